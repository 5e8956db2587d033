"""Trees of weights: what holds for all weights of a model."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import errors, sharding, tree
from lora_jax.weights import protocol
from lora_jax.weights.protocol import Added, Weight, is_node

SHARED = "shared"  # the entry of a tree for arrays that the weights of all layers share


def strip(params: Any) -> Any:
  """The tree without what methods have added: the pretrained model, not copied."""
  return _without_added(jax.tree.map(protocol.base, params, is_leaf=is_node))


def _without_added(params: Any) -> Any:
  if not isinstance(params, dict):
    return params
  return {k: _without_added(v) for k, v in params.items() if k != SHARED and not isinstance(v, Added)}


def added(params: Any) -> set[str]:
  """What methods have added beside weights, by the last step of its name: "prompt", "adapter", "shared"."""
  flat = tree.flatten(params, is_leaf=is_node)
  found = {k.rpartition("/")[2] for k, x in flat.items() if isinstance(x, Added)}
  return found | ({SHARED} if isinstance(params, dict) and SHARED in params else set())


def merge(params: Any) -> Any:
  """The tree with every weight replaced by its dense array, and each bias by what belongs to that.

  Raises:
    UserError: a bottleneck, a soft prompt or a prefix has no place in the weights, nor has an adapter's bias without
      one of the layer.
  """
  params = bind(params)
  if left := [k for k, x in tree.flatten(params, is_leaf=is_node).items() if isinstance(x, Added)]:
    raise errors.UserError(f"cannot be merged into the weights: {', '.join(left[:3])}; keep them apart, as an adapter")
  return _merged(params, "")


def _merged(params: Any, where: str) -> Any:
  if not isinstance(params, dict):
    return protocol.dense(params)
  p = {k: _merged(v, f"{where}{k}/") for k, v in params.items() if k != SHARED}
  if "kernel" in params:
    with errors.located(f"{where}kernel"):
      bias = protocol.merged_bias(params["kernel"], p.get("bias"))
    if bias is not None:
      p["bias"] = bias
  return p


def map_nodes(fn: Callable[[str, Any], Any], params: Any) -> Any:
  """`fn(name, weight)` in place of every weight that is no array, those inside others first."""

  def visit(k, w):
    if not isinstance(w, Weight):
      return w
    return fn(k, w.map(lambda part, v: visit(f"{k}/{part}", v)))

  return tree.map_named(visit, params, is_leaf=is_node)


def bind(params: Any, shared: Any = None) -> Any:
  """The tree whose weights have what they need of `params["shared"]`, or of `shared`."""
  shared = params.get(SHARED) if shared is None and isinstance(params, dict) else shared
  return params if shared is None else map_nodes(lambda _, w: w.bind(shared), params)


def cuts(params: Any) -> list[int]:
  """Layers before which a tree of stacks has to be cut, rising."""
  found = (w.cuts() for w in jax.tree.leaves(params, is_leaf=is_node) if isinstance(w, Weight))
  return sorted({layer for layers in found for layer in layers})


def n_params(params: Any) -> int:
  """How many numbers the weights of a tree stand for; codes and scales of packed ones do not count."""
  leaves = jax.tree.leaves(params, is_leaf=is_node)
  return sum(math.prod(w.shape) if isinstance(w, Weight) else tree.size(w) for w in leaves)


def layout(params: Any) -> dict[str, tuple[str, int, str, bool]]:
  """What each leaf is: {its name: (the weight that it belongs to, how many adapters are beneath, its own name, whether
  training may change it)}.

  The weight is called what the pretrained model calls it, and stays so however many adapters are put around it. A
  leaf that is no weight's is a weight itself, without a name of its own.
  """
  found = {}

  def own(k, w, weight):
    """Describes the tensors of a weight, and of those inside; returns how many adapters it is."""
    if not isinstance(w, Weight):
      for name, x in tree.flatten(w).items():
        free = jnp.issubdtype(x.dtype, jnp.floating) and not k.startswith(f"{SHARED}/")
        free &= not isinstance(w, Added) or name.split("/")[0] in w.TRAINABLE
        found[f"{k}/{name}" if name else k] = weight, 0, name, free
      return 0
    below = [0]

    def inside(part, v):
      below.append(own(f"{k}/{part}", v, weight if v is w.adapted or part == "base" else f"{weight}/{part}"))
      return

    rest = w.map(inside)
    depth = max(below) + (w.adapted is not None)
    for name in tree.names(rest):
      found[f"{k}/{name}"] = weight, depth, name, name.split("/")[0] in w.TRAINABLE
    return depth

  for k, w in tree.flatten(params, is_leaf=is_node).items():
    own(k, w, k)
  return found


def mask(params: Any, patterns: Sequence[str], what: str = "pattern") -> Any:
  """A tree of booleans: True where one of `patterns` is found in the name of a leaf that may be trained.

  Names are those of the pretrained model, `layers/attn/q/kernel`, and for what an adapter trains that and its field,
  `layers/attn/q/kernel/a`, whichever adapters are around a weight.

  Raises:
    UserError: a pattern finds nothing, or a packed weight.
  """
  names = addressable(params)
  packed = {weight for weight, depth, _, free in layout(params).values() if not depth and not free}
  packed = sorted(k for k in packed - set(names.values()) if not k.startswith(f"{SHARED}/"))
  hit = tree.first_match([(p, True) for p in patterns], False)
  if found := [k for k in packed if hit(k)]:
    raise errors.UserError(f"{what}: {found[0]} is packed, which cannot be trained; load a model that is not quantised")
  tree.check_patterns(patterns, names.values(), what)
  return tree.map_named(lambda k, _: k in names and hit(names[k]), params)


def addressable(params: Any) -> dict[str, str]:
  """{leaf: the name that patterns find it by} of all leaves that may be trained."""
  return {k: f"{weight}/{own}".rstrip("/") for k, (weight, _, own, free) in layout(params).items() if free}


def inherit(old: Any, old_mask: Any, params: Any, mask: Any) -> Any:
  """`mask`, and what `old_mask` trains in `old`, though the weights of `params` may hold those of `old` now."""
  flags = tree.flatten(old_mask)
  trained = {x[:3] for k, x in layout(old).items() if flags[k]}
  where = layout(params)

  def keeps(k):
    weight, depth, own, _ = where[k]
    whole = weight.rpartition("/")[0]  # of a matrix that is in parts now
    return (weight, depth, own) in trained or (not own and (whole, 0, "") in trained)

  return tree.map_named(lambda k, m: m or keeps(k), mask)


def settle(params: Any, mask: Any) -> tuple[Any, Any]:
  """(params, mask) without what adapters have computed from weights that are trained too."""
  flags = tree.flatten(mask)
  trained = {x[0] for k, x in layout(params).items() if flags[k] and not x[1]}

  def leaf(k, w):
    beneath = isinstance(w, Weight) and any(t == k or t.startswith(f"{k}/") for t in trained)
    return w.over_trained() if beneath else w

  new = tree.map_named(leaf, params, is_leaf=is_node)
  return new, tree.map_named(lambda k, _: flags[k], new)


def placer(params: Any, mesh: jax.sharding.Mesh) -> Callable[[str, tuple[int, ...]], jax.sharding.NamedSharding]:
  """A function from a leaf's name and shape to its sharding: `sharding.RULES` place weights, and those their tensors.

  The names of an optimiser's arrays end like those of what they are of, which says where they are.
  """
  place = sharding.Placer(mesh)
  specs = {}
  for k, w in tree.flatten(params, is_leaf=is_node).items():
    spec = place.spec(k) if isinstance(w, Weight) else None
    if spec is not None:
      specs |= {f"{k}/{name}": s for name, s in tree.flatten(protocol.place(w, spec)).items()}

  def of_leaf(name: str, shape: tuple[int, ...]) -> jax.sharding.NamedSharding:
    end = name
    while end and end not in specs:
      end = end.partition("/")[2]
    return place.fit(specs[end], shape) if end else place(name, shape)

  return of_leaf


def with_dropout(params: Any, key: jax.Array, rates: Mapping[str, jax.Array] | None = None) -> Any:
  """The tree with a random key, folded from its name, in every node that has dropout; others are left as they are.

  Under scan each layer receives its own key: stacked nodes get a key per layer.

  Args:
    rates: {name of a node: float32 []} in place of the rates of the nodes, which then say only that there is dropout.
  """

  def seed(k, w):
    if not w.dropout:
      return w
    key_, layers = tree.fold(key, k), w.scale.shape
    key_ = jax.random.split(key_, layers) if layers else key_
    return w.replace(key=(key_, jnp.broadcast_to(rates[k], layers)) if rates and k in rates else key_)

  return map_nodes(seed, params)
