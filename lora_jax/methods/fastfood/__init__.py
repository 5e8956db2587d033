"""Fastfood: a random projection that is never stored (Le et al. 2013, https://arxiv.org/abs/1408.3060).

`H G Pi H B z` per block of q = 2^ceil(log2 d) outputs, blocks one after the other: B are random signs, Pi is a
permutation, G are Gaussians and H is the Walsh-Hadamard matrix. All that is random follows from the bits of a key, so
that up to rounding a projection is the same on every device and mesh.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

RADIX = 5  # log2 of the largest Hadamard factor: up to 32 x 32 a product is bound by memory, not by arithmetic


def size(d: int) -> int:
  """q: the length of a block, the smallest power of two that is not below `d`."""
  return 1 << (d - 1).bit_length()


def hadamard(n: int) -> np.ndarray:
  """The Walsh-Hadamard matrix of a power of two in Sylvester's order, float32 [n, n] of 1 and -1."""
  h = np.ones((1, 1), np.float32)
  while len(h) < n:
    h = np.block([[h, h], [h, -h]])
  return h


def transform(x: jax.Array) -> jax.Array:
  """`hadamard(q)` times float32 [q, ...] over the first axis, which becomes the last: [..., q]; q is a power of two.

  A product with each Kronecker factor. It is not normalised: done twice it gives q x.
  """
  rest, bits = x.shape[1:], x.shape[0].bit_length() - 1
  n_factors = max(math.ceil(bits / RADIX), 1)
  for i in range(n_factors):
    # The part of the axis that was multiplied goes last, so that the next is first, and all are in order at the end.
    n = 1 << (bits // n_factors + (i < bits % n_factors))
    x = jnp.einsum("im,ij->mj", x.reshape(n, -1), hadamard(n), precision="highest")
  return x.reshape(*rest, -1)


def project(key: jax.Array, z: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """The projection of `key`, float32 [*shape], of `z` [d]: linear in z, entries of mean 0 and variance |z|^2 over keys.

  So `project(...) / sqrt(n)` for n numbers in all, be they of one key or many, has nearly orthonormal columns: their
  inner products are off by about 1 / sqrt(n). B and Pi are drawn once, G for every block, so that `Pi H B z` is
  computed once. The longest arrays are as long as the result.
  """
  n, q = math.prod(shape), size(len(z))
  blocks = math.ceil(n / q)
  first, words = _words(key, q, blocks)
  z = jnp.pad(z.astype(jnp.float32), (0, q - len(z)))
  z = transform(jnp.where(first & 1, -z, z))[jnp.argsort(first >> 1)]
  y = transform(_gaussian(words)[:, :blocks] * (z / math.sqrt(q))[:, None])
  return y.reshape(-1)[:n].reshape(shape)


def _words(key: jax.Array, q: int, blocks: int) -> tuple[jax.Array, jax.Array]:
  """uint32 [q] for B and Pi, and [q, blocks / 2] for G: drawn at once, which costs most of the time."""
  words = jax.random.bits(key, (q, 1 + math.ceil(blocks / 2)), jnp.uint32)
  return words[:, 0], words[:, 1:]


def _gaussian(words: jax.Array) -> jax.Array:
  """float32 standard normal numbers [q, 2 k] from uint32 [q, k]: the middles of 2^16 equally likely intervals.

  Every output sums q of them, so that the rounding is not to be seen.
  """
  halves = jnp.concatenate([words >> 16, words & 0xFFFF], 1).astype(jnp.float32)
  return math.sqrt(2) * jax.lax.erf_inv((2 * halves + 1) / (1 << 16) - 1)
