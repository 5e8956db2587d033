"""The adapter that multiplies a layer's inputs or outputs by learned vectors."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec as P

from lora_jax.weights import protocol
from lora_jax.weights.adapters import Adapter


@struct.dataclass
class Scaled(Adapter):
  """`input_scale * W * output_scale`, and the bias beside W times `output_scale`.

  IA3 (Liu et al. 2022, https://arxiv.org/abs/2205.05638, section 3.3). Stacked over layers every field has a leading L.

  Fields:
    base: the adapted weight [*in, *out].
    input_scale: float32 [*in], or None.
    output_scale: float32 [*out], or None.
    outer: how many axes `out` has.
  """

  base: Any
  input_scale: jax.Array | None = None
  output_scale: jax.Array | None = None
  outer: int = struct.field(pytree_node=False, default=1)

  TRAINABLE = ("input_scale", "output_scale")

  def affine(self, spec: str, x: jax.Array, bias: Any = None, dtype: Any = None) -> jax.Array:
    """The scaled product and bias; inputs are the last axes of x, outputs the last of the result."""
    if self.input_scale is not None:
      x = x * self.input_scale.astype(x.dtype)
    y = protocol.affine(spec, x, self.base, bias, dtype)
    return y if self.output_scale is None else y * self.output_scale.astype(y.dtype)

  def dot(self, spec: str, x: jax.Array, dtype: Any = None) -> jax.Array:
    """`affine` without a bias."""
    return self.affine(spec, x, None, dtype)

  def dense(self) -> jax.Array:
    """The merged weight in the dtype of the base; computed in float32."""
    w = protocol.dense(self.base)
    y = w.astype(jnp.float32)
    if self.input_scale is not None:
      y = y * self.input_scale.reshape(*self.input_scale.shape, *(1,) * self.outer)
    if self.output_scale is not None:
      y = y * self._beside_inputs(w.ndim)
    return y.astype(w.dtype)

  def _beside_inputs(self, ndim: int) -> jax.Array:
    """`output_scale` with an axis of length 1 for each input."""
    shape = self.output_scale.shape
    stack = len(shape) - self.outer
    return self.output_scale.reshape(*shape[:stack], *(1,) * (ndim - len(shape)), *shape[stack:])

  def merged_bias(self, bias: jax.Array | None) -> jax.Array | None:
    """The bias times `output_scale`."""
    bias = super().merged_bias(bias)
    return bias if bias is None or self.output_scale is None else bias * self.output_scale

  def place(self, spec: P) -> "Scaled":
    """The scales are split like the inputs and the outputs."""
    placed = super().place(spec)
    if not len(spec):
      return placed
    ends = len(spec) - self.outer
    into = None if self.input_scale is None else P(*spec[: self.input_scale.ndim])
    out = self.output_scale
    out = None if out is None else P(*spec[: out.ndim - self.outer], *spec[ends:])
    return placed.replace(input_scale=into, output_scale=out)
