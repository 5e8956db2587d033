"""Partial finetuning: the last layers and what comes after them are trained; the layers below are frozen.

This is the baseline of Houlsby et al. 2019 for adapters (https://arxiv.org/abs/1902.00751, section 3.2, "fine-tune only
the top n layers").
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from lora_jax import errors, tree, weights
from lora_jax.methods import full
from lora_jax.values import Size

KIND = "whole weights"
OPTIM = {"learning_rate": 3e-5}  # Houlsby et al. 2019, section 3.3
WHOLE = True
MODEL = True

AFTER = "^(norm|project|head|pooler|classifier)/"  # what a model may have after its layers


@struct.dataclass
class Parts(weights.Weight):
  """A leaf that is stacked over layers, in two parts that `transformer.hidden` scans one after the other.

  The gradient and the optimiser's moments exist only for the upper part, and the backward pass stops above the lower
  part. In return, the layer is compiled twice.

  Fields:
    lower: frozen [L - k, ...], an array or a node.
    upper: [k, ...].
  """

  lower: Any
  upper: jax.Array

  TRAINABLE = ("lower", "upper")

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of the whole stack."""
    return (self.lower.shape[0] + self.upper.shape[0], *self.upper.shape[1:])

  def map(self, fn: Callable[[str, Any], Any]) -> "Parts":
    """Returns the stack with `fn(name, weight)` in place of each part."""
    return Parts(fn("lower", self.lower), fn("upper", self.upper))

  def at(self, index: Any) -> Any:
    """Returns a layer, an expert of a layer, or a slice of layers within one part."""
    n = self.lower.shape[0]
    if isinstance(index, slice):
      start, stop, _ = index.indices(self.shape[0])
      part, index = (self.lower, index) if stop <= n else (self.upper, slice(start - n, stop - n))
      return weights.at(part, index)
    layer, *rest = index if isinstance(index, tuple) else (index,)
    part, layer = (self.lower, layer) if layer < n else (self.upper, layer - n)
    return weights.at(part, (layer, *rest))

  def cuts(self) -> tuple[int, ...]:
    """Returns the index of the first layer of the upper part, in a tuple."""
    return (self.lower.shape[0],)

  def dense(self) -> jax.Array:
    """Returns a copy of the whole stack in the dtype of the lower part."""
    lower = weights.dense(self.lower)
    return jnp.concatenate([lower, self.upper.astype(lower.dtype)])


def init(
  key: jax.Array,
  params: Any,
  *,
  layers: Size = 2,
  targets: str | Sequence[str] = ".*",
  also: str | Sequence[str] = AFTER,
  dtype: full.Dtype = "float32",
) -> tuple[Any, Any]:
  """Trains the last layers, including norms and biases, and chosen leaves outside the layers.

  Args:
    layers: how many layers to train, counted from the top of the decoder if there is also an encoder; 0 means none.
    targets: regexes of the leaves to train in those layers, such as `layers/attn/q/kernel`.
    also: regexes of the leaves to train outside the layers; by default the final norm and the head.
    dtype: as in full.py.

  Returns:
    (params, mask): all leaves of the layers are `Parts` if only some of the layers are trained.
  """
  del key
  flat = {k: w for k, w in tree.flatten(params, is_leaf=weights.is_node).items() if k.startswith("layers/")}
  depth = next(iter(flat.values())).shape[0]
  if not 0 <= layers <= depth:
    raise errors.UserError(f"config.method.layers={layers} is not within the {depth} layers of the model")
  if found := [k for k, w in flat.items() if isinstance(w, weights.Weight)]:
    why = "is packed; load a model that is not quantised"
    if flat[found[0]].adapted is not None:
      why = "is adapted already; in a list of methods, 'partial' comes first"
    raise errors.UserError(f"{found[0]} {why}")
  targets, also = ([x] if isinstance(x, str) else list(x) for x in (targets, also))
  names = weights.addressable(params)
  tree.check_patterns(targets if layers else (), flat, "config.method.targets")
  tree.check_patterns(set(also) - {AFTER}, names.values(), "config.method.also")
  inside, outside = (tree.first_match([(p, True) for p in patterns], False) for patterns in (targets, also))

  def trained(k):
    if k.startswith("layers/"):
      return layers > 0 and inside(k.removesuffix("/upper")) and (layers == depth or k.endswith("/upper"))
    return k in names and outside(names[k])

  def part(k, w):
    if not k.startswith("layers/"):
      return w
    lower, upper = (jax.tree.map(lambda x: x[at], w) for at in (slice(depth - layers), slice(depth - layers, None)))
    return Parts(lower, weights.dense(upper))

  if 0 < layers < depth:
    params = tree.map_named(part, params, is_leaf=weights.is_node)
  mask = tree.map_named(lambda k, _: trained(k), params)
  if not any(jax.tree.leaves(mask)):
    raise errors.UserError("partial finetuning trains nothing: config.method.layers is 0 and no leaf matches `also`")
  return full.masters(params, mask, dtype), mask
