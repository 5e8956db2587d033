"""Meshes of eight fake devices against one device, and where leaves live."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lora_jax import errors, sharding, tree, weights
from lora_jax.inference import evaluate
from lora_jax.methods import lora
from lora_jax.model import transformer
from lora_jax.training import objectives, optim, train
from tests.test_train import adapted, batch, close, forward

CONFIG = transformer.Config(48, 16, 2, 4, 2, 4, 32, dtype="float32")
SLOW = [pytest.param(s, id=str(s), marks=pytest.mark.slow) for s in ((8, 1, 1), (1, 8, 1), (2, 2, 2))]
MESHES = [pytest.param((1, 2, 4), id="(1, 2, 4)"), *SLOW]


def step(mesh, method):
  """One step on a mesh: (state before, frozen, state after, metrics)."""
  trainable, frozen = (jax.device_get(t) for t in adapted(CONFIG, method))
  place = weights.placer(tree.join(trainable, frozen), mesh)
  trainable, frozen = (sharding.put(t, place) for t in (trainable, frozen))
  # A large eps keeps Adam's step a smooth function of the gradient.
  optimiser, rate = optim.make(
    steps=10, schedule="constant", warmup=0, learning_rate=0.1, eps=1e-2, clip_norm=0, weight_decay=0.1
  )
  state = sharding.put(train.init_state(trainable, optimiser), place)
  placed = jax.tree.map(lambda x: x.sharding, state)
  with jax.set_mesh(mesh):
    stepper = train.Stepper(train.make_step(forward(CONFIG), objectives.make("causal_lm").loss, optimiser, rate), state)
    after, metrics = stepper(state, frozen, None, sharding.put_batch(batch(), mesh))
  jax.tree.map(
    lambda x, s: None if x.sharding.is_equivalent_to(s, x.ndim) else pytest.fail(str(x.sharding)), after, placed
  )
  return jax.device_get((after, metrics)), after, frozen


@pytest.fixture(scope="module")
def single():
  mesh = sharding.make_mesh(1, 1, 1)
  return functools.cache(lambda method: step(mesh, method)[0])


@pytest.mark.slow
@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_step_equals_that_of_one_device(single, sizes, method):
  """Loss, gradients (Adam's first moment is a tenth of them), parameters after the step."""
  mesh = sharding.make_mesh(*sizes)
  (state, metrics), after, frozen = step(mesh, method)
  want, want_metrics = single(method)
  close(metrics, want_metrics, rtol=1e-5, atol=1e-5)
  close(state.trainable, want.trainable, atol=1e-5)
  moments = lambda s: {k: x for k, x in tree.flatten(s.opt_state).items() if "/mu/" in k}
  assert len(moments(state)) == len(jax.tree.leaves(state.trainable))
  close(moments(state), moments(want), atol=1e-6)
  assert max(np.abs(x).max() for x in moments(want).values()) > 1e-3
  check_split(mesh, method, after, frozen)


def check_split(mesh, method, state, frozen):
  """Shapes of what one device holds."""
  f, t = mesh.shape["fsdp"], mesh.shape["tensor"]
  base = "/base" if method == "lora" else ""
  kv = 2 // t if 2 % t == 0 else 2
  expected = {
    "embed/kernel": (48 // t, 16 // f),
    "head/kernel": (16 // f, 48 // t),
    f"layers/attn/q/kernel{base}": (2, 16 // f, 4 // t, 4),
    f"layers/attn/v/kernel{base}": (2, 16 // f, kv, 4),
    f"layers/attn/o/kernel{base}": (2, 4 // t, 4, 16 // f),
    f"layers/mlp/gate/kernel{base}": (2, 16 // f, 32 // t),
    f"layers/mlp/down/kernel{base}": (2, 32 // t, 16 // f),
    "norm/scale": (16,),
  }
  adapters = {
    "layers/attn/q/kernel/a": (2, 16 // f, 2),
    "layers/attn/q/kernel/b": (2, 2, 4 // t, 4),
    "layers/attn/v/kernel/b": (2, 2, kv, 4),
    "layers/attn/o/kernel/a": (2, 4 // t, 4, 2),
    "layers/attn/o/kernel/b": (2, 2, 16 // f),
    "layers/mlp/up/kernel/b": (2, 2, 32 // t),
    "layers/mlp/down/kernel/a": (2, 32 // t, 2),
  }
  held = lambda params: {k: x.addressable_shards[0].data.shape for k, x in tree.flatten(params).items()}
  shapes = held(tree.join(state.trainable, frozen))
  assert {k: shapes[k] for k in expected} == expected
  trained = adapters if method == "lora" else expected
  assert {k: shapes[k] for k in trained} == trained
  moments = held(state.opt_state)
  for moment in ("mu", "nu"):
    ours = {k.split(f"/{moment}/")[1]: s for k, s in moments.items() if f"/{moment}/" in k}
    assert {k: ours[k] for k in trained} == trained


@functools.cache
def trees():
  """Shapes of models and of LoRA on them."""
  found = []
  for kw in (dict(), dict(fused=True), dict(n_experts=2, mlp_bias=True)):
    model = transformer.shapes(dataclasses.replace(CONFIG, **kw))
    lora_of = lambda params: lora.init(jax.random.key(0), params, targets="all-linear", rank=2)[0]
    found += [model, jax.eval_shape(lora_of, model)]
  return found


def test_every_rule_is_the_first_for_some_weight():
  """So no rule is misspelt or hidden by one above it."""
  first = tree.first_match([(p, p) for p, _ in sharding.RULES])
  names = {k for params in trees() for k in tree.names(params, is_leaf=weights.is_node)}
  assert {first(k) for k in names} - {None} == {p for p, _ in sharding.RULES}
  left = {k for k in names if first(k) is None and not k.endswith("/scale")}
  assert left and all("/moe/router/" in k or k.endswith("/bias") for k in left), "these alone are replicated"


@pytest.mark.parametrize("axis", ["fsdp", "tensor"])
def test_every_matrix_is_spread_over_both_axes(axis):
  """The factors of LoRA are spread where their matrix is: `a` over its inputs, `b` over its outputs."""
  whole, names = set(), set()
  for params in trees():
    place = weights.placer(params, sharding.make_mesh(1, **{axis: 2}))
    for k, x in tree.flatten(params).items():
      if "/router/" not in k and k.endswith(("/kernel", "/kernel/base", "/a", "/b")):
        names.add(k)
        whole |= {k} if place(k, x.shape).is_fully_replicated else set()
  assert not [k for k in whole if not k.endswith(("/a", "/b"))]
  inward = {k for k in names if any(f"/{n}/kernel/" in k for n in ("o", "down"))}  # their inputs are over `tensor`
  expected = {k for k in names if k.endswith(("/a", "/b")) and k.endswith("/a") == ((k in inward) == (axis == "fsdp"))}
  assert whole == expected


@pytest.mark.parametrize(
  "name, shape, spec",
  [
    ("layers/attn/q/kernel", (2, 16, 4, 4), P(None, "fsdp", "tensor", None)),
    ("layers/attn/k/kernel/base", (2, 16, 3, 4), P(None, "fsdp", None, None)),
    ("layers/attn/k/kernel", (2, 15, 4, 4), P(None, None, "tensor", None)),
    ("layers/mlp/up/kernel", (2, 15, 3), P(None, None, None)),
    ("1/0/mu/layers/mlp/up/kernel", (2, 16, 8), P(None, "fsdp", "tensor")),
    ("embed/kernel", (49, 16), P(None, "fsdp")),
    ("layers/attn/q/kernel/scale", (2,), P()),
    ("step", (), P()),
  ],
)
def test_axes_that_do_not_divide_are_replicated(name, shape, spec):
  place = sharding.Placer(sharding.make_mesh(2, 2, 2))
  assert place(name, shape).is_equivalent_to(jax.NamedSharding(sharding.make_mesh(2, 2, 2), spec), len(shape))


def test_rules_can_be_replaced():
  place = sharding.Placer(sharding.make_mesh(2, 2, 2), [("w", P(("data", "fsdp"), "tensor"))])
  assert place("w", (4, 2)).shard_shape((4, 2)) == (1, 1)
  assert place("w", (2, 2)).shard_shape((2, 2)) == (2, 1)
  assert place("other", (4, 2)).is_fully_replicated


@pytest.mark.parametrize(
  "sizes, want",
  [((), (8, 1, 1)), ((-1, 2, 2), (2, 2, 2)), ((1, -1, 4), (1, 2, 4)), ((2, 2, -1), (2, 2, 2)), ((1, 2, 1), (1, 2, 1))],
)
def test_make_mesh(sizes, want):
  mesh = sharding.make_mesh(*sizes)
  assert tuple(mesh.shape.items()) == tuple(zip(sharding.MESH, (1, *want), strict=True))
  assert sharding.batch_divisor(mesh) == want[0] * want[1]


@pytest.mark.parametrize("sizes", [(-1, -1, 1), (0, 1, 1), (1, -2, 1)])
def test_sizes_that_mean_nothing_are_refused(sizes):
  with pytest.raises(errors.UserError, match="config.mesh: sizes are positive, at most one is -1"):
    sharding.make_mesh(*sizes)


@pytest.mark.parametrize("sizes", [(16, 1, 1), (4, 4, 1), (-1, 16, 1)])
def test_more_devices_than_there_are_is_refused(sizes):
  with pytest.raises(errors.UserError, match=r"config.mesh asks for at least 16 devices, there are 8 \(cpu\)"):
    sharding.make_mesh(*sizes)


def test_batches_are_split_over_data_and_fsdp():
  mesh = sharding.make_mesh(2, 2, 2)
  data = {"tokens": np.arange(24).reshape(8, 3), "lengths": np.arange(8)}
  for put in (sharding.put_batch, sharding.replicate):
    placed = put(data, mesh)
    assert {k: x.addressable_shards[0].data.shape for k, x in placed.items()} == {"tokens": (2, 3), "lengths": (2,)}
    close(placed, data)
  odd = sharding.replicate({"tokens": np.arange(6).reshape(2, 3)}, mesh)["tokens"]
  assert odd.is_fully_replicated
  np.testing.assert_array_equal(odd, np.arange(6).reshape(2, 3))


def test_activations_are_constrained_within_a_mesh_alone():
  where = lambda rows: jax.jit(lambda x: sharding.constrain(x * 1.0))(jnp.ones((rows, 3, 4))).sharding
  assert where(8).is_fully_replicated
  mesh = sharding.make_mesh(2, 2, 2)
  with jax.set_mesh(mesh):
    assert where(8).shard_shape((8, 3, 4)) == (2, 3, 4)
    assert where(6).is_fully_replicated


@pytest.mark.slow
def test_scores_on_a_mesh_equal_those_of_one_device():
  params = tree.join(*adapted(CONFIG))
  data = batch(8)
  inputs = {"tokens": data["tokens"], "lengths": np.arange(3, 11, dtype=np.int32)}
  labels, lengths = np.array([[[1, 2, 3], [4, 5, 0]]] * 8, np.int32), np.array([[3, 2]] * 8, np.int32)
  want = evaluate.score(CONFIG, params, *inputs.values(), labels, lengths, 4, (7,))
  mesh = sharding.make_mesh(2, 2, 2)
  with jax.set_mesh(mesh):
    placed = sharding.replicate(inputs, mesh)
    params = sharding.put(params, weights.placer(params, mesh))
    got = evaluate.score(CONFIG, params, placed["tokens"], placed["lengths"], labels, lengths, 4, (7,))
  np.testing.assert_allclose(got[0], want[0], atol=1e-5)
  np.testing.assert_array_equal(got[1], want[1])


def test_to_host_leaves_addressable_trees_alone():
  params = tree.join(*adapted(CONFIG))
  params = sharding.put(params, weights.placer(params, sharding.make_mesh(2, 2, 2)))
  assert sharding.to_host(params) is params


def test_minus_one_needs_a_divisor():
  with pytest.raises(errors.UserError, match="3 does not divide the 8 devices"):
    sharding.make_mesh(-1, 3, 1)
