"""Selection of the weights that methods adapt, by short names, regexes and patterns, and of the leaves they train."""

import inspect
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lora_jax import errors, tree, weights
from lora_jax.model import architecture
from lora_jax.weights import fused


def split(params: Any, targets: str | Sequence[str]) -> Any:
  """Returns the tree with `fused.Fused` for each fused matrix of which `targets` names a part: "q" of `attn/qkv`.

  A method's `init` calls it first. A part is named by the matrix and the part, as in `attn/qkv/kernel/q`.
  """
  flat = tree.flatten(params, is_leaf=weights.is_node)
  parts = {part: (k, w) for k, w in flat.items() if architecture.in_axes(k) for part in fused.part_names(k)}
  patterns = [p for t in _listed(targets) for p in _expand(t)]
  found = {k for part, (k, w) in parts.items() for p in patterns if _hits(p, part, _stack(k, w), alone=True).any()}
  return fused.split(params, found) if found else params


def signature(init: Callable, of: Callable, without: Collection[str] = ()) -> inspect.Signature:
  """Returns the signature of an `init` that passes its other keywords on to the `init` of another method.

  It also sets `init.inherits` to that function.

  Args:
    of: the `init` of the other method.
    without: keywords of `of` that `init` sets itself.
  """
  init.inherits = of
  named = {k: p for k, p in inspect.signature(init).parameters.items() if p.kind is not p.VAR_KEYWORD}
  more = {k: p for k, p in inspect.signature(of).parameters.items() if k not in named and k not in without}
  return inspect.Signature([*named.values(), *more.values()])


def matrices(params: Any, experts: bool = False) -> dict[str, Any]:
  """Returns {name: weight} of the matrices in a tree: arrays or nodes that `architecture.in_axes` knows.

  A fused matrix that is split is included whole and by its parts. Matrices of experts are included only with `experts`:
  they have two stack axes, see `architecture.stack_axes`.
  """
  flat = fused.flatten(params)
  return {k: w for k, w in flat.items() if architecture.in_axes(k) and (experts or architecture.stack_axes(k) < 2)}


def wrap(params: Any, chosen: Mapping[str, np.ndarray], node: Callable[[str, Any, np.ndarray], Any]) -> Any:
  """Returns the tree with `node(name, weight, layers)` in place of each chosen weight; see `select`."""

  def visit(k, w):
    if isinstance(w, fused.Fused):
      w = w.map(lambda part, v: visit(f"{k}/{part}", v))
    return node(k, w, chosen[k]) if k in chosen else w

  return tree.map_named(visit, params, is_leaf=weights.is_node)


def mask(params: Any, kind: type, fields: Sequence[str]) -> Any:
  """Returns a mask that is True at `fields` of the outermost nodes of class `kind`, and False elsewhere."""

  def leaf(w):
    if isinstance(w, fused.Fused) and kind is not fused.Fused:
      return w.map(lambda _, part: leaf(part))
    m = jax.tree.map(lambda _: False, w)
    if not isinstance(w, kind):
      return m
    return m.replace(**{f: jax.tree.map(lambda _: True, getattr(w, f)) for f in fields})

  return jax.tree.map(leaf, params, is_leaf=weights.is_node)


def select(targets: str | Sequence[str], linear: Mapping[str, Any], what: str) -> dict[str, np.ndarray]:
  """Returns {leaf name: bool [L], or [] if not stacked} for the matrices that `targets` names.

  Args:
    targets: short names ("q,v"), "all-linear" (every matrix in the layers), regexes found in names such as
      `layers/attn/q/kernel` or, for single layers, `layers/3/attn/q/kernel`, or a sequence of these. A target that
      matches the name of a fused matrix selects the whole matrix; one that matches only the name of a part selects the
      part.
    linear: as returned by `matrices`.
    what: the key of the config, for messages.

  Raises:
    UserError: a target matches nothing.
  """
  return _select(targets, linear, what, alone=True)


def _select(targets, linear, what, alone) -> dict[str, np.ndarray]:
  patterns = [p for t in _listed(targets) for p in _expand(t, linear, what)]
  hits = {k: np.zeros(_stack(k, w), bool) for k, w in linear.items()}
  for p in patterns:
    found = False
    for k in linear:
      hit = _hits(p, k, hits[k].shape, alone)
      hits[k] |= hit
      found |= bool(hit.any())
    if not found:
      raise errors.UserError(f"{what} {p!r} matches nothing; {errors.nearest(p, linear)}")
  return {k: h for k, h in hits.items() if h.any()}


def _listed(targets: str | Sequence[str]) -> list[str]:
  return [targets] if isinstance(targets, str) else list(targets)


def _stack(k: str, w: Any) -> tuple[int, ...]:
  return w.shape[:1] if architecture.stacked(k) else ()


def _expand(target: str, linear: Mapping[str, Any] | None = None, what: str = "") -> list[str]:
  """Returns the regexes for one target; short names and `all-linear` are expanded, and regexes are returned as is.

  With `linear`, a short name that is not in it raises UserError.
  """
  if target == "all-linear":
    return ["(^|/)layers/.*kernel$"]
  if not target.strip(" ,"):  # as a regex it would find everything
    raise errors.UserError(f"{what or 'targets'}={target!r} names no matrix; 'all-linear' names all in the layers")
  if not re.fullmatch(r"[\w\s,-]+", target):
    return [target]
  words = [w.strip() for w in target.split(",") if w.strip()]
  if linear is not None:
    short = {k.split("/")[-2] for k in linear if k.endswith("/kernel")} | {"all-linear"}
    short |= {part for name in short for part in fused.PARTS.get(name, ())}
    for w in words:
      if w not in short:
        raise errors.UserError(f"{what} {w!r} matches nothing; {errors.nearest(w, short)}")
  return [p for w in words for p in (_expand(w) if w == "all-linear" else [f"(^|/)({w}/kernel|kernel/{w})$"])]


def _hits(pattern: str, k: str, stack: tuple[int, ...], alone: bool) -> np.ndarray:
  """Returns which layers of leaf `k` a pattern matches: all if it matches the stacked name, else by each indexed name.

  A pattern that matches a fused matrix matches its parts only if `alone` is False.
  """
  search = tree.compile_pattern(pattern).search
  if search(k) or not stack:
    hit = np.full(stack, bool(search(k)))
  else:
    hit = np.array([bool(search(k.replace("layers/", f"layers/{i}/", 1))) for i in range(stack[0])])
  whole = k.rpartition("/")[0]
  if not fused.part_names(whole):
    return hit
  of_whole = _hits(pattern, whole, stack, alone)
  return hit & ~of_whole if alone else hit | of_whole


def values(pattern: Mapping | None, default: float, linear: Mapping, what: str) -> dict[str, np.ndarray]:
  """Returns {leaf name: value per layer} from an ordered {target: value}.

  A target that matches a fused matrix also sets the value of its parts.
  """
  values = {k: np.full(_stack(k, w), default, float) for k, w in linear.items()}
  for target, value in reversed(dict(pattern or {}).items()):
    for k, hit in _select(target, linear, what, alone=False).items():
      values[k] = np.where(hit, value, values[k])
  return values
