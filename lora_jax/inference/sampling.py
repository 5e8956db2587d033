"""How the next token is chosen: temperature, top-k, top-p, a ban on repeated n-grams; and its random keys."""

import collections
import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct


@struct.dataclass
class Sampling:
  """How tokens are chosen; all are arrays, so that other values do not compile anew.

  Fields:
    temperature: float32 [], what logits are divided by; 0 takes the most likely token.
    top_k: int32 [], only so many of the most likely tokens; 0 is all.
    top_p: float32 [], only the most likely tokens whose probabilities reach this sum (Holtzman et al. 2019,
      https://arxiv.org/abs/1904.09751, section 3.1); the one that crosses it is kept.
    keys: random keys [B].
  """

  temperature: jax.Array
  top_k: jax.Array
  top_p: jax.Array
  keys: jax.Array


def filter_logits(logits: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
  """Logits [B, V] with -inf outside the top k, and of those outside the top p."""
  V = logits.shape[-1]
  order = jnp.argsort(logits, axis=-1)
  rising = jnp.take_along_axis(logits, order, axis=-1)
  kth = jax.lax.dynamic_index_in_dim(rising, V - jnp.where(top_k > 0, jnp.minimum(top_k, V), V), axis=-1)
  below = jnp.cumsum(jax.nn.softmax(jnp.where(rising < kth, -jnp.inf, rising)), axis=-1)
  kept = (rising >= kth) & ((below > 1 - top_p) | (jnp.arange(V) == V - 1))
  return jnp.where(jnp.put_along_axis(jnp.zeros_like(kept), order, kept, -1, inplace=False), logits, -jnp.inf)


def choose(logits: jax.Array, sampling: Sampling | None, count: jax.Array) -> jax.Array:
  """The next tokens int32 [B], after `count` others, for logits [B, V]; None takes the most likely ones."""

  def sample(x):
    x = x / sampling.temperature
    limited = (sampling.top_k > 0) | (sampling.top_p < 1)
    x = jax.lax.cond(limited, filter_logits, lambda x, *_: x, x, sampling.top_k, sampling.top_p)
    return jax.vmap(jax.random.categorical)(jax.vmap(jax.random.fold_in, (0, None))(sampling.keys, count), x)

  most_likely = lambda x: x.argmax(-1)
  if sampling is None:
    return most_likely(logits).astype(jnp.int32)
  return jax.lax.cond(sampling.temperature > 0, sample, most_likely, logits).astype(jnp.int32)


def ban_repeats(logits: jax.Array, ids: jax.Array, lengths: jax.Array, n: int) -> jax.Array:
  """Logits [B, V] without the tokens that would repeat an n-gram (Paulus et al. 2017, section 2.5).

  Args:
    ids: int [B, S], texts so far, of `lengths` [B]; negative ones are soft tokens.
    n: 0 bans nothing; static.
  """
  if n == 0 or n > ids.shape[1]:
    return logits
  starts = jnp.arange(ids.shape[1] - n + 1)
  match = starts + n <= lengths[:, None]
  for i in range(n - 1):
    last = jnp.take_along_axis(ids, jnp.maximum(lengths - (n - 1) + i, 0)[:, None], axis=1)
    match &= ids[:, i : i + len(starts)] == last
  banned = jnp.where(match & (ids[:, n - 1 :] >= 0), ids[:, n - 1 :], logits.shape[1])
  return logits.at[jnp.arange(len(ids))[:, None], banned].set(-jnp.inf, mode="drop")


def keys(seed: int, rows: Sequence[np.ndarray]) -> jax.Array:
  """A random key for each prompt's ids: it depends on them and the seed alone; that of a copy on its number too."""
  copies, found = collections.Counter(), []
  for row in rows:
    name = zlib.crc32(np.asarray(row, np.int32).tobytes())
    found.append((name, copies[name]))
    copies[name] += 1
  fold = lambda x: jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), x[0]), x[1])
  return jax.vmap(fold)(np.array(found, np.uint32))
