"""Matrices that are several in one, by their parts: query, key and value as `qkv`, gate and up as `gate_up`.

A `Fused` node holds the parts side by side, so that a method may adapt some of them and leave the others alone, as
loralib's `MergedLinear(enable_lora=[True, False, True])` does. The bias beside such a matrix is split alike.
"""

import dataclasses
import itertools
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import errors, tree
from lora_jax.weights import protocol, trees
from lora_jax.weights.protocol import AXIS, Weight

PARTS = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}


@dataclasses.dataclass(frozen=True)
class Fused(Weight):
  """A matrix or bias as its parts, which lie one after the other along `AXIS`.

  Fields:
    parts: {name: weight}; the names of leaves are those of the matrix and the part, `layers/attn/qkv/kernel/q`.
  """

  parts: dict[str, Any]

  def affine(self, spec: str, x: jax.Array, bias: Any = None, dtype: Any = None) -> jax.Array:
    """The layer's output of each part, one after the other."""
    w, out = spec.replace(" ", "").split(",")[1].split("->")
    each = zip(self.parts.values(), self.biases(bias), strict=True)
    return jnp.concatenate([protocol.affine(spec, x, p, b, dtype) for p, b in each], axis=out.index(w[AXIS]))

  def dot(self, spec: str, x: jax.Array, dtype: Any = None) -> jax.Array:
    """`weights.dot` with each part, the results one after the other."""
    return self.affine(spec, x, None, dtype)

  def biases(self, bias: Any) -> list[Any]:
    """The part of a bias that belongs to each part of the matrix."""
    if bias is None:
      return [None] * len(self.parts)
    if isinstance(bias, Fused):
      return [bias.parts[k] for k in self.parts]
    ends = list(itertools.accumulate(p.shape[AXIS] for p in self.parts.values()))
    return [protocol.cut(bias, start, end) for start, end in zip([0, *ends], ends, strict=False)]

  def dense(self) -> jax.Array:
    """The matrix, adapters merged in."""
    return jnp.concatenate([protocol.dense(p) for p in self.parts.values()], axis=AXIS)

  def merged_bias(self, bias: jax.Array | None) -> jax.Array | None:
    """The bias with what each part adds to its own."""
    each = zip(self.parts.values(), self.biases(bias), strict=True)
    merged = [protocol.merged_bias(p, b) for p, b in each]
    return None if bias is None else protocol.join(merged)

  @property
  def adapted(self) -> Any:
    """The matrix without adapters, bit for bit what was split."""
    return protocol.join([protocol.base(p) for p in self.parts.values()])

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of the dense weight."""
    shapes = [p.shape for p in self.parts.values()]
    return (*shapes[0][:AXIS], sum(s[AXIS] for s in shapes), *shapes[0][AXIS:][1:])

  def map(self, fn: Callable[[str, Any], Any]) -> "Fused":
    """The matrix with `fn(name, weight)` in place of the parts."""
    return Fused({k: fn(k, p) for k, p in self.parts.items()})

  def over_trained(self) -> "Fused":
    """The matrix where what its parts adapt is trained too."""
    return self.map(lambda _, w: w.over_trained() if isinstance(w, Weight) else w)

  def clean(self) -> "Fused":
    """The matrix with all that pads its parts zeroed."""
    return self.map(lambda _, p: p.clean() if isinstance(p, Weight) else p)

  def n_padding(self, mask: "Fused") -> int:
    """How many trained numbers of the parts are padding."""
    return sum(p.n_padding(mask.parts[k]) for k, p in self.parts.items() if isinstance(p, Weight))


def _flatten(w: Fused) -> tuple:
  return [(jax.tree_util.GetAttrKey(k), p) for k, p in w.parts.items()], tuple(w.parts)


jax.tree_util.register_pytree_with_keys(Fused, _flatten, lambda names, ps: Fused(dict(zip(names, ps, strict=True))))


def flatten(params: Any) -> dict[str, Any]:
  """{name: array or node} of a tree; a fused matrix that is split is there whole, and after that by its parts."""
  flat = {}
  for k, w in tree.flatten(params, is_leaf=protocol.is_node).items():
    flat[k] = w
    if isinstance(w, Fused):
      flat |= {f"{k}/{part}": p for part, p in w.parts.items()}
  return flat


def part_names(name: str) -> tuple[str, ...]:
  """Names that the parts of a fused matrix or bias have; () for what is none."""
  steps = name.split("/")
  is_fused = len(steps) > 1 and steps[-1] in ("kernel", "bias")
  return tuple(f"{name}/{p}" for p in PARTS.get(steps[-2], ())) if is_fused else ()


def whole(name: str) -> str:
  """The name of the matrix or bias that a part is of; `name` itself where it is none."""
  return parent if name in part_names(parent := name.rpartition("/")[0]) else name


def alone(part: str) -> str:
  """What a part would be called in a model that has it as a matrix or bias of its own."""
  *group, _, leaf, name = part.split("/")
  return "/".join([*group, name, leaf])


def split(params: Any, names: Collection[str]) -> Any:
  """The tree with a `Fused` in place of the matrices and biases `names`; those that are split already stay.

  Raises:
    UserError: a method has adapted the matrix whole.
  """
  flat = tree.flatten(params, is_leaf=protocol.is_node)

  def leaf(k, w):
    if k not in names or isinstance(w, Fused):
      return w
    if protocol.base(w) is not w:
      raise errors.UserError(f"{k} is {type(w).__name__} as a whole; adapt its parts before it or not at all")
    group, name, _ = k.rsplit("/", 2)
    if name == "qkv":
      n, m = flat[f"{group}/o/kernel"].shape[-3], w.shape[AXIS]
      ends = [n, (n + m) // 2, m]
    else:
      ends = [1, 2]
    bounds = zip(PARTS[name], [0, *ends], ends, strict=False)
    return Fused({part: protocol.cut(w, start, end) for part, start, end in bounds})

  return tree.map_named(leaf, params, is_leaf=protocol.is_node)


def like(params: Any, other: Any) -> Any:
  """`params`, a pretrained model's, with the matrices split that are so in `other`, which may have adapters."""
  names = set()

  def note(k, w):
    if isinstance(w, Fused):
      names.add("/".join(s for s in k.split("/") if s != "base"))
    return w

  trees.map_nodes(note, other)
  return split(params, names)


def plain(name: str) -> str:
  """The name of a leaf before it was put into nodes."""
  return "/".join(s for s in name.split("/") if s != "base")


def altered(params: Any, base: Any) -> set[str]:
  """Names of the leaves of a pretrained tree `base`, split as in `params`, that have other values there.

  A leaf that is the same array costs nothing. What is packed in `params` alone is not compared.
  """
  old = tree.flatten(like(base, params))

  def differs(k, x):
    return k in old and x is not old[k] and not np.array_equal(x, old[k])

  return {k for name, x in tree.flatten(params).items() if differs(k := plain(name), x)}
