"""The low-rank adapter."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import PartitionSpec as P

from lora_jax import errors, sharding
from lora_jax.weights import grouped
from lora_jax.weights.adapters import Additive, dropout, split_spec
from lora_jax.weights.protocol import dot, take


@struct.dataclass
class LoRA(Additive):
  """`W + scale * A B` (Hu et al. 2021, https://arxiv.org/abs/2106.09685, section 4.1), A applied first.

  Stacked over layers every field has a leading L. Layers of smaller rank than R have zero columns in `a` and zero rows
  in `b`; such a pair has zero gradients, so it stays zero through training and needs no mask. The matrices of experts
  have an E before the axes of `a` and `b` besides.

  Fields:
    base: the adapted weight [*in, *out], an array or a node; of an embedding [V, D], V are its inputs.
    a: float32 [*in, R].
    b: float32 [R, *out].
    scale: float32 []; alpha / rank, or alpha / sqrt(rank) for rsLoRA.
    rank: int32 []; how many of the R columns are in use.
    key: random key []; present only in a training forward, where it switches dropout on.
    start: None, or (a, b) whose product is subtracted: what `a` and `b` were where they do not start at zero, as in
      PiSSA, so that the base stays what it is.
    bias: None, or float32 [*out], which is added to what B gives.
    dropout: probability that an input element is dropped before `a`; a row of an embedding is no such input.
    rslora: how `scale` follows from alpha; kept for the adapter file.
    use: of a table that embeds and, transposed, is the head: "embed" or "head" where that use alone is adapted.
  """

  TRAINABLE = ("a", "b", "bias")

  base: Any
  a: jax.Array
  b: jax.Array
  scale: jax.Array
  rank: jax.Array
  key: jax.Array | None = None
  start: tuple[jax.Array, jax.Array] | None = None
  bias: jax.Array | None = None
  dropout: float = struct.field(pytree_node=False, default=0.0)
  rslora: bool = struct.field(pytree_node=False, default=False)
  use: str = struct.field(pytree_node=False, default="")

  def dot(self, spec: str, x: jax.Array, dtype: Any = None) -> jax.Array:
    """`dot(spec, x, base)` and the change."""
    y = dot(spec, x, self.base, dtype)
    return y if self.use == "embed" else y + self.change(spec, x, dtype)

  def change(self, spec: str, x: jax.Array, dtype: Any = None) -> jax.Array:
    """`scale * ((dropout(x) a) b - (x a0) b0 + bias)`, (a0, b0) being `start`."""
    kept, b = dropout(x, self.dropout, self.key), self.b * self.scale
    if self.start is None:
      y = _low_rank(spec, kept, self.a, b, dtype)
    else:
      # As differences, taken in float32: a and b would lose what they have learned where large products cancel.
      a0, b0 = self.start[0], self.start[1] * self.scale
      y = _low_rank(spec, kept, self.a, b - b0, dtype) + _low_rank(spec, kept, self.a - a0, b0, dtype)
      y = y if kept is x else y + _low_rank(spec, kept - x, a0, b0, dtype)
    return y if self.bias is None else y + self.offset().astype(y.dtype)

  def take(self, ids: jax.Array) -> jax.Array:
    """Rows `ids` of an embedding table [V, D]; sums are float32."""
    y = take(self.base, ids)
    if self.use == "head":
      return y
    change = jnp.tensordot(self.a.at[ids].get(mode="clip"), self.b * self.scale, 1)
    return (y.astype(jnp.float32) + change).astype(y.dtype)

  def offset(self) -> jax.Array | None:
    """What the adapter adds to every output, [*out]."""
    return None if self.bias is None else self.bias * _align(self.scale, self.bias)

  def merged_bias(self, bias: jax.Array | None) -> jax.Array | None:
    """The bias beside the weight plus `offset`; UserError where there is no bias to add it to."""
    bias, offset = super().merged_bias(bias), self.offset()
    if offset is not None and bias is None:
      raise errors.UserError("the adapter has a bias, and the layer has none that it could be merged into")
    return bias if offset is None else bias + offset

  def grouped_dot(self, x: jax.Array, owner: jax.Array, keys: tuple[str, ...] = ()) -> jax.Array:
    """As `Weight.grouped_dot`, through the factors of the experts: `a` [E, D, R], `b` [E, R, F]."""
    dropped = x
    if self.key is not None:
      key, *rate = self.key if isinstance(self.key, tuple) else (self.key,)
      for axis in keys:
        key = jax.random.fold_in(key, jax.lax.axis_index(axis))
      dropped = dropout(x, self.dropout, (key, *rate) if rate else key)
    y = grouped.dot(x, self.base, owner, keys)
    pair = lambda x, a, b: grouped.dot(grouped.dot(x, a, owner), b * self.scale, owner)
    if self.start is None:
      return y + pair(dropped, self.a, self.b)
    a, b = self.start  # as differences, see `change`
    y += pair(dropped, self.a, self.b - b) + pair(dropped, self.a - a, b)
    return y if dropped is x else y + pair(dropped - x, a, b)

  def layer_delta(self) -> jax.Array:
    """`scale * (a b - a0 b0)`, float32, in the shape of a `base` that is not stacked."""
    product = lambda a, b: jnp.tensordot(a, b, 1, precision="highest")
    product = jax.vmap(product) if self.n_experts_axes() else product
    if self.start is None:
      return self.scale * product(self.a, self.b)
    a0, b0 = self.start
    return self.scale * (product(self.a, self.b - b0) + product(self.a - a0, b0))

  def dense(self) -> jax.Array:
    """The merged weight in the dtype of the base; UserError where one use of a table alone is adapted."""
    self._check_use()
    return super().dense()

  def _check_use(self) -> None:
    if self.use:
      raise errors.UserError(
        f"an adapter of the {self.use} alone cannot be merged into a table that embedding and head share; train it "
        "with tied=True, or keep it apart"
      )

  def factors(self) -> list[tuple[jax.Array, jax.Array]] | None:
    """[(a, b * scale)] of a weight that is not stacked, and two differences where there is a `start`.

    Raises:
      UserError: one use of a table alone is adapted, which no change of the table is.
    """
    self._check_use()
    if self.n_experts_axes():
      return None
    if self.start is None:
      return [(self.a, self.b * self.scale)]
    a, b = self.start
    return [(self.a, (self.b - b) * self.scale), (self.a - a, b * self.scale)]

  def layer(self, index: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, float]:
    """(a, b, scale) of a layer, without the columns that pad it; further ones subtract what it starts from."""
    rank, at = int(self.rank[index]), self.n_experts_axes()
    pairs = [(self.a, self.b)]
    if self.start is not None:
      pairs.append((self.start[0], -self.start[1]))
    first = [np.asarray(a[index])[..., :rank] for a, _ in pairs]
    second = [np.take(np.asarray(b[index]), np.arange(rank), at) for _, b in pairs]
    return np.concatenate(first, -1), np.concatenate(second, at), float(self.scale[index])

  def n_experts_axes(self) -> int:
    """How many axes, of experts, `a` and `b` both have before their own: 0 or 1."""
    stack = self.scale.ndim
    return self.a.ndim + self.b.ndim - 2 * stack - 2 - (len(self.base.shape) - stack)

  def place(self, spec: P) -> "LoRA":
    """`a` is split like the inputs, `b` and the bias like the outputs."""
    placed = super().place(spec)
    if not len(spec):
      return placed
    lead = self.a.ndim + self.b.ndim - 2 - len(spec)
    inner = self.a.ndim - 1
    a, b = P(*spec[:inner], None), P(*spec[:lead], None, *spec[inner:])
    bias = None if self.bias is None else P(*spec[: self.scale.ndim], *spec[inner:])
    return placed.replace(a=a, b=b, bias=bias, start=None if self.start is None else (a, b))

  @property
  def columns(self) -> int:
    """The rank that the factors have room for."""
    return self.a.shape[-1]

  def padded(self, columns: int) -> "LoRA":
    """The adapter with zeros for further columns of `a` and rows of `b`, on the host; `rslora` is forgotten."""
    more = columns - self.columns
    axis = self.scale.ndim + self.n_experts_axes()

    def pad(x, at):
      return np.pad(sharding.to_host(x), [(0, more if i == at else 0) for i in range(x.ndim)])

    if not more:
      return self.replace(rslora=False)
    pair = lambda a, b: (pad(a, a.ndim - 1), pad(b, axis))
    a, b = pair(self.a, self.b)
    return self.replace(a=a, b=b, start=self.start and pair(*self.start), rslora=False)

  def clean(self) -> "LoRA":
    """The node with the columns of `a` and rows of `b` that no rank uses, and the bias of such layers, zeroed."""
    used = jnp.arange(self.a.shape[-1]) < self.rank[..., None]
    axis = self.scale.ndim + self.n_experts_axes()
    in_b = jnp.expand_dims(used, [*range(self.scale.ndim, axis), *range(axis + 1, self.b.ndim)])
    a = jnp.where(jnp.expand_dims(used, [*range(self.scale.ndim, self.a.ndim - 1)]), self.a, 0)
    bias = None if self.bias is None else jnp.where(_align(self.rank, self.bias) > 0, self.bias, 0)
    return self.replace(a=a, b=jnp.where(in_b, self.b, 0), bias=bias)

  def n_padding(self, mask: "LoRA") -> int:
    """How many of the numbers that `mask` calls trained pad smaller ranks."""
    rank, columns = np.asarray(self.rank), self.a.shape[-1]
    each = lambda x: x.size // (columns * rank.size)
    n = sum(each(x) for x, trained in ((self.a, mask.a), (self.b, mask.b)) if trained) * int(np.sum(columns - rank))
    idle = int(np.sum(rank == 0)) * (self.bias.size // rank.size) if mask.bias else 0
    return n + idle


def _align(scale: jax.Array, x: jax.Array) -> jax.Array:
  """`scale` with axes of length 1 after its own, as many as x has."""
  return scale.reshape(*scale.shape, *(1,) * (x.ndim - scale.ndim))


def _low_rank(spec, x, a, b, dtype):
  """`x a b`; b comes first where x has the axes of b: a tied head multiplies by the transposed table."""
  operands, out = spec.replace(" ", "").split("->")
  if set(operands.split(",")[1][: a.ndim - 1]) <= set(out):
    a, b = jnp.moveaxis(b, 0, -1), jnp.moveaxis(a, -1, 0)
  spec_a, spec_b = split_spec(spec)
  return dot(spec_b, dot(spec_a, x, a), b, dtype)
