"""Fastfood: a random projection that is never stored (Le et al. 2013, https://arxiv.org/abs/1408.3060).

The output is a sequence of blocks of q = 2^ceil(log2 d) numbers, each `H G Pi H B z`: B holds random signs, Pi is a
permutation, G holds Gaussians and H is the Walsh-Hadamard matrix. The bits of a key determine all random values, so a
projection is the same on every device and mesh, up to rounding.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

RADIX = 5  # log2 of the largest Hadamard factor; up to 32 x 32 a product is limited by memory, not by arithmetic


def size(d: int) -> int:
  """Returns q, the length of a block: the smallest power of two that is at least `d`."""
  return 1 << (d - 1).bit_length()


def hadamard(n: int) -> np.ndarray:
  """Returns the Walsh-Hadamard matrix in Sylvester's order, float32 [n, n] of 1 and -1; n is a power of two."""
  h = np.ones((1, 1), np.float32)
  while len(h) < n:
    h = np.block([[h, h], [h, -h]])
  return h


def transform(x: jax.Array) -> jax.Array:
  """Returns `hadamard(q)` times x, float32 [q, ...], over the first axis, which becomes the last: [..., q].

  q is a power of two. It multiplies by one Kronecker factor at a time. It is not normalised: applied twice it gives
  q x.
  """
  rest, bits = x.shape[1:], x.shape[0].bit_length() - 1
  n_factors = max(math.ceil(bits / RADIX), 1)
  for i in range(n_factors):
    # The multiplied part of the axis goes last, so the next part is first, and all are in order at the end.
    n = 1 << (bits // n_factors + (i < bits % n_factors))
    x = jnp.einsum("im,ij->mj", x.reshape(n, -1), hadamard(n), precision="highest")
  return x.reshape(*rest, -1)


def project(key: jax.Array, z: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Returns a random projection of `z` [d], float32 [*shape]; it is linear in z and `key` determines it.

  Over keys, its entries have mean 0 and variance |z|^2. `project(...) / sqrt(n)`, for n numbers of one or many keys,
  has nearly orthonormal columns: their inner products are off by about 1 / sqrt(n). B and Pi are drawn once and G for
  every block, so `Pi H B z` is computed once. No array is longer than the result.
  """
  n, q = math.prod(shape), size(len(z))
  blocks = math.ceil(n / q)
  first, words = _words(key, q, blocks)
  z = jnp.pad(z.astype(jnp.float32), (0, q - len(z)))
  z = transform(jnp.where(first & 1, -z, z))[jnp.argsort(first >> 1)]
  y = transform(_gaussian(words)[:, :blocks] * (z / math.sqrt(q))[:, None])
  return y.reshape(-1)[:n].reshape(shape)


def _words(key: jax.Array, q: int, blocks: int) -> tuple[jax.Array, jax.Array]:
  """Returns uint32 [q] for B and Pi, and [q, blocks / 2] for G, from one draw, which takes most of the time."""
  words = jax.random.bits(key, (q, 1 + math.ceil(blocks / 2)), jnp.uint32)
  return words[:, 0], words[:, 1:]


def _gaussian(words: jax.Array) -> jax.Array:
  """Returns float32 normal numbers [q, 2 k] from uint32 [q, k]: the centres of 2^16 equally likely intervals.

  Every output sums q of them, so this rounding has no visible effect.
  """
  halves = jnp.concatenate([words >> 16, words & 0xFFFF], 1).astype(jnp.float32)
  return math.sqrt(2) * jax.lax.erf_inv((2 * halves + 1) / (1 << 16) - 1)
