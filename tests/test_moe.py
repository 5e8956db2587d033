"""moe.py: routing and grouped matmuls against a dense loop over the experts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from lora_jax import moe, sharding, transformer, tree

D, F = 6, 10


def normal(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def weights(E, seed=0):
  shapes = {"router": (D, E), "gate": (E, D, F), "up": (E, D, F), "down": (E, F, D)}
  return {name: {"kernel": normal(seed + i, *s)} for i, (name, s) in enumerate(shapes.items())}


def dense_mlp(x, params, k, normalise):
  """The definition: every expert on every token, weighted by what the router gives the k best."""
  w = {name: p["kernel"] for name, p in params.items()}
  p = jax.nn.softmax(x @ w["router"])
  top, experts = jax.lax.top_k(p, k)
  top = top / top.sum(-1, keepdims=True) if normalise else top
  y = jnp.zeros_like(x)
  for e in range(p.shape[-1]):
    h = jax.nn.silu(x @ w["gate"][e]) * (x @ w["up"][e])
    y += (h @ w["down"][e]) * (top * (experts == e)).sum(-1)[..., None]
  return y


ROUTINGS = {
  "random": np.random.default_rng(0).integers(0, 5, 77),
  "one token": np.array([3]),
  "all to one": np.full(40, 2),
  "first and last": np.array([0, 4, 4, 0, 4]),
  "one row over a block": np.r_[np.zeros(33), np.ones(32), np.full(31, 4)],
  "sorted backwards": np.repeat(np.arange(5)[::-1], 9),
  "more rows than a full block": np.random.default_rng(1).integers(0, 2, 600),
}


@pytest.mark.parametrize("routing", ROUTINGS)
def test_every_row_has_its_own_slot_in_a_block_of_its_expert(routing):
  experts = ROUTINGS[routing].astype(np.int32)
  slots, owner, rows = jax.tree.map(np.asarray, moe.blocks(jnp.asarray(experts), 5))
  assert len(set(slots.tolist())) == len(slots)
  assert slots.max() < len(owner) * rows
  np.testing.assert_array_equal(owner[slots // rows], experts)
  assert owner.min() >= 0 and owner.max() < 5


@pytest.mark.parametrize("routing", ROUTINGS)
def test_grouped_dot_equals_a_loop_over_rows(routing):
  experts = ROUTINGS[routing].astype(np.int32)
  x, w = normal(1, len(experts), D), normal(2, 5, D, F)
  slots, owner, rows = moe.blocks(jnp.asarray(experts), 5)
  xs = jnp.zeros((owner.size * rows, D)).at[slots].set(x).reshape(-1, rows, D)
  y = moe.grouped_dot(xs, w, owner).reshape(-1, F)
  np.testing.assert_allclose(y[slots], np.einsum("md,mdf->mf", x, w[experts]), atol=1e-5)


@pytest.mark.parametrize(
  "B, T, E, k, normalise", [(2, 90, 5, 2, True), (1, 1, 8, 3, False), (3, 4, 4, 4, True), (1, 30, 3, 1, False)]
)
def test_mlp_equals_the_dense_formula(B, T, E, k, normalise):
  x, params = normal(3, B, T, D), weights(E)
  ours = jax.jit(moe.mlp, static_argnums=(2, 3, 4))(x, params, "silu", k, normalise)
  theirs = jax.jit(dense_mlp, static_argnums=(2, 3))(x, params, k, normalise)
  np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_all_tokens_to_one_expert():
  x, params = abs(normal(3, 2, 40, D)), weights(6)
  params["router"]["kernel"] = jnp.zeros((D, 6)).at[:, 4].set(50.0)
  np.testing.assert_array_equal(moe.route(x[0], params["router"]["kernel"], 1, True)[0], 4)
  ours, theirs = jax.jit(lambda: (moe.mlp(x, params, "silu", 1, True), dense_mlp(x, params, 1, True)))()
  np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_gradients_equal_those_of_the_dense_formula():
  x, params, weight = normal(3, 2, 13, D), weights(5), normal(4, 2, 13, D)

  def grads(f):
    return jax.jit(jax.grad(lambda x, params: (f(x, params) * weight).sum(), argnums=(0, 1)))(x, params)

  ours = grads(lambda x, params: moe.mlp(x, params, "silu", 2, True))
  theirs = grads(lambda x, params: dense_mlp(x, params, 2, True))
  for k, g in tree.flatten(theirs).items():
    assert np.abs(g).max() > 1e-2
    np.testing.assert_allclose(tree.flatten(ours)[k], g, atol=1e-4, err_msg=k)


def test_gradients_equal_finite_differences():
  x, w = normal(5, 7, 8, D), normal(6, 3, D, F)
  owner = jnp.array([0, 0, 2, 2, 2, 2, 2])
  run = jax.jit(lambda x, w: moe.grouped_dot(x, w, owner))
  check_grads(run, (x, w), order=1, modes=["rev"], atol=2e-2, rtol=2e-2)


def test_frozen_experts_keep_no_copy_of_inputs_or_weights():
  """Residuals: activations of the routed rows, and the frozen weights themselves."""
  E, G, M = 4, 9, 8
  x, w, owner = normal(1, G, M, D), normal(2, E, D, F), jnp.sort(jnp.arange(G) % E)
  frozen = jax.vjp(lambda x: moe.grouped_dot(x, w, owner), x)[1]
  kept = [a for a in jax.tree.leaves(frozen) if a is not w and a.size > G]
  assert not kept, [a.shape for a in kept]
  trained = jax.vjp(lambda x, w: moe.grouped_dot(x, w, owner), x, w)[1]
  assert (G, M, D) in [a.shape for a in jax.tree.leaves(trained)]


def model(E, n_layers=2):
  sizes = dict(vocab_size=50, d_model=16, n_heads=2, n_kv_heads=2, head_dim=8, d_ff=12)
  return transformer.Config(**sizes, n_layers=n_layers, n_experts=E, dtype="float32")


def step(config):
  """The gradient with respect to q, everything else frozen."""

  def loss(q, params, tokens):
    attn = params["layers"]["attn"] | {"q": {"kernel": q}}
    params = params | {"layers": params["layers"] | {"attn": attn}}
    return (transformer.apply(config, params, tokens) ** 2).sum()

  return jax.value_and_grad(loss)


def test_a_training_step_holds_no_second_copy_of_the_experts():
  config = model(200, n_layers=8)
  shapes = transformer.shapes(config)
  q, tokens = shapes["layers"]["attn"]["q"]["kernel"], jax.ShapeDtypeStruct((2, 8), jnp.int32)
  compiled = jax.jit(step(config)).lower(q, shapes, tokens).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < tree.nbytes(shapes["layers"]["moe"]) / 2


def test_work_grows_with_rows_and_not_with_experts():
  """Rows that are multiplied, empty ones included: at most two for each that is routed, and eight an expert."""
  count = lambda R, E: jax.eval_shape(lambda e: moe.blocks(e, E)[1], jax.ShapeDtypeStruct((R,), jnp.int32)).size
  for R, E in [(256, 8), (4096, 8), (4096, 128), (32768, 128), (5000, 100)]:
    assert count(R, E) * moe.block_rows(R, E) <= 2 * R + 8 * E
  assert [count(8, E) for E in (8, 64, 512)] == [8, 8, 8]


def test_vmap_equals_a_loop():
  x, params = normal(7, 3, 2, 11, D), weights(5)
  run = jax.value_and_grad(lambda x: (moe.mlp(x, params, "silu", 2, True) ** 2).sum())
  one = jax.jit(run)
  for i, (value, grad) in enumerate(zip(*jax.jit(jax.vmap(run))(x), strict=True)):
    np.testing.assert_allclose(value, one(x[i])[0], rtol=1e-5)
    np.testing.assert_allclose(grad, one(x[i])[1], atol=1e-5 * np.abs(grad).max())


@functools.cache
def unsharded():
  x, params = normal(3, 8, 5, D), weights(5)
  stacked = {"layers": {"moe": jax.tree.map(lambda w: w[None], params)}}

  def loss(params, x):
    y = moe.mlp(x, jax.tree.map(lambda w: w[0], params["layers"]["moe"]), "silu", 2, True)
    return (y**2).sum(), y

  run = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
  return run, stacked, x, jax.jit(run)(stacked, x)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 8, 1), (1, 2, 4)])
def test_sharded_equals_unsharded(sizes):
  """Outputs and all gradients, with F split evenly over `tensor` or, where it does not divide, whole."""
  run, params, x, expected = unsharded()
  mesh = sharding.make_mesh(*sizes)
  with jax.set_mesh(mesh):
    x = sharding.put_batch({"x": np.asarray(x)}, mesh)["x"]
    ours = tree.flatten(jax.jit(lambda *a: run(*a))(sharding.put(params, sharding.placer(mesh)), x))
  for k, a in tree.flatten(expected).items():
    np.testing.assert_allclose(ours[k], a, atol=2e-5 * np.abs(a).max(), err_msg=k)


def test_experts_are_split_over_fsdp_and_tensor():
  mesh = sharding.make_mesh(1, 2, 4)
  place = sharding.placer(mesh)
  shapes = tree.flatten(transformer.shapes(model(5)))
  for name in ("gate", "up", "down"):
    k = f"layers/moe/{name}/kernel"
    assert place(k, shapes[k].shape).shard_shape(shapes[k].shape)[2:] in ((8, 3), (3, 8))
  assert place("layers/moe/router/kernel", (2, 16, 5)).is_fully_replicated


def test_routing_stays_on_its_device():
  """Without a tensor axis the layer communicates nothing but weights: no collective over rows."""
  mesh = sharding.make_mesh(8, 1, 1)
  x, params = normal(3, 8, 16, D), weights(5)
  with jax.set_mesh(mesh):
    x = sharding.put_batch({"x": x}, mesh)["x"]
    put = jax.device_put(params, jax.NamedSharding(mesh, jax.P()))
    text = jax.jit(moe.mlp, static_argnums=(2, 3, 4)).lower(x, put, "silu", 2, True).compile().as_text()
  assert not [c for c in ("all-reduce", "all-gather", "all-to-all", "collective-permute") if c in text]
