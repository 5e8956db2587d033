"""Adapts any model that is a function of a tree of parameters.

`adapt` merges adapters into the weights before it calls the model, which works for every model. flax_layers.py runs
Flax's own layers without merging.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lora_jax import errors, tree
from lora_jax.bridges import matrices

Rule = tuple[str, str | Mapping[str, Any] | None]


class Adapted(NamedTuple):
  """The functions of an adapted model.

  Fields:
    init: maps a random key to an adapter: a tree like the parameters, with None where nothing is trained.
    apply: maps an adapter and the model's other arguments to the model's result. The pretrained parameters become
      constants of a program that is compiled around it, unless they are given as the keyword `base`.
    merge: maps an adapter, and optionally `base`, to parameters with the shapes and dtypes of the pretrained ones.
  """

  init: Callable[[jax.Array], Any]
  apply: Callable[..., Any]
  merge: Callable[..., Any]


def adapt(apply_fn: Callable, params: Any, rules: Sequence[Rule], *, key: jax.Array | None = None) -> Adapted:
  """Adapts a model `apply_fn(params, *args, **kw)`.

  >>> import jax, jax.numpy as jnp, lora_jax
  >>> from flax import linen as nn
  >>> model = nn.Sequential([nn.Dense(32), nn.relu, nn.Dense(1)])
  >>> x = jnp.ones((8, 16))
  >>> params = model.init(jax.random.key(0), x)["params"]
  >>> forward = lambda params, x: model.apply({"params": params}, x)
  >>> rules = [(r"layers_0/kernel", {"name": "lora", "rank": 4}), (r"bias$", "full")]
  >>> adapted = lora_jax.adapt(forward, params, rules)
  >>> adapter = adapted.init(jax.random.key(1))
  >>> jax.tree.map(jnp.shape, adapter["layers_2"])
  {'bias': (1,), 'kernel': None}
  >>> adapter["layers_0"]["kernel"].a.shape, adapter["layers_0"]["kernel"].b.shape
  ((16, 4), (4, 32))
  >>> loss = lambda adapter: jnp.mean((adapted.apply(adapter, x) - 1) ** 2)
  >>> before, grads = jax.value_and_grad(loss)(adapter)
  >>> adapter = jax.tree.map(lambda p, g: p - 0.01 * g, adapter, grads)
  >>> bool(loss(adapter) < before)
  True
  >>> bool(jnp.allclose(forward(adapted.merge(adapter), x), adapted.apply(adapter, x)))
  True

  Args:
    apply_fn: the model.
    params: the pretrained parameters, any tree of arrays; they are not changed.
    rules: ordered (regex, method). The first regex that is found in the name of a leaf, such as `Dense_0/kernel`,
      decides; other leaves are frozen. A method is a name or {"name": ..., keywords}. "full" trains the leaf itself
      (with r"bias$" that is BitFit). "ia3" scales each output of a weight. The others are the methods of
      `lora_jax.methods` that put a node in the place of one matrix, such as "lora", "dora", "loha" and "lokr". None
      freezes. Two keywords describe the axes. `in_axes` is the number of leading axes that are inputs: by default all
      but the last for two axes, for four or more, and for names that contain `conv` or end in `out/kernel`; else 1.
      `stacked` says whether an axis of layers precedes them, as with `nn.scan`. Leaves called `embedding` are tables,
      for which LoRA starts with A zero.
    key: random key for what a method draws but does not train; None is seed 0.

  Returns:
    `init`, `apply` and `merge`. In an adapter `a` and `b` of LoRA are [*in, R] and [R, *out]; other nodes have the
    shapes for a matrix [in, out]. Trained arrays are float32.

  Raises:
    UserError: a rule matches nothing, a method or keyword is unknown, a weight does not fit, or there is dropout.
  """
  surgery = Surgery(params, rules, key)
  surgery.refuse_dropout("lora_jax.bridges.linen, which sees the inputs of layers, supports it")

  def apply(adapter: Any, *args, base: Any = None, **kw) -> Any:
    return apply_fn(surgery.merge(adapter, base), *args, **kw)

  return Adapted(surgery.init, apply, surgery.merge)


class Surgery:
  """Rules applied to a tree of parameters.

  Fields:
    base: the parameters.
    trained: names of the leaves that are trained themselves.
    plans: {name: `matrices.Plan`} of the leaves that get a node.
    dropout: names of the leaves whose node has dropout.
  """

  def __init__(self, params: Any, rules: Sequence[Rule], key: jax.Array | None = None):
    key = jax.random.key(0) if key is None else key
    flat = tree.flatten(params)
    specs = assign(rules, flat)
    self.base = params
    self.trained = {k for k, s in specs.items() if s["name"] == "full"}
    self.plans = {k: matrices.plan(k, flat[k].shape, s) for k, s in specs.items() if k not in self.trained}
    shapes = {k: plan.shapes(flat[k]) for k, plan in self.plans.items()}
    chains = {k: matrices.chain(node) for k, (node, _) in shapes.items()}
    self.dropout = [k for k, nodes in chains.items() if any(n.dropout for n in nodes)]
    # A start that is subtracted has to be what is trained from, whatever key `init` is called with.
    fixed = {k for k, nodes in chains.items() if any(n.start is not None for n in nodes)}

    def parts(key, other, some):
      nodes = {k: plan.start(other if k in fixed else key, some[k])[0] for k, plan in self.plans.items()}
      split = {k: tree.split(node, shapes[k][1]) for k, node in nodes.items()}
      return {k: trained for k, (trained, _) in split.items()}, {k: held for k, (_, held) in split.items()}

    parts = jax.jit(parts)
    some = {k: flat[k] for k in self.plans}
    self._held = parts(key, key, some)[1]
    self._start = lambda k: parts(k, key, some)[0]
    self._dense = jax.jit(lambda kernels: {k: w.dense() for k, w in kernels.items()})

  def init(self, key: jax.Array) -> Any:
    """A fresh adapter."""
    flat = tree.flatten(self.base)
    # Copy, since training may donate the buffers of an adapter.
    new = self._start(key) | {k: jnp.array(flat[k], jnp.float32) for k in self.trained}
    return tree.map_named(lambda k, _: new.get(k), self.base)

  def nodes(self, adapter: Any, base: Any = None) -> Any:
    """The parameters with a `matrices.Kernel` in the place of every weight that has a node."""

    def leaf(k, w, part):
      if k in self.plans:
        return self.plans[k].kernel(w, tree.join(part, self._held[k]))
      return part.astype(w.dtype) if k in self.trained else w

    return tree.map_named(leaf, self.base if base is None else base, adapter)

  def merge(self, adapter: Any, base: Any = None) -> Any:
    """The parameters with adapters merged in. Frozen parameters are not copied."""
    nodes = self.nodes(adapter, base)
    merged = self._dense({k: w for k, w in tree.flatten(nodes, is_leaf=is_kernel).items() if is_kernel(w)})
    return tree.map_named(lambda k, w: merged.get(k, w), nodes, is_leaf=is_kernel)

  def refuse_dropout(self, instead: str) -> None:
    """Raises UserError if a rule has dropout, which needs the inputs of layers."""
    if self.dropout:
      raise errors.UserError(f"rule for {self.dropout[0]}: dropout is not supported here; {instead}")


def is_kernel(w: Any) -> bool:
  """Whether `w` is a weight with a node."""
  return isinstance(w, matrices.Kernel)


def assign(rules: Sequence[Rule], flat: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
  """The method of each leaf that rules adapt, {leaf name: method}.

  Raises:
    UserError: a rule is malformed or matches nothing.
  """
  table = []
  for rule in rules:
    if not isinstance(rule, Sequence) or isinstance(rule, str) or len(rule) != 2:
      raise errors.UserError(f"a rule is (regex, method), not {rule!r:.200}")
    pattern, method = rule
    method = {"name": method} if isinstance(method, str) else method
    if method is not None and not (isinstance(method, Mapping) and isinstance(method.get("name"), str)):
      raise errors.UserError(f"rule {pattern!r}: a method is a name or has a name, not {method!r:.200}")
    table.append((pattern, method))
  tree.check_patterns([p for p, _ in table], flat, "rule")
  first = tree.first_match(table)
  specs = {k: dict(s) for k in flat if (s := first(k)) is not None}
  if not specs:
    raise errors.UserError("the rules adapt nothing: every leaf is frozen")
  for k, s in specs.items():
    if not jnp.issubdtype(flat[k].dtype, jnp.floating):
      raise errors.UserError(f"rule for {k}: its dtype {flat[k].dtype} cannot be trained")
    if s["name"] == "full" and len(s) > 1:
      raise errors.UserError(f"rule for {k}: the method 'full' takes no keywords here; the regex says what is trained")
  return specs
