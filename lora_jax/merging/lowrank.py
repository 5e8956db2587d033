"""Converts any adapter that changes weights to plain LoRA: the best factors of a given rank, layer by layer.

The change of each matrix is cut after its largest singular values (Eckart and Young 1936,
https://doi.org/10.1007/BF02288367). So adapters of other methods can be saved, merged, served and composed as LoRA, and
LoRA itself can be made smaller.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import errors, tree, weights
from lora_jax.model import architecture
from lora_jax.weights import fused


class Fit(NamedTuple):
  """How well LoRA approximates the change of a weight.

  Fields:
    ranks: rank of each layer; a single one if the weight is not stacked.
    error: Frobenius norm of the residual divided by that of the change, over all layers.
  """

  ranks: tuple[int, ...]
  error: float


def to_lora(params: Any, rank: int | None = None, variance: float | None = None) -> tuple[Any, dict[str, Fit]]:
  """The tree with `weights.LoRA` in place of all other adapters.

  Layers may have different ranks: singular values that are zero up to rounding are dropped, and a weight without any
  others in all its layers becomes plain. All experts of a layer have the largest rank that one of them needs. The parts
  of a split fused matrix have their own ranks. One layer at a time is made dense, in float32.

  Args:
    params: a model's tree, of one or more methods.
    rank: the largest rank of each matrix. Give either this or `variance`.
    variance: in (0, 1], the share of the sum of squared singular values that the rank must explain at least.

  Returns:
    (params, {leaf name: Fit} of the converted weights).

  Raises:
    UserError: neither or both of `rank` and `variance` are given; there is nothing to convert; or a method does more
      than change weights, such as a bottleneck or a soft prompt.
  """
  if (rank is None) == (variance is None):
    raise errors.UserError("converting to LoRA needs either a rank or a variance")
  if rank is not None and (not isinstance(rank, int) or rank < 1):
    raise errors.UserError(f"converting to LoRA: rank={rank!r} must be a whole number, at least 1")
  if variance is not None and not 0 < variance <= 1:
    raise errors.UserError(f"converting to LoRA: variance={variance!r} must be in (0, 1]")
  if odd := [k for k, x in tree.flatten(params, is_leaf=weights.is_node).items() if isinstance(x, weights.Added)]:
    raise errors.UserError(f"no change of weights, which LoRA could stand for: {', '.join(odd)}")
  found: dict[str, tuple] = {}
  bound = lambda w: weights.bind(w, params.get("shared"))
  converted = _visit(params, "", lambda *given: _convert(found, rank, variance, bound, *given))
  if not found:
    raise errors.UserError("there is no adapter to convert to LoRA")
  made = {k: w for k, (w, _) in found.items() if w is not None}
  if not made:
    raise errors.UserError("the adapter changes nothing: there is no LoRA to make of it")
  return _put(converted, _alike(made)), {k: fit for k, (_, fit) in found.items()}


def table(report: Mapping[str, Fit]) -> str:
  """The fits as lines of text: name, ranks and error of each weight."""
  ranks = {
    k: ",".join(map(str, fit.ranks)) if len(set(fit.ranks)) > 1 else f"{fit.ranks[0]}" for k, fit in report.items()
  }
  wide, widest = max(map(len, report)), max(map(len, ranks.values()))
  rows = [f"{k:{wide}}  rank {ranks[k]:{widest}}  error {fit.error:.2e}" for k, fit in report.items()]
  return "\n".join(rows)


def _visit(params: Any, where: str, convert: Any) -> Any:
  """The tree without adapters; `convert(name, weight, bias)` sees each of them."""
  if not isinstance(params, dict):
    return params
  p = {k: _visit(v, f"{where}{k}/", convert) for k, v in params.items() if k != weights.SHARED}
  w, bias, name = params.get("kernel"), params.get("bias"), f"{where}kernel"
  if isinstance(w, fused.Fused):
    each = zip(w.parts.items(), w.biases(bias), strict=True)
    adapted = [(part, v, b) for (part, v), b in each if isinstance(v, weights.Adapter)]
    for part, v, b in adapted:
      convert(f"{name}/{part}", v, b)
    return p | {"kernel": w.map(lambda _, v: weights.base(v)) if adapted else w.adapted}
  if isinstance(w, weights.Adapter):
    convert(name, w, bias)
    p["kernel"] = weights.base(w)
  return p


def _put(params: Any, made: Mapping[str, weights.LoRA]) -> Any:
  """The tree with nodes around the weights of these names."""

  def visit(k, w):
    w = w.map(lambda part, v: visit(f"{k}/{part}", v)) if isinstance(w, fused.Fused) else w
    return made[k].replace(base=w) if k in made else w

  return tree.map_named(visit, params, is_leaf=weights.is_node)


def _alike(made: Mapping[str, weights.LoRA]) -> dict[str, weights.LoRA]:
  """The nodes with a common alpha, so that PEFT's config needs no pattern of it. If one has a bias, all get one."""
  alpha = max(int(np.max(w.rank)) for w in made.values())
  biased = any(w.bias is not None for w in made.values())

  def node(w):
    scale = np.where(w.rank > 0, alpha / np.maximum(w.rank, 1), 0).astype(np.float32)
    part = lambda x: x / np.where(scale > 0, scale, 1).reshape(*scale.shape, *(1,) * (x.ndim - scale.ndim))
    bias = part(w.bias) if w.bias is not None else None
    if biased and bias is None and w.n_experts_axes() == 0:
      bias = np.zeros((*scale.shape, *w.b.shape[scale.ndim + 1 :]))
    arrays = dict(a=w.a, b=part(w.b), scale=scale, bias=bias)
    return w.replace(**{k: None if x is None else jnp.asarray(x, jnp.float32) for k, x in arrays.items()})

  return {k: node(w.replace(rank=jnp.asarray(w.rank, jnp.int32))) for k, w in made.items()}


def _convert(found: dict, rank, variance, bound, name: str, w: Any, bias: Any) -> None:
  """Puts (LoRA with numpy arrays and scale 1, or None if there is no change, and how well it fits) in `found`.

  `bound` gives a layer's node the arrays that all layers share.
  """
  stacked = architecture.stacked(name)
  n_in = architecture.in_axes(name) or 1  # the inputs of a table are its rows
  layers = range(w.shape[0]) if stacked else [()]
  shape = w.shape[stacked:]
  experts = shape[:1] if architecture.stack_axes(name) == 2 else ()
  inner, outer = shape[len(experts) :][:n_in], shape[len(experts) :][n_in:]
  each, offsets = [], []
  kept = left = 0.0
  for i in layers:
    layer = bound(weights.at(w, i))
    delta, factors = np.asarray(_delta(layer)), _factors(layer)
    offsets.append(_offset(layer, jnp.zeros(outer) if bias is None else weights.dense(weights.at(bias, i))))
    delta = delta.reshape(*(experts or (1,)), math.prod(inner), math.prod(outer))
    parts = [_svd(m, factors) for m in delta]
    r = max(_rank(s, rank, variance) for _, s, _ in parts) or int(bool(offsets[-1].any()))
    a = np.stack([u[:, :r] * np.sqrt(s[:r]) for u, s, _ in parts])
    b = np.stack([np.sqrt(s[:r, None]) * v[:r] for _, s, v in parts])
    kept += float((delta**2).sum())
    left += float(((delta - a @ b) ** 2).sum())
    each.append((a, b))
  ranks = np.int32([a.shape[-1] for a, _ in each])
  fit = Fit(tuple(ranks.tolist()), math.sqrt(left / kept) if kept else 0.0)
  if not ranks.max():
    found[name] = None, fit
    return

  def pad(x, axis):
    return np.pad(x, [(0, ranks.max() - n if k == axis else 0) for k, n in enumerate(x.shape)])

  stack = (len(each),) if stacked else ()
  a = np.stack([pad(a, 2) for a, _ in each]).reshape(*stack, *experts, *inner, -1)
  b = np.stack([pad(b, 1) for _, b in each]).reshape(*stack, *experts, -1, *outer)
  offset = np.stack(offsets).reshape(*stack, *outer)
  node = weights.LoRA(
    base=weights.base(w),
    a=a,
    b=b,
    scale=np.ones(stack, np.float32),
    rank=ranks.reshape(stack),
    bias=offset if offset.any() else None,
  )
  found[name] = node, fit


def _factors(w: Any) -> tuple[np.ndarray, np.ndarray] | None:
  """[in, n] and [n, out] whose product is the change of a layer; None where it is not known in this form."""
  each = [x.factors() if isinstance(x, weights.Additive) else None for x in _chain(w)]
  if None in each or not isinstance(weights.base(w), jax.Array | np.ndarray):
    return None
  pairs = [pair for pairs in each for pair in pairs]
  a = np.concatenate([np.asarray(a).reshape(-1, a.shape[-1]) for a, _ in pairs], -1)
  return a, np.concatenate([np.asarray(b).reshape(b.shape[0], -1) for _, b in pairs])


def _chain(w: Any) -> list[Any]:
  """The adapters around a weight, the outermost first."""
  return [w, *_chain(w.base)] if isinstance(w, weights.Adapter) else []


def _delta(w: Any) -> jax.Array:
  """The change that a layer's adapters make to its weight, in float32."""
  if isinstance(w, fused.Fused):
    return weights.join([_delta(p) for p in w.parts.values()])
  if isinstance(w, weights.Additive):
    return w.layer_delta() + _delta(w.base)
  if isinstance(w, weights.Adapter):
    whole = _in_float32(w)
    return whole.dense() - weights.base(whole)
  return jnp.zeros(w.shape, jnp.float32)


def _in_float32(w: Any) -> Any:
  """The adapters around their base as a dense float32 array."""
  if isinstance(w, weights.Adapter):
    return w.map(lambda _, v: _in_float32(v))
  return weights.dense(w).astype(jnp.float32)


def _offset(w: Any, bias: jax.Array) -> np.ndarray:
  """What a layer's adapters add to its bias, zeros where it has none."""
  return np.asarray(weights.merged_bias(w, bias) - bias)


def _svd(delta: np.ndarray, factors: tuple | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Singular vectors [in, n], values [n] and vectors [n, out], computed from the `factors` if these are smaller."""
  if factors is None or factors[0].shape[1] >= min(delta.shape):
    return tuple(map(np.asarray, jnp.linalg.svd(delta, full_matrices=False)))
  (qa, ra), (qb, rb) = np.linalg.qr(factors[0]), np.linalg.qr(factors[1].T)
  u, s, v = np.linalg.svd(ra @ rb.T)
  return qa @ u, s, v @ qb.T


def _rank(s: np.ndarray, rank: int | None, variance: float | None) -> int:
  """The number of singular values to keep; values that are zero up to rounding are dropped."""
  real = int((s > s[0] * len(s) * np.finfo(np.float32).eps).sum()) if s.size and s[0] else 0
  if rank is not None or not real:
    return min(rank or 0, real)
  explained = np.cumsum(s.astype(np.float64) ** 2)
  return min(int(np.searchsorted(explained, variance * explained[-1])) + 1, real)
