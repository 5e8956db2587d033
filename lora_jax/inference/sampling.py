"""Chooses the next token: temperature, top-k, top-p, a ban on repeated n-grams; and the random keys of sampling."""

import collections
import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct


@struct.dataclass
class Sampling:
  """Settings of sampling. All are arrays, so other values do not recompile the program.

  Fields:
    temperature: float32 [], divides the logits; 0 takes the most likely token.
    top_k: int32 [], number of most likely tokens to choose from; 0 is all.
    top_p: float32 [], choose from the most likely tokens whose probabilities reach this sum (Holtzman et al. 2019,
      https://arxiv.org/abs/1904.09751, section 3.1). The token that crosses it is kept.
    keys: random keys [B].
  """

  temperature: jax.Array
  top_k: jax.Array
  top_p: jax.Array
  keys: jax.Array


def filter_logits(logits: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
  """The logits float32 [B, V], with -inf outside the top k, and outside the top p of these."""
  V = logits.shape[-1]
  order = jnp.argsort(logits, axis=-1)
  rising = jnp.take_along_axis(logits, order, axis=-1)
  kth = jax.lax.dynamic_index_in_dim(rising, V - jnp.where(top_k > 0, jnp.minimum(top_k, V), V), axis=-1)
  below = jnp.cumsum(jax.nn.softmax(jnp.where(rising < kth, -jnp.inf, rising)), axis=-1)
  kept = (rising >= kth) & ((below > 1 - top_p) | (jnp.arange(V) == V - 1))
  return jnp.where(jnp.put_along_axis(jnp.zeros_like(kept), order, kept, -1, inplace=False), logits, -jnp.inf)


def choose(logits: jax.Array, sampling: Sampling | None, count: jax.Array) -> jax.Array:
  """The next tokens int32 [B] for logits float32 [B, V].

  Args:
    sampling: None takes the most likely tokens.
    count: int32 [], number of tokens chosen before; each count draws its own noise.
  """

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
  """The logits float32 [B, V], with -inf for tokens that would repeat an n-gram (Paulus et al. 2017, section 2.5).

  Args:
    ids: int32 [B, S], the texts so far; negative ids are soft tokens.
    lengths: int32 [B], their lengths.
    n: static; 0 bans nothing.
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
  """Random keys [B], one for each prompt's ids.

  A key depends only on the seed, the ids, and how many earlier rows have the same ids.
  """
  copies = collections.Counter()
  found = []
  for row in rows:
    name = zlib.crc32(np.asarray(row, np.int32).tobytes())
    found.append((name, copies[name]))
    copies[name] += 1

  def fold(x):
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), x[0]), x[1])

  return jax.vmap(fold)(np.array(found, np.uint32))
