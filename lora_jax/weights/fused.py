"""Matrices that are several in one, by their parts: query, key and value as `qkv`, gate and up as `gate_up`.

A `Fused` node holds the parts side by side, so that a method may adapt some of them and leave the others alone, as
loralib's `MergedLinear(enable_lora=[True, False, True])` does. The bias beside such a matrix is split alike.
"""

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import errors, tree, weights
from lora_jax.weights import Weight

PARTS = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}
AXIS = -2  # heads of [D, M, H], and what is gate and up of [D, 2, F]; a bias has the last two axes


@dataclasses.dataclass(frozen=True)
class Fused:
  """A matrix or bias as its parts, which lie one after the other along `AXIS`.

  Fields:
    parts: {name: weight}; the names of leaves are those of the matrix and the part, `layers/attn/qkv/kernel/q`.
  """

  parts: dict[str, Weight]

  def dot(self, spec: str, x: jax.Array, dtype: Any = None) -> jax.Array:
    """`weights.dot` with each part, the results one after the other."""
    w, out = spec.replace(" ", "").split(",")[1].split("->")
    return jnp.concatenate([weights.dot(spec, x, p, dtype) for p in self.parts.values()], axis=out.index(w[AXIS]))

  def dense(self) -> jax.Array:
    """The matrix, adapters merged in."""
    return jnp.concatenate([weights.dense(p) for p in self.parts.values()], axis=AXIS)

  @property
  def base(self) -> jax.Array:
    """The matrix without adapters, bit for bit what was split."""
    return jnp.concatenate([weights.dense(weights.base(p)) for p in self.parts.values()], axis=AXIS)

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of the dense weight."""
    shapes = [p.shape for p in self.parts.values()]
    return (*shapes[0][:AXIS], sum(s[AXIS] for s in shapes), *shapes[0][AXIS:][1:])

  def map(self, fn: Callable[[str, Weight], Weight]) -> "Fused":
    """The node with `fn(name, weight)` in place of the parts."""
    return Fused({k: fn(k, p) for k, p in self.parts.items()})

  def clean(self) -> "Fused":
    """The node with what pads its parts zeroed."""
    return self.map(lambda _, p: p.clean() if hasattr(p, "clean") else p)

  def n_padding(self, mask: "Fused") -> int:
    """How many trained numbers of the parts are padding."""
    return sum(p.n_padding(mask.parts[k]) for k, p in self.parts.items() if hasattr(p, "n_padding"))


def _flatten(w: Fused) -> tuple:
  return [(jax.tree_util.GetAttrKey(k), p) for k, p in w.parts.items()], tuple(w.parts)


jax.tree_util.register_pytree_with_keys(Fused, _flatten, lambda names, ps: Fused(dict(zip(names, ps, strict=True))))


def flatten(params: Any) -> dict[str, Any]:
  """{name: array or node} of a tree; a fused matrix that is split is there whole, and after that by its parts."""
  flat = {}
  for k, w in tree.flatten(params, is_leaf=weights.is_node).items():
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
  flat = tree.flatten(params, is_leaf=weights.is_node)

  def leaf(k, w):
    if k not in names or isinstance(w, Fused):
      return w
    if weights.is_node(w):
      raise errors.UserError(f"{k} is {type(w).__name__} as a whole; adapt its parts before it or not at all")
    group, name, _ = k.rsplit("/", 2)
    if name == "qkv":
      n, m = flat[f"{group}/o/kernel"].shape[-3], w.shape[AXIS]
      ends = [n, (n + m) // 2, m]
    else:
      ends = [1, 2]
    bounds = zip(PARTS[name], [0, *ends], ends, strict=False)
    return Fused({part: w[..., start:end, :] for part, start, end in bounds})

  return tree.map_named(leaf, params, is_leaf=weights.is_node)


def like(params: Any, other: Any) -> Any:
  """`params`, a pretrained model's, with the matrices split that are so in `other`, which may have adapters."""
  names = set()

  def note(k, w):
    if isinstance(w, Fused):
      names.add("/".join(s for s in k.split("/") if s != "base"))
    return w

  weights.map_nodes(note, other)
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


def as_lora(w: Weight) -> Weight:
  """A `weights.LoRA` of the whole matrix that computes what LoRA on some parts does; anything else as it is.

  Ranks add up: the parts' `a` lie side by side, and each part's rows of `b` are zero in the outputs of the others.
  Computed in numpy: for files.
  """
  parts = [p if isinstance(p, weights.LoRA) else None for p in w.parts.values()] if isinstance(w, Fused) else []
  nodes = [weights.is_node(p) for p in w.parts.values()] if parts else []
  if not any(parts) or [p is not None for p in parts] != nodes:
    return w
  widths = [p.shape[AXIS] for p in w.parts.values()]
  first = next(p for p in parts if p is not None)
  stack = first.scale.shape
  made = [block([p and factors(p, i) for p in parts], widths, AXIS) for i in np.ndindex(stack)]
  rank = np.int32([a.shape[-1] for a, _, _ in made])
  a = np.zeros((len(made), *made[0][0].shape[:-1], rank.max()), np.float32)
  b = np.zeros((len(made), rank.max(), *made[0][1].shape[1:]), np.float32)
  for i, (a_, b_, _) in enumerate(made):
    a[i, ..., : rank[i]], b[i, : rank[i]] = a_, b_
  shaped = lambda x: x.reshape(*stack, *x.shape[1:])
  scale = shaped(np.float32([s for _, _, s in made]))
  out = dict(base=w.base, a=shaped(a), b=shaped(b), scale=scale, rank=shaped(rank), start=None)
  if any(p is not None and p.bias is not None for p in parts):
    out["bias"] = np.concatenate([_bias(p, first.a.ndim - 1, scale) for p in w.parts.values()], AXIS)
  return first.replace(**out)


def _bias(p: Weight, n: int, scale: np.ndarray) -> np.ndarray:
  """A part's bias [*stack, *out] for the scale of the whole; n is how many axes come before those of the output."""
  bias = getattr(p, "bias", None)
  if bias is None:
    return np.zeros((*p.shape[: scale.ndim], *p.shape[n:]), np.float32)
  ratio = np.asarray(p.scale) / np.where(scale == 0, 1, scale)
  return np.asarray(bias) * ratio.reshape(*ratio.shape, *(1,) * (bias.ndim - ratio.ndim))


def factors(w: weights.LoRA, index: tuple) -> tuple[np.ndarray, np.ndarray, float]:
  """(a, b, scale) of one layer of LoRA, without the columns that pad it; further ones subtract what it starts from."""
  rank, at = int(w.rank[index]), w.n_experts_axes()
  pairs = [(w.a, w.b)] if w.start is None else [(w.a, w.b), (w.start[0], -w.start[1])]
  pairs = [(np.asarray(a[index])[..., :rank], np.take(np.asarray(b[index]), np.arange(rank), at)) for a, b in pairs]
  a, b = (np.concatenate(each, axis) for each, axis in zip(zip(*pairs, strict=True), (-1, at), strict=True))
  return a, b, float(w.scale[index])


def block(parts: Sequence[tuple | None], widths: Sequence[int], axis: int) -> tuple[np.ndarray, np.ndarray, float]:
  """(a, b, scale) of a matrix from the `factors` of its parts, None for a part without any.

  Args:
    parts: a [..., in, R], b [..., R, ..., out, ...] and scale.
    widths: how long each part is along `axis` of b, counted from the end.
  """
  given = [(p, i) for i, p in enumerate(parts) if p is not None]
  scale = next((s for (_, _, s), _ in given if s), 0.0)
  columns, rows = [a for (a, _, _), _ in given], []
  for (_, b, s), i in given:
    pad = [(0, 0)] * b.ndim
    pad[axis] = (sum(widths[:i]), sum(widths[i + 1 :]))
    rows.append(np.pad(b * (s / scale if scale else 0.0), pad))
  return np.concatenate(columns, -1), np.concatenate(rows, columns[0].ndim - 2), scale
