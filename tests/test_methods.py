"""The laws of every method, over families, dtypes and bases. A new module in methods/ is found by itself.

A law is a function of a case. The cases are a covering array: each two levels of two factors meet, but not all products
are run. The quick tests hold every method to every law on one case; the slow ones hold it to those that need no program
of their own on its other cases, and to the rest where levels would not meet.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from lora_jax import errors, methods, models, tree, weights
from lora_jax.formats import adapter
from tests.method_cases import BASES, CASES, DTYPES, MODELS, ROWS, case, forget, layers_of, outputs
from tests.pairwise import covering, pairs


def pytest_generate_tests(metafunc):
  """A function that takes a case `c` is a law, and runs on the cases that `plan` gives it."""
  if "c" in metafunc.fixturenames:
    rows = plan()[metafunc.function.__name__]
    quick = lambda row: [] if row in QUICK else pytest.mark.slow
    metafunc.parametrize("name, kind, dtype, base", [pytest.param(*row, marks=quick(row)) for row in rows])


@pytest.fixture
def c(name, kind, dtype, base):
  return case(name, kind, dtype, base)


@pytest.fixture(autouse=True)
def forget_earlier_methods(request, seen=set()):  # noqa: B006, it outlives a test on purpose
  seen.add(getattr(request.node, "callspec", None) and request.node.callspec.params.get("name"))
  if len(seen) > 4:
    forget()
    seen.clear()


def test_starts_as_the_model_it_adapts(c):
  if reason := getattr(c.module, "STARTS", None):
    assert isinstance(reason, str) and reason
    base = c.run(c.model.params)
    assert c.started.outputs.shape != base.shape or np.abs(c.started.outputs - base).max() > 1e-3
    np.testing.assert_array_equal(c.run(weights.strip(c.params)), base)
    return
  # Rounding alone may differ where a method divides and multiplies by the same norm.
  c.close(c.started.outputs, c.run(c.model.params))


def test_gradients_are_finite_and_reach_every_layer_of_every_trained_leaf(c):
  found = layers_of({k: np.asarray(g, np.float32) for k, g in tree.flatten(c.said.gradients).items()})
  assert found
  assert not [k for k, g in found.items() if not np.isfinite(g).all()]
  assert not [k for k, g in found.items() if not g.any()]


def test_a_step_changes_every_layer_of_the_masked_leaves_and_no_others(c):
  whole = lambda trainable: layers_of(tree.flatten(tree.join(trainable, c.split(c.moved)[1])))
  before, after = whole(c.split(c.moved)[0]), whole(c.said.stepped)
  changed = {k for k, x in after.items() if not np.array_equal(x, before[k])}
  assert changed == layers_of(tree.flatten(c.split(c.moved)[0])).keys()


def test_merged_weights_compute_the_same_and_unmerging_gives_the_base(c):
  if not getattr(c.module, "WHOLE", False):
    jax.tree.map(np.testing.assert_array_equal, weights.strip(c.moved), c.model.params)
  if not c.merges:
    with pytest.raises(errors.UserError, match="merged"):
      weights.merge(c.moved)
    return
  merged, ours = c.said.merged, c.said.outputs
  assert not any(weights.is_node(w) for w in jax.tree.leaves(merged, is_leaf=weights.is_node))
  assert set(tree.names(merged)) >= set(tree.names(c.model.params, is_leaf=weights.is_node))
  assert c.effect > 1e-3 * np.abs(ours).max()
  c.close(c.run(merged), ours)


def test_saved_and_loaded_is_the_same(c, tmp_path):
  want = c.said.outputs
  if whole := getattr(c.module, "MODEL", False):
    want = c.run(c.said.merged)  # which is what is saved
    models.save(dataclasses.replace(c.model, params=c.moved), tmp_path)
    loaded = models.load(str(tmp_path), dtype=c.dtype).params
  else:
    adapter.save(c.model, c.moved, c.mask, c.spec, tmp_path)
    loaded = adapter.load(c.model, tmp_path)
  same_form = not whole and jax.tree.structure(loaded) == jax.tree.structure(c.moved)
  c.close(c.say(loaded).outputs if same_form else c.run(loaded), want)


def test_eager_and_unrolled_is_as_compiled_and_scanned(c):
  eager = outputs(dataclasses.replace(c.model.config, scan=False), c.moved)
  # A compiled program keeps some results in float32 that operations one by one round.
  c.close(np.asarray(eager, np.float32), c.said.outputs)


def test_two_members_under_vmap_are_two_runs(c):
  other, _ = methods.init(jax.random.key(1), c.model.params, c.spec)
  split = [c.split(c.move(params, seed=i)) for i, params in enumerate((c.params, other))]
  trainable, frozen = ([s[i] for s in split] for i in (0, 1))
  # What differs between members is batched too: frozen parts that a method draws at random.
  axes = jax.tree.map(lambda a, b: None if a is b or np.array_equal(a, b) else 0, *frozen)
  none = lambda x: x is None
  both = jax.tree.map(lambda ax, a, b: a if ax is None else np.stack([a, b]), axes, *frozen, is_leaf=none)
  step = jax.vmap(c.gradients, (0, axes))
  got = jax.tree.map(np.asarray, jax.jit(step)(jax.tree.map(lambda *xs: np.stack(xs), *trainable), both))
  for i, members in enumerate(split):
    said = c.say(tree.join(*members))
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves((said.gradients, said.outputs)), strict=True):
      g, w = g[i].astype(np.float32), np.asarray(w, np.float32)
      # That of a key's bias is zero but for rounding.
      atol = max(1e-9, (1e-4 if c.dtype == "float32" else 2**-5) * np.abs(w).max())
      np.testing.assert_allclose(g, w, rtol=0, atol=atol)


COSTLY = (test_eager_and_unrolled_is_as_compiled_and_scanned, test_two_members_under_vmap_are_two_runs)
QUICK = {row[0]: row for row in reversed(CASES) if row[2] == "float32"}.values()  # the first case of each method


@functools.cache
def plan():
  """{law: the cases that it runs on}."""
  laws = [k for k, f in globals().items() if k.startswith("test_") and "c" in f.__code__.co_varnames[:1]]
  costly = {f.__name__ for f in COSTLY}
  rows = [(*row, law) for row in CASES for law in laws]
  chosen = covering(rows, [row for row in rows if row[-1] not in costly or row[:-1] in QUICK])
  return {law: sorted(row[:-1] for row in chosen if row[-1] == law) for law in laws}


def test_all_pairs_of_levels_meet():
  product = [(*row, law) for row in ROWS for law in plan()]
  assert {x for row in ROWS for x in row} == {*methods.names(), *MODELS, *DTYPES, *BASES}
  met = {pair for law, rows in plan().items() for row in rows for pair in pairs((*row, law))}
  assert met == {pair for row in product for pair in pairs(row)}
  assert sorted(row[0] for row in QUICK) == sorted(methods.names())
