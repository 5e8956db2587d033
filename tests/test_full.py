"""Training whole weights: masters, bfloat16 with stochastic rounding, and the last layers alone."""

import dataclasses
import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import errors, methods, tree, weights
from lora_jax.formats import checkpoint
from lora_jax.methods import full, partial
from lora_jax.model import transformer
from lora_jax.training import objectives, optim, train
from lora_jax.weights import updates
from tests import terms

CONFIG = transformer.Config(47, 16, 4, 4, 2, 4, 24, dtype="float32")
KEY = jax.random.key(0)
ULP = 2.0**-7  # of bfloat16 at one


def model(**changes):
  config = dataclasses.replace(CONFIG, **changes)
  return config, transformer.init(config, KEY)


def batch(rows=4, length=10):
  tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (rows, length + 1), dtype=np.int32)
  ones = np.ones((rows, length))
  return {
    "tokens": tokens[:, :-1],
    "targets": tokens[:, 1:],
    "weights": ones.astype(np.float32),
    "segment_ids": ones.astype(np.int32),
  }


def make(config, params, mask, accumulate=1, **optimiser):
  """(step, state, frozen)"""
  trainable, frozen = tree.split(params, mask)
  how = dict(schedule="constant", warmup=0, learning_rate=1e-2, weight_decay=0.01) | optimiser
  optimiser, rate = optim.make(steps=20, **how)
  step = train.make_step(
    train.Forward(config), objectives.make("causal_lm").loss, optimiser, rate, accumulate=accumulate
  )
  return step, train.init_state(trainable, optimiser), frozen


def dtypes(x):
  return {k: str(v.dtype) for k, v in tree.flatten(x).items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rounding_is_unbiased(dtype):
  """The mean of many draws is the number, within four deviations of what a draw between two neighbours has."""
  x = jnp.asarray(np.random.default_rng(0).uniform(-2, 2, 50), jnp.float32).astype(dtype).astype(jnp.float32)
  n = 4000
  draws = jax.vmap(lambda k: updates.round_stochastically(x, k))(jax.random.split(KEY, n)).astype(jnp.float32)
  down = np.asarray(draws).min(0)
  np.testing.assert_allclose(draws.mean(0), x, atol=4 * ULP / 2 / n**0.5)
  if dtype == "bfloat16":  # which can be represented, and so is kept
    np.testing.assert_array_equal(draws, np.broadcast_to(x, draws.shape))
  else:
    assert all(len(np.unique(d)) == 2 for d in np.asarray(draws).T)
    assert (down <= np.asarray(x)).all()


def test_what_is_not_finite_is_kept():
  full_nans = np.array([0x7FFFFFFF, 0xFFFFFFFF], np.uint32).view(np.float32)  # whose bits one more carries over
  x = jnp.array([np.nan, *full_nans, np.inf, -np.inf, 0.0, -0.0], jnp.float32)
  got = updates.round_stochastically(x, KEY)
  assert got.dtype == jnp.bfloat16
  np.testing.assert_array_equal(np.asarray(got, np.float32), x)
  np.testing.assert_array_equal(np.signbit(np.asarray(got, np.float32))[3:], np.signbit(x)[3:])


def test_small_updates_add_up_where_rounding_to_nearest_loses_them():
  steps, update = 500, ULP / 50

  def run(add):
    body = lambda p, k: (add(p, jnp.full(p.shape, update), k), None)
    return jax.lax.scan(body, jnp.ones(200, jnp.bfloat16), jax.random.split(KEY, steps))[0].astype(jnp.float32)

  nearest = run(lambda p, u, k: (p.astype(jnp.float32) + u).astype(jnp.bfloat16))
  np.testing.assert_array_equal(nearest, 1.0)
  got = run(lambda p, u, k: updates.add({"w": p}, {"w": u}, k)["w"])
  np.testing.assert_allclose(got.mean(), 1 + steps * update, atol=0.1 * steps * update)


@pytest.mark.slow
@pytest.mark.parametrize(
  "computes, dtype, optimiser",
  [("float32", "bfloat16", "adamw"), ("bfloat16", "bfloat16", "adafactor"), ("bfloat16", "float32", "adamw")],
)
def test_what_is_float32(computes, dtype, optimiser):
  """Matrices have the dtype asked for, moments are float32, and the model computes in its own dtype."""
  config, params = model(dtype=computes)
  params, mask = full.init(KEY, params, targets="embed|norm|attn/q", dtype=dtype)
  step, state, frozen = make(config, params, mask, name=optimiser, accumulate=2)
  after, metrics = jax.jit(step)(state, frozen, None, batch())
  for k, t in dtypes(after.trainable).items():
    assert t == ("float32" if k.endswith(("scale", "bias")) else dtype), k
  assert dtypes(after) == dtypes(state)
  floats = [x for x in jax.tree.leaves(after.opt_state) if jnp.issubdtype(x.dtype, jnp.floating)]
  assert floats and {str(x.dtype) for x in floats} == {"float32"}
  assert train.Forward(config)(params, batch()).dtype == computes
  assert np.isfinite(metrics["loss"])


@pytest.mark.slow
def test_gradients_of_bfloat16_weights_add_up_in_float32():
  """Of many equal rows or micro-batches the mean is that of one; sums in bfloat16 would stop growing."""
  config, params = model(n_layers=1)
  params, mask = full.init(KEY, params, targets="embed|mlp/up", dtype="bfloat16")
  norms = []
  for accumulate, rows in ((1, 1), (1, 1024), (1024, 1024)):
    step, state, frozen = make(config, params, mask, accumulate=accumulate)
    data = jax.tree.map(lambda x: np.repeat(x, rows, 0), batch(1))
    norms.append(float(jax.jit(step)(state, frozen, None, data)[1]["grad_norm"]))
  np.testing.assert_allclose(norms[1:], norms[0], rtol=0.005)


@pytest.mark.slow
def test_bfloat16_learns_and_resumes_bit_for_bit(tmp_path):
  config, params = model()
  params, mask = full.init(KEY, params, targets="embed|mlp|head", dtype="bfloat16")
  step, state, frozen = make(config, params, mask)
  step = jax.jit(step)
  losses = []
  with checkpoint.Checkpoints(tmp_path) as saved:
    for i in range(12):
      state, metrics = step(state, frozen, None, batch())
      losses.append(float(metrics["loss"]))
      if i == 5:
        saved.save(6, state)
    again, _ = saved.restore(6, state)
  assert losses[-1] < 0.8 * losses[0]
  for _ in range(6):
    again, _ = step(again, frozen, None, batch())
  jax.tree.map(np.testing.assert_array_equal, again, state)


def test_what_cannot_be_trained_is_refused():
  _, params = model()
  with pytest.raises(errors.UserError, match="config.method.dtype 'float16'.*'bfloat16'"):
    full.init(KEY, params, dtype="float16")
  params["layers"]["mlp"]["up"]["kernel"] = params["layers"]["mlp"]["up"]["kernel"].astype(jnp.int8)
  with pytest.raises(errors.UserError, match="layers/mlp/up/kernel is packed.*not quantised"):
    full.init(KEY, params)
  full.init(KEY, params, targets="attn")


def trained_names(params, mask):
  return {k: x.shape for k, x in tree.flatten(tree.split(params, mask)[0]).items()}


@pytest.mark.parametrize("layers", [0, 1, 3, 4])
def test_partial_trains_the_last_layers_the_norm_and_the_head(layers):
  _, params = model()
  whole = {k: x.shape for k, x in tree.flatten(params).items()}
  got, mask = partial.init(KEY, params, layers=layers)
  end = "/upper" if 0 < layers < 4 else ""
  want = {f"{k}{end}": (layers, *s[1:]) for k, s in whole.items() if k.startswith("layers/") and layers}
  want |= {k: whole[k] for k in ("norm/scale", "head/kernel")}
  assert trained_names(got, mask) == want
  jax.tree.map(np.testing.assert_array_equal, weights.merge(got), params)
  shapes = jax.eval_shape(lambda p: partial.init(KEY, p, layers=layers)[0], params)
  assert jax.tree.map(lambda x: x.shape, shapes) == jax.tree.map(lambda x: x.shape, got)


def test_partial_by_patterns():
  _, params = model()
  got, mask = partial.init(KEY, params, layers=2, targets="mlp/(up|down)", also="embed")
  assert trained_names(got, mask).keys() == {
    "layers/mlp/up/kernel/upper",
    "layers/mlp/down/kernel/upper",
    "embed/kernel",
  }
  assert trained_names(*partial.init(KEY, params, also=())).keys().isdisjoint({"norm/scale", "head/kernel"})
  for kw, message in (
    (dict(layers=5), "config.method.layers=5 is not within the 4 layers"),
    (dict(layers=-1), "not within"),
    (dict(targets="mpl"), "config.method.targets 'mpl' matches nothing"),
    (dict(also="nrom"), "config.method.also 'nrom' matches nothing"),
    (dict(layers=0, also=()), "trains nothing"),
  ):
    with pytest.raises(errors.UserError, match=message):
      partial.init(KEY, params, **kw)
  both = [{"name": "partial"}, {"name": "lora", "targets": "q"}]
  got, mask = methods.init(KEY, params, both)
  assert {k for k in trained_names(got, mask) if "attn/q/" in k} == {
    f"layers/attn/q/kernel/{x}" for x in ("a", "b", "base/upper")
  }
  with pytest.raises(errors.UserError, match="layers/attn/q/kernel is adapted already.*comes first"):
    methods.init(KEY, params, both[::-1])


@pytest.mark.slow
@pytest.mark.parametrize("remat, windows", [(False, False), (True, True)])
def test_partial_gives_the_gradients_of_full_finetuning(remat, windows):
  local = dict(window=3, local=(True, False, False, True)) if windows else {}
  config, params = model(remat=remat, **local)
  params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(KEY, x.shape), params)
  whole = full.init(KEY, params)
  part = partial.init(KEY, params, layers=3)

  def grads(params, mask):
    trainable, frozen = tree.split(params, mask)
    loss = lambda t: terms.sums(train.Forward(config), tree.join(t, frozen), batch())[0]
    return jax.jit(jax.value_and_grad(loss))(trainable)

  (want_loss, want), (loss, got) = grads(*whole), grads(*part)
  np.testing.assert_allclose(loss, want_loss, rtol=1e-6)
  want = tree.flatten(want)
  for k, g in tree.flatten(got).items():
    np.testing.assert_allclose(
      g, want[k][1:] if (k := k.removesuffix("/upper")).startswith("layers/") else want[k], atol=1e-4
    )


def lengths(jaxpr, reverse):
  """Lengths of the scans of a jaxpr, those of inner jaxprs included, in one direction."""
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "scan" and eqn.params["reverse"] == reverse:
      yield eqn.params["length"]
    for inner in jax.extend.core.jaxprs_in_params(eqn.params):
      yield from lengths(inner, reverse)


@pytest.mark.parametrize("remat", [False, True])
def test_no_backward_pass_runs_below_what_is_trained(remat):
  config, params = model(n_layers=7, remat=remat)
  for init, forward, backward in (
    (functools.partial(partial.init, layers=2), {5, 2}, {2}),
    (functools.partial(partial.init, layers=0), {7}, set()),
    (full.init, {7}, {7}),
  ):
    step, state, frozen = make(config, *init(KEY, params))
    jaxpr = jax.make_jaxpr(step)(state, frozen, None, batch()).jaxpr
    # The loss scans chunks of the vocabulary or tokens, of other lengths.
    assert {n for n in lengths(jaxpr, True) if n in (2, 5, 7)} == backward
    assert forward <= set(lengths(jaxpr, False))
    moments = [x for k, x in tree.flatten(state.opt_state).items() if "/mu/layers/" in f"/{k}"]
    assert {x.shape[0] for x in moments} == backward


def test_a_cache_runs_through_both_parts():
  config, params = model()
  params, _ = partial.init(KEY, params, layers=1)
  tokens = batch()["tokens"]
  want = jax.jit(transformer.apply, static_argnums=0)(config, params, tokens)
  hidden = jax.jit(transformer.hidden, static_argnums=0)
  cache = transformer.init_cache(config, *tokens.shape)
  for i in range(tokens.shape[1]):
    positions = np.full((len(tokens), 1), i)
    x, cache = hidden(config, params, tokens[:, i : i + 1], positions=positions, cache=cache)
    np.testing.assert_allclose(transformer.logits(config, params, x)[:, 0], want[:, i], atol=1e-5)
