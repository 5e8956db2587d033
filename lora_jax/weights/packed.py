"""Frozen weights in fewer bits than their values: what all formats share."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from lora_jax.weights import grouped
from lora_jax.weights.protocol import Weight


class Packed(Weight):
  """Mixin of frozen weights; a class defines `shape` and `dense`.

  A product keeps its tensors alone for the backward pass, which unpacks them again: neither an input nor a dense copy
  is among the residuals of a step (QLoRA, Dettmers et al. 2023, https://arxiv.org/abs/2305.14314, section 3). By
  default each tensor is split over a mesh, and cut into the parts of a fused matrix, along the axes of the dense
  weight; an axis of length 1 is not split.
  """

  def dot(self, spec: str, x: jax.Array, dtype: Any = None) -> jax.Array:
    """`einsum(spec, x, dense)`; only x is differentiated."""
    return _dot(spec.replace(" ", ""), dtype, x, self)

  def take(self, ids: jax.Array) -> jax.Array:
    """Rows `ids` of a table [V, D]."""
    return jax.lax.stop_gradient(self.dense()).at[ids].get(mode="clip")

  def grouped_dot(self, x: jax.Array, owner: jax.Array, keys: tuple[str, ...] = ()) -> jax.Array:
    """As `Weight.grouped_dot`; one expert a block is dense at a time."""
    del keys
    return grouped.packed_dot(x, self, owner)

  def place(self, spec: P) -> Any:
    """Axes of a tensor are split like those of the weight that are as long, the others not."""

    def one(x):
      if x.ndim != len(self.shape):
        return P()
      axes = zip(spec, x.shape, self.shape, strict=False)
      return P(*(s if n == whole else None for s, n, whole in axes))

    return jax.tree.map(one, self)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _dot(spec, dtype, x, w):
  # The barriers keep a dense copy from existing before its product and from being kept for the other pass: the
  # compiler would otherwise unpack many layers at once, or once for both passes.
  x, w = jax.lax.optimization_barrier((x, w))
  return jnp.einsum(spec, x, w.dense().astype(x.dtype), preferred_element_type=dtype)


def _forward(spec, dtype, x, w):
  return _dot(spec, dtype, x, w), (w, jnp.zeros((0,), x.dtype))


def _backward(spec, dtype, residuals, g):
  w, like = residuals
  g, w = jax.lax.optimization_barrier((g.astype(like.dtype), w))
  operands, out = spec.split("->")
  x, own = operands.split(",")
  return jnp.einsum(f"{out},{own}->{x}", g, w.dense().astype(like.dtype)), None


_dot.defvjp(_forward, _backward)
