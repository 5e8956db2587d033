"""Trees of parameters: path names, regex tables, splitting and joining.

Every leaf has a name such as `layers/attn/q/kernel/a`. Every choice per parameter (trained, adapted, sharded, decayed,
initialised) is an ordered list of (regex, value) over these names: `re.search`, first match wins.
"""

import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from lora_jax import errors


def name(path: tuple) -> str:
  """The name of a key path, such as `layers/attn/q/kernel/a`."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def names(tree: Any, is_leaf: Callable | None = None) -> list[str]:
  """The names of all leaves, in flattening order."""
  return [name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)]


def flatten(tree: Any, is_leaf: Callable | None = None) -> dict[str, Any]:
  """The leaves by name, `{name: leaf}`. None does not count as a leaf."""
  return {name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)}


def unflatten(like: Any, flat: dict[str, Any]) -> Any:
  """The tree of `like` with the leaves of `flat`. Raises ValueError unless both have the same names."""
  want = set(names(like))
  have = set(flat)
  if want != have:
    raise ValueError(f"missing leaves {sorted(want - have)}, unexpected leaves {sorted(have - want)}")
  return map_named(lambda k, _: flat[k], like)


def map_named(fn: Callable, tree: Any, *rest: Any, is_leaf: Callable | None = None) -> Any:
  """`jax.tree.map` whose `fn` receives the leaf's name as its first argument."""
  return jax.tree_util.tree_map_with_path(lambda path, *xs: fn(name(path), *xs), tree, *rest, is_leaf=is_leaf)


def compile_pattern(pattern: str) -> re.Pattern:
  """The compiled regex. Raises UserError if it is invalid."""
  try:
    return re.compile(pattern)
  except re.error as e:
    raise errors.UserError(f"pattern {pattern!r} is not a regular expression: {e}") from e


def first_match(table: Sequence[tuple[str, Any]], default: Any = None) -> Callable[[str], Any]:
  """A function that maps a leaf name to the value of the first pattern found in it, or to `default`."""
  compiled = [(compile_pattern(p), v) for p, v in table]
  return lambda k: next((v for p, v in compiled if p.search(k)), default)


def check_patterns(patterns: Iterable[str], valid: Iterable[str], what: str) -> None:
  """Raises UserError if a pattern matches none of the names `valid`."""
  valid = list(valid)
  for p in patterns:
    if not any(compile_pattern(p).search(k) for k in valid):
      raise errors.UserError(f"{what} {p!r} matches nothing; {errors.nearest(p, valid)}")


def mask(tree: Any, patterns: Sequence[str], what: str = "pattern") -> Any:
  """A tree of booleans, True where one of `patterns` is found in the leaf's name. Each pattern must match something."""
  check_patterns(patterns, names(tree), what)
  hit = first_match([(p, True) for p in patterns], False)
  return map_named(lambda k, _: hit(k), tree)


def split(tree: Any, mask: Any) -> tuple[Any, Any]:
  """The leaves where `mask` is True, and the others: two trees of the same structure, with None for missing leaves."""
  return (
    jax.tree.map(lambda x, m: x if m else None, tree, mask),
    jax.tree.map(lambda x, m: None if m else x, tree, mask),
  )


def join(a: Any, b: Any) -> Any:
  """The tree that `split` gave as `a` and `b`."""
  return jax.tree.map(lambda x, y: y if x is None else x, a, b, is_leaf=lambda x: x is None)


def fold(key: jax.Array, leaf_name: str) -> jax.Array:
  """A random key for one leaf. It depends on `key` and the name alone, not on the order of leaves or the mesh."""
  return jax.random.fold_in(key, zlib.crc32(leaf_name.encode()) & 0x7FFFFFFF)


def size(tree: Any) -> int:
  """Number of scalars in all leaves."""
  return sum(x.size for x in jax.tree.leaves(tree))


def nbytes(tree: Any) -> int:
  """Bytes of all leaves."""
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
