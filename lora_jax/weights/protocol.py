"""The protocol of weights: what may stand in a model's tree in place of an array."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

AXIS = -2  # along which matrices that are several in one are cut: heads of [D, M, H], gate and up of [D, 2, F]


class Weight:
  """A pytree that stands for an array, which it may never hold.

  Model code calls `dot`, `take` and `affine` of this module, which take arrays and weights alike. A weight may hold
  other weights: an adapter holds the one it adapts as `base`, so m adapters and n packed formats need m + n classes.
  Nobody asks a weight for its class; what a class does differently it says by overriding one of these.

  What a class must define: `dense` and `shape`. Its tensors are its leaves. In a stack of layers all of them have a
  leading axis L, which `jax.lax.scan` slices; so a shape follows from tensors and not from static fields.

  Fields:
    TRAINABLE: names of the fields that hold what training may change. Patterns find these alone: the others describe
      the weight (a scale, a rank, codes) and cannot be trained or placed by accident.
    dropout: the probability that an element of an input is dropped in training. Such a class has a `key` too.
  """

  TRAINABLE: tuple[str, ...] = ()
  dropout = 0.0

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of the dense weight."""
    raise NotImplementedError

  def dense(self) -> jax.Array:
    """The array that the weight stands for."""
    raise NotImplementedError

  def dot(self, spec: str, x: jax.Array, dtype: Any = None) -> jax.Array:
    """`einsum(spec, x, dense)` in `dtype`, or the dtype of x."""
    return dot(spec, x, self.dense(), dtype)

  def affine(self, spec: str, x: jax.Array, bias: Any = None, dtype: Any = None) -> jax.Array:
    """`dot` plus the bias beside the weight, an array or a weight."""
    y = self.dot(spec, x, dtype)
    return y if bias is None else y + dense(bias).astype(y.dtype)

  def merged_bias(self, bias: jax.Array | None) -> jax.Array | None:
    """The bias [*stack, *out] that belongs to `dense`, given the one beside the weight; None is no bias."""
    return bias

  def take(self, ids: jax.Array) -> jax.Array:
    """Rows `ids` of a table [V, D]."""
    return take(self.dense(), ids)

  def grouped_dot(self, x: jax.Array, owner: jax.Array, keys: tuple[str, ...] = ()) -> jax.Array:
    """`x[g] @ self[owner[g]]` for blocks [G, M, D] of rows that share an expert, see `grouped.dot`.

    Args:
      keys: mesh axes over which rows or columns of x are split, so that dropout differs between their devices.
    """
    raise TypeError(f"{type(self).__name__} does not stand for the matrices of experts")

  @property
  def adapted(self) -> Any:
    """The weight that this one adapts, without copying it; None where it is a pretrained weight itself."""
    return None

  def map(self, fn: Callable[[str, Any], Any]) -> "Weight":
    """The weight with `fn(name, weight)` in place of each weight that it holds."""
    del fn
    return self

  def held(self) -> dict[str, Any]:
    """{name: weight} of the weights that it holds."""
    found: dict[str, Any] = {}
    self.map(lambda name, w: found.setdefault(name, w))
    return found

  def at(self, index: Any) -> Any:
    """The weight of one layer, or of an expert of one, of a stack."""
    return jax.tree.map(lambda x: x[index], self)

  def cuts(self) -> tuple[int, ...]:
    """Layers before which a stack has to be cut, because its lower and upper part are scanned apart."""
    return ()

  def cut(self, start: int, end: int) -> "Weight":
    """The outputs from `start` to `end` along `AXIS`."""
    return jax.tree.map(lambda x: x[..., start:end, :], self)

  def join(self, others: list["Weight"]) -> "Weight":
    """The weight of which this one and `others` are the cuts, in their order."""
    return jax.tree.map(lambda *xs: jnp.concatenate(xs, AXIS), self, *others)

  def bind(self, shared: Any) -> "Weight":
    """The weight with what it needs of the arrays that all layers share, `params["shared"]`."""
    del shared
    return self

  def over_trained(self) -> "Weight":
    """The weight where what it adapts is trained too, and nothing may be kept that was computed from its start."""
    return self

  def place(self, spec: P) -> Any:
    """A tree of this structure that says how each tensor is split, from how the dense weight would be.

    Args:
      spec: an entry for each axis of the dense weight, its stack included; or `P()`, which is replicated.
    """
    held = self.held()
    own = jax.tree.map(lambda _: P(), self.map(lambda *_: None))
    return own.map(lambda name, _: place(held[name], spec))

  def clean(self) -> "Weight":
    """The weight with all that pads smaller ranks zeroed."""
    return self

  def n_padding(self, mask: Any) -> int:
    """How many of the numbers that `mask`, a tree of this structure, calls trained are padding."""
    del mask
    return 0

  def idle(self, base: Any) -> "Weight":
    """Another weight `base` in an adapter of this structure that changes nothing and has zero gradients.

    Raises:
      TypeError: there is none.
    """
    raise TypeError(f"{type(self).__name__} has no form that changes nothing")

  @property
  def columns(self) -> int:
    """The rank that its factors have room for; 0 where it has none."""
    return 0

  def padded(self, columns: int) -> "Weight":
    """The adapter with room for a rank of `columns`, and without what only its file needs."""
    del columns
    return self


class Added:
  """Mixin of what methods add to a tree beside weights: soft prompts, bottlenecks, arrays that layers share."""

  TRAINABLE: tuple[str, ...] = ()
  scaled = False  # whether a soft prompt is multiplied by the scale of the embedding

  def bake(self) -> Any:
    """What the model needs of it when nothing is trained, such as a table in place of the network that makes it."""
    return self

  def n_padding(self, mask: Any) -> int:
    """As `Weight.n_padding`."""
    del mask
    return 0


def is_node(w: Any) -> bool:
  """Whether `w` is a weight that is no array, or something that a method has added."""
  return isinstance(w, Weight | Added)


def dot(spec: str, x: jax.Array, w: Any, dtype: Any = None) -> jax.Array:
  """`einsum(spec, x, w)` for an array or a weight `w`.

  Operands have the dtype of `x`, sums are float32, and the result has `dtype`, or the dtype of `x`.
  """
  if isinstance(w, Weight):
    return w.dot(spec, x, dtype)
  return jnp.einsum(spec, x, w.astype(x.dtype), preferred_element_type=dtype)


def affine(spec: str, x: jax.Array, w: Any, bias: Any = None, dtype: Any = None) -> jax.Array:
  """`dot(spec, x, w) + bias`, as a layer computes it."""
  if isinstance(w, Weight):
    return w.affine(spec, x, bias, dtype)
  y = dot(spec, x, w, dtype)
  return y if bias is None else y + dense(bias).astype(y.dtype)


def dense(w: Any) -> jax.Array:
  """The array that `w` stands for, adapters merged in."""
  return w.dense() if isinstance(w, Weight) else w


def take(w: Any, ids: jax.Array) -> jax.Array:
  """Rows `ids` of an embedding table [V, D]."""
  return w.take(ids) if isinstance(w, Weight) else w.at[ids].get(mode="clip")


def base(w: Any) -> Any:
  """The pretrained weight under the adapters of `w`."""
  while isinstance(w, Weight) and w.adapted is not None:
    w = w.adapted
  return w


def merged_bias(w: Any, bias: jax.Array | None) -> jax.Array | None:
  """The bias that belongs to `dense(w)`, given the one beside `w`."""
  return w.merged_bias(bias) if isinstance(w, Weight) else bias


def at(w: Any, index: Any) -> Any:
  """The weight of one layer, or of some, or of an expert of one, of a stack."""
  return w.at(index) if isinstance(w, Weight) else jax.tree.map(lambda x: x[index], w)


def cut(w: Any, start: int, end: int) -> Any:
  """The outputs from `start` to `end` of a matrix or bias, along `AXIS`."""
  return w.cut(start, end) if isinstance(w, Weight) else w[..., start:end, :]


def join(ws: list[Any]) -> Any:
  """The matrix of which `ws` are the cuts."""
  first, *others = ws
  return first.join(others) if isinstance(first, Weight) else jnp.concatenate(ws, AXIS)


def place(w: Any, spec: P) -> Any:
  """How each tensor of `w` is split, from how the dense weight would be; None where there is nothing."""
  if isinstance(w, Weight):
    return w.place(spec)
  return None if w is None else spec
