"""Trees: splitting and joining are inverse, tables of patterns, keys by name."""

import jax
import numpy as np
import pytest
from hypothesis import given, strategies as st

from lora_jax import errors, tree, weights
from lora_jax.model import transformer

KEY = jax.random.key(0)
CONFIG = transformer.Config(50, 16, 2, 4, 2, 4, 24, dtype="float32")
WORDS = st.text("abcq", min_size=1, max_size=3)
TREES = st.recursive(
  st.integers(), lambda t: st.dictionaries(WORDS, t, min_size=1, max_size=4) | st.lists(t, min_size=1, max_size=3)
)


def params():
  """A small tree with a node in it."""
  node = weights.LoRA(np.ones((3, 4)), np.ones((3, 2)), np.ones((2, 4)), np.float32(1), np.int32(2))
  return {"layers": {"q": {"kernel": node}, "norm": {"scale": np.ones(3)}}, "embed": [np.zeros(5), np.zeros(6)]}


def test_names():
  q = [f"layers/q/kernel/{k}" for k in ("base", "a", "b", "scale", "rank")]
  assert tree.names(params()) == ["embed/0", "embed/1", "layers/norm/scale", *q]
  assert tree.names(params(), is_leaf=weights.is_node)[-1] == "layers/q/kernel"
  assert tree.names({"a": None, "b": 1}) == ["b"]


@given(TREES, st.randoms(use_true_random=False))
def test_join_is_the_inverse_of_split(t, random):
  mask = jax.tree.map(lambda _: random.random() < 0.5, t)
  a, b = tree.split(t, mask)
  assert tree.join(a, b) == tree.join(b, a) == t
  hit = tree.flatten(mask)
  assert tree.flatten(a) == {k: x for k, x in tree.flatten(t).items() if hit[k]}
  assert tree.flatten(b) == {k: x for k, x in tree.flatten(t).items() if not hit[k]}


def test_split_keeps_nodes_and_copies_nothing():
  p = params()
  mask = tree.mask(p, ["/a$", "/b$"])
  a, b = tree.split(p, mask)
  assert tree.names(a) == ["layers/q/kernel/a", "layers/q/kernel/b"]
  assert isinstance(a["layers"]["q"]["kernel"], weights.LoRA)
  joined = tree.join(a, b)
  assert jax.tree.structure(joined) == jax.tree.structure(p)
  assert all(x is y for x, y in zip(jax.tree.leaves(joined), jax.tree.leaves(p), strict=True))


@given(TREES)
def test_unflatten_is_the_inverse_of_flatten(t):
  assert tree.unflatten(t, tree.flatten(t)) == t


def test_unflatten_names_what_does_not_fit():
  like = {"a": {"b": 1}, "c": 2}
  with pytest.raises(ValueError, match=r"missing leaves \['c'\], unexpected leaves \['a/d'\]"):
    tree.unflatten(like, {"a/b": 1, "a/d": 3})
  assert tree.unflatten(like, {"c": 5, "a/b": 4}) == {"a": {"b": 4}, "c": 5}


def test_first_match_wins_anywhere_in_the_name():
  match = tree.first_match([(r"attn/q", "q"), (r"attn/", "attn"), (r"kernel$", "kernel")], "none")
  want = {"layers/attn/q/kernel": "q", "layers/attn/k/kernel": "attn", "layers/mlp/kernel": "kernel", "norm": "none"}
  assert {k: match(k) for k in want} == want
  assert tree.first_match([("^kernel", 1)])("mlp/kernel") is None
  assert tree.first_match([("a", False), ("", True)])("a") is False


def test_mask():
  assert tree.flatten(tree.mask({"a": {"x": 1, "y": 2}, "b": 3}, ["x$", "^b"])) == {
    "a/x": True,
    "a/y": False,
    "b": True,
  }


def test_a_pattern_that_matches_nothing_names_the_nearest():
  with pytest.raises(
    errors.UserError, match="targets 'layers/attn/p/kernel' matches nothing; did you mean 'layers/attn"
  ):
    tree.mask(transformer.shapes(CONFIG), ["embed", "layers/attn/p/kernel"], "targets")
  with pytest.raises(errors.UserError, match="pattern 'zzz' matches nothing; valid: a/x, b"):
    tree.mask({"a": {"x": 1}, "b": 3}, ["zzz"])
  for call in (lambda p: tree.first_match([(p, 1)]), lambda p: tree.mask({"a": 1}, [p])):
    with pytest.raises(errors.UserError, match=r"'\(a' is not a regular expression"):
      call("(a")


@given(st.lists(WORDS, min_size=2, max_size=6, unique=True), st.randoms(use_true_random=False))
def test_keys_depend_on_the_name_alone(names, random):
  bits = lambda k: tuple(np.asarray(jax.random.key_data(tree.fold(KEY, k))).tolist())
  one = {k: bits(k) for k in names}
  shuffled = random.sample(names, len(names))
  assert {k: bits(k) for k in shuffled} == one
  assert len(set(one.values())) == len(names)


def test_keys_of_all_leaves_differ_and_follow_the_seed():
  names = tree.names(transformer.shapes(CONFIG))
  draw = lambda seed: [float(jax.random.uniform(tree.fold(jax.random.key(seed), k))) for k in names]
  assert len(set(draw(0) + draw(1))) == 2 * len(names)
  assert draw(0) == draw(0)


def test_sizes():
  p = {"a": np.zeros((2, 3), np.float32), "b": [np.zeros(5, np.int8), None], "c": jax.ShapeDtypeStruct((), "bfloat16")}
  assert tree.size(p) == 12
  assert tree.nbytes(p) == 6 * 4 + 5 + 2
