"""Code shared by LoHa and LoKr, two methods of LyCORIS (Yeh et al. 2024, https://arxiv.org/abs/2309.14859)."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import errors
from lora_jax.methods import targeting


def output_mask(key: jax.Array | None, rate: float, shape: tuple[int, ...], rescale: bool) -> jax.Array | float:
  """Returns a float32 mask that is 1 with probability 1 - rate, else 0; 1.0 without a key or a rate.

  With `rescale` it is divided by its mean.
  """
  if key is None or not rate:
    return 1.0
  kept = jax.random.bernoulli(key, 1 - rate, shape).astype(jnp.float32)
  return kept / jnp.maximum(kept.mean(), 1 / kept.size) if rescale else kept


def within(x: jax.Array, rank: jax.Array, axis: int) -> jax.Array:
  """Returns `x` with zeros from index `rank` of an axis on; x has the leading axes of `rank`."""
  index = jax.lax.broadcasted_iota(jnp.int32, x.shape, axis % x.ndim)
  return jnp.where(index < rank.reshape(*rank.shape, *(1,) * (x.ndim - rank.ndim)), x, 0)


def unused(x: jax.Array, rank: jax.Array, columns: int) -> int:
  """Returns how many numbers of `x`, which has `columns` columns, `within` sets to zero."""
  return int(np.sum(columns - np.asarray(rank))) * (x.size // max(rank.size * columns, 1))


def check_dropout(name: str, rate: float) -> None:
  """Raises UserError unless `rate` is at least 0 and below 1."""
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
  """Returns (params, {leaf name: (rank, scale) per layer}) of the matrices that `name` adapts.

  The scale is alpha / rank. Fused matrices in params are split if `targets` names one of their parts.
  """
  params = targeting.split(params, targets)
  linear = targeting.matrices(params)
  chosen = targeting.select(targets, linear, "config.method.targets")
  ranks = targeting.values(rank_pattern, rank, linear, "config.method.rank_pattern")
  alphas = targeting.values(alpha_pattern, alpha, linear, "config.method.alpha_pattern")
  if any((ranks[k] < 0).any() or (ranks[k] % 1).any() for k in chosen):
    raise errors.UserError(f"{name} needs whole ranks >= 0")
  used = {k: r for k, hit in chosen.items() if (r := np.where(hit, ranks[k], 0).astype(np.int32)).max() > 0}
  if not used:
    raise errors.UserError(f"{name} adapts nothing: every target has rank 0")
  return params, {k: (r, np.where(r > 0, alphas[k] / np.maximum(r, 1), 0.0)) for k, r in used.items()}


def columns(key: jax.Array, ranks: np.ndarray, size: int, draw: Callable[[jax.Array, tuple], jax.Array]) -> jax.Array:
  """Returns float32 [L, size, R]: column j of layer l is `draw(key of l and j, (size,))`, or zero beyond its rank."""
  return _columns(key, jnp.asarray(ranks.reshape(-1)), size, int(ranks.max()), draw)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _columns(key, ranks, size, n, draw):
  def one(layer, j, r):
    return jnp.where(j < r, draw(jax.random.fold_in(jax.random.fold_in(key, layer), j), (size,)), 0.0)

  per_layer = jax.vmap(one, (None, 0, None), -1)
  return jax.vmap(per_layer, (0, None, 0))(jnp.arange(ranks.size), jnp.arange(n), ranks)


def uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Returns float32 values uniform in [-1, 1)."""
  return jax.random.uniform(key, shape, minval=-1.0, maxval=1.0)
