"""Adapts one weight with any number of axes as a matrix, by any method that puts a node in the place of a matrix."""

import functools
import inspect
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from lora_jax import errors, methods, tree, values, weights

# What a method may need in addition to its node. A training loop that is not ours lacks it.
HOOKS = ("penalty", "direction", "optimiser", "between")
OTHERS = ("feedforward",)  # keywords that name further targets; a single weight has none
TABLE = "embedding"  # what Flax calls the leaf of an embedding layer


@struct.dataclass
class Kernel:
  """A weight [*stack, *in, *out] that is adapted as a matrix.

  Fields:
    base: the pretrained weight.
    node: a node for the matrix [*stack, in, out], without its base.
    inner, outer: sizes of the axes `in` and `out`.
  """

  base: jax.Array
  node: Any
  inner: tuple[int, ...] = struct.field(pytree_node=False)
  outer: tuple[int, ...] = struct.field(pytree_node=False)

  @property
  def matrix(self) -> Any:
    """The node on its base, [*stack, in, out]."""
    stack = self.base.shape[: self.base.ndim - len(self.inner) - len(self.outer)]
    return on(self.node, self.base.reshape(*stack, math.prod(self.inner), math.prod(self.outer)))

  @property
  def additive(self) -> bool:
    """Whether an output is the sum of the base's output and `change`."""
    return isinstance(self.node, weights.Additive)

  def dense(self) -> jax.Array:
    """The merged weight in the shape and dtype of the base."""
    return weights.dense(self.matrix).reshape(self.base.shape)

  def change(self, x: jax.Array) -> jax.Array:
    """The adapter's part of the output [..., *out] for x [..., *in]."""
    return self._rows(self.matrix.change, x)

  def dot(self, x: jax.Array) -> jax.Array:
    """The output [..., *out] for x [..., *in]."""
    return self._rows(self.matrix.dot, x)

  @property
  def table(self) -> Any:
    """The weight [V, D] of an embedding layer; adapters that have no form for rows are merged."""
    return self.dense() if self.pair is None else self.matrix

  @property
  def pair(self) -> tuple[jax.Array, jax.Array] | None:
    """a [in, R] and b [R, out] where their product is all that is added to a matrix."""
    pairs = self.matrix.factors() if self.additive and self.matrix.scale.ndim == 0 else None
    return pairs[0] if pairs is not None and len(pairs) == 1 else None

  def _rows(self, fn, x):
    lead = x.shape[: x.ndim - len(self.inner)]
    return fn("MI,IO->MO", x.reshape(-1, math.prod(self.inner))).reshape(*lead, *self.outer)


def on(node: Any, base: Any) -> Any:
  """The node, of one or more adapters, on another innermost base."""
  return node.map(lambda _, w: on(w, base) if weights.is_node(w) else base)


def chain(node: Any) -> list:
  """An adapter and those inside it."""
  return [node, *chain(node.adapted)] if isinstance(node, weights.Adapter) else []


class Plan(NamedTuple):
  """How one leaf is adapted.

  Fields:
    name: name of the leaf.
    method: name and keywords of the method.
    stack, inner, outer: sizes of the leaf's axes.
    path: name of the matrix in the tree that the method sees.
  """

  name: str
  method: Mapping[str, Any]
  stack: tuple[int, ...]
  inner: tuple[int, ...]
  outer: tuple[int, ...]
  path: str

  def start(self, key: jax.Array, w: jax.Array) -> tuple[Any, Any]:
    """The node that the method puts in the place of the weight, without its base, and the mask of what is trained."""
    w = w.reshape(*self.stack, math.prod(self.inner), math.prod(self.outer))
    module, keywords = methods.parts(self.method)[0]
    params = functools.reduce(lambda x, k: {k: x}, reversed(self.path.split("/")), w)
    keywords = _no_others(module) | keywords
    params, mask = module.init(tree.fold(key, self.name), params, targets=[f"^{self.path}$"], **keywords)
    node, mask = _only(params, self.path), _only(mask, self.path)
    if not isinstance(node, weights.Adapter) or not any(jax.tree.leaves(mask)):
      raise errors.UserError(f"rule for {self.name}: the method {self.method['name']!r} does not adapt a single weight")
    with errors.located(f"rule for {self.name}"):
      weights.merged_bias(node, None)
    return _reshaped(on(node, None), self.stack, self.inner, self.outer), on(mask, None)

  def shapes(self, w: jax.Array) -> tuple[Any, Any]:
    """The node and mask of `start` as shapes and booleans. Nothing is computed."""
    masks = []

    def run(key, w):
      node, mask = self.start(key, w)
      masks.append(mask)
      return node

    return jax.eval_shape(run, jax.random.key(0), w), masks[0]

  def kernel(self, w: jax.Array, node: Any) -> Kernel:
    """The weight with a node that `start` gave."""
    node = _reshaped(node, self.stack, (math.prod(self.inner),), (math.prod(self.outer),))
    return Kernel(w, node, self.inner, self.outer)


def plan(name: str, shape: Sequence[int], method: Mapping[str, Any]) -> Plan:
  """The plan for a leaf. `method` may have `in_axes` and `stacked`, see `bridges.adapt`."""
  where = f"rule for {name}"
  keywords = {k: v for k, v in method.items() if k not in ("in_axes", "stacked")}
  module, given = methods.parts(keywords)[0]
  if needed := [h for h in HOOKS if hasattr(module, h)]:
    raise errors.UserError(f"{where}: the method {keywords['name']!r} needs lora_jax's own training ({needed[0]})")
  whole = getattr(module, "WHOLE", False) or getattr(module, "MODEL", False)
  if whole or "targets" not in inspect.signature(module.init).parameters:
    raise errors.UserError(
      f"{where}: the method {keywords['name']!r} does not adapt a single weight; 'full' trains one"
    )
  values.keywords(module.init, given, f"{where} ({keywords['name']})", ("key", "params", "targets", *OTHERS))
  stack, axes = ((), tuple(shape)) if not method.get("stacked") else (tuple(shape[:1]), tuple(shape[1:]))
  if len(axes) < 2:
    raise errors.UserError(
      f"{where}: its shape {tuple(shape)} is not a matrix; train it with 'full', or match only kernels"
    )
  n = method.get("in_axes", _in_axes(name, len(axes)))
  if not isinstance(n, int) or not 0 < n < len(axes):
    raise errors.UserError(f"{where}: in_axes={n!r}, expected 1 to {len(axes) - 1} of the axes {axes}")
  result = Plan(name, keywords, stack, axes[:n], axes[n:], "layers/m/kernel" if stack else "m/kernel")
  if name.split("/")[-1] == TABLE and len(axes) == 2 and not stack:
    node, mask = result.shapes(jax.ShapeDtypeStruct(axes, jnp.float32))
    if isinstance(node, weights.LoRA) and node.start is None and mask.a:
      result = result._replace(path="embed/kernel")  # LoRA starts with A zero there
  return result


def _no_others(module: Any) -> dict[str, str]:
  """The keywords of a method for further targets, which name nothing."""
  return {k: "" for k in OTHERS if k in inspect.signature(module.init).parameters}


def _in_axes(name: str, axes: int) -> int:
  """The number of axes that are inputs, unless a rule says so."""
  last_is_output = axes >= 4 or "conv" in name.lower() or re.search(r"(^|/)out/kernel$", name)
  return axes - 1 if axes == 2 or last_is_output else 1


def _only(params: Any, path: str) -> Any:
  """The entry at `path` of a tree without other entries; None if there are others."""
  for k in path.split("/"):
    if not isinstance(params, dict) or set(params) != {k}:
      return None
    params = params[k]
  return params


def _reshaped(node: Any, stack: tuple, inner: tuple, outer: tuple) -> Any:
  """The node, in which each LoRA has factors [*stack, *inner, R] and [*stack, R, *outer]."""
  if not isinstance(node, weights.LoRA):
    return node.map(lambda _, w: _reshaped(w, stack, inner, outer) if weights.is_node(w) else w)
  n = node.scale.ndim

  def pair(a, b):
    return (
      None if a is None else a.reshape(*stack, *inner, a.shape[-1]),
      None if b is None else b.reshape(*stack, b.shape[n], *outer),
    )

  a, b = pair(node.a, node.b)
  return node.replace(a=a, b=b, start=None if node.start is None else pair(*node.start))
