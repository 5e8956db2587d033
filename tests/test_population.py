"""Laws of populations: every member is the run that it would be alone."""

import copy
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import errors, methods, sharding, tree, weights
from lora_jax.model import prompts, transformer
from lora_jax.runs import config as config_lib, group
from lora_jax.training import objectives, optim, population, train
from lora_jax.weights import fused
from tests.test_train import CONFIG, batch, forward

KEY = jax.random.key(3)
STEPS = 5
OBJECTIVE = objectives.make("causal_lm")
BASE = {
  "method": {"name": "lora", "rank": 2, "alpha": 8.0, "targets": "q,v"},
  # With eps as large as some gradients: the sign of one that is but rounding would decide an update otherwise; the
  # default is tested apart.
  "optim": {"name": "adamw", "learning_rate": 2e-2, "schedule": "linear", "warmup": 0.0, "eps": 1e-3},
  "train": {"steps": STEPS, "seed": 0},
}


def configs(*changes):
  """A config for each {section: {key: value}}; a method with a name replaces that of BASE."""
  out = []
  for change in changes:
    c = copy.deepcopy(BASE)
    for section, values in change.items():
      c[section] = values if "name" in values else c[section] | values
    out.append(c)
  return out


def resolved(members, optimiser="adamw"):
  """The members' configs with what else a run has."""
  rest = {"model": {"name": "x"}, "task": {"name": "rotten_tomatoes"}, "data": {"batch_size": 4, "seq_len": 8}}
  return [config_lib.resolve(rest | c | {"optim": c["optim"] | {"name": optimiser}}) for c in members]


@pytest.fixture(scope="module")
def base():
  return jax.tree.map(lambda x: x + 0.02 * jnp.arange(x.size).reshape(x.shape) % 0.1, transformer.init(CONFIG, KEY))


def member(base, c):
  return methods.init(jax.random.key(c["train"]["seed"]), base, c["method"])


def alone(base, c, data, stop=None):
  """(losses of each step, params, trainable at the start) of a run of its own, or of its first steps."""
  params, mask = member(base, c)
  trainable, frozen = tree.split(params, mask)
  held = methods.held(c["method"], params)
  if held is not None:
    held, frozen = tree.split(frozen, tree.split(held, mask)[1])
  n = c["train"]["steps"]
  optimiser, rate = optim.make(steps=n, **c["optim"], **methods.wrappers(c["method"], n))
  penalty = methods.penalty(c["method"])
  how = dict(seed=c["train"]["seed"], accumulate=c["train"].get("accumulate", 1), penalty=penalty)
  step = jax.jit(train.make_step(forward(CONFIG), OBJECTIVE.loss, optimiser, rate, **how))
  state, losses = train.init_state(trainable, optimiser, held), []
  for i in range(n if stop is None else stop):
    state, metrics = step(state, frozen, None, data[i])
    losses.append(float(metrics["loss"]))
    for period, change in methods.between(c["method"]):
      if (i + 1) % period == 0 and i + 1 < n:
        state = change(jax.random.fold_in(jax.random.key(how["seed"]), i + 1), state)
  return losses, state.params(frozen), tree.split(params, mask)[0]


def population_of(members, trees, index, shared_batch):
  """(hyper, state, step) of a population."""
  given = resolved(members)
  first, kw = given[0], [dataclasses.asdict(c.optim) for c in given]
  steps, seeds = [c.train.steps for c in given], [c.train.seed for c in given]
  hyper = population.hyper(steps=steps, seeds=seeds, optim=kw, batches=index, dropout=trees.dropout)
  how = kw[0] | methods.wrappers(first.method, first.train.steps)
  make_optimiser = functools.partial(population.optimiser, **how)
  step = population.make_step(
    forward(CONFIG),
    OBJECTIVE,
    make_optimiser,
    shared_batch=shared_batch,
    accumulate=first.train.accumulate,
    penalty=methods.penalty(first.method),
  )
  return hyper, population.init_state(trees, hyper, make_optimiser), step


def together(base, members, data, index=None):
  """(losses [S, P], state, trees) of a population; `index`: which of the batches `data[i]` [K, ...] a member takes."""
  made = [member(base, c) for c in members]
  held = [methods.held(c["method"], p) for c, (p, _) in zip(members, made, strict=True)]
  trees = population.stack(made, None if held[0] is None else held)
  hyper, state, step = population_of(members, trees, [0] * len(members) if index is None else index, index is None)
  step, losses = jax.jit(step), []
  between = [(n, jax.jit(population.between(fn))) for n, fn in methods.between(members[0]["method"])]
  steps = max(c["train"]["steps"] for c in members)
  for i in range(steps):
    state, metrics = step(state, hyper, trees.own, trees.shared, None, data[i])
    losses.append(np.asarray(metrics["loss"]))
    for period, change in between:
      if (i + 1) % period == 0:
        state = change(hyper, state)
  return np.array(losses), state, trees


def check(base, members):
  soft = member(base, members[0])[0]
  data = [prompts.insert_batch(soft, batch(seed=i)) for i in range(max(c["train"]["steps"] for c in members))]
  losses, state, trees = together(base, members, data)
  for i, c in enumerate(members):
    want, params, like = alone(base, c, data)
    np.testing.assert_allclose(losses[: len(want), i], want, rtol=1e-5, atol=1e-5)
    got = tree.flatten(population.unstack(state.members.trainable, i, like))
    for k, x in tree.flatten(params).items():
      if k in got:
        np.testing.assert_allclose(got[k], x, rtol=1e-5, atol=1e-6, err_msg=k)
  return state, trees


CASES = {
  "ranks, targets and scales": [
    {"method": {"rank": 1, "alpha": 1.0}},
    {"method": {"rank": 4, "targets": "o", "rslora": True}},
    {"method": {"targets": "all-linear", "alpha": 64.0}},
    {"method": {"targets": "q,k,v,o", "rank_pattern": {"layers/0/attn/v": 3, "o": 0}, "rank": 1}},
  ],
  "optimisers": [
    {"optim": {"learning_rate": 1e-3, "weight_decay": 0.1}, "train": {"seed": 4}},
    {"optim": {"schedule": "cosine", "warmup": 2, "clip_norm": 0.0, "b1": 0.5}},
    {"optim": {"schedule": "constant", "clip_norm": 0.01, "eps": 1e-4}, "train": {"steps": 3}},
  ],
  "dropout": [
    {"method": {"dropout": 0.5}, "train": {"seed": 1}},
    {"method": {"dropout": 0.1}, "train": {"seed": 2}},
    {},
  ],
  "dora": [
    {"method": {"name": "dora", "rank": 2, "targets": "q"}, "optim": {"weight_decay": 0.1}},
    {"method": {"name": "dora", "rank": 4, "targets": "v,down", "dropout": 0.2}, "optim": {"weight_decay": 0.1}},
  ],
  "pissa": [{"method": {"name": "pissa", "rank": 2}}, {"method": {"name": "pissa", "rank": 4, "targets": "k"}}],
  "lora_fa": [{"method": {"name": "lora_fa", "rank": 2}}, {"method": {"name": "lora_fa", "rank": 3}}],
  **{
    n: [{"method": {"name": n}}, {"method": {"name": n}, "train": {"seed": 1}, "optim": {"learning_rate": 1e-3}}]
    for n in ("ia3", "prompt_tuning", "full")
  },
  "accumulation": [
    {"method": {"name": "lora", "rank": 2}, "train": {"accumulate": 2}},
    {"method": {"name": "lora", "rank": 1, "targets": "up"}, "train": {"accumulate": 2}},
  ],
  "relora": [
    {"method": {"name": "relora", "rank": 2, "cycle": 2}, "train": {"seed": 1}},
    {"method": {"name": "relora", "rank": 2, "cycle": 2}},
  ],
}


QUICK = ("ranks, targets and scales", "optimisers", "dropout", "ia3", "prompt_tuning")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_members_are_runs_of_their_own(base, name):
  check(base, configs(*CASES[name]))


@pytest.mark.slow
def test_members_are_runs_of_their_own_with_the_default_eps(base):
  """A gradient that is but rounding is divided by its own size then: updates are bounded by what training moves."""
  members = configs(*CASES["ranks, targets and scales"])
  for c in members:
    del c["optim"]["eps"]
  data = [batch(seed=i) for i in range(STEPS)]
  losses, state, _ = together(base, members, data)
  for i, c in enumerate(members):
    want, params, start = alone(base, c, data)
    np.testing.assert_allclose(losses[:, i], want, rtol=1e-5)
    got, params = tree.flatten(population.unstack(state.members.trainable, i, start)), tree.flatten(params)
    for k, x in tree.flatten(start).items():
      np.testing.assert_allclose(got[k], params[k], rtol=0, atol=0.01 * np.abs(params[k] - x).max(), err_msg=k)


@pytest.mark.slow
def test_biases_of_parts(monkeypatch):
  """The query's part of a fused bias is a member's own, the rest of it is shared."""
  monkeypatch.setitem(globals(), "CONFIG", dataclasses.replace(CONFIG, fused=True, attn_bias="qkv"))
  method = {"name": "bitfit", "targets": "q,up"}
  members = configs({"method": method}, {"method": method, "optim": {"learning_rate": 1e-3}})
  base = transformer.init(CONFIG, KEY)
  _, trees = check(fused.like(base, member(base, members[0])[0]), members)
  assert {k for k in tree.names(trees.shared) if "qkv/bias" in k} == {f"layers/attn/qkv/bias/{k}" for k in "kv"}


def test_no_member_has_a_copy_of_a_matrix_of_the_base(base):
  """Products with the base are one matmul over all members: nothing in the step has the shape of a copy for each."""
  members = configs(*({"train": {"seed": i}} for i in range(7)))
  trees = population.stack([member(base, c) for c in members])
  hyper, state, step = population_of(members, trees, [0] * 7, True)
  text = str(jax.make_jaxpr(step)(state, hyper, trees.own, trees.shared, None, batch()))
  shape = lambda *n: f"f32[{','.join(map(str, n))}]"
  kernels = [x.shape for k, x in tree.flatten(base).items() if k.startswith("layers/") and k.endswith("kernel")]
  assert len(kernels) == 7 and all(shape(*s[1:]) in text for s in kernels)
  assert not [s for s in kernels if shape(7, *s[1:]) in text or shape(7, *s) in text]


@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False])
def test_devices_of_a_population_do_not_communicate(base, shared):
  """With batches of their own neither: one number says when all have gone through their targets."""
  members, mesh = configs(*({"train": {"seed": i}} for i in range(4))), sharding.make_mesh(1, population=4)
  trees = population.stack([member(base, c) for c in members])
  place = sharding.Placer(mesh)
  with jax.set_mesh(mesh):
    put = lambda x: sharding.put(x, sharding.stacked(place))
    hyper, state, step = population_of(members, trees, [0, 1, 1, 0], shared)
    data = batch() if shared else jax.tree.map(lambda *x: np.stack(x), batch(), batch(seed=1))
    arguments = put(state), put(hyper), put(trees.own), sharding.put(trees.shared, place), None
    lowered = jax.jit(step).lower(*arguments, sharding.put_batch(data, mesh, stack=int(not shared)))
    text = lowered.compile().as_text()
  assert len(state.alive.sharding.device_set) == 4
  assert not [c for c in ("all-reduce", "all-gather", "all-to-all", "collective-permute") if c in text]


@pytest.mark.slow
def test_padding_stays_zero_in_value_and_moments(base):
  members = configs({"method": {"rank": 1}}, {"method": {"rank": 4, "targets": "o"}, "optim": {"weight_decay": 0.1}})
  state, _ = check(base, members)
  seen = 0
  for k, x in tree.flatten(state.members).items():
    if "/attn/" not in k or x.ndim < 4:
      continue
    rank = np.where(np.array(["/o/" not in k, "/o/" in k]), [1, 4], 0)
    for i, r in enumerate(rank):
      part = x[i][..., r:] if k.endswith("/a") else x[i][:, r:]
      assert not np.any(part), k
      seen += part.size
      assert r == 0 or np.any(x[i]), k
  assert seen


def test_what_is_the_same_array_is_not_stacked(base):
  members = configs({"method": {"targets": "q"}}, {"method": {"targets": "o", "rank": 3}})
  trees = population.stack([member(base, c) for c in members])
  shared = {id(x) for x in jax.tree.leaves(trees.shared)}
  assert shared == {id(x) for x in jax.tree.leaves(base)}
  own = tree.flatten(trees.own)
  assert own and all(k.endswith(("scale", "rank")) for k in own)


@pytest.mark.slow
def test_each_member_may_have_batches_of_its_own(base):
  """Of its own size too: dropout of the rows there are is not that of the rows that fill up."""
  members = configs({"train": {"seed": 1}}, {"method": {"dropout": 0.3}}, {"method": {"rank": 1}})
  data = [[batch(rows=8 - 3 * k, seed=10 * i + k) for k in range(2)] for i in range(STEPS)]
  fill = lambda x: np.pad(x, [(0, 8 - len(x)), (0, 0)])
  stacked = [{k: np.stack([fill(b[k]) for b in bs]) for k in bs[0]} for bs in data]
  losses, *_ = together(base, members, stacked, index=[0, 1, 1])
  for i, (c, k) in enumerate(zip(members, (0, 1, 1), strict=True)):
    np.testing.assert_allclose(losses[:, i], alone(base, c, [bs[k] for bs in data])[0], rtol=1e-5, atol=1e-5)


def test_dropout_does_not_depend_on_padding():
  x = jnp.ones((3, 7, 5))
  for key in (KEY, (KEY, jnp.float32(0.5))):
    short = weights.dropout(x, 0.5, key)
    assert 20 < np.count_nonzero(short == 2) < 85
    np.testing.assert_array_equal(weights.dropout(jnp.ones((4, 11, 5)), 0.5, key)[:3, :7], short)


@pytest.mark.slow
def test_a_member_that_is_not_finite_is_frozen_and_the_others_go_on(base):
  """For good: it stays what it was before, though the batches after the bad one would do."""
  members, bad = configs({}, {"method": {"rank": 4}}, {"method": {"rank": 1}}), 2
  data = [[batch(seed=2 * i + k) for k in range(2)] for i in range(STEPS)]
  data[bad][1]["weights"][0, 0] = np.nan
  stacked = [jax.tree.map(lambda *x: np.stack(x), *pair) for pair in data]
  losses, state, _ = together(base, members, stacked, index=[0, 1, 0])
  np.testing.assert_array_equal(state.alive, [True, False, True])
  for i in (0, 2):
    np.testing.assert_allclose(losses[:, i], alone(base, members[i], [pair[0] for pair in data])[0], rtol=1e-5)
  assert np.isnan(losses[bad, 1]) and np.isfinite(np.delete(losses[:, 1], bad)).all()
  _, params, like = alone(base, members[1], [pair[1] for pair in data], stop=bad)
  got, params = tree.flatten(population.unstack(state.members.trainable, 1, like)), tree.flatten(params)
  for k, x in got.items():
    np.testing.assert_allclose(x, params[k], rtol=1e-5, atol=1e-6, err_msg=k)


@pytest.mark.parametrize("optimiser, together", [("adamw", True), ("adafactor", False)])
def test_ranks_are_not_padded_under_optimisers_that_would_see_it(optimiser, together):
  """Adafactor divides by means over a leaf."""
  members = configs({"method": {"rank": 1}}, {"method": {"rank": 4}}, {"method": {"rank": 1, "alpha": 1.0}})
  one, four, other = (group.key(c) for c in resolved(members, optimiser))
  assert (one == four) == together and one == other


@pytest.mark.parametrize(
  "changes, message",
  [
    ([{}, {"method": {"name": "dora", "targets": "q"}}], "adapt layers/attn/q/kernel by weights of one kind"),
    (
      [{"method": {"name": "bitfit"}}, {"method": {"name": "ia3"}}],
      "have the same leaves; .* is in some of them alone",
    ),
    ([{}, {"method": {"lora_bias": True}}], "differ in more than their numbers"),
    (
      [{"method": {"name": "houlsby", "size": 4}}, {"method": {"name": "houlsby", "size": 8}}],
      r"layers/attn/o/adapter/down is \(2, 16, 4\) and \(2, 16, 8\)",
    ),
  ],
)
def test_members_that_differ_in_structure_are_refused(base, changes, message):
  with pytest.raises(errors.UserError, match=message):
    population.stack([member(base, c) for c in configs(*changes)])
