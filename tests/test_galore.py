"""GaLore: its formula in numpy, what is projected on which side, what is kept, and that it trains and is resumed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_jax import errors, methods, tree
from lora_jax.formats import checkpoint
from lora_jax.methods import galore
from lora_jax.model import transformer
from lora_jax.training import optim
from tests.test_full import batch, make, model

KEY = jax.random.key(0)
B1, B2, EPS = 0.9, 0.99, 1e-8
SHAPES = {  # two layers; D 12, N 2, H 3, F 20
  "attn/q": (2, 12, 2, 3),
  "attn/o": (2, 2, 3, 12),
  "mlp/up": (2, 12, 20),
  "mlp/down": (2, 20, 12),
}
SIDES = {"attn/q": (12, 6), "attn/o": (6, 12), "mlp/up": (12, 20), "mlp/down": (20, 12)}  # inputs, outputs


def params():
  layers = {}
  for k, shape in SHAPES.items():
    block, part = k.split("/")
    layers.setdefault(block, {})[part] = {"kernel": jnp.zeros(shape), "bias": jnp.zeros(shape[:1] + shape[2:])}
  return {"layers": layers, "norm": {"scale": jnp.ones(12)}, "head": {"kernel": jnp.zeros((12, 30))}}


def gradients(steps):
  rng = np.random.default_rng(0)
  return [jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), params()) for _ in range(steps)]


def adam(moments, g, t):
  """Moments and direction of Adam's step t = 1, 2, ..."""
  m, v = (B1 * moments[0] + (1 - B1) * g, B2 * moments[1] + (1 - B2) * g * g)
  return (m, v), m / (1 - B1**t) / (np.sqrt(v / (1 - B2**t)) + EPS)


class Reference:
  """The authors' algorithm for one torch weight [out, in], in float64.

  A basis is known but for the signs of its vectors, which its moments depend on once it changes: they are taken from
  ours after it was checked to span the same subspace.
  """

  def __init__(self, rank, gap, scale):
    self.rank, self.gap, self.scale, self.moments, self.step = rank, gap, scale, (0, 0), 0

  def update(self, g, basis):
    right = g.shape[0] >= g.shape[1]
    if self.step % self.gap == 0:
      u, _, vt = np.linalg.svd(g, full_matrices=False)
      want = vt[: self.rank].T if right else u[:, : self.rank]
      np.testing.assert_allclose(np.abs(want.T @ basis), np.eye(want.shape[1]), atol=1e-3)
      self.basis = want * np.sign(np.sum(want * basis, 0))
    np.testing.assert_allclose(basis, self.basis, atol=1e-3)
    self.step += 1
    self.moments, low = adam(self.moments, g @ self.basis if right else self.basis.T @ g, self.step)
    return self.scale * (low @ self.basis.T if right else self.basis @ low)


@pytest.mark.parametrize("rank", [2, 5, 64])
def test_updates_are_those_of_the_algorithm(rank):
  gap, scale, steps = 3, 0.5, 7
  transformation = galore.direction(optax.scale_by_adam(B1, B2, EPS), rank=rank, gap=gap, scale=scale)
  state = transformation.init(params())
  step = jax.jit(transformation.update)
  torch = {k: [Reference(rank, gap, scale) for _ in range(2)] for k in SHAPES}
  plain = {}
  for t, grads in enumerate(gradients(steps), 1):
    updates, state = step(grads, state)
    got, flat = tree.flatten(updates), tree.flatten(grads)
    for k, (inner, outer) in SIDES.items():
      name = f"layers/{k}/kernel"
      for i in range(2):
        want = torch[k][i].update(flat[name][i].reshape(inner, outer).T.astype(np.float64), state.basis[name][i])
        np.testing.assert_allclose(got[name][i].reshape(inner, outer).T, want, atol=2e-3)
      del flat[name]
    assert len(flat) == 6
    for k, g in flat.items():
      plain[k], want = adam(plain.get(k, (0, 0)), g, t)
      np.testing.assert_allclose(got[k], want, atol=1e-4)


def test_square_matrices_get_the_updates_of_optax():
  """It projects the longer side of others."""
  ours = galore.direction(optax.scale_by_adam(), targets="head", rank=3, gap=2, scale=0.25)
  theirs = optax.contrib.scale_by_galore(rank=3, update_proj_gap=2, scale=0.25)
  rng = np.random.default_rng(1)
  grads = [{"head": {"kernel": rng.standard_normal((12, 12)).astype(np.float32)}} for _ in range(5)]
  a, b = ours.init(grads[0]), theirs.init(grads[0])
  for g in grads:
    (got, a), (want, b) = ours.update(g, a), theirs.update(g, b)
    np.testing.assert_allclose(got["head"]["kernel"], want["head"]["kernel"], atol=1e-5)


def test_a_projection_stays_for_the_gap_and_then_changes():
  transformation = galore.direction(optax.scale_by_adam(), rank=2, gap=3)
  state, bases = transformation.init(params()), []
  for grads in gradients(5):
    state = transformation.update(grads, state)[1]
    bases.append(np.asarray(state.basis["layers/mlp/up/kernel"]))
  same = [np.array_equal(a, b) for a, b in zip(bases, bases[1:], strict=False)]
  assert same == [True, True, False, True]


def test_what_is_kept_has_the_size_of_the_rank():
  """By Zhao et al. 2024, table 1: m r + 2 n r numbers for a matrix m x n, m <= n."""
  rank = 3
  state = galore.direction(optax.scale_by_adam(), rank=rank).init(params())
  projected = sum(2 * rank * (min(s) + 2 * max(s)) for s in SIDES.values())
  plain = 2 * sum(x.size for k, x in tree.flatten(params()).items() if not k.startswith("layers/") or "bias" in k)
  assert sum(x.size for x in jax.tree.leaves(state) if x.ndim) == projected + plain
  assert state.basis["layers/attn/q/kernel"].shape == (2, 6, rank)  # of two sides the shorter
  assert state.inner.mu["layers"]["attn"]["q"]["kernel"].shape == (2, rank, 12)


def test_targets():
  names = lambda **kw: galore.direction(optax.scale_by_adam(), **kw).init(params()).basis.keys()
  assert names() == {f"layers/{k}/kernel" for k in SHAPES}
  assert names(targets="q,down") == {"layers/attn/q/kernel", "layers/mlp/down/kernel"}
  assert names(targets=["mlp/", "head"]) == {"layers/mlp/up/kernel", "layers/mlp/down/kernel", "head/kernel"}
  _, whole = model()
  for kw, message in (
    (dict(targets="mpl/"), "config.method.targets 'mpl/' matches nothing"),
    (dict(targets="layers/1/mlp"), "layers/mlp/.*/kernel in all layers or in none"),
    (dict(rank=0), "rank >= 1"),
    (dict(gap=0), "gap >= 1"),
    (dict(train="mpl"), "'mpl' matches nothing"),
  ):
    with pytest.raises(errors.UserError, match=message):
      galore.init(KEY, whole, **kw)
  _, mask = galore.init(KEY, whole, train="mlp/")
  assert {k for k, m in tree.flatten(mask).items() if m} == {k for k in tree.names(whole) if "mlp/" in k}


def test_experts_are_projected_each_by_itself():
  config = transformer.Config(31, 8, 2, 2, 2, 4, 12, n_experts=3, dtype="float32")
  shapes = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), transformer.shapes(config))
  basis = galore.direction(optax.scale_by_adam(), rank=2).init(shapes).basis
  assert basis["layers/moe/up/kernel"].shape == (2 * 3, 8, 2)


@pytest.mark.parametrize("name", optim.OPTIMISERS)
def test_every_optimiser_works_in_the_projected_space(name):
  how = methods.wrappers({"name": "galore", "rank": 2, "gap": 2}, steps=9)
  optimiser, _ = optim.make(steps=9, name=name, weight_decay=0.1, **how)
  state, zero = optimiser.init(params()), jax.tree.map(lambda x: x + 1.0, params())
  for grads in gradients(3):
    updates, state = jax.jit(optimiser.update)(grads, state, zero)
  assert all(np.isfinite(u).all() for u in jax.tree.leaves(updates))
  low = np.asarray(updates["layers"]["mlp"]["up"]["kernel"][0])
  low = low - low.mean() if name != "sgd" else low  # what decays is constant here
  assert np.linalg.matrix_rank(low, tol=1e-4 * np.abs(low).max()) <= 3


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_trains_and_resumes_bit_for_bit(dtype, tmp_path):
  config, whole = model(n_layers=2)
  config = dataclasses.replace(config, dtype=dtype)
  how = {"name": "galore", "rank": 4, "gap": 5, "train": "mlp|head", "dtype": dtype}
  whole, mask = methods.init(KEY, whole, how)
  step, state, frozen = make(config, whole, mask, learning_rate=0.05, **methods.wrappers(how, 20))
  step, losses = jax.jit(step), []
  with checkpoint.Checkpoints(tmp_path) as saved:
    for i in range(14):
      state, metrics = step(state, frozen, None, batch())
      losses.append(float(metrics["loss"]))
      if i == 6:
        saved.save(7, state)
    again, _ = saved.restore(7, state)
  assert losses[-1] < 0.8 * losses[0]
  for _ in range(7):
    again, _ = step(again, frozen, None, batch())
  jax.tree.map(np.testing.assert_array_equal, again, state)


@pytest.mark.parametrize("others", [("partial", "galore"), ("galore", "lora")])
def test_what_another_method_has_made_of_a_matrix_is_not_projected(others):
  settings = {"galore": {"rank": 2}, "partial": {"layers": 1}, "lora": {"rank": 2}}
  method = [{"name": n, **settings[n]} for n in others]
  _, whole = model(n_layers=2)
  with pytest.raises(errors.UserError, match="another method has changed layers/attn/"):
    params, mask = methods.init(KEY, whole, method)
    optim.make(steps=3, learning_rate=1e-2, **methods.wrappers(method, 3))[0].init(tree.split(params, mask)[0])
