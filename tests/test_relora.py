"""ReLoRA: what a merge keeps and what it starts anew, its schedule, and that a run cut in two ends as a whole one."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import errors, methods, models, tasks, tree, weights
from lora_jax.methods import relora
from lora_jax.model import transformer
from lora_jax.runs import build, config as config_lib, experiment
from lora_jax.training import optim, train
from tests.test_experiment import changed, compiled, config, files, interrupt, timeless  # noqa: F401, fixtures
from tests.test_full import batch, make, model

KEY = jax.random.key(0)
METHOD = {"name": "relora", "rank": 3, "alpha": 6.0, "cycle": 4, "also": ["norm", "embed"]}
METHOD |= {"rank_pattern": {"layers/1/attn/q": 1}}


@functools.cache
def started(optimiser="adamw", dtype="float32", **kw):
  """(config, state after some steps, frozen) of a run with `METHOD`."""
  c, params = model(n_layers=2, dtype=dtype)
  how = METHOD | kw
  params, mask = methods.init(KEY, params, how)
  held = methods.held(how, params)
  step, state, frozen = make(c, params, mask, name=optimiser, learning_rate=0.03)
  held, frozen = tree.split(frozen, tree.split(held, mask)[1])
  state = state.replace(held=held)
  step = jax.jit(step)
  for _ in range(3):
    state, _ = step(state, frozen, None, batch())
  return c, state, frozen, how


def merge(how, state, seed=1):
  ((period, between),) = methods.between(how)
  assert period == how["cycle"]
  return between(jax.random.key(seed), state)


def lora_names(tree_):
  return {k for k in tree.names(tree_) if k.endswith(("/kernel/a", "/kernel/b"))}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_merge_leaves_the_model_as_it_is(dtype):
  c, state, frozen, how = started(dtype=dtype)
  after = jax.jit(lambda s: merge(how, s))(state)
  run = jax.jit(lambda s: train.Forward(c)(s.params(frozen), batch()).astype(jnp.float32))
  want, got = run(state), run(after)
  plain = run(state.replace(trainable=tree.map_named(lambda k, x: x * (not k.endswith("/b")), state.trainable)))
  assert np.abs(want - plain).max() > 0.1
  np.testing.assert_allclose(got, want, atol=1e-5 if dtype == "float32" else 0.15)
  np.testing.assert_allclose(got.mean(), want.mean(), atol=1e-3)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)


@pytest.mark.slow
def test_merged_weights_are_the_sum():
  _, state, frozen, how = started()
  after = merge(how, state)
  for k in ("layers/attn/q/kernel", "layers/mlp/down/kernel"):
    b, a = (tree.flatten(s.trainable) for s in (state, after))
    scale = np.array([2.0, 6.0 if "attn/q" in k else 2.0])
    delta = np.stack([s * np.tensordot(x, y, 1) for s, x, y in zip(scale, b[f"{k}/a"], b[f"{k}/b"], strict=True)])
    base, new = (tree.flatten(s.held)[f"{k}/base"] for s in (state, after))
    np.testing.assert_allclose(new, base + delta, atol=1e-5)
    assert not a[f"{k}/b"].any()


def test_rounding_of_merges_is_unbiased():
  """A change of a tenth of what bfloat16 resolves is in the mean of many weights, and lost when rounded to nearest."""
  node = weights.LoRA(
    jnp.ones((64, 64), jnp.bfloat16), jnp.ones((64, 1)), jnp.full((1, 64), 2.0**-7 / 10), jnp.ones(()), jnp.int32(1)
  )
  params = {"head": {"kernel": node}}
  trainable, held = tree.split(
    params, {"head": {"kernel": node.replace(base=False, a=True, b=True, scale=False, rank=False)}}
  )
  after = relora.between(KEY, train.State(jnp.int32(0), trainable, (), held))
  base = np.asarray(after.held["head"]["kernel"].base, np.float32)
  np.testing.assert_allclose(base.mean() - 1, 2.0**-7 / 10, rtol=0.2)
  np.testing.assert_array_equal(node.dense(), node.base)


def test_factors_start_anew():
  _, state, _, how = started()
  one, same, other = (merge(how, state, seed) for seed in (1, 1, 2))
  before, a, b, c = (tree.flatten(s.trainable) for s in (state, one, same, other))
  for k in lora_names(state.trainable):
    x = np.asarray(a[k])
    np.testing.assert_array_equal(x, b[k])
    if k.endswith("/b"):
      assert not x.any()
      continue
    assert not np.array_equal(x, c[k]) and not np.array_equal(x, before[k])
    bound = 1 / math.sqrt(math.prod(x.shape[1:-1]))
    assert 0.9 * bound < np.abs(x).max() <= bound
    columns = (np.abs(x).reshape(2, -1, 3).max(1) > 0).sum(1)
    assert list(columns) == ([3, 1] if "attn/q" in k else [3, 3])
  assert not np.array_equal(a["layers/attn/k/kernel/a"], a["layers/attn/v/kernel/a"])  # of one shape
  others = before.keys() - lora_names(state.trainable)
  assert {k.split("/")[-2] for k in others} >= {"norm", "attn_norm", "mlp_norm", "embed"}
  for k in others:
    np.testing.assert_array_equal(a[k], before[k])


@pytest.mark.parametrize(
  "optimiser, prune, keep",
  [
    *(("adamw", *how) for how in (("random", 0.25), ("magnitude", None), ("magnitude", 0.3), ("zero", None))),
    *((name, "random", 0.25) for name in ("lion", "sgd", "adafactor")),
  ],
)
def test_moments_of_the_factors_alone_are_pruned(optimiser, prune, keep):
  _, state, _, how = started(optimiser)
  how = how | {"prune": prune, "keep": keep}
  before, after = (tree.flatten(s.opt_state) for s in (state, merge(how, state)))
  names = lora_names(state.trainable)
  share, pruned = {"random": keep, "magnitude": keep or 0.1, "zero": 0.0}[prune], []
  for k, x in before.items():
    x, y = np.asarray(x), np.asarray(after[k])
    if not k.endswith(tuple(names)):
      np.testing.assert_array_equal(x, y)
      continue
    kept = y != 0
    np.testing.assert_array_equal(y[kept], x[kept])
    pruned.append((x, kept))
  assert len(pruned) == len(names) * {"adamw": 2, "adafactor": 3}.get(optimiser, 1)
  held = sum(kept.sum() for _, kept in pruned) / sum((x != 0).sum() for x, _ in pruned)
  assert held == pytest.approx(share, abs=0.04)
  if prune == "magnitude":
    for x, kept in pruned:
      for layer, k in zip(np.abs(x), kept, strict=True):
        assert k.sum() == math.ceil(share * (k.size - 1) - 1e-6) or layer[~k].max() == 0
        assert not k.any() or layer[k].min() > layer[~k].max()


def test_by_default_a_thousandth_stays():
  moments = {"mu": {"layers": {"mlp": {"up": {"kernel": {"a": jnp.ones((2, 500, 400))}}}}}, "count": jnp.int32(7)}
  pruned = relora._prune(KEY, moments, ["layers/mlp/up/kernel"], "random", relora.KEEP["random"])
  kept = float(pruned["mu"]["layers"]["mlp"]["up"]["kernel"]["a"].sum())
  assert 400 * 0.8 < kept < 400 * 1.2 and pruned["count"] == 7


def test_what_it_refuses():
  _, params = model(n_layers=2)
  for kw, message in (
    (dict(prune="randon"), "config.method.prune 'randon'; did you mean 'random'"),
    (dict(cycle=0), "cycle >= 1"),
    (dict(keep=1.5), "0 <= keep <= 1"),
    (dict(also="nrom"), "config.method.also 'nrom' matches nothing"),
    (dict(targets="q,embed"), "embed/kernel is a table"),
  ):
    with pytest.raises(errors.UserError, match=message):
      relora.init(KEY, params, **kw)
  adapted, _ = methods.init(KEY, params, {"name": "lora", "targets": "q"})
  with pytest.raises(errors.UserError, match="layers/attn/q/kernel is a LoRA"):
    relora.init(KEY, adapted, targets="q,v")


def test_parts_of_a_fused_matrix_are_merged():
  c = dataclasses.replace(model(n_layers=2)[0], fused=True)
  params, mask = methods.init(KEY, transformer.init(c, KEY), {"name": "relora", "targets": "q"})
  trainable, frozen = tree.split(params, mask)
  held, frozen = tree.split(frozen, tree.split(relora.held(params), mask)[1])
  trainable = jax.tree.map(lambda x: x + 0.1, trainable)
  state = train.State(jnp.int32(0), trainable, (), held)
  want, got = (
    weights.merge(s.params(frozen))["layers"]["attn"]["qkv"]["kernel"] for s in (state, relora.between(KEY, state))
  )
  np.testing.assert_allclose(got, want, atol=1e-6)
  assert np.abs(want - weights.strip(params)["layers"]["attn"]["qkv"]["kernel"]).max() > 0.01


@pytest.mark.parametrize("final", [0.0, 0.1])
def test_jagged_cosine(final):
  steps, first, cycle, restart, rate = 100, 10, 30, 5, 0.2

  def want(step):
    cosine = lambda at: final + (1 - final) * 0.5 * (1 + math.cos(math.pi * (at - first) / (steps - first)))
    if step < first:
      return step / first
    n, k = divmod(step, cycle)
    if n and k < restart:
      return k / restart * cosine(n * cycle + restart)
    return cosine(step)

  how = dict(warmup=first, final=final, cycle=cycle, restart_warmup=restart)
  got = optim.make_schedule("cosine_restarts", rate, steps, **how)
  np.testing.assert_allclose(
    jax.vmap(got)(jnp.arange(steps + 1)), [rate * want(s) for s in range(steps + 1)], atol=1e-6
  )
  _, made = optim.make(steps=steps, schedule="cosine_restarts", learning_rate=rate, **how)
  assert float(made(30)) == 0 and float(made(jnp.int32(29))) > 0 and float(made(31)) > 0
  plain = optim.make_schedule("cosine_restarts", rate, steps, **how | {"restart_warmup": 0, "warmup": 0})
  cosine = optim.make_schedule("cosine", rate, steps, final=final)
  np.testing.assert_allclose([plain(s) for s in (0, 30, 61)], [cosine(s) for s in (0, 30, 61)], rtol=1e-6)
  for bad in (dict(cycle=0), dict(cycle=9), dict(restart_warmup=31), dict(restart_warmup=-1)):
    with pytest.raises(errors.UserError, match="config.optim.cycle=.*restart_warmup"):
      optim.make_schedule("cosine_restarts", rate, steps, **how | bad)


@pytest.fixture(scope="module")
def cycles(config):  # noqa: F811
  """Three cycles of two steps, on a mesh that splits the weights."""
  c = changed(config, method={"name": "relora", "rank": 4, "cycle": 2, "also": "norm", "dropout": 0.1})
  c = changed(c, optim__schedule="cosine_restarts", optim__cycle=2, optim__restart_warmup=1, optim__warmup=1)
  return changed(c, mesh__data=2, mesh__fsdp=2, train__checkpoint_every=1, eval__examples=2)


@pytest.fixture(scope="module")
def whole(cycles, tmp_path_factory):
  directory = tmp_path_factory.mktemp("relora") / "whole"
  return directory, experiment.run(cycles, directory)


def saved(directory):
  return {p.name: p.read_bytes() for p in (directory / "model").glob("*.safetensors")}


@pytest.mark.slow
def test_a_run_leaves_a_merged_model_of_high_rank(cycles, whole):
  directory, _ = whole
  assert not (directory / "adapter").exists() and saved(directory)
  before, after = (models.load(str(p), dtype="float32").params for p in (cycles["model"]["name"], directory / "model"))
  q = lambda p: np.asarray(p["layers"]["mlp"]["up"]["kernel"][0])
  assert np.linalg.matrix_rank(q(after) - q(before), tol=1e-6) > 4
  last = experiment.trained(directory)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), weights.merge(last.params), after)
  assert [r["train/learning_rate"] for r in timeless(directory) if "train/loss" in r][2::2] == [0.0, 0.0]


@pytest.mark.slow
@pytest.mark.parametrize("when", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_an_interrupted_run_ends_bit_identical(cycles, whole, tmp_path, monkeypatch, when):
  """Cut off in the first step after a merge, and in the last one before one."""
  undo = interrupt(monkeypatch, train.Stepper, "__call__", when)
  with pytest.raises(KeyboardInterrupt):
    experiment.run(cycles, tmp_path / "cut")
  undo()
  experiment.run(cycles, tmp_path / "cut")
  assert saved(tmp_path / "cut") == saved(whole[0])
  assert timeless(tmp_path / "cut") == timeless(whole[0])


@pytest.mark.slow
def test_a_shared_base_outlives_the_merges(cycles, tmp_path):
  c = changed(cycles, mesh__data=1, mesh__fsdp=1, train__steps=3)
  given = config_lib.resolve(c)
  shared = build.load(given, tasks.get(**given.task), build.make_mesh(given))
  before = jax.tree.map(np.array, shared.params)
  experiment.run(c, tmp_path, model=shared)
  jax.tree.map(np.testing.assert_array_equal, shared.params, before)
