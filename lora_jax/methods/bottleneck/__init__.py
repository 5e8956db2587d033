"""Bottleneck adapters, which houlsby, pfeiffer and parallel share: small feed-forward layers with a narrow middle."""

import functools
import math
import re
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from lora_jax import errors, tree, weights
from lora_jax.methods import targeting
from lora_jax.model import layers, transformer

ATTENTION = r"(^|/)attn/o/kernel$"
FEED_FORWARD = r"(^|/)mlp/down/kernel$"
NORM = r"norm/(scale|bias)$"

# (down, up): functions from a key and a shape [in, out] to an initial matrix. Biases start at zero.
INITS = {
  "zero": (lambda key, shape: _truncated(key, shape, 1e-2), lambda key, shape: jnp.zeros(shape)),
  "lora": (lambda key, shape: _kaiming(key, shape), lambda key, shape: jnp.zeros(shape)),
  "paper": (lambda key, shape: _truncated(key, shape, 1e-2),) * 2,
  "repo": (lambda key, shape: _truncated(key, shape, 1e-3),) * 2,
}
Init, Activation = Literal[*INITS], Literal[*layers.ACTIVATIONS]


@struct.dataclass
class Bottleneck(weights.Added):
  """`scale * (act(x down + down_bias) up + up_bias)`, called with x [..., D].

  Stacked over layers, every field has a leading L. Parameters are float32 and are cast to the dtype of x.

  Fields:
    down: [D, M].
    down_bias: [M].
    up: [M, D].
    up_bias: [D].
    scale: []; 0 in layers that have no adapter.
    activation: a name in `layers.ACTIVATIONS`.
  """

  down: jax.Array
  down_bias: jax.Array
  up: jax.Array
  up_bias: jax.Array
  scale: jax.Array
  activation: str = struct.field(pytree_node=False, default="gelu")

  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns what is added to the layer's output, in the shape and dtype of x."""
    h = weights.dot("...D,DM->...M", x, self.down) + self.down_bias.astype(x.dtype)
    h = layers.ACTIVATIONS[self.activation](h)
    y = weights.dot("...M,MD->...D", h, self.up) + self.up_bias.astype(x.dtype)
    return self.scale.astype(x.dtype) * y

  def n_padding(self, mask: "Bottleneck") -> int:
    """Returns how many of the numbers that `mask` trains belong to layers without an adapter."""
    idle = np.asarray(self.scale) == 0
    trained = sum(x.size for x, m in zip(jax.tree.leaves(self), jax.tree.leaves(mask), strict=True) if m)
    return trained // idle.size * int(idle.sum())


def add(
  key: jax.Array,
  params: Any,
  targets: str | Sequence[str],
  *,
  size: int,
  activation: str,
  init: str,
  scale: float = 1.0,
  beside: bool = False,
  train_norms: bool = False,
) -> tuple[Any, Any]:
  """Returns (params, mask) with a `Bottleneck` in the dict of each chosen matrix, or of its feed-forward layer.

  Args:
    key: random key; the initial values follow from it, the name of the place and the layer.
    targets: as in `targeting.select`.
    size: M.
    init: a name in `INITS`.
    beside: whether the adapter runs in parallel with a whole feed-forward layer rather than after a matrix.
    train_norms: whether norms are also trained.
  """
  errors.choose(init, INITS, "config.method.init")
  errors.choose(activation, layers.ACTIVATIONS, "config.method.activation")
  if size < 1:
    raise errors.UserError(f"a bottleneck needs config.method.size >= 1, not {size}")
  places = _places(params, targets, beside)
  mask = jax.tree.map(lambda _: False, params)
  if train_norms:
    mask = tree.map_named(lambda k, _: bool(re.search(NORM, k)), mask)
    params = jax.tree.map(lambda x, m: x.astype(jnp.float32) if m else x, params, mask)
  for place, (width, layer_hits) in places.items():
    node = _bottleneck(tree.fold(key, f"{place}/adapter"), width, size, layer_hits, scale, activation, init)
    trained = jax.tree.map(lambda _: True, node).replace(scale=False)
    params, mask = (_put(t, place.split("/"), x) for t, x in ((params, node), (mask, trained)))
  return params, mask


def _places(params: Any, targets: str | Sequence[str], beside: bool) -> dict[str, tuple[int, np.ndarray]]:
  """Returns {path of a dict: (D, bool [L])} for every place that `targets` names; UserError for an impossible place."""
  linear = {k: w for k, w in targeting.matrices(params).items() if "/moe/" not in k}
  feed_forward = {k: w for k, w in linear.items() if re.search(FEED_FORWARD, k)}
  named = [targets] if isinstance(targets, str) else list(targets)
  if not feed_forward and (beside or FEED_FORWARD in named) and any("/moe/" in k for k in tree.names(params)):
    raise errors.UserError(
      "the feed-forward layers of this model are mixtures of experts, which a bottleneck does not support; "
      + ("try the method houlsby" if beside else f"choose config.method.targets, such as {ATTENTION!r}")
    )
  out = {}
  for k, hit in targeting.select(named, feed_forward if beside else linear, "config.method.targets").items():
    outer = linear[k].shape[hit.ndim + transformer.in_axes(k) :]
    if len(outer) != 1:
      raise errors.UserError(
        f"config.method.targets: the output of {k} has axes {outer}; a bottleneck goes after a matrix whose output is "
        "one vector, such as attn/o or mlp/down"
      )
    out["/".join(k.split("/")[: -2 if beside else -1])] = (outer[0], hit)
  return out


def _bottleneck(key, width, size, hits, scale, activation, init) -> Bottleneck:
  down, up = _draw(key, hits.shape, width, size, init)
  return Bottleneck(
    down=down,
    down_bias=jnp.zeros((*hits.shape, size)),
    up=up,
    up_bias=jnp.zeros((*hits.shape, width)),
    scale=jnp.asarray(np.where(hits, scale, 0.0), jnp.float32),
    activation=activation,
  )


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _draw(key, stack, width, size, init):
  """Returns the initial (down, up); the values of a layer follow from its index."""
  draw_down, draw_up = INITS[init]

  def one(layer):
    key_down, key_up = jax.random.split(jax.random.fold_in(key, layer))
    return draw_down(key_down, (width, size)), draw_up(key_up, (size, width))

  return jax.vmap(one)(jnp.arange(stack[0])) if stack else one(0)


def _put(params: Any, path: Sequence[str], adapter: Any) -> Any:
  """Returns the tree with an adapter in the dict at `path`; UserError if there is one already."""
  if path:
    return {**params, path[0]: _put(params[path[0]], path[1:], adapter)}
  if "adapter" in params:
    raise errors.UserError("config.method: two bottlenecks in one place; choose other targets for one of them")
  return {**params, "adapter": adapter}


def _truncated(key, shape, deviation):
  """Returns normal values truncated at two standard deviations."""
  return deviation * jax.random.truncated_normal(key, -2.0, 2.0, shape)


def _kaiming(key, shape):
  """Returns values uniform in +-1/sqrt(in), as for LoRA's A."""
  return jax.random.uniform(key, shape, minval=-1.0, maxval=1.0) / math.sqrt(shape[0])
