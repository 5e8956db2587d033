"""Intrinsic dimension of finetuning: d numbers are trained, and a fixed random projection maps them to all changes.

`theta = theta_0 + P z` with P [n, d] (Li et al. 2018, https://arxiv.org/abs/1804.08838). With a Fastfood transform
(fastfood/) as P, it is the DID of Aghajanyan et al. 2020 (https://arxiv.org/abs/2012.13255, section 3). With a learned
scale for every layer, `theta_i = theta_0i + lambda_i (P z)_i`, it is their SAID. The intrinsic dimension of a task is
`d90`, the d at which a metric reaches 90% of the value of full finetuning.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from lora_jax import errors, tree, weights
from lora_jax.methods import fastfood, targeting
from lora_jax.model import architecture
from lora_jax.values import Count

KIND = "subspaces"


@struct.dataclass
class Intrinsic(weights.Additive):
  """`W + scale * lambda * P z`, where P is this matrix's rows of the projection. P is never stored.

  Stacked over layers, every field but `shared` has a leading L.

  Fields:
    base: the adapted weight [*in, *out], an array or a node.
    seed: uint32 [2], the key of this matrix's rows of P.
    scale: float32 []; 1 / sqrt(n) for n adapted numbers in the model, or 0 in layers that are not adapted.
    layer: int32 [], the index of this layer's lambda; None without lambdas.
    shared: z [d] and the lambdas [m] or None, float32, present after `weights.bind`.
  """

  base: Any
  seed: jax.Array
  scale: jax.Array
  layer: jax.Array | None = None
  shared: tuple[jax.Array, jax.Array | None] | None = None

  def bind(self, shared: Mapping) -> "Intrinsic":
    """Returns the node with z and the lambdas of `params["shared"]`."""
    return self.replace(shared=(shared["intrinsic"]["z"], shared["intrinsic"].get("scale")))

  def _scaled(self) -> jax.Array:
    """Returns z times the scales: [d], or [L, d] if the node is stacked."""
    if self.shared is None:
      raise ValueError("an Intrinsic node computes only after weights.bind(params)")
    z, scales = self.shared
    scale = self.scale if self.layer is None else self.scale * scales[self.layer]
    return scale[..., None] * z

  def change(self, spec: str, x: jax.Array, dtype: Any = None) -> jax.Array:
    """Returns `x delta`; the backward pass recomputes delta, since storing all of it would take a second model."""
    run = lambda x, seed, z: weights.dot(spec, x, _rows(seed, z, self.shape), dtype)
    return jax.checkpoint(run)(x, self.seed, self._scaled())

  def layer_delta(self) -> jax.Array:
    """Returns what is added to a weight that is not stacked, float32."""
    return _rows(self.seed, self._scaled(), self.shape)

  def delta(self) -> jax.Array:
    """Returns what is added to the weight, float32, in the shape of `base`."""
    rows = functools.partial(_rows, shape=self.shape[self.scale.ndim :])
    return (jax.vmap(rows) if self.scale.ndim else rows)(self.seed, self._scaled())


def _rows(seed: jax.Array, z: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  # The implementation is explicit, since the default of jax.random.key is configurable.
  return fastfood.project(jax.random.wrap_key_data(seed, impl="threefry2x32"), z, shape)


def init(
  key: jax.Array,
  params: Any,
  *,
  dimension: Count = 200,
  targets: str | Sequence[str] = "all-linear",
  layer_scales: bool = False,
) -> tuple[Any, Any]:
  """Wraps the target matrices in `Intrinsic`; z starts at zero, so the model does not change.

  Args:
    key: random key of the projection; a matrix's rows follow from the key, the matrix's name and the layer.
    params: a model's tree; the adapted weights may be arrays or nodes.
    dimension: d, how many numbers are trained in all.
    targets: as in `lora.init`.
    layer_scales: whether to train SAID rather than DID. In SAID, m of the d numbers are lambdas, which start at 1: one
      for each layer with an adapted matrix, and one each for the head, classifier and the like. z has the other d - m.

  Returns:
    (params, mask): True at `shared/intrinsic/z` and `shared/intrinsic/scale`, float32.

  Raises:
    UserError: the model already has an intrinsic dimension, or d is too small or exceeds the adapted numbers.
  """
  if "intrinsic" in params.get("shared", {}):
    raise errors.UserError("the model already has an intrinsic dimension; a second one cannot share its vector")
  params = targeting.split(params, targets)
  linear = targeting.matrices(params)
  chosen = targeting.select(targets, linear, "config.method.targets")
  groups = {k: _groups(k, layers) for k, layers in chosen.items()}
  order = list(dict.fromkeys(g for k in chosen for g, hit in zip(groups[k], chosen[k].flat, strict=True) if hit))
  n = sum(math.prod(linear[k].shape[layers.ndim :]) * int(layers.sum()) for k, layers in chosen.items())
  m = len(order) if layer_scales else 0
  if not isinstance(dimension, int) or isinstance(dimension, bool) or not m < dimension <= n:
    least = f"more than the {m} layers with a scale of their own" if m else "at least 1"
    raise errors.UserError(
      f"config.method.dimension={dimension!r} must be a whole number, {least} and at most the {n:,} numbers adapted"
    )

  def node(k, w, layers):
    index = np.int32([order.index(g) if hit else 0 for g, hit in zip(groups[k], layers.flat, strict=True)])
    own = jnp.asarray(index.reshape(layers.shape)) if m else None
    return Intrinsic(w, _seeds(tree.fold(key, k), layers.shape), jnp.float32(layers / math.sqrt(n)), own)

  arrays = {"z": jnp.zeros(dimension - m, jnp.float32)}
  if m:
    arrays["scale"] = jnp.ones(m, jnp.float32)
  params = targeting.wrap(params, chosen, node)
  params = params | {"shared": params.get("shared", {}) | {"intrinsic": arrays}}
  return params, tree.map_named(lambda k, _: k.startswith("shared/intrinsic/"), params)


def _groups(name: str, layers: np.ndarray) -> list[str]:
  """Returns the group of each layer of a matrix; the matrices of a group, a layer or a head, share one lambda."""
  top = name.partition("layers/")[0]
  return [f"{top}{i}" for i in range(layers.size)] if architecture.stacked(name) else [name.split("/")[0]]


def _seeds(key: jax.Array, stack: tuple[int, ...]) -> jax.Array:
  """Returns uint32 [*stack, 2]: random words for each layer, independent of the number of layers."""
  words = lambda i: jax.random.bits(jax.random.fold_in(key, i), (2,), jnp.uint32)
  return jax.vmap(words)(jnp.arange(stack[0])) if stack else words(0)


def d90(
  dims: Sequence[float], metrics: Sequence[float], full: float, base: float = 0.0, share: float = 0.9
) -> float | None:
  """Returns the smallest dimension at which a metric reaches `base + share (full - base)`; None if no dimension does.

  Metrics of the same dimension, such as several seeds, are averaged; metrics that are not finite are left out. The
  metric is interpolated linearly in log d between the first dimension that reaches the threshold and the one below. If
  the smallest dimension reaches it, that dimension is returned as an upper bound.

  Args:
    dims: positive, in any order.
    metrics: one per dimension; with a `base` they may be losses.
    full: metric of full finetuning.
    base: the metric if nothing is learned: 0, as in both papers, or the score of chance or before finetuning.
    share: 0.9, as in both papers.

  Raises:
    UserError: the lengths differ, a dimension is not positive, or `full` equals `base` or is not finite.
  """
  dims, values = np.asarray(dims, float), np.asarray(metrics, float)
  if dims.ndim != 1 or dims.shape != values.shape or not (np.isfinite(dims) & (dims > 0)).all():
    raise errors.UserError(f"d90 needs positive dimensions and as many metrics, not {dims.tolist()}, {values.tolist()}")
  if not np.isfinite(full - base) or full == base:
    raise errors.UserError(f"d90 needs a metric of full finetuning other than that of the base: {full}, {base}")
  gained = (values - base) / (full - base)
  known = np.isfinite(gained)
  sizes = np.unique(dims[known])
  means = np.array([gained[known & (dims == d)].mean() for d in sizes])
  if not (means >= share).any():
    return None
  i = int(np.argmax(means >= share))
  if i == 0:
    return float(sizes[0])
  return float(np.exp(np.interp(share, means[i - 1 : i + 1], np.log(sizes[i - 1 : i + 1]))))
