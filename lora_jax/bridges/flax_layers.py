"""Adapts Flax models without merging: adapters run beside the layers, on the layers' own inputs.

Adapters equal those of `bridges.adapt` for the same parameters and rules, and results are equal up to rounding. Some
cases have no faster form and are merged on the fly: other layers and subclasses, layers with their own product or
convolution, grouped convolutions, methods other than LoRA on convolutions and embeddings, and weights stacked by
nnx.vmap.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax import errors, tree, weights
from lora_jax.bridges import function, matrices


def linen(
  module: Any, params: Any, rules: Sequence[function.Rule], *, key: jax.Array | None = None
) -> function.Adapted:
  """Adapts a flax.linen module as `bridges.adapt` does; nn.Dense, nn.DenseGeneral, nn.Conv and nn.Embed do not merge.

  `apply(adapter, *args, variables=None, base=None, **kw)` calls `module.apply` with {"params": ...} and the other
  collections `variables`. It passes `rngs`, `mutable` and `method` on. Dropout of adapters uses the rng "dropout".

  Args:
    module: an unbound module; it is not changed.
    params: its collection "params", without boxes (`flax.linen.meta.unbox`).
  """
  from flax import linen as nn

  if any(isinstance(x, nn.meta.AxisMetadata) for x in jax.tree.leaves(params, is_leaf=nn.meta.is_axis_metadata)):
    raise errors.UserError("the parameters have boxes of metadata; give flax.linen.meta.unbox(params)")
  surgery = function.Surgery(params, rules, key)

  def apply(adapter: Any, *args, variables: Mapping | None = None, base: Any = None, **kw) -> Any:
    boxed = jax.tree.map(
      lambda w: _box()(w) if function.is_kernel(w) else w, surgery.nodes(adapter, base), is_leaf=function.is_kernel
    )
    with nn.intercept_methods(_intercept):
      return module.apply({**(variables or {}), "params": boxed}, *args, **kw)

  return function.Adapted(surgery.init, apply, surgery.merge)


@functools.cache
def _box() -> type:
  """The type of the box in which a linen module holds a `Kernel`. A module that unboxes it gets the merged weight."""
  from flax import linen as nn, struct

  @struct.dataclass
  class Box(nn.meta.AxisMetadata):
    kernel: matrices.Kernel

    def unbox(self):
      return _merged(self.kernel)

    def replace_boxed(self, val):
      return val

    def add_axis(self, index, params):
      return self

    def remove_axis(self, index, params):
      return self

  return Box


def _intercept(call: Callable, args: tuple, kw: dict, context: Any) -> Any:
  """Runs a call of a module's method, with the adapter beside the layer if it has one; see `nn.intercept_methods`."""
  from flax import linen as nn

  module, method = context.module, context.method_name
  is_table = type(module) is nn.Embed  # a subclass may use its weight in another way
  if not is_table and type(module) not in (nn.Dense, nn.DenseGeneral, nn.Conv) or module.scope is None:
    return call(*args, **kw)
  own = dict(module.variables.get("params", {}))
  box = own.get("embedding" if is_table else "kernel")
  if not isinstance(box, _box()) or getattr(module, "mask", None) is not None:
    return call(*args, **kw)
  if is_table and method == "setup":
    module.embedding = box.kernel.base
    return None
  if is_table and method == "__call__":
    return _rows(module, box.kernel, *args, **kw)
  if is_table and method == "attend":
    return _scores(module, box.kernel, *args, **kw)
  if method != "__call__":
    return call(*args, **kw)
  hook, beside = HOOKS["conv" if type(module) is nn.Conv else "dot"]
  if not _plain(module, hook):
    return call(*args, **kw)
  k = box.kernel
  if module.has_rng("dropout"):
    k = k.replace(node=weights.with_dropout(k.node, module.make_rng("dropout")))
  plain = module.clone(parent=None, **{hook: beside(k)})
  return plain.apply({"params": own | {"kernel": k.base}}, *args, **kw)


def _plain(module: Any, hook: str) -> bool:
  """Whether a layer uses the operation of jax.lax, not its own."""
  return getattr(module, f"{hook}_cls", None) is None and getattr(module, hook) in (None, getattr(lax, hook))


def _merged(k: matrices.Kernel) -> jax.Array:
  """The merged weight for a layer that has no other way; UserError if there should be dropout."""
  if any(n.dropout for n in matrices.chain(k.node)):
    raise errors.UserError(
      f"dropout of an adapter on a weight {k.base.shape}, whose layer cannot run beside its adapter: see "
      "lora_jax.bridges, and `in_axes` for a convolution"
    )
  return k.dense()


def nnx(model: Any, rules: Sequence[function.Rule], *, key: jax.Array | None = None) -> function.Adapted:
  """Adapts a flax.nnx model as `bridges.adapt` does; Linear, LinearGeneral, Conv and Embed run without merging.

  The parameters are the state of `nnx.Param`, as `nnx.to_pure_dict` gives it. `apply(adapter, *args, base=None, **kw)`
  calls a copy of the model, so changes that the call makes to it, such as batch statistics, are lost. `merge` gives a
  model.
  """
  from flax import nnx

  graph, state, rest = nnx.split(model, nnx.Param, ...)
  params = nnx.to_pure_dict(state)
  surgery = function.Surgery(params, rules, key)
  surgery.refuse_dropout("lora_jax.bridges.linen supports it")
  paths = {tree.name(path): [p.key for p in path] for path, _ in jax.tree_util.tree_leaves_with_path(params)}
  beside = {k: hook for k in surgery.plans if (hook := _nnx_hook(_module(model, paths[k]), paths[k][-1]))}

  def build(params: Any) -> Any:
    new = jax.tree.map(lambda x: x, state)
    nnx.replace_by_pure_dict(new, params)
    return nnx.merge(graph, new, rest)

  def apply(adapter: Any, *args, base: Any = None, **kw) -> Any:
    nodes = surgery.nodes(adapter, base)

    def plain(k, w):
      return (w.base if k in beside else w.dense()) if function.is_kernel(w) else w

    copy = build(tree.map_named(plain, nodes, is_leaf=function.is_kernel))
    for k, w in tree.flatten(nodes, is_leaf=function.is_kernel).items():
      if k in beside:
        _put(_module(copy, paths[k]), beside[k], w)
    return copy(*args, **kw)

  return function.Adapted(surgery.init, apply, lambda adapter, base=None: build(surgery.merge(adapter, base)))


def _module(model: Any, path: Sequence) -> Any:
  """The module that holds the parameter at a path of the state."""

  def step(m, k):
    return getattr(m, k) if isinstance(k, str) and hasattr(m, k) else m[k]

  return functools.reduce(step, path[:-1], model)


def _nnx_hook(module: Any, leaf: str) -> str | None:
  """The way in which an nnx module runs with an adapter beside it, or None if it cannot."""
  from flax import nnx

  if leaf == "embedding" and type(module) is nnx.Embed:
    return "embed" if module.embedding.ndim == 2 else None
  kinds = {nnx.Linear: "dot", nnx.LinearGeneral: "dot", nnx.Conv: "conv"}
  if leaf != "kernel" or type(module) not in kinds or getattr(module, "mask", None) is not None:
    return None
  if not _plain(module, HOOKS[kinds[type(module)]][0]):
    return None
  shape = module.kernel.shape
  own = {
    nnx.Linear: lambda: 2,
    nnx.LinearGeneral: lambda: len(module.in_features) + len(module.out_features),
    nnx.Conv: lambda: len(module.kernel_shape),
  }[type(module)]()
  return kinds[type(module)] if len(shape) == own else None  # nnx.vmap has stacked weights with more axes


def _put(module: Any, hook: str, k: matrices.Kernel) -> None:
  """Makes an nnx module run with an adapter beside it."""
  if hook == "embed":
    module.__class__ = _embed()
    module.adapted = lambda: k  # a function, since static attributes cannot hold arrays
    return
  name, beside = HOOKS[hook]
  setattr(module, name, beside(k))


@functools.cache
def _embed() -> type:
  from flax import nnx

  class Embed(nnx.Embed):
    """An embedding layer with an adapter, which `adapted()` gives."""

    def __call__(self, inputs):
      return _rows(self, self.adapted(), inputs)

    def attend(self, query):
      return _scores(self, self.adapted(), query)

  return Embed


def _rows(module: Any, k: matrices.Kernel, inputs: jax.Array) -> jax.Array:
  """Rows of an adapted embedding layer for `inputs` int [...], [..., D] in the layer's dtype."""
  return weights.take(k.table, inputs).astype(module.dtype or k.base.dtype)


def _scores(module: Any, k: matrices.Kernel, query: jax.Array) -> jax.Array:
  """Products [..., V] of a query [..., D] with all rows of an adapted embedding layer, in its or the promoted dtype."""
  query = query.astype(module.dtype or jnp.promote_types(query.dtype, k.base.dtype))
  rows = query.reshape(-1, query.shape[-1])
  return weights.dot("MD,VD->MV", rows, k.table).reshape(*query.shape[:-1], k.base.shape[0])


def _dot_general(k: matrices.Kernel) -> Callable:
  """`lax.dot_general` that adds the adapter's part."""

  def run(x, w, dims, *args, **kw):
    (axes, w_axes), (batch, _) = dims
    if batch or tuple(w_axes) != tuple(range(len(k.inner))):
      return lax.dot_general(x, _merged(k).astype(w.dtype), dims, *args, **kw)
    moved = jnp.moveaxis(x, axes, range(-len(axes), 0))
    if not k.additive:
      return k.dot(moved)
    y = lax.dot_general(x, w, dims, *args, **kw)
    return y + k.change(moved).astype(y.dtype)

  return run


def _conv(k: matrices.Kernel) -> Callable:
  """`lax.conv_general_dilated` that adds the adapter's part: LoRA is a convolution to R channels, then a matrix."""
  node = k.node

  def run(x, w, *args, **kw):
    if k.pair is None or len(k.outer) != 1 or kw.get("feature_group_count", 1) != 1:
      return lax.conv_general_dilated(x, _merged(k).astype(w.dtype), *args, **kw)
    a, b = k.pair
    a = a.reshape(*k.inner, -1).astype(x.dtype)
    h = lax.conv_general_dilated(weights.dropout(x, node.dropout, node.key), a, *args, **kw)
    y = lax.conv_general_dilated(x, w, *args, **kw)
    return y + weights.dot("...R,RO->...O", h, b).astype(y.dtype)

  return run


HOOKS = {"dot": ("dot_general", _dot_general), "conv": ("conv_general_dilated", _conv)}
