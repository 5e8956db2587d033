"""The training step: accumulation, what moves, what is refused, dropout, and what gradients cost."""

import dataclasses
import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_jax import tree, weights
from lora_jax.batches.rows import compact
from lora_jax.methods import full, lora
from lora_jax.model import transformer
from lora_jax.training import objectives, optim, train
from tests import terms

CONFIG = transformer.Config(47, 16, 2, 4, 2, 4, 24, dtype="float32", tied=True)
ADAM = dict(schedule="constant", warmup=0, learning_rate=2e-2)


def batch(rows=8, length=12, seed=0):
  """Random tokens; row i has i + 2 targets of different weights (as many as fit), and padding at its end."""
  rng = np.random.default_rng(seed)
  n = np.minimum(np.arange(rows) + 2, length)[:, None]
  columns = np.arange(length)[None]
  tokens = rng.integers(0, CONFIG.vocab_size, (rows, length + 1), dtype=np.int32)
  return {
    "tokens": tokens[:, :-1],
    "targets": tokens[:, 1:],
    "weights": np.where(columns < n, rng.choice([0.1, 1.0], (rows, length)), 0).astype(np.float32),
    "positions": np.broadcast_to(columns, (rows, length)).astype(np.int32),
    "segment_ids": (columns < n).astype(np.int32),
  }


def forward(config):
  return train.Forward(config, packed=True)


@functools.cache
def adapted(config=CONFIG, method="lora", **kw):
  """(trainable, frozen) of a random model; LoRA of rank 2 on all matrices, B not zero."""
  key, rng = jax.random.key(0), np.random.default_rng(0)
  lora_init = lambda: lora.init(key, transformer.init(config, key), targets="all-linear", rank=2, **kw)[0]
  full_init = lambda: full.init(key, transformer.init(config, key))[0]
  params = jax.eval_shape(lora_init if method == "lora" else full_init)

  def leaf(k, x):
    if k.endswith(("scale", "rank")):
      return jnp.full(x.shape, 1.0 if "norm" in k else 2, x.dtype)
    return jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype)

  params = tree.map_named(leaf, params)
  return tree.split(params, jax.tree.map(lambda _: True, params) if method == "full" else lora.trainable(params))


LOSS = objectives.make("causal_lm").loss


def make(trainable, config=CONFIG, loss=LOSS, optimiser=ADAM, **kw):
  """(step, state)"""
  optimiser, rate = optim.make(steps=50, **optimiser)
  step = train.make_step(forward(config), loss, optimiser, rate, **kw)
  return jax.jit(step), train.init_state(trainable, optimiser)


def same(a, b):
  return jax.tree.structure(a) == jax.tree.structure(b) and all(
    np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  )


def close(a, b, **kw):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **kw), a, b)


PLAIN = dict(name="sgd", b1=0.0, learning_rate=1.0, schedule="constant", warmup=0, clip_norm=0)


@pytest.mark.parametrize("method", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_accumulation_equals_one_batch(method):
  """Micro-batches weigh differently, so means of means fail."""
  trainable, frozen = adapted(method=method)
  data = batch()
  results = {}
  # Its state is the gradient, free of the rounding that a difference of parameters has.
  keep = optax.GradientTransformation(lambda p: p, lambda g, s, p=None: (jax.tree.map(jnp.zeros_like, g), g))
  for accumulate in (1, 4):
    step = train.make_step(forward(CONFIG), LOSS, keep, lambda n: 1.0, accumulate=accumulate)
    # Optimised, since the sums are then of one order on all versions of the compiler.
    step = jax.jit(step, compiler_options={"xla_backend_optimization_level": 3})
    after, metrics = step(train.init_state(trainable, keep), frozen, None, data)
    results[accumulate] = after.opt_state, metrics
  assert float(optax.tree.norm(results[1][0])) > 0.1
  close(results[4], results[1], atol=1e-6, rtol=1e-6)


def test_examples_that_share_rows_have_the_gradient_of_the_padded_batch():
  """Positions, attention and weights are each example's own."""
  trainable, frozen = adapted()
  padded = batch(length=11)
  n = padded["segment_ids"].sum(1)
  keys = ("tokens", "targets", "weights")
  examples = [{k: padded[k][i, : n[i]] for k in keys} for i in range(len(n))]
  shared = compact(examples, slice(0, len(n)), 16, 0, 2)
  assert len(shared["tokens"]) < len(n) and shared["segment_ids"].max() > 2

  def loss(trainable, batch):
    return terms.sums(forward(CONFIG), tree.join(trainable, frozen), batch)[0]

  (a, ga), (b, gb) = (jax.jit(jax.value_and_grad(loss))(trainable, x) for x in (padded, shared))
  np.testing.assert_allclose(b, a, rtol=1e-6)
  for x, y in zip(jax.tree.leaves(gb), jax.tree.leaves(ga), strict=True):
    # Of sums, whose small elements have the rounding of the large ones that cancel in them.
    np.testing.assert_allclose(x, y, rtol=0, atol=3e-6 * np.abs(y).max())


def test_gradient_is_that_of_the_weighted_mean():
  trainable, frozen = adapted()
  data = batch()

  def loss(trainable):
    params = tree.join(trainable, frozen)
    x = forward(CONFIG)(params, data)
    ll = jnp.take_along_axis(
      jax.nn.log_softmax(transformer.logits(CONFIG, params, x)), data["targets"][..., None], axis=-1
    )
    return -(data["weights"] * ll[..., 0]).sum() / data["weights"].sum()

  value, grads = jax.value_and_grad(loss)(trainable)
  step, state = make(trainable, optimiser=PLAIN)
  after, metrics = step(state, frozen, None, data)
  close(jax.tree.map(jnp.subtract, trainable, after.trainable), grads, atol=1e-6)
  np.testing.assert_allclose(metrics["loss"], value, rtol=1e-6)
  np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-5)
  assert metrics["tokens"] == (data["segment_ids"] > 0).sum()
  assert metrics["learning_rate"] == 1.0 and metrics["finite"] == 1.0 and after.step == 1


@pytest.mark.parametrize("method", ["lora", "full"])
def test_overfitting_one_batch_moves_every_trainable_leaf_and_no_other(method):
  trainable, frozen = adapted(method=method)
  kept = jax.tree.map(np.array, frozen)
  start = jax.tree.map(np.array, trainable)
  data = batch(4)
  _, state = make(jax.tree.map(jnp.copy, trainable))  # which the step donates
  optimiser, rate = optim.make(steps=50, **ADAM)
  stepper = train.Stepper(train.make_step(forward(CONFIG), LOSS, optimiser, rate), state)
  losses = []
  for _ in range(40):
    state, metrics = stepper(state, frozen, None, data)
    losses.append(float(metrics["loss"]))
  assert losses[-1] < 0.5 * losses[0]
  assert same(frozen, kept)
  moved = tree.flatten(jax.tree.map(lambda a, b: bool(np.any(a != b)), state.trainable, start))
  assert all(moved.values()), [k for k, m in moved.items() if not m]
  assert int(state.step) == 40


def test_stepper_compiles_once_a_shape():
  trainable, frozen = adapted()
  traces = []

  def step(state, frozen, aux, batch):
    traces.append(batch["tokens"].shape)
    return state.replace(step=state.step + 1), {"sum": jnp.sum(batch["tokens"])}

  _, state = make(jax.tree.map(jnp.copy, trainable))
  stepper = train.Stepper(step, state)
  seconds = [0.0]
  for length in (12, 12, 20, 12, 20):
    state, metrics = stepper(state, frozen, None, batch(2, length))
    seconds.append(stepper.compile_seconds)
    assert int(metrics["sum"]) == batch(2, length)["tokens"].sum()
  assert traces == [(2, 12), (2, 20)]
  assert [b > a for a, b in zip(seconds, seconds[1:], strict=False)] == [True, False, True, False, False]
  assert int(state.step) == 5


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_loss_that_is_not_finite_changes_nothing(accumulate, value):
  trainable, frozen = adapted()
  data = batch()
  step, state = compiled(accumulate)
  state, metrics = step(state, frozen, None, data)
  assert metrics["finite"] == 1
  data["weights"][3, 1] = float(value)
  after, metrics = step(state, frozen, None, data)
  assert metrics["finite"] == 0 and not np.isfinite(metrics["loss"])
  assert same((after.trainable, after.opt_state), (state.trainable, state.opt_state))
  assert int(after.step) == 2


@functools.cache
def compiled(accumulate):
  return make(adapted()[0], accumulate=accumulate)


def test_a_gradient_that_is_not_finite_changes_nothing():
  """The loss is finite: the square root of 0."""

  def loss(fwd, params, batch, aux, *, step):
    del fwd, batch, aux, step
    return {"loss": (jnp.sqrt(0.0 * jnp.sum(params["layers"]["attn"]["q"]["kernel"].b)), jnp.float32(1))}, {}

  trainable, frozen = adapted()
  step, state = make(trainable, loss=loss)
  after, metrics = step(state, frozen, None, batch())
  assert metrics["finite"] == 0 and metrics["loss"] == 0
  assert same((after.trainable, after.opt_state), (state.trainable, state.opt_state))
  assert int(after.step) == 1


def test_a_batch_without_weight_has_no_gradient():
  trainable, frozen = adapted()
  data = batch()
  step, state = make(trainable, optimiser=PLAIN)
  after, metrics = step(state, frozen, None, data | {"weights": np.zeros_like(data["weights"])})
  assert same(after.trainable, trainable)
  assert metrics["loss"] == 0 and metrics["finite"] == 1


def test_dropout_follows_seed_and_step():
  trainable, frozen = adapted(dropout=0.5)
  data = batch()

  made = {seed: make(trainable, seed=seed) for seed in (0, 1)}

  def loss(seed, number):
    step, state = made[seed]
    return float(step(state.replace(step=jnp.int32(number)), frozen, None, data)[1]["loss"])

  assert loss(0, 0) == loss(0, 0)
  assert len({loss(0, 0), loss(0, 1), loss(0, 2), loss(1, 0)}) == 4


def test_dropout_keys_differ_between_micro_batches_layers_and_leaves():
  trainable, frozen = adapted(dropout=0.5)

  def loss(fwd, params, batch, aux, *, step):
    """The random bits of every node's first layers as metrics, in place of a loss."""
    del fwd, batch, aux, step
    nodes = tree.flatten(params, is_leaf=weights.is_node)
    draws = {f"{k}/{i}": jax.random.uniform(w.key[i]) for k, w in nodes.items() if weights.is_node(w) for i in (0, 1)}
    zero = 0.0 * sum(jnp.sum(w.b) for w in nodes.values() if weights.is_node(w))
    found = draws | {f"{k}^2": v * v for k, v in draws.items()}
    return {"loss": (zero, jnp.float32(1))}, {k: (v, jnp.float32(1)) for k, v in found.items()}

  step, state = make(trainable, loss=loss, accumulate=4)
  metrics = {k: float(v) for k, v in step(state, frozen, None, batch())[1].items()}
  draws = {k: v for k, v in metrics.items() if k.startswith("layers/") and not k.endswith("^2")}
  assert len(draws) == 14 and len(set(draws.values())) == 14
  assert all(metrics[f"{k}^2"] - v * v > 1e-4 for k, v in draws.items())


def test_without_dropout_steps_are_alike():
  trainable, frozen = adapted()
  step, state = compiled(1)
  losses = {float(step(state.replace(step=jnp.int32(i)), frozen, None, batch())[1]["loss"]) for i in range(3)}
  assert len(losses) == 1


@pytest.mark.slow
def test_scan_unroll_and_remat_have_the_same_gradients():
  results = []
  for scan, remat in ((True, False), (False, False), (True, True), (False, True)):
    config = dataclasses.replace(CONFIG, scan=scan, remat=remat)
    trainable, frozen = adapted(config, dropout=0.3)
    step, state = make(trainable, config, optimiser=PLAIN)
    after, metrics = step(state, frozen, None, batch())
    results.append((jax.tree.map(jnp.subtract, after.trainable, trainable), metrics))
  for other in results[1:]:
    close(other, results[0], atol=1e-6, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_bfloat16_model_has_float32_masters_and_moments(method):
  config = dataclasses.replace(CONFIG, dtype="bfloat16")
  trainable, frozen = adapted(config, method)
  step, state = make(trainable, config, optimiser=ADAM | {"learning_rate": 1e-5})
  after, metrics = step(state, frozen, None, batch())
  assert forward(config)(tree.join(trainable, frozen), batch()).dtype == "bfloat16"
  for name in ("trainable", "opt_state"):
    floats = [x for x in jax.tree.leaves(getattr(after, name)) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert floats and all(x.dtype == "float32" for x in floats), name
  assert all(v.dtype == "float32" for v in metrics.values())
  if method == "lora":
    assert frozen["layers"]["attn"]["q"]["kernel"].base.dtype == "bfloat16"
  a, b = (
    tree.flatten(t)[f"layers/mlp/up/kernel{'/b' if method == 'lora' else ''}"] for t in (after.trainable, trainable)
  )
  np.testing.assert_allclose(np.abs(np.asarray(a) - np.asarray(b)).max(), 1e-5, rtol=0.1)  # lost in bfloat16
  exact_params, exact_frozen = adapted(CONFIG, method)
  exact, _, _ = terms.sums(forward(CONFIG), tree.join(exact_params, exact_frozen), batch())
  np.testing.assert_allclose(metrics["loss"], exact / batch()["weights"].sum(), rtol=0.02)


def dots(jaxpr):
  """Shapes of all matrix products of a jaxpr, those of inner jaxprs included."""
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "dot_general":
      yield tuple(sorted(eqn.outvars[0].aval.shape))
    for inner in jax.extend.core.jaxprs_in_params(eqn.params):
      yield from dots(inner)


@pytest.mark.parametrize("scan", [True, False])
def test_no_gradient_of_frozen_weights_is_computed(scan):
  """No product has the shape of a matrix; with full finetuning all of them do."""
  config = transformer.Config(47, 20, 2, 4, 2, 6, 26, dtype="float32", scan=scan)
  matrices = {tuple(sorted(s)) for s in ((20, 4, 6), (20, 2, 6), (20, 26), (20, 47))}

  def products(method):
    trainable, frozen = adapted(config, method)
    step, state = make(trainable, config)
    return set(dots(jax.make_jaxpr(step)(state, frozen, None, batch(3, 9)).jaxpr))

  assert not products("lora") & matrices
  assert matrices <= products("full")
