"""Optimisers: schedules at steps computed by hand, what is decayed, what is clipped, trees with holes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_jax import errors, tree
from lora_jax.training import optim
from tests.test_train import adapted

LR = 0.5


@pytest.mark.parametrize(
  "name, kw, want",
  [
    ("constant", {}, {0: 1, 50: 1, 100: 1}),
    ("linear", {}, {0: 1, 25: 0.75, 100: 0, 130: 0}),
    ("linear", dict(final=0.2), {0: 1, 50: 0.6, 100: 0.2, 130: 0.2}),
    ("cosine", {}, {0: 1, 25: (1 + 0.5**0.5) / 2, 50: 0.5, 100: 0}),
    ("cosine", dict(final=0.1), {0: 1, 50: 0.55, 100: 0.1, 130: 0.1}),
    ("constant", dict(warmup=0.1), {0: 0, 5: 0.5, 10: 1, 11: 1, 100: 1}),
    ("linear", dict(warmup=20), {0: 0, 5: 0.25, 20: 1, 60: 0.5, 100: 0}),
    ("cosine", dict(warmup=0.5, final=0.5), {0: 0, 49: 0.98, 50: 1, 75: 0.75, 100: 0.5}),
    ("linear", dict(warmup=1), {0: 0, 1: 1, 100: 0}),
    ("linear", dict(warmup=100), {0: 0, 99: 0.99, 100: 1}),
  ],
)
def test_schedules(name, kw, want):
  rate = optim.make_schedule(name, LR, 100, **kw)
  np.testing.assert_allclose([rate(s) for s in want], [LR * v for v in want.values()], atol=1e-6)


@pytest.mark.parametrize("warmup", [101, 1e9, -1, -0.5])
def test_warmup_outside_the_run_is_refused(warmup):
  with pytest.raises(errors.UserError, match=r"config.optim.warmup=.* is not within the 100 steps"):
    optim.make(steps=100, warmup=warmup)


def test_unknown_names():
  with pytest.raises(errors.UserError, match="config.optim.name 'adam'; did you mean 'adamw'"):
    optim.make(steps=10, name="adam")
  with pytest.raises(errors.UserError, match="config.optim.schedule 'cosin'; did you mean 'cosine'"):
    optim.make(steps=10, schedule="cosin")
  with pytest.raises(errors.UserError, match="regular expression"):
    optim.make(steps=10, no_decay=["("])


def update(grads, params, **kw):
  optimiser, _ = optim.make(steps=10, schedule="constant", warmup=0, **kw)
  return optimiser.update(grads, optimiser.init(params), params)[0]


@pytest.mark.parametrize("name", optim.OPTIMISERS)
def test_decay_spares_names(name):
  """With a zero gradient a step is `-lr * weight_decay * w` on decayed leaves and nothing on others."""
  params = {
    "q": {"kernel": jnp.full(3, 2.0), "bias": jnp.ones(3)},
    "norm": {"scale": jnp.ones(3)},
    "scales": jnp.ones(2),
  }
  zero = jax.tree.map(jnp.zeros_like, params)
  got = tree.flatten(update(zero, params, name=name, learning_rate=0.1, weight_decay=0.5))
  want = {"q/kernel": -0.1, "q/bias": 0.0, "norm/scale": 0.0, "scales": -0.05}
  assert {k: float(x[0]) for k, x in got.items()} == pytest.approx(want)
  got = tree.flatten(update(zero, params, name=name, learning_rate=0.1, weight_decay=0.5, no_decay=["^q/", "scales"]))
  want = {"q/kernel": 0.0, "q/bias": 0.0, "norm/scale": -0.05, "scales": -0.05 * 0}
  assert {k: float(x[0]) for k, x in got.items()} == pytest.approx(want)


def test_first_steps():
  """Adam's and Lion's first step is the sign of the gradient, plain SGD's the gradient (times the rate)."""
  params, grads = {"a": jnp.zeros(3)}, {"a": jnp.array([0.3, -0.2, 0.0])}
  kw = dict(learning_rate=0.1, clip_norm=0)
  for name in ("adamw", "lion"):
    np.testing.assert_allclose(update(grads, params, name=name, **kw)["a"], [-0.1, 0.1, 0], atol=1e-6)
  for b1 in (0.0, 0.9):
    np.testing.assert_allclose(update(grads, params, name="sgd", b1=b1, **kw)["a"], [-0.03, 0.02, 0], atol=1e-7)


def test_adamw_is_optax_adamw_under_the_schedule():
  params = {"a": jnp.array([1.0, -2.0])}
  ours, rate = optim.make(
    steps=5, learning_rate=0.1, warmup=2, schedule="cosine", weight_decay=0.3, b1=0.8, b2=0.9, eps=1e-3, clip_norm=0
  )
  theirs = optax.adamw(rate, b1=0.8, b2=0.9, eps=1e-3, weight_decay=0.3)
  results = []
  for optimiser in (ours, theirs):
    p, s = params, optimiser.init(params)
    for i in range(5):
      updates, s = optimiser.update({"a": jnp.array([0.1 * i, 1.0])}, s, p)
      p = optax.apply_updates(p, updates)
    results.append(p["a"])
  np.testing.assert_allclose(*results, rtol=1e-6)
  assert np.abs(results[0] - params["a"]).max() > 0.1


@pytest.mark.slow
def test_clipping_sees_the_trainable_tree_alone():
  trainable, _ = adapted()
  grads = jax.tree.map(jnp.ones_like, trainable)
  norm = np.sqrt(tree.size(trainable))
  kw = dict(name="sgd", b1=0.0, learning_rate=1.0)
  got = update(grads, trainable, clip_norm=0.5, **kw)
  np.testing.assert_allclose(optax.tree.norm(got), 0.5, rtol=1e-5)
  np.testing.assert_allclose(jax.tree.leaves(got)[0], -0.5 / norm, rtol=1e-5)
  for clip_norm in (0, 2 * norm):
    got = update(grads, trainable, clip_norm=clip_norm, **kw)
    np.testing.assert_allclose(optax.tree.norm(got), norm, rtol=1e-5)


@pytest.mark.parametrize("name", optim.OPTIMISERS)
def test_holes_have_no_state(name):
  """A split tree has None where leaves are frozen: no moments there, and a step keeps the structure."""
  trainable, _ = adapted()
  optimiser, _ = optim.make(steps=10, name=name, weight_decay=0.1)
  state = optimiser.init(trainable)
  moments = {"adamw": 2, "lion": 1, "sgd": 1, "adafactor": 0}[name]
  have = sum(x.size for x in jax.tree.leaves(state) if x.ndim)
  assert have == moments * tree.size(trainable) if moments else 0 < have < 2 * tree.size(trainable)
  updates, after = jax.jit(optimiser.update)(jax.tree.map(jnp.ones_like, trainable), state, trainable)
  assert jax.tree.structure(updates) == jax.tree.structure(trainable)
  assert jax.tree.structure(after) == jax.tree.structure(state)
