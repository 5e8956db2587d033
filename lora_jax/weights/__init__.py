"""Weights that answer `dot`.

Model code never multiplies by a bare array. It calls `dot("BTD,DNH->BTNH", x, w)`, where `w` is an array or a weight
node: a pytree with `.dot(spec, x, dtype=None)`, `.dense()` and `.shape`. A node may hold any other weight as its
`base`, so m adapters and n quantised formats need m + n classes.

What a method adds to a layer and no weight can hold, such as a bottleneck, is an entry of the layer's dict beside its
kernel; `EXTRAS` names those.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from lora_jax import errors, tree

Weight = Any  # jax.Array or a node

# Entries of the parameters that only methods add: scales of a linear layer's input and output (IA3), a bottleneck after
# a linear layer or beside a feed-forward layer, and on the first level soft prompts, keys and values before the text,
# and arrays that the nodes of all layers share.
SCALES = ("input_scale", "output_scale")
EXTRAS = (*SCALES, "adapter", "prompt", "prefix", "shared")


def dot(spec: str, x: jax.Array, w: Weight, dtype: Any = None) -> jax.Array:
  """`einsum(spec, x, w)` for an array or a weight node `w`.

  Operands have the dtype of `x`, sums are float32, and the result has `dtype` (that of `x` if None).
  """
  if is_node(w):
    return w.dot(spec, x, dtype)
  return jnp.einsum(spec, x, w.astype(x.dtype), preferred_element_type=dtype)


def dense(w: Weight) -> jax.Array:
  """The array that `w` stands for, adapters merged in."""
  return w.dense() if is_node(w) else w


def take(w: Weight, ids: jax.Array) -> jax.Array:
  """Rows `ids` of an embedding table [V, D]."""
  return w.take(ids) if hasattr(w, "take") and is_node(w) else dense(w).at[ids].get(mode="clip")


def is_node(w: Any) -> bool:
  """Whether `w` is a weight node rather than an array."""
  return hasattr(w, "dot") and hasattr(w, "dense")


def base(w: Weight) -> Weight:
  """The innermost weight under the adapters of `w`."""
  while is_node(w) and hasattr(w, "base"):
    w = w.base
  return w


def strip(params: Any) -> Any:
  """The tree without what methods have added: the pretrained model, not copied."""
  return _without_extras(jax.tree.map(base, params, is_leaf=is_node))


def _without_extras(params: Any) -> Any:
  if not isinstance(params, dict):
    return params
  return {k: _without_extras(v) for k, v in params.items() if k not in EXTRAS}


def merge(params: Any) -> Any:
  """The tree with every node replaced by its dense array, and scales folded into kernels and biases.

  Raises:
    UserError: a bottleneck, a soft prompt or a prefix has no place in the weights, nor has an adapter's bias without
      one of the layer.
  """
  params = bind(params)
  left = [k for k in tree.names(params, is_leaf=is_node) if set(k.split("/")) & {"adapter", "prompt", "prefix"}]
  if left:
    raise errors.UserError(f"cannot be merged into the weights: {', '.join(left[:3])}; keep them apart, as an adapter")
  return _fold(jax.tree.map(dense, _offsets(params), is_leaf=is_node))


def _offsets(params: Any, where: str = "") -> Any:
  """What the kernels' nodes add to every output in the biases beside them."""
  if not isinstance(params, dict):
    return params
  p, w = {k: _offsets(v, f"{where}{k}/") for k, v in params.items()}, params.get("kernel")
  while is_node(w) and hasattr(w, "base"):
    if hasattr(w, "offset") and w.offset() is not None:
      if "bias" not in p:
        raise errors.UserError(f"{where}kernel has an adapter with a bias, but no bias that it could be merged into")
      p["bias"] = dense(p["bias"]) + w.offset()
    w = w.base
  return p


def _fold(params: Any, stack: int = 0) -> Any:
  """Scales multiplied into the kernel and bias beside them; `stack` is 1 in the layers, which have a leading L."""
  if not isinstance(params, dict):
    return params
  p = {k: _fold(v, int(stack or k == "layers")) for k, v in params.items() if k not in EXTRAS}
  for name in SCALES:
    if name in params:
      scale = params[name].astype(jnp.float32)
      p["kernel"] = scaled(p["kernel"].astype(jnp.float32), scale, name, stack).astype(p["kernel"].dtype)
      if name == "output_scale" and "bias" in p:
        p["bias"] = scaled(p["bias"], scale, name, stack)
  return p


def scaled(w: jax.Array, scale: jax.Array, name: str, stack: int) -> jax.Array:
  """A kernel [*stack, *in, *out] or bias [*stack, *out] times a scale [*stack, *in] or [*stack, *out].

  Args:
    name: one of `SCALES`.
    stack: how many axes are the stack.
  """
  if name == "input_scale":
    return w * scale.reshape(*scale.shape, *(1,) * (w.ndim - scale.ndim))
  scale = widened(scale, w.shape[-2:], stack)
  return w * scale.reshape(*scale.shape[:stack], *(1,) * (w.ndim - scale.ndim), *scale.shape[stack:])


def widened(scale: jax.Array, out: tuple[int, ...], stack: int = 0) -> jax.Array:
  """An `output_scale` for outputs of shape [..., *out], with ones before it where it is that of the last heads only.

  So one of k and v, [*stack, 2K, H], scales the output [..., N + 2K, H] of a matrix that is q, k and v.
  """
  if scale.ndim - stack < 2 or scale.shape[-2] == out[-2]:
    return scale
  before = [(0, 0)] * (scale.ndim - 2) + [(out[-2] - scale.shape[-2], 0), (0, 0)]
  return jnp.pad(scale, before, constant_values=1)


def map_nodes(fn: Callable[[str, Any], Any], params: Any) -> Any:
  """`fn(name, node)` in place of every node, those inside others first."""

  def visit(k, w):
    if not is_node(w):
      return w
    return fn(k, w.map(lambda part, v: visit(f"{k}/{part}", v)) if hasattr(w, "map") else w)

  return tree.map_named(visit, params, is_leaf=is_node)


def bind(params: Any, shared: Any = None) -> Any:
  """The tree with the arrays of `params["shared"]`, or `shared`, in the nodes that ask for them by a `bind` method."""
  shared = params.get("shared") if shared is None and isinstance(params, dict) else shared
  if shared is None:
    return params
  return map_nodes(lambda _, w: w.bind(shared) if hasattr(w, "bind") else w, params)


class Adapter:
  """Mixin of nodes that adapt another weight, their field `base`."""

  def map(self, fn: Callable[[str, Weight], Weight]) -> "Adapter":
    """The node with `fn(field, weight)` in place of the weights that it holds."""
    return self.replace(base=fn("base", self.base))

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of the dense weight."""
    return self.base.shape


class Additive(Adapter):
  """Mixin of nodes that stand for `base + delta()`.

  They have a field `scale`, float32 [] or, stacked over layers, [L]: 0 in layers that are not adapted. A node defines
  `change`, what it adds to an output, and `layer_delta`, what it adds to a weight that is not stacked.
  """

  def dot(self, spec: str, x: jax.Array, dtype: Any = None) -> jax.Array:
    """`dot(spec, x, base)` and the change."""
    return dot(spec, x, self.base, dtype) + self.change(spec, x, dtype)

  def change(self, spec: str, x: jax.Array, dtype: Any = None) -> jax.Array:
    """What the node adds to the output for an input x."""
    return dot(spec, x, self.layer_delta(), dtype)

  def delta(self) -> jax.Array:
    """What the node adds to the weight, float32, in the shape of `base`."""
    return jax.vmap(lambda w: w.layer_delta())(self) if self.scale.ndim else self.layer_delta()

  def dense(self) -> jax.Array:
    """The merged weight in the dtype of the base; the sum is taken in float32."""
    w = dense(self.base)
    return (w.astype(jnp.float32) + self.delta()).astype(w.dtype)


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


@struct.dataclass
class LoRA(Additive):
  """`W + scale * A B` (Hu et al. 2021, https://arxiv.org/abs/2106.09685, section 4.1), A applied first.

  Stacked over layers every field has a leading L. Layers of smaller rank than R have zero columns in `a` and zero rows
  in `b`; such a pair has zero gradients, so it stays zero through training and needs no mask. The matrices of experts
  have an E before the axes of `a` and `b` besides.

  Fields:
    base: the adapted weight [*in, *out], an array or a node; of an embedding [V, D], V are its inputs.
    a: float32 [*in, R].
    b: float32 [R, *out].
    scale: float32 []; alpha / rank, or alpha / sqrt(rank) for rsLoRA.
    rank: int32 []; how many of the R columns are in use.
    key: random key []; present only in a training forward, where it switches dropout on.
    start: None, or (a, b) whose product is subtracted: what `a` and `b` were where they do not start at zero, as in
      PiSSA, so that the base stays what it is.
    bias: None, or float32 [*out], which is added to what B gives.
    dropout: probability that an input element is dropped before `a`; a row of an embedding is no such input.
    rslora: how `scale` follows from alpha; kept for the adapter file.
    use: of a table that embeds and, transposed, is the head: "embed" or "head" where that use alone is adapted.
  """

  base: Weight
  a: jax.Array
  b: jax.Array
  scale: jax.Array
  rank: jax.Array
  key: jax.Array | None = None
  start: tuple[jax.Array, jax.Array] | None = None
  bias: jax.Array | None = None
  dropout: float = struct.field(pytree_node=False, default=0.0)
  rslora: bool = struct.field(pytree_node=False, default=False)
  use: str = struct.field(pytree_node=False, default="")

  def dot(self, spec: str, x: jax.Array, dtype: Any = None) -> jax.Array:
    """`dot(spec, x, base)` and the change."""
    y = dot(spec, x, self.base, dtype)
    return y if self.use == "embed" else y + self.change(spec, x, dtype)

  def change(self, spec: str, x: jax.Array, dtype: Any = None) -> jax.Array:
    """`scale * ((dropout(x) a) b - (x a0) b0 + bias)`, (a0, b0) being `start`."""
    kept, b = dropout(x, self.dropout, self.key), self.b * self.scale
    if self.start is None:
      y = _low_rank(spec, kept, self.a, b, dtype)
    else:
      # As differences, taken in float32: a and b would lose what they have learned where large products cancel.
      a0, b0 = self.start[0], self.start[1] * self.scale
      y = _low_rank(spec, kept, self.a, b - b0, dtype) + _low_rank(spec, kept, self.a - a0, b0, dtype)
      y = y if kept is x else y + _low_rank(spec, kept - x, a0, b0, dtype)
    return y if self.bias is None else y + self.offset().astype(y.dtype)

  def take(self, ids: jax.Array) -> jax.Array:
    """Rows `ids` of an embedding table [V, D]; sums are float32."""
    y = take(self.base, ids)
    if self.use == "head":
      return y
    change = jnp.tensordot(self.a.at[ids].get(mode="clip"), self.b * self.scale, 1)
    return (y.astype(jnp.float32) + change).astype(y.dtype)

  def offset(self) -> jax.Array | None:
    """What the node adds to every output, [*out]."""
    return None if self.bias is None else self.bias * _align(self.scale, self.bias)

  def layer_delta(self) -> jax.Array:
    """`scale * (a b - a0 b0)`, float32, in the shape of a `base` that is not stacked."""
    product = lambda a, b: jnp.tensordot(a, b, 1, precision="highest")
    product = jax.vmap(product) if self.n_experts_axes() else product
    if self.start is None:
      return self.scale * product(self.a, self.b)
    a0, b0 = self.start
    return self.scale * (product(self.a, self.b - b0) + product(self.a - a0, b0))

  def dense(self) -> jax.Array:
    """The merged weight in the dtype of the base; UserError where one use of a table alone is adapted."""
    if self.use:
      raise errors.UserError(
        f"an adapter of the {self.use} alone cannot be merged into a table that embedding and head share; train it "
        "with tied=True, or keep it apart"
      )
    return Additive.dense(self)

  def n_experts_axes(self) -> int:
    """How many axes, of experts, `a` and `b` both have before their own: 0 or 1."""
    stack = self.scale.ndim
    return self.a.ndim + self.b.ndim - 2 * stack - 2 - (len(self.base.shape) - stack)

  def clean(self) -> "LoRA":
    """The node with the columns of `a` and rows of `b` that no rank uses, and the bias of such layers, zeroed."""
    used = jnp.arange(self.a.shape[-1]) < self.rank[..., None]
    axis = self.scale.ndim + self.n_experts_axes()
    in_b = jnp.expand_dims(used, [*range(self.scale.ndim, axis), *range(axis + 1, self.b.ndim)])
    a = jnp.where(jnp.expand_dims(used, [*range(self.scale.ndim, self.a.ndim - 1)]), self.a, 0)
    bias = None if self.bias is None else jnp.where(_align(self.rank, self.bias) > 0, self.bias, 0)
    return self.replace(a=a, b=jnp.where(in_b, self.b, 0), bias=bias)

  def n_padding(self, mask: "LoRA") -> int:
    """How many of the numbers that `mask` calls trained pad smaller ranks."""
    rank, columns = np.asarray(self.rank), self.a.shape[-1]
    each = lambda x: x.size // (columns * rank.size)
    n = sum(each(x) for x, trained in ((self.a, mask.a), (self.b, mask.b)) if trained) * int(np.sum(columns - rank))
    idle = int(np.sum(rank == 0)) * (self.bias.size // rank.size) if mask.bias else 0
    return n + idle


def _align(scale: jax.Array, x: jax.Array) -> jax.Array:
  """`scale` with axes of length 1 after its own, as many as x has."""
  return scale.reshape(*scale.shape, *(1,) * (x.ndim - scale.ndim))


def _low_rank(spec, x, a, b, dtype):
  """`x a b`; b comes first where x has the axes of b: a tied head multiplies by the transposed table."""
  operands, out = spec.replace(" ", "").split("->")
  if set(operands.split(",")[1][: a.ndim - 1]) <= set(out):
    a, b = jnp.moveaxis(b, 0, -1), jnp.moveaxis(a, -1, 0)
  spec_a, spec_b = split_spec(spec)
  return dot(spec_b, dot(spec_a, x, a), b, dtype)


def with_dropout(params: Any, key: jax.Array, rates: Mapping[str, jax.Array] | None = None) -> Any:
  """The tree with a random key, folded from its name, in every node that has dropout; others are left as they are.

  Under scan each layer receives its own key: stacked nodes get a key per layer.

  Args:
    rates: {name of a node: float32 []} in place of the rates of the nodes, which then say only that there is dropout.
  """

  def seed(k, w):
    if not getattr(w, "dropout", 0):
      return w
    key_, layers = tree.fold(key, k), w.scale.shape
    key_ = jax.random.split(key_, layers) if layers else key_
    return w.replace(key=(key_, jnp.broadcast_to(rates[k], layers)) if rates and k in rates else key_)

  return map_nodes(seed, params)
