"""Weights that answer `dot`.

Model code never multiplies by a bare array. It calls `dot("BTD,DNH->BTNH", x, w)`, where `w` is an array or a weight
node: a pytree with `.dot(spec, x, dtype=None)`, `.dense()` and `.shape`. A node may hold any other weight as its
`base`, so m adapters and n quantised formats need m + n classes.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from lora_jax import tree

Weight = Any  # jax.Array or a node


def dot(spec: str, x: jax.Array, w: Weight, dtype: Any = None) -> jax.Array:
  """`einsum(spec, x, w)` for an array or a weight node `w`.

  Operands have the dtype of `x`, sums are float32, and the result has `dtype` (that of `x` if None).
  """
  if is_node(w):
    return w.dot(spec, x, dtype)
  return jnp.einsum(spec, x, w.astype(x.dtype), preferred_element_type=dtype)


def dense(w: Weight) -> jax.Array:
  """The array that `w` stands for, adapters merged in."""
  return w.dense() if is_node(w) else w


def take(w: Weight, ids: jax.Array) -> jax.Array:
  """Rows `ids` of an embedding table [V, D]."""
  return dense(w).at[ids].get(mode="clip")


def is_node(w: Any) -> bool:
  """Whether `w` is a weight node rather than an array."""
  return hasattr(w, "dot") and hasattr(w, "dense")


def base(w: Weight) -> Weight:
  """The innermost weight under the adapters of `w`."""
  while is_node(w) and hasattr(w, "base"):
    w = w.base
  return w


def strip(params: Any) -> Any:
  """The tree with every adapter node replaced by what it adapts: the pretrained model, not copied."""
  return jax.tree.map(base, params, is_leaf=is_node)


def merge(params: Any) -> Any:
  """The tree with every node replaced by its dense array."""
  return jax.tree.map(dense, params, is_leaf=is_node)


def split_spec(spec: str) -> tuple[str, str]:
  """Specs of a low-rank product in place of a full one.

  `"BTNH,NHD->BTD"` becomes `("BTNH,NHR->BTR", "BTR,RD->BTD")`: first contract what x and w share and the output lacks,
  then expand. R stands for the first letter that the spec does not use.
  """
  operands, out = spec.replace(" ", "").split("->")
  x, w = operands.split(",")
  r = next(c for c in "RABCEFGIJKLMOPQSUVWXYZ" if c not in spec)
  inner = "".join(c for c in w if c not in out)
  outer = "".join(c for c in w if c in out)
  kept = "".join(c for c in x if c not in inner)
  return f"{x},{inner}{r}->{kept}{r}", f"{kept}{r},{r}{outer}->{out}"


@struct.dataclass
class LoRA:
  """`W + scale * A B` (Hu et al. 2021, https://arxiv.org/abs/2106.09685, section 4.1), A applied first.

  Stacked over layers every field has a leading L. Layers of smaller rank than R have zero columns in `a` and zero rows
  in `b`; such a pair has zero gradients, so it stays zero through training and needs no mask.

  Fields:
    base: the adapted weight [*in, *out], an array or a node.
    a: float32 [*in, R].
    b: float32 [R, *out].
    scale: float32 []; alpha / rank, or alpha / sqrt(rank) for rsLoRA.
    rank: int32 []; how many of the R columns are in use.
    key: random key []; present only in a training forward, where it switches dropout on.
    dropout: probability that an input element is dropped before `a`.
    rslora: how `scale` follows from alpha; kept for the adapter file.
  """

  base: Weight
  a: jax.Array
  b: jax.Array
  scale: jax.Array
  rank: jax.Array
  key: jax.Array | None = None
  dropout: float = struct.field(pytree_node=False, default=0.0)
  rslora: bool = struct.field(pytree_node=False, default=False)

  def dot(self, spec: str, x: jax.Array, dtype: Any = None) -> jax.Array:
    """`dot(spec, x, base) + scale * (dropout(x) a) b`."""
    spec_a, spec_b = split_spec(spec)
    z = x
    if self.key is not None and self.dropout:
      keep = jax.random.bernoulli(self.key, 1 - self.dropout, x.shape)
      z = jnp.where(keep, x / (1 - self.dropout), 0).astype(x.dtype)
    return dot(spec, x, self.base, dtype) + dot(spec_b, dot(spec_a, z, self.a), self.b * self.scale, dtype)

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of the dense weight."""
    return self.base.shape

  def delta(self) -> jax.Array:
    """`scale * A B`, float32, in the shape of `base`."""
    stacked = self.scale.ndim
    lead = self.a.shape[: self.a.ndim - 1]
    a = self.a.reshape(*self.a.shape[:stacked], -1, self.a.shape[-1])
    b = self.b.reshape(*self.b.shape[: stacked + 1], -1)
    ab = jnp.matmul(a, b, precision="highest") * self.scale[..., None, None]
    return ab.reshape(*lead, *self.b.shape[stacked + 1 :])

  def dense(self) -> jax.Array:
    """The merged weight in the dtype of the base; the sum is taken in float32."""
    w = dense(self.base)
    return (w.astype(jnp.float32) + self.delta()).astype(w.dtype)


def with_dropout(params: Any, key: jax.Array) -> Any:
  """The tree with a random key, folded from its name, in every node that has dropout; others are left as they are.

  Under scan each layer receives its own key: stacked nodes get a key per layer.
  """

  def seed(k, w):
    if not isinstance(w, LoRA) or not w.dropout:
      return w
    key_ = tree.fold(key, k)
    return w.replace(key=jax.random.split(key_, w.scale.shape) if w.scale.ndim else key_)

  return tree.map_named(seed, params, is_leaf=is_node)
