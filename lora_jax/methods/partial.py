"""Partial finetuning: the last layers and what comes after them are trained, the layers below stay as they are.

The baseline that Houlsby et al. 2019 (https://arxiv.org/abs/1902.00751, section 3.2, "fine-tune only the top n
layers") compare adapters with.
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
  """A leaf that is stacked over layers, in two parts, which `transformer.hidden` scans one after the other.

  So the gradient and the optimiser's moments exist for the upper part alone, and no backward pass runs through the
  layers of the lower part; the price is that the layer is compiled twice.

  Fields:
    lower: frozen [L - k, ...], an array or a node.
    upper: [k, ...].
  """

  lower: Any
  upper: jax.Array

  TRAINABLE = ("lower", "upper")

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of the whole stack."""
    return (self.lower.shape[0] + self.upper.shape[0], *self.upper.shape[1:])

  def map(self, fn: Callable[[str, Any], Any]) -> "Parts":
    """The stack with `fn(name, weight)` in place of both parts."""
    return Parts(fn("lower", self.lower), fn("upper", self.upper))

  def at(self, index: Any) -> Any:
    """A layer, an expert of one, or all layers of one of the parts."""
    n = self.lower.shape[0]
    if isinstance(index, slice):
      start, stop, _ = index.indices(self.shape[0])
      part, index = (self.lower, index) if stop <= n else (self.upper, slice(start - n, stop - n))
      return weights.at(part, index)
    layer, *rest = index if isinstance(index, tuple) else (index,)
    part, layer = (self.lower, layer) if layer < n else (self.upper, layer - n)
    return weights.at(part, (layer, *rest))

  def cuts(self) -> tuple[int, ...]:
    """The first layer of the upper part."""
    return (self.lower.shape[0],)

  def dense(self) -> jax.Array:
    """The whole stack in the dtype of the lower part: a copy."""
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
  """Trains the last layers, norms and biases included, and leaves outside of the layers.

  Args:
    layers: how many; 0 is none. Those of the decoder, where there is an encoder too.
    targets: regexes; of the leaves in those layers, such as `layers/attn/q/kernel`, the ones to train.
    also: regexes; leaves outside of the layers that are trained besides: by default the final norm and the head.
    dtype: as in full.py.

  Returns:
    (params, mask): where some layers are trained and some not, `Parts` in place of all leaves of the layers.
  """
  del key
  flat = {k: w for k, w in tree.flatten(params, is_leaf=weights.is_node).items() if k.startswith("layers/")}
  depth = next(iter(flat.values())).shape[0]
  if not 0 <= layers <= depth:
    raise errors.UserError(f"config.method.layers={layers} is not within the {depth} layers of the model")
  if found := [k for k, w in flat.items() if isinstance(w, weights.Weight)]:
    why = "is packed; load a model that is not quantised"
    if flat[found[0]].adapted is not None:
      why = "is adapted already; in a list of methods 'partial' comes before those"
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
    raise errors.UserError("partial finetuning trains nothing: config.method.layers is 0 and no leaf fits `also`")
  return full.masters(params, mask, dtype), mask
