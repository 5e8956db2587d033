"""Weights that adapt another one: their base, and what an additive one adds to it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.weights import grouped, protocol
from lora_jax.weights.protocol import Weight, dot


class Adapter(Weight):
  """Mixin of weights that adapt another one, their field `base`.

  Fields:
    start: what of it is subtracted where it does not start at nothing, and therefore belongs to what is trained.
  """

  start = None

  @property
  def adapted(self) -> Any:
    """The weight that this one adapts."""
    return self.base

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of the dense weight."""
    return self.base.shape

  def map(self, fn: Callable[[str, Any], Any]) -> "Adapter":
    """The adapter with `fn("base", base)` in place of its base."""
    return self.replace(base=fn("base", self.base))

  def merged_bias(self, bias: jax.Array | None) -> jax.Array | None:
    """The bias that belongs to `dense`, given the one beside the weight."""
    return protocol.merged_bias(self.base, bias)

  def grouped_dot(self, x: jax.Array, owner: jax.Array, keys: tuple[str, ...] = ()) -> jax.Array:
    """As `Weight.grouped_dot`, with the merged matrices."""
    del keys
    return grouped.dot(x, self.dense(), owner)

  def over_trained(self) -> "Adapter":
    """The adapter where what it adapts is trained too."""
    return self.map(lambda _, w: w.over_trained() if isinstance(w, Weight) else w)

  def cuts(self) -> tuple[int, ...]:
    """Layers before which the stack has to be cut."""
    return self.base.cuts() if isinstance(self.base, Weight) else ()


class Additive(Adapter):
  """Mixin of weights that stand for `base + delta()`.

  They have a field `scale`, float32 [] or, stacked over layers, [L]: 0 in layers that are not adapted. A class defines
  `change`, what it adds to an output, and `layer_delta`, what it adds to a weight that is not stacked.
  """

  def dot(self, spec: str, x: jax.Array, dtype: Any = None) -> jax.Array:
    """`dot(spec, x, base)` and the change."""
    return dot(spec, x, self.base, dtype) + self.change(spec, x, dtype)

  def change(self, spec: str, x: jax.Array, dtype: Any = None) -> jax.Array:
    """What the adapter adds to the output for an input x."""
    return dot(spec, x, self.layer_delta(), dtype)

  def delta(self) -> jax.Array:
    """What the adapter adds to the weight, float32, in the shape of `base`."""
    return jax.vmap(lambda w: w.layer_delta())(self) if self.scale.ndim else self.layer_delta()

  def dense(self) -> jax.Array:
    """The merged weight in the dtype of the base; the sum is taken in float32."""
    w = protocol.dense(self.base)
    return (w.astype(jnp.float32) + self.delta()).astype(w.dtype)

  def factors(self) -> list[tuple[jax.Array, jax.Array]] | None:
    """Pairs a [*in, R], b [R, *out] of a weight that is not stacked, whose products sum to its delta; None if it has
    no such form."""
    return None

  def idle(self, base: Any) -> "Additive":
    """Another weight in an adapter of this structure, of zeros: it changes nothing."""
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), self.replace(base=None))
    return zeros.replace(base=base)


def dropout(x: jax.Array, rate: float, key: Any) -> jax.Array:
  """Elements zeroed with probability `rate`, the others divided by 1 - rate; x itself without a key.

  Args:
    x: [B, ...]. What is dropped at a position does not depend on how many rows follow, or how far they are padded.
    key: a random key, or (key, rate): a traced rate in place of the static one, see `with_dropout`.
  """
  if key is None or not rate:
    return x
  key, rate = key if isinstance(key, tuple) else (key, rate)
  kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(jax.random.split(key, len(x)))
  return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)


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
