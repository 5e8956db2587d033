"""DoRA: weight-decomposed low-rank adaptation (Liu et al. 2024, https://arxiv.org/abs/2402.09353).

`m * (W + s A B) / ||W + s A B||`, equation 5: LoRA changes the direction of each output's weights, and a trained `m`
changes their length. The norm is taken over the inputs, one number per output, and gets no gradient (section 4.3).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import PartitionSpec as P

from lora_jax import errors, tree, weights
from lora_jax.methods import lora, targeting
from lora_jax.model import architecture, transformer

KIND = "low rank"
OPTIM = {"learning_rate": 2e-4}  # the authors' script for LLaMA
VARIES = lora.VARIES


@struct.dataclass
class DoRA(weights.Adapter):
  """`W + s A B`, a LoRA node, with the length of each output's weights replaced by `magnitude`.

  Stacked over layers every field has a leading L. Layers that LoRA does not adapt are left as they are.

  Fields:
    base: weights.LoRA of W [*in, *out].
    magnitude: float32 [*out].
    norm: float32 [*out]; ||W||, the initial value of `magnitude`. It is kept so that no step has to sum the squares of
      W. None if W itself is trained.
  """

  base: weights.LoRA
  magnitude: jax.Array
  norm: jax.Array | None

  TRAINABLE = ("magnitude",)

  def gain(self, dtype: Any = jnp.float32) -> jax.Array:
    """Returns `magnitude / ||W + s A B||`, float32 [*out]; it is 1 before training.

    The square of the norm is `||W||^2 + 2 s (W^T A) . B + s^2 B^T (A^T A) B`, so the product A B is never formed. The
    product with W is computed in `dtype`, the others in float32.
    """
    a, b = self.base.a, self.base.b
    if self.base.start is not None:  # a b - a0 b0 = a (b - b0) + (a - a0) b0, exactly 0 at first
      a0, b0 = self.base.start
      a, b = jnp.concatenate([a, a - a0], -1), jnp.concatenate([b - b0, b0], 0)
    a, b, s = jax.lax.stop_gradient((a, b, self.base.scale))
    letters = "abcdefgh"[: a.ndim + b.ndim - 2]
    inner, outer = letters[: a.ndim - 1], letters[a.ndim - 1 :]
    aw = weights.dot(f"{inner}R,{letters}->R{outer}", a.astype(dtype), self.base.base)
    aw = jax.lax.stop_gradient(aw).astype(jnp.float32)
    aa = jnp.tensordot(a, a, ([*range(a.ndim - 1)],) * 2, precision="highest")
    change = s * jnp.sum(b * (2 * aw + s * jnp.tensordot(aa, b, 1, precision="highest")), 0)
    known = self.norm
    if known is None:
      known = jax.lax.stop_gradient(norm(self.base.base, 0, self.base.a.ndim - 1))
    # Relative to ||W||, so that the gain is exactly 1 where nothing has changed.
    length = jnp.where(known > 0, known, 1.0)
    square = (known > 0) + change / length**2
    gain = self.magnitude / length / jnp.sqrt(jnp.maximum(square, 1e-12))
    return jnp.where(s == 0, 1.0, gain)

  def dot(self, spec: str, x: jax.Array, dtype: Any = None) -> jax.Array:
    """Returns `gain * dot(spec, x, W + s A B)`.

    With dropout d it returns this for d(x), plus `W (x - d(x))`, as PEFT and the authors' code do. This costs a second
    product with W.
    """
    lora, gain = self.base, self.gain(x.dtype)
    if lora.key is None or not lora.dropout:
      return _scaled(lora.dot(spec, x, dtype), gain)
    kept = jnp.where(lora.scale == 0, x, weights.dropout(x, lora.dropout, lora.key))
    lora = lora.replace(key=None)
    rest = lora.base if lora.start is None else lora.replace(b=jnp.zeros_like(lora.b))
    return weights.dot(spec, x - kept, rest, dtype) + _scaled(lora.dot(spec, kept, dtype), gain)

  def dense(self) -> jax.Array:
    """Returns the merged weight in the dtype of the base; it is computed in float32."""

    def layer(node):
      w = weights.dense(node.base.base)
      return (node.gain() * (w.astype(jnp.float32) + node.base.layer_delta())).astype(w.dtype)

    return jax.vmap(layer)(self) if self.base.scale.ndim else layer(self)

  def over_trained(self) -> "DoRA":
    """Returns the node without the initial norm of W, for a W that is trained."""
    return super().over_trained().replace(norm=None)

  def idle(self, base: Any) -> "DoRA":
    """Returns the node around `base`, which an idle LoRA adapts; magnitudes are zero and unused while LoRA is idle."""
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), self.replace(base=None))
    return zeros.replace(base=base)

  def place(self, spec: P) -> "DoRA":
    """Returns the partition specs; `magnitude` and `norm` are split like the outputs."""
    placed = super().place(spec)
    if not len(spec):
      return placed
    stack = self.base.scale.ndim
    out = P(*spec[:stack], *spec[len(spec) - self.magnitude.ndim + stack :])
    return placed.replace(magnitude=out, norm=None if self.norm is None else out)

  def clean(self) -> "DoRA":
    """Returns the node with LoRA's padding set to zero."""
    return self.replace(base=self.base.clean())

  def n_padding(self, mask: "DoRA") -> int:
    """Returns how many trained numbers are padding: LoRA's own, and the magnitudes of layers that are not adapted."""
    layers = int(np.sum(np.asarray(self.base.scale) == 0))
    unused = layers * (self.magnitude.size // max(self.base.scale.size, 1)) if mask.magnitude else 0
    return self.base.n_padding(mask.base) + unused


def _scaled(y: jax.Array, gain: jax.Array) -> jax.Array:
  """Returns `y * gain`, computed in float32; the backward pass stores y in its own dtype."""
  product = lambda y, gain: (y.astype(jnp.float32) * gain).astype(y.dtype)
  return jax.checkpoint(product, prevent_cse=False)(y, gain)


def _is_lora(w: Any) -> bool:
  return isinstance(w, weights.LoRA)


def norm(w: weights.Weight, stack: int, in_axes: int) -> jax.Array:
  """Returns ||W||, float32 [*stack, *out], of a weight [*stack, *in, *out]; it unpacks one layer at a time."""

  def layer(w):
    return jnp.sqrt(jnp.sum(jnp.square(weights.dense(w).astype(jnp.float32)), range(in_axes)))

  return jax.lax.map(layer, w) if stack else layer(w)


def init(key: jax.Array, params: Any, **kw: Any) -> tuple[Any, Any]:
  """Adds LoRA to the target matrices, and magnitudes that start at ||W||, so the model does not change.

  The keywords are those of `lora.init`.

  Returns:
    (params, mask): True at `a`, `b` and `magnitude`, float32, and at the biases that `bias` selects.
  """
  adapted, mask = lora.init(key, params, **kw)
  before = {k: w.a for k, w in tree.flatten(params, is_leaf=_is_lora).items() if _is_lora(w)}
  new = {k for k, w in tree.flatten(adapted, is_leaf=_is_lora).items() if _is_lora(w) and w.a is not before.get(k)}
  if other := sorted(k for k in new if not transformer.in_axes(k) or architecture.stack_axes(k) > 1):
    raise errors.UserError(f"DoRA does not adapt embeddings or experts ({', '.join(other)}); name other targets")
  mask = tree.map_named(lambda k, m: DoRA(m, True, False) if k in new else m, mask, is_leaf=_is_lora)
  return tree.map_named(lambda k, w: node(w) if k in new else w, adapted, is_leaf=_is_lora), mask


init.__signature__ = targeting.signature(init, lora.init, without=("lora_bias", "tied"))


def node(w: weights.LoRA) -> DoRA:
  """Returns DoRA over `w`, whose magnitude starts as the norms of the base (arXiv:2402.09353, equation 5)."""
  stack = w.scale.ndim
  length = norm(w.base, stack, w.a.ndim - 1 - stack)
  return DoRA(w, length, length)
