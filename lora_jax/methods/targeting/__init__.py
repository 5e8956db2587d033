"""What methods share: which weights they adapt, by short names, regexes and patterns, and which leaves they train."""

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
  """The tree with fused matrices as `fused.Fused` where `targets` name a part of them alone: "q" of `attn/qkv`.

  A method's `init` calls it first; names of the parts are those of the matrix and the part, `attn/qkv/kernel/q`.
  """
  flat = tree.flatten(params, is_leaf=weights.is_node)
  parts = {part: (k, w) for k, w in flat.items() if architecture.in_axes(k) for part in fused.part_names(k)}
  patterns = [p for t in _listed(targets) for p in _expand(t)]
  found = {k for part, (k, w) in parts.items() for p in patterns if _hits(p, part, _stack(k, w), alone=True).any()}
  return fused.split(params, found) if found else params


def signature(init: Callable, of: Callable, without: Collection[str] = ()) -> inspect.Signature:
  """The signature of an `init` that hands its other keywords on to the `init` of another method, `init.inherits`.

  Args:
    of: the other one.
    without: keywords of it that the first sets itself.
  """
  init.inherits = of
  named = {k: p for k, p in inspect.signature(init).parameters.items() if p.kind is not p.VAR_KEYWORD}
  more = {k: p for k, p in inspect.signature(of).parameters.items() if k not in named and k not in without}
  return inspect.Signature([*named.values(), *more.values()])


def matrices(params: Any, experts: bool = False) -> dict[str, Any]:
  """{name: weight} of the matrices in a tree: arrays or nodes that `architecture.in_axes` knows.

  A fused matrix that is split is there whole and by its parts. Those of `experts`, which are many in one, are there
  only for a method that asks for them: they have two axes before their own, see `architecture.stack_axes`.
  """
  flat = fused.flatten(params)
  return {k: w for k, w in flat.items() if architecture.in_axes(k) and (experts or architecture.stack_axes(k) < 2)}


def wrap(params: Any, chosen: Mapping[str, np.ndarray], node: Callable[[str, Any, np.ndarray], Any]) -> Any:
  """The tree with `node(name, weight, layers)` in place of each chosen weight; see `select`."""

  def visit(k, w):
    if isinstance(w, fused.Fused):
      w = w.map(lambda part, v: visit(f"{k}/{part}", v))
    return node(k, w, chosen[k]) if k in chosen else w

  return tree.map_named(visit, params, is_leaf=weights.is_node)


def mask(params: Any, kind: type, fields: Sequence[str]) -> Any:
  """True at `fields` of the outermost nodes of a class, False elsewhere."""

  def leaf(w):
    if isinstance(w, fused.Fused) and kind is not fused.Fused:
      return w.map(lambda _, part: leaf(part))
    m = jax.tree.map(lambda _: False, w)
    if not isinstance(w, kind):
      return m
    return m.replace(**{f: jax.tree.map(lambda _: True, getattr(w, f)) for f in fields})

  return jax.tree.map(leaf, params, is_leaf=weights.is_node)


def select(targets: str | Sequence[str], linear: Mapping[str, Any], what: str) -> dict[str, np.ndarray]:
  """{leaf name: bool [L], or [] where not stacked} for the matrices that `targets` names.

  Args:
    targets: short names ("q,v"), "all-linear" (every matrix in the layers), regexes found in names such as
      `layers/attn/q/kernel` or, for single layers, `layers/3/attn/q/kernel`, or a sequence of those. What is found in
      the name of a fused matrix means it as a whole; its parts are meant by what is found in their names alone.
    linear: of `matrices`.
    what: the key of the config, for messages.
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
  """Regexes for one target: short names and `all-linear` are spelled out, regexes are taken as they are.

  With `linear` a short name that is none of its matrices raises UserError.
  """
  if target == "all-linear":
    return ["(^|/)layers/.*kernel$"]
  if not target.strip(" ,"):  # as a regex it would find everything
    raise errors.UserError(f"{what or 'targets'}={target!r} names no matrix; 'all-linear' is every one in the layers")
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
  """Which layers of leaf `k` a pattern finds: by the stacked name all, else by the name with the layer's index.

  With `alone` a part of a fused matrix is not found by what finds the matrix, else by that too.
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
  """{leaf name: value per layer} from an ordered {target: value}; a fused matrix's value is that of its parts too."""
  values = {k: np.full(_stack(k, w), default, float) for k, w in linear.items()}
  for target, value in reversed(dict(pattern or {}).items()):
    for k, hit in _select(target, linear, what, alone=False).items():
      values[k] = np.where(hit, value, values[k])
  return values
