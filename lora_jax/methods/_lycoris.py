"""What LoHa and LoKr share, the two methods of LyCORIS (Yeh et al. 2024, https://arxiv.org/abs/2309.14859)."""

import functools
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import errors, families, transformer, tree, weights
from lora_jax.methods import _peft, _targets


def output_mask(key: jax.Array | None, rate: float, shape: tuple[int, ...], rescale: bool) -> jax.Array | float:
  """1 with probability 1 - rate, else 0, float32; divided by its mean if `rescale`. 1.0 without a key."""
  if key is None or not rate:
    return 1.0
  kept = jax.random.bernoulli(key, 1 - rate, shape).astype(jnp.float32)
  return kept / jnp.maximum(kept.mean(), 1 / kept.size) if rescale else kept


def within(x: jax.Array, rank: jax.Array, axis: int) -> jax.Array:
  """`x`, stacked as `rank` is, with zeros from index `rank` of an axis on."""
  index = jax.lax.broadcasted_iota(jnp.int32, x.shape, axis % x.ndim)
  return jnp.where(index < rank.reshape(*rank.shape, *(1,) * (x.ndim - rank.ndim)), x, 0)


def unused(x: jax.Array, rank: jax.Array, columns: int) -> int:
  """How many numbers of `x`, which has `columns` of them, `within` sets to zero."""
  return int(np.sum(columns - np.asarray(rank))) * (x.size // max(rank.size * columns, 1))


def check_dropout(name: str, rate: float) -> None:
  """Raises UserError for what is no probability below 1."""
  if not 0 <= rate < 1:
    raise errors.UserError(f"{name} needs 0 <= config.method.dropout < 1, not {rate}")


def plan(
  name: str,
  params: Any,
  targets: str | Sequence[str],
  rank: int,
  alpha: float,
  rank_pattern: Mapping[str, int] | None,
  alpha_pattern: Mapping[str, float] | None,
) -> tuple[Any, dict[str, tuple[np.ndarray, np.ndarray]]]:
  """(params, {leaf name: (rank, scale) per layer}) of the matrices that `name` adapts; the scale is alpha / rank.

  In the tree fused matrices are split where their parts are meant.
  """
  params = _targets.split(params, targets)
  linear = _targets.matrices(params)
  chosen = _targets.select(targets, linear, "config.method.targets")
  ranks = _targets.values(rank_pattern, rank, linear, "config.method.rank_pattern")
  alphas = _targets.values(alpha_pattern, alpha, linear, "config.method.alpha_pattern")
  if any((ranks[k] < 0).any() or (ranks[k] % 1).any() for k in chosen):
    raise errors.UserError(f"{name} needs whole ranks >= 0")
  used = {k: r for k, hit in chosen.items() if (r := np.where(hit, ranks[k], 0).astype(np.int32)).max() > 0}
  if not used:
    raise errors.UserError(f"{name} adapts nothing: every target has rank 0")
  return params, {k: (r, np.where(r > 0, alphas[k] / np.maximum(r, 1), 0.0)) for k, r in used.items()}


def columns(key: jax.Array, ranks: np.ndarray, size: int, draw: Callable[[jax.Array, tuple], jax.Array]) -> jax.Array:
  """float32 [L, size, R]: column j of layer l is `draw(key of l and j, (size,))`, and zero from the layer's rank on."""
  return _columns(key, jnp.asarray(ranks.reshape(-1)), size, int(ranks.max()), draw)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _columns(key, ranks, size, n, draw):
  def one(layer, j, r):
    return jnp.where(j < r, draw(jax.random.fold_in(jax.random.fold_in(key, layer), j), (size,)), 0.0)

  per_layer = jax.vmap(one, (None, 0, None), -1)
  return jax.vmap(per_layer, (0, None, 0))(jnp.arange(ranks.size), jnp.arange(n), ranks)


def uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """float32, uniform in [-1, 1)."""
  return jax.random.uniform(key, shape, minval=-1.0, maxval=1.0)


def nodes(params: Any, keys: Sequence[families.Key], kind: type) -> dict[families.Key, Any]:
  """{key: node} of the nodes of a class; UserError where one is on what PEFT has no such adapter for: what is no whole
  `nn.Linear`, as GPT-2's Conv1D or a part of a fused matrix, or has another adapter."""
  flat, every = tree.flatten(params, is_leaf=weights.is_node), {}
  weights.map_nodes(lambda k, w: every.setdefault(k, w) if isinstance(w, kind) else w, params)
  found = {key: flat[key.path] for key in keys if key.path in every}
  odd = [key.path for key, w in found.items() if key.transposed or isinstance(w.base, weights.Adapter)]
  odd += sorted(every.keys() - {key.path for key in found})
  if odd:
    raise errors.UserError(
      f"PEFT has {kind.__name__} of whole `nn.Linear`s without other adapters alone, not of {', '.join(odd)}"
    )
  return found


def adapted(key: families.Key, node: Any) -> list[tuple[Any, str, int]]:
  """(index into the node's arrays, module, rank) of each adapted layer."""
  ranks = np.atleast_1d(np.asarray(node.rank))
  return [(i if node.rank.ndim else ..., key.module.format(i), int(r)) for i, r in enumerate(ranks) if r]


def peft_config(found: Mapping[families.Key, Any], params: Any, keys: Sequence[families.Key]) -> dict[str, Any]:
  """What the configs of PEFT's LoHa and LoKr share."""
  ranks, alphas = {}, {}
  for key, node in found.items():
    for i, module, r in adapted(key, node):
      ranks[module], alphas[module] = r, float(f"{float(node.scale[i]) * r:.6g}")
  (rank, rank_pattern), (alpha, alpha_pattern) = _peft.commonest(ranks), _peft.commonest(alphas)
  return {
    "r": rank,
    "alpha": int(alpha) if alpha == int(alpha) else alpha,
    "rank_dropout": next(iter(found.values())).dropout,
    "module_dropout": 0.0,
    "target_modules": _peft.target_modules(ranks, keys, tree.flatten(params, is_leaf=weights.is_node)),
    "rank_pattern": rank_pattern,
    "alpha_pattern": alpha_pattern,
  }


def check_config(config: Mapping, known: Mapping[str, tuple[str, Callable[[Any], bool]]] | None = None) -> None:
  """Raises UserError listing the values of a PEFT config that are wrong, beyond what formats/peft.py checks.

  Args:
    known: {key: (what is expected, whether a value is that)} of the method's own keys.
  """
  number = lambda x: isinstance(x, numbers.Real) and not isinstance(x, bool) and math.isfinite(x)
  rules = {
    "alpha": ("a number", number),
    "rank_dropout": ("a number in [0, 1)", lambda x: x is None or number(x) and 0 <= x < 1),
    "module_dropout": ("0, as no module is dropped whole here", lambda x: not x),
    **(known or {}),
  }
  bad = [
    f"{k} is {config[k]!r:.100}, expected {what}"
    for k, (what, fits) in rules.items()
    if k in config and not fits(config[k])
  ]
  if bad:
    raise errors.UserError("; ".join(bad))


def ranks_of(config: Mapping, modules: Sequence[str], rows: Sequence[Mapping]) -> tuple[list[int], list[float]]:
  """(ranks, scales) that PEFT gives modules; 0 for those without tensors."""
  matched = lambda pattern, m, default: _peft.pattern_value(config.get(pattern), m, config.get(*default))
  ranks = [matched("rank_pattern", m, ("r", 8)) if row else 0 for m, row in zip(modules, rows, strict=True)]
  alphas = [matched("alpha_pattern", m, ("alpha", 8)) for m in modules]
  return ranks, [a / r if r else 0.0 for a, r in zip(alphas, ranks, strict=True)]


def read(
  params: Any,
  keys: Sequence[families.Key],
  left: dict[str, np.ndarray],
  names: Sequence[str],
  build: Callable[[families.Key, Any, list[str], list[dict]], Any],
) -> Any:
  """`params` with `build(key, weight, modules, tensors of each)` in place of the matrices that have tensors.

  Args:
    names: what tensors are called after the module's name.
  """
  flat = tree.flatten(params, is_leaf=weights.is_node)
  for key in keys:
    if not transformer.in_axes(key.path) or key.transposed or key.hf.count("{}") > 1:
      continue
    w = flat[key.path]
    modules = [key.module.format(i) for i in range(w.shape[0] if "{}" in key.hf else 1)]
    rows = [{k: left.pop(k) for n in names if (k := f"{m}.{n}") in left} for m in modules]
    if any(rows):
      flat[key.path] = build(key, w, modules, rows)
  return tree.map_named(lambda k, _: flat[k], params, is_leaf=weights.is_node)
