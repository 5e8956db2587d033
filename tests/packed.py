"""A packed weight, as small as one can be: int8 codes and a scale a channel."""

import jax
import jax.numpy as jnp
from flax import struct

from lora_jax import tree, weights
from lora_jax.model import architecture


@struct.dataclass
class Int8(weights.Packed):
  """`codes * scale`: codes int8 [*in, *out], scale [1, ..., *out] in the dtype of the model."""

  codes: jax.Array
  scale: jax.Array

  @property
  def shape(self):
    return self.codes.shape

  def dense(self):
    return self.codes.astype(self.scale.dtype) * self.scale


def pack(name, w):
  """A matrix of one layer, or of one expert of it, packed; other leaves as they are."""
  if not name.startswith(("layers/", "encoder/")) or not (inner := architecture.in_axes(name)):
    return w
  largest = jnp.abs(w).max(range(inner), keepdims=True).astype(jnp.float32)
  codes = jnp.round(w / jnp.maximum(largest, 1e-9) * 127)
  return Int8(codes.astype(jnp.int8), (largest / 127).astype(w.dtype))


def packed(params):
  """A model's tree with its matrices packed."""

  def leaf(name, w):
    one = lambda w: pack(name, w)
    for _ in range(architecture.stack_axes(name)):
      one = jax.vmap(one)
    return one(w)

  return tree.map_named(leaf, params)
