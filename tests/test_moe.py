"""model/mixture.py: routing and grouped matmuls against a dense loop over the experts."""

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from lora_jax import sharding, tree, weights as nodes
from lora_jax.model import mixture, transformer
from lora_jax.weights import grouped

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
  slots, owner, rows = jax.tree.map(np.asarray, mixture.blocks(jnp.asarray(experts), 5))
  assert len(set(slots.tolist())) == len(slots)
  assert slots.max() < len(owner) * rows
  np.testing.assert_array_equal(owner[slots // rows], experts)
  assert owner.min() >= 0 and owner.max() < 5


@pytest.mark.parametrize("routing", ROUTINGS)
def test_grouped_dot_equals_a_loop_over_rows(routing):
  experts = ROUTINGS[routing].astype(np.int32)
  x, w = normal(1, len(experts), D), normal(2, 5, D, F)
  slots, owner, rows = mixture.blocks(jnp.asarray(experts), 5)
  xs = jnp.zeros((owner.size * rows, D)).at[slots].set(x).reshape(-1, rows, D)
  y = grouped.dot(xs, w, owner).reshape(-1, F)
  np.testing.assert_allclose(y[slots], np.einsum("md,mdf->mf", x, w[experts]), atol=1e-5)


@pytest.mark.parametrize(
  "B, T, E, k, normalise", [(2, 90, 5, 2, True), (1, 1, 8, 3, False), (3, 4, 4, 4, True), (1, 30, 3, 1, False)]
)
def test_mlp_equals_the_dense_formula(B, T, E, k, normalise):
  x, params = normal(3, B, T, D), weights(E)
  ours = jax.jit(mixture.mlp, static_argnums=(2, 3, 4))(x, params, "silu", k, normalise)
  theirs = jax.jit(dense_mlp, static_argnums=(2, 3))(x, params, k, normalise)
  np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_all_tokens_to_one_expert():
  x, params = abs(normal(3, 2, 40, D)), weights(6)
  params["router"]["kernel"] = jnp.zeros((D, 6)).at[:, 4].set(50.0)
  np.testing.assert_array_equal(mixture.route(x[0], params["router"]["kernel"], 1, True)[0], 4)
  ours, theirs = jax.jit(lambda: (mixture.mlp(x, params, "silu", 1, True), dense_mlp(x, params, 1, True)))()
  np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_gradients_equal_those_of_the_dense_formula():
  x, params, weight = normal(3, 2, 13, D), weights(5), normal(4, 2, 13, D)

  def grads(f):
    return jax.jit(jax.grad(lambda x, params: (f(x, params) * weight).sum(), argnums=(0, 1)))(x, params)

  ours = grads(lambda x, params: mixture.mlp(x, params, "silu", 2, True))
  theirs = grads(lambda x, params: dense_mlp(x, params, 2, True))
  for k, g in tree.flatten(theirs).items():
    assert np.abs(g).max() > 1e-2
    np.testing.assert_allclose(tree.flatten(ours)[k], g, atol=1e-4, err_msg=k)


def test_gradients_equal_finite_differences():
  x, w = normal(5, 7, 8, D), normal(6, 3, D, F)
  owner = jnp.array([0, 0, 2, 2, 2, 2, 2])
  run = jax.jit(lambda x, w: grouped.dot(x, w, owner))
  check_grads(run, (x, w), order=1, modes=["rev"], atol=2e-2, rtol=2e-2)


def test_frozen_experts_keep_no_copy_of_inputs_or_weights():
  """Residuals: activations of the routed rows, and the frozen weights themselves."""
  E, G, M = 4, 9, 8
  x, w, owner = normal(1, G, M, D), normal(2, E, D, F), jnp.sort(jnp.arange(G) % E)
  frozen = jax.vjp(lambda x: grouped.dot(x, w, owner), x)[1]
  kept = [a for a in jax.tree.leaves(frozen) if a is not w and a.size > G]
  assert not kept, [a.shape for a in kept]
  trained = jax.vjp(lambda x, w: grouped.dot(x, w, owner), x, w)[1]
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
  count = lambda R, E: jax.eval_shape(lambda e: mixture.blocks(e, E)[1], jax.ShapeDtypeStruct((R,), jnp.int32)).size
  for R, E in [(256, 8), (4096, 8), (4096, 128), (32768, 128), (5000, 100)]:
    assert count(R, E) * mixture.block_rows(R, E) <= 2 * R + 8 * E
  assert [count(8, E) for E in (8, 64, 512)] == [8, 8, 8]


def test_vmap_equals_a_loop():
  x, params = normal(7, 3, 2, 11, D), weights(5)
  run = jax.value_and_grad(lambda x: (mixture.mlp(x, params, "silu", 2, True) ** 2).sum())
  one = jax.jit(run)
  for i, (value, grad) in enumerate(zip(*jax.jit(jax.vmap(run))(x), strict=True)):
    np.testing.assert_allclose(value, one(x[i])[0], rtol=1e-5)
    np.testing.assert_allclose(grad, one(x[i])[1], atol=1e-5 * np.abs(grad).max())


@functools.cache
def unsharded():
  x, params = normal(3, 8, 5, D), weights(5)
  stacked = {"layers": {"moe": jax.tree.map(lambda w: w[None], params)}}

  def loss(params, x):
    y = mixture.mlp(x, jax.tree.map(lambda w: w[0], params["layers"]["moe"]), "silu", 2, True)
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
    ours = tree.flatten(jax.jit(lambda *a: run(*a))(sharding.put(params, sharding.Placer(mesh)), x))
  for k, a in tree.flatten(expected).items():
    np.testing.assert_allclose(ours[k], a, atol=2e-5 * np.abs(a).max(), err_msg=k)


def test_experts_are_split_over_fsdp_and_tensor():
  mesh = sharding.make_mesh(1, 2, 4)
  place = sharding.Placer(mesh)
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
    text = jax.jit(mixture.mlp, static_argnums=(2, 3, 4)).lower(x, put, "silu", 2, True).compile().as_text()
  assert not [c for c in ("all-reduce", "all-gather", "all-to-all", "collective-permute") if c in text]


def with_lora(params, rank=3, start=False, seed=7):
  """LoRA on the experts and the router of one layer, none of its factors zero."""

  def node(name, w):
    lead, inner, outer = w.shape[:-2], *w.shape[-2:]
    draw = lambda i: (normal(seed + i, *lead, inner, rank), 0.3 * normal(seed + i + 1, *lead, rank, outer))
    a, b = draw(zlib.crc32(name.encode()))
    more = {"start": draw(zlib.crc32(name.encode()) + 5)} if start else {}
    return nodes.LoRA(base=w, a=a, b=b, scale=jnp.float32(0.5), rank=jnp.int32(rank), **more)

  return {name: {"kernel": node(name, p["kernel"])} for name, p in params.items()}


@pytest.mark.slow
@pytest.mark.parametrize("start", [False, True])
def test_lora_on_experts_equals_the_merged_layer(start):
  """Outputs, and the gradients of x and of all factors."""
  x, params, weight = normal(3, 2, 13, D), with_lora(weights(5), start=start), normal(4, 2, 13, D)
  merged = lambda p: {name: {"kernel": nodes.dense(w["kernel"])} for name, w in p.items()}
  run = lambda x, p: mixture.mlp(x, p, "silu", 2, True)
  grads = lambda f: jax.jit(jax.value_and_grad(lambda x, p: (f(x, p) * weight).sum(), (0, 1), allow_int=True))(
    x, params
  )
  ours, theirs = grads(run), grads(lambda x, p: dense_mlp(x, merged(p), 2, True))
  np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5)
  for (k, a), b in zip(tree.flatten(ours[1]).items(), jax.tree.leaves(theirs[1]), strict=True):
    if a.dtype == jnp.float32:
      np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max(), err_msg=k)
      assert np.abs(b).max() > 1e-3, k


def test_lora_on_experts_is_never_dense():
  """Neither the forward pass nor the gradient of the factors makes a float array as large as an expert's matrices."""
  E, D, F = 64, 32, 48  # so large that blocks of tokens are smaller
  shapes = {"router": (D, E), "gate": (E, D, F), "up": (E, D, F), "down": (E, F, D)}
  params = with_lora({k: {"kernel": normal(1, *s).astype(jnp.bfloat16)} for k, s in shapes.items()})
  mask = tree.map_named(lambda k, _: k.endswith(("/a", "/b")), params)
  trainable, frozen = tree.split(params, mask)

  def loss(t, x):
    return mixture.mlp(x, tree.join(t, frozen), "silu", 2, True).astype(jnp.float32).sum()

  jaxpr = jax.make_jaxpr(jax.value_and_grad(loss))(trainable, normal(2, 1, 8, D).astype(jnp.bfloat16))
  sizes = [v.aval.size for eqn in equations(jaxpr.jaxpr) for v in eqn.outvars if floating(v.aval)]
  assert max(sizes) < E * D * F


def equations(jaxpr):
  for eqn in jaxpr.eqns:
    yield eqn
    for inner in jax.tree.leaves(eqn.params, is_leaf=lambda p: hasattr(p, "jaxpr") or hasattr(p, "eqns")):
      inner = getattr(inner, "jaxpr", inner)
      if hasattr(inner, "eqns"):
        yield from equations(inner)


def floating(aval):
  return hasattr(aval, "dtype") and jnp.issubdtype(aval.dtype, jnp.floating)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 2, 4)])
def test_sharded_lora_on_experts_equals_unsharded(sizes):
  x, params = normal(3, 8, 6, D), with_lora(weights(5), start=True)
  run = jax.jit(
    jax.grad(lambda x, p: (mixture.mlp(x, p, "silu", 2, True) ** 2).sum(), (0, 1), allow_int=True),
  )
  expected, mesh = tree.flatten(run(x, params)), sharding.make_mesh(*sizes)
  with jax.set_mesh(mesh):
    x = sharding.put_batch({"x": np.asarray(x)}, mesh)["x"]
    ours = tree.flatten(run(x, jax.device_put(params, jax.NamedSharding(mesh, jax.P()))))
  for k, b in expected.items():
    if b.dtype == jnp.float32:
      np.testing.assert_allclose(ours[k], b, atol=3e-5 * np.abs(b).max(), err_msg=k)


@pytest.mark.slow
def test_dropout_of_experts():
  """Elements of the routed rows are dropped, by other masks on each device; the base's part is not."""
  x, params = normal(3, 8, 16, D), with_lora(weights(5))
  for name in ("gate", "up", "down"):
    w = params[name]["kernel"]
    params[name]["kernel"] = w.replace(dropout=0.5, key=jax.random.key(len(name)))
  run = jax.jit(lambda x, p: mixture.mlp(x, p, "silu", 2, True))
  keys = jax.random.split(jax.random.key(1), 400)
  seeded = lambda key: {
    k: {"kernel": p["kernel"].replace(key=None if k == "router" else tree.fold(key, k))} for k, p in params.items()
  }
  off = jax.tree.map(lambda w: w.replace(key=None), params, is_leaf=nodes.is_node)
  down = {k: p if k == "down" else off[k] for k, p in params.items()}  # the layer is linear in this one
  each = jax.lax.map(lambda key: run(x, down | {"down": seeded(key)["down"]}), keys)
  assert np.abs(each[0] - run(x, off)).max() > 1e-2
  np.testing.assert_allclose(each.mean(0), run(x, off), atol=6 * float(each.std(0).max()) / np.sqrt(400))
  same = jnp.broadcast_to(x[:1, :1], x.shape)
  mesh = sharding.make_mesh(8, 1, 1)
  with jax.set_mesh(mesh):
    y = run(sharding.put_batch({"x": np.asarray(same)}, mesh)["x"], params)
  assert len(np.unique(np.asarray(y)[:, 0, 0])) == 8
