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
  """The tree with `weights.LoRA` in place of all other nodes and of IA3's scales, and the fit of each weight.

  Layers may have different ranks: singular values that are zero up to rounding are dropped. A weight that has no other
  singular values in any layer becomes plain. All experts of a layer have the largest rank that one of them needs. The
  parts of a split fused matrix have their own ranks. One layer at a time is made dense, in float32.

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
  steps = {"adapter", "prompt", "prefix"}
  if odd := [k for k in tree.names(params, is_leaf=weights.is_node) if set(k.split("/")) & steps]:
    raise errors.UserError(f"LoRA cannot stand for these, which are no change of weights: {', '.join(odd)}")
  found: dict[str, tuple] = {}

  def convert(name, w, scales, bias):
    found[name] = _converted(name, w, scales, bias, shared=params.get("shared"), rank=rank, variance=variance)

  converted = _visit(params, "", convert)
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
  """The tree without nodes and scales. Calls `convert(name, weight, scales, bias)` for each weight that has some."""
  if not isinstance(params, dict):
    return params
  p = {k: _visit(v, f"{where}{k}/", convert) for k, v in params.items() if k not in weights.EXTRAS}
  scales = {k: params[k] for k in weights.SCALES if k in params}
  w = params.get("kernel")
  name = f"{where}kernel"
  if isinstance(w, fused.Fused) and not scales:
    parts = {k: v for k, v in w.parts.items() if isinstance(v, weights.Adapter)}
    for part, v in parts.items():
      convert(f"{name}/{part}", v, {}, None)
    return p | {"kernel": w.map(lambda _, v: weights.base(v)) if parts else w.base}
  if scales or isinstance(w, weights.Adapter):
    convert(name, w, scales, params.get("bias"))
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

    def part(x):
      return x / np.where(scale > 0, scale, 1).reshape(*scale.shape, *(1,) * (x.ndim - scale.ndim))

    bias = part(w.bias) if w.bias is not None else None
    if biased and bias is None and w.n_experts_axes() == 0:
      bias = np.zeros((*scale.shape, *w.b.shape[scale.ndim + 1 :]))
    arrays = dict(a=w.a, b=part(w.b), scale=scale, bias=bias)
    return w.replace(**{k: None if x is None else jnp.asarray(x, jnp.float32) for k, x in arrays.items()})

  return {k: node(w.replace(rank=jnp.asarray(w.rank, jnp.int32))) for k, w in made.items()}


def _converted(
  name: str, w: Any, scales: Mapping, bias: Any, *, shared: Any, rank: int | None, variance: float | None
) -> tuple[weights.LoRA | None, Fit]:
  """LoRA with numpy arrays and scale 1 for a weight, or None if nothing changes it, and how well it fits.

  `shared` holds the arrays that all layers share.
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
    layer = jax.tree.map(lambda x: x[i], (w, dict(scales), bias))
    delta, offset = _change(weights.bind(layer[0], shared), *layer[1:])
    factors = None if scales or experts else _factors(layer[0])
    offsets.append(np.zeros(outer, np.float32) if offset is None else np.asarray(offset))
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
    return None, fit

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
  return node, fit


def _change(w: Any, scales: Mapping[str, jax.Array], bias: jax.Array | None) -> tuple[np.ndarray, jax.Array | None]:
  """What is added to a layer's weight, in float32, and what is added to its outputs, or None."""
  if any(getattr(x, "use", "") for x in _chain(w)):
    raise errors.UserError(
      "embedding and head share a table and an adapter is on one use of it: it is no change of the weight"
    )
  delta, offset = _delta(w), _offset(w)
  if not scales:
    return np.asarray(delta), offset
  base = weights.dense(weights.base(w)).astype(jnp.float32)
  given = [x for x in (bias, offset) if x is not None]
  changed = base + delta
  outputs = sum(given) if given else None
  for name, scale in scales.items():
    changed = weights.scaled(changed, scale.astype(jnp.float32), name, 0)
    if name == "output_scale" and given:
      outputs = weights.scaled(outputs, scale.astype(jnp.float32), name, 0)
  return np.asarray(changed - base), outputs if bias is None else outputs - bias


def _factors(w: Any) -> tuple[np.ndarray, np.ndarray] | None:
  """[in, n] and [n, out] whose product is the change of a layer that only LoRA adapts; None for other layers."""
  chain = _chain(w)
  if not all(isinstance(x, weights.LoRA) for x in chain) or isinstance(chain[-1].base, fused.Fused):
    return None
  plain = []
  for x in chain:
    if x.start is None:
      plain.append(x)
    else:  # a b - a0 b0 as a sum of differences, which keeps its precision where both are large
      a0, b0 = x.start
      x = x.replace(start=None)
      plain += [x.replace(b=x.b - b0), x.replace(a=x.a - a0, b=b0)]
  each = [fused.factors(jax.tree.map(lambda x: x[None], x), (0,)) for x in plain]
  a = np.concatenate([a.reshape(math.prod(a.shape[:-1]), a.shape[-1]) for a, _, _ in each], -1)
  return a, np.concatenate([s * b.reshape(len(b), math.prod(b.shape[1:])) for _, b, s in each])


def _chain(w: Any) -> list[Any]:
  """The adapters around a weight, the outermost first."""
  return [w, *_chain(w.base)] if isinstance(w, weights.Adapter) else []


def _delta(w: Any) -> jax.Array:
  """The change that a layer's adapters make to its weight, in float32."""
  if isinstance(w, fused.Fused):
    return jnp.concatenate([_delta(p) for p in w.parts.values()], fused.AXIS)
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


def _offset(w: Any) -> jax.Array | None:
  """The bias that a layer's adapters add to its outputs, or None."""
  if isinstance(w, fused.Fused) and any(_offset(p) is not None for p in w.parts.values()):
    raise errors.UserError("LoRA with a bias on a part of a matrix whose outputs are also scaled cannot be converted")
  found = [x.offset() for x in _chain(w) if hasattr(x, "offset")]
  return sum(found) if (found := [x for x in found if x is not None]) else None


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
