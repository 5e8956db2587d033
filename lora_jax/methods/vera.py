"""VeRA: vector-based random matrix adaptation (Kopiczko et al. 2023, https://arxiv.org/abs/2310.11454).

`W x + b * (B (d * (A x)))`, equation 2. A and B are random, frozen and shared by all matrices; each matrix trains only
the vectors b and d. A matrix uses as many columns of A as it has inputs and as many rows of B as it has outputs.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from lora_jax import errors, tree, weights
from lora_jax.methods import targeting
from lora_jax.model import transformer
from lora_jax.values import Count, Probability

KIND = "low rank"
OPTIM = {"learning_rate": 4e-3}  # the paper, from memory


@struct.dataclass
class VeRA(weights.Additive):
  """`W + A diag(d) B diag(b)`, A applied first.

  Stacked over layers, every field but `shared` has a leading L.

  Fields:
    base: the adapted weight [*in, *out], an array or a node.
    d: float32 [R].
    b: float32 [*out].
    scale: float32 []; 1, or 0 in layers that are not adapted.
    key: random key []; present only in a training forward, where it switches dropout on.
    shared: (A [R, max in], B [max out, R]), float32, present after `weights.bind`.
    dropout: probability that an input element is dropped before A.
  """

  base: Any
  d: jax.Array
  b: jax.Array
  scale: jax.Array
  key: jax.Array | None = None
  shared: tuple[jax.Array, jax.Array] | None = None
  dropout: float = struct.field(pytree_node=False, default=0.0)

  TRAINABLE = ("d", "b")

  def bind(self, shared: Mapping) -> "VeRA":
    """Returns the node with A and B of `params["shared"]`."""
    return self.replace(shared=(shared["vera"]["a"], shared["vera"]["b"]))

  def _factors(self) -> tuple[jax.Array, jax.Array]:
    """Returns A [*in, R] and B scaled by b [R, *out], of a node that is not stacked."""
    if self.shared is None:
      raise ValueError("a VeRA node computes only after weights.bind(params)")
    a, b = self.shared
    inner, outer = self.shape[: -self.b.ndim], self.b.shape
    b = self.scale * self.b.reshape(-1) * b[: math.prod(outer)].T
    return a[:, : math.prod(inner)].T.reshape(*inner, -1), b.reshape(-1, *outer)

  def change(self, spec: str, x: jax.Array, dtype: Any = None) -> jax.Array:
    """Returns `b * (B (d * (A dropout(x))))`; b multiplies B, so that no output is kept for the gradient of b."""
    spec_a, spec_b = weights.split_spec(spec)
    a, b = self._factors()
    h = weights.dot(spec_a, weights.dropout(x, self.dropout, self.key), a, jnp.float32)
    return weights.dot(spec_b, (h * self.d).astype(x.dtype), b, dtype)

  def layer_delta(self) -> jax.Array:
    """Returns what is added to a weight that is not stacked, float32."""
    a, b = self._factors()
    return jnp.tensordot(a * self.d, b, 1, precision="highest")

  def delta(self) -> jax.Array:
    """Returns what is added to the weight, float32, in the shape of `base`."""
    axes = jax.tree.map(lambda _: 0, self).replace(shared=None if self.shared is None else (None, None))
    return jax.vmap(VeRA.layer_delta, (axes,))(self) if self.scale.ndim else self.layer_delta()

  def n_padding(self, mask: "VeRA") -> int:
    """Returns how many trained numbers belong to layers that are not adapted."""
    layers = int(np.sum(np.asarray(self.scale) == 0))
    each = (self.d.size * mask.d + self.b.size * mask.b) // max(self.scale.size, 1)
    return layers * each


def init(
  key: jax.Array,
  params: Any,
  *,
  rank: Count = 256,
  dropout: Probability = 0.0,
  targets: str | Sequence[str] = "q,v",
  d_init: float = 0.1,
) -> tuple[Any, Any]:
  """Wraps the target matrices in `VeRA`; b starts at zero, so the model does not change.

  Args:
    key: random key of A and B, which are uniform within Kaiming's bound sqrt(6 / fan in), as in PEFT.
    params: a model's tree; the adapted weights may be arrays or nodes.
    rank: R, the same for all matrices.
    dropout: probability of dropping an input element of A in training.
    targets: as in `lora.init`.
    d_init: initial value of d.

  Returns:
    (params, mask): True at the leaves `d` and `b`, float32; `params["shared"]["vera"]` holds A and B.
  """
  if not 0 <= dropout < 1 or rank < 1:
    raise errors.UserError(f"VeRA needs rank >= 1 and 0 <= dropout < 1, not rank={rank}, dropout={dropout}")
  if "vera" in params.get("shared", {}):
    raise errors.UserError("the model already has VeRA; a second one cannot share its random matrices")
  params = targeting.split(params, targets)
  linear = targeting.matrices(params)
  chosen = targeting.select(targets, linear, "config.method.targets")
  most = [max(math.prod(s[i]) for k in chosen if (s := split_axes(k, linear[k]))) for i in (0, 1)]

  def uniform(name, shape):
    bound = math.sqrt(6 / shape[1])
    return jax.random.uniform(tree.fold(key, f"shared/vera/{name}"), shape, jnp.float32, -bound, bound)

  def node(k, w, layers):
    d = jnp.full((*layers.shape, rank), d_init, jnp.float32)
    b = jnp.zeros((*layers.shape, *split_axes(k, w)[1]), jnp.float32)
    return VeRA(w, d, b, jnp.asarray(layers, jnp.float32), dropout=float(dropout))

  arrays = {"a": uniform("a", (rank, most[0])), "b": uniform("b", (most[1], rank))}
  params = targeting.wrap(params, chosen, node)
  params = params | {"shared": params.get("shared", {}) | {"vera": arrays}}
  return params, targeting.mask(params, VeRA, ("d", "b"))


def split_axes(k: str, w: weights.Weight) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """Returns the input and the output axes of one layer's matrix."""
  shape = w.shape[int(transformer.stacked(k)) :]
  return shape[: transformer.in_axes(k)], shape[transformer.in_axes(k) :]
