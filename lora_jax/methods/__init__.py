"""Finetuning methods, one module each. A method decides what is trained; a list of methods is also a method.

A method module has `init(key, params, **kw) -> (params, mask)`. It returns the tree with what the method adds, and a
tree of booleans that says which leaves are trained. A `weights.Weight` wraps and adapts a weight; a `weights.Added`
stands beside weights. A module may also define

  STARTS                        why the model computes something else at the start; absent if it does not
  VARIES                        the keywords in which members of one population may differ, see population.align
  WHOLE                         True if it trains weights of the pretrained model themselves
  MODEL                         True if a run saves a whole model, because most weights are trained or merged into
  MERGES                        False if what it adds cannot be merged into the weights
  PEFT                          the method whose module in formats/peft/ it uses, if not its own
  KIND                          the kind that it is compared as, such as "low rank"; "other" if absent
  OPTIM                         keys of config.optim with which its paper or official code trains

and functions that take the same keywords:

  prepare(kw, tokenizer, labels) -> kw     replaces texts in the keywords by token ids
  penalty(params, **kw)                    returns a float32 [] that is added to the mean loss
  direction(inner, **kw)                   wraps the optax transformation before decay and learning rate
  optimiser(inner, *, steps, **kw)         wraps the whole optax transformation
  period(**kw), between(key, state, **kw)  the number of steps after which `between` changes the `train.State`
  held(params, **kw)                       the mask of the frozen leaves that `between` changes
"""

import functools
import importlib
import pkgutil
from collections.abc import Callable, Collection, Mapping, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import errors, patterns, tree, values, weights
from lora_jax.weights import fused

Method = Mapping[str, Any] | Sequence[Mapping[str, Any]]  # {"name": ..., keywords}, or several


@functools.cache
def names() -> list[str]:
  """Returns the names of all methods."""
  return [m.name for m in pkgutil.iter_modules(__path__) if not m.ispkg]


def get(name: str) -> ModuleType:
  """Returns the module of a method; raises UserError for an unknown name."""
  return importlib.import_module(f"{__name__}.{errors.choose(name, {k: k for k in names()}, 'method')}")


def parts(method: Method) -> list[tuple[ModuleType, dict[str, Any]]]:
  """Returns (module, keywords) for each method in `method`."""
  each = list(method) if isinstance(method, Sequence) and not isinstance(method, str) else [method]
  if not each or not all(isinstance(m, Mapping) and m.get("name") for m in each):
    what = f"not {values.shown(method)}"
    raise errors.UserError(f"config.method must be a method {{'name': ..., keywords}} or a list of methods, {what}")
  return [(get(m["name"]), {k: v for k, v in m.items() if k != "name"}) for m in each]


def title(method: Method) -> str:
  """Returns the names of the methods, joined by a plus."""
  return "+".join(name_of(module) for module, _ in parts(method))


def name_of(module: ModuleType) -> str:
  """Returns the name that a config uses for a method."""
  return module.__name__.rpartition(".")[2]


def kind(method: Method) -> str:
  """What a method is compared as; several are what the first of them is."""
  return getattr(parts(method)[0][0], "KIND", "other")


@functools.cache
def fields(name: str) -> dict[str, values.Field]:
  """Returns the keywords of a method."""
  return values.fields(get(name).init, without=("key", "params"))


def resolve(method: Method) -> tuple[dict[str, Any], ...]:
  """Returns the methods with all their keywords; raises UserError for an unknown method, keyword or value."""
  found, wrong = [], []
  for i, (module, kw) in enumerate(parts(method)):
    where, name = "config.method" + ("" if isinstance(method, Mapping) else f"[{i}]"), name_of(module)
    with errors.listed(wrong):
      found.append({"name": name, **values.resolve(fields(name), kw, where)})
  if wrong:
    raise errors.UserError("; ".join(wrong))
  return tuple(found)


def prepare(method: Method, tokenizer: Any = None, labels: Sequence[str] = ()) -> list[dict[str, Any]]:
  """Returns the methods with their texts as token ids, which `init` expects."""
  out = []
  for module, kw in parts(method):
    kw = module.prepare(kw, tokenizer, labels) if hasattr(module, "prepare") else kw
    out.append({"name": name_of(module), **kw})
  return out


def init(key: jax.Array, params: Any, method: Method) -> tuple[Any, Any]:
  """Returns (params, mask) of one or several methods; each is applied to the result of the previous one."""
  regexes = [t for _, kw in parts(method) for t in patterns.texts(kw) if patterns.is_regex(t)]
  patterns.check(regexes, tree.names(params), "method")
  mask = None
  for i, (module, kw) in enumerate(parts(method)):
    old = params
    params, own = module.init(jax.random.fold_in(key, i) if i else key, params, **kw)
    mask = own if mask is None else weights.inherit(old, mask, params, own)
  return weights.settle(params, mask)


def leaves_model(method: Method) -> bool:
  """Returns whether a run saves a whole model rather than an adapter."""
  modules = [m for m, _ in parts(method)]
  has = lambda m, name, default=False: getattr(m, name, default)
  if any(has(m, "MODEL") and not has(m, "WHOLE") for m in modules):
    return True
  return any(has(m, "MODEL") for m in modules) and all(has(m, "WHOLE") and has(m, "MERGES", True) for m in modules)


def train_also(params: Any, mask: Any, names: Collection[str]) -> tuple[Any, Any]:
  """Returns (params, mask) in which the pretrained weights `names` are also trained, as float32 masters.

  They are trained whether or not a method adapts them.
  """
  layout = weights.layout(params)

  def chosen(k):
    weight, depth, _, free = layout[k]
    return free and not depth and (weight in names or fused.whole(weight) in names)

  params = tree.map_named(lambda k, x: x.astype(jnp.float32) if chosen(k) else x, params)
  return weights.settle(params, tree.map_named(lambda k, m: m or chosen(k), mask))


def size(params: Any, mask: Any) -> int:
  """Returns how many numbers are trained, without the padding of smaller ranks and of layers that are not adapted."""

  def count(w, m):
    n = sum(x.size for x, t in zip(jax.tree.leaves(w), jax.tree.leaves(m), strict=True) if t)
    return n - w.n_padding(m) if weights.is_node(w) else n

  return sum(jax.tree.leaves(jax.tree.map(count, params, mask, is_leaf=weights.is_node)))


def penalty(method: Method) -> Callable[[Any], jax.Array] | None:
  """Returns a function from parameters to what the methods add to the mean loss; None if they add nothing."""
  found = [functools.partial(m.penalty, **kw) for m, kw in parts(method) if hasattr(m, "penalty")]
  return (lambda params: sum(fn(params) for fn in found)) if found else None


def wrappers(method: Method, steps: int) -> dict[str, list[Callable]]:
  """Returns how the methods wrap an optimiser: `direction` and `wrap`, which `optim.make` takes."""
  each = parts(method)
  return {
    "direction": [functools.partial(m.direction, **kw) for m, kw in each if hasattr(m, "direction")],
    "wrap": [functools.partial(m.optimiser, steps=steps, **kw) for m, kw in each if hasattr(m, "optimiser")],
  }


def between(method: Method) -> list[tuple[int, Callable[[jax.Array, Any], Any]]]:
  """Returns (period, function from a key and a state to a state) for the methods that act between steps."""
  each = [(m, kw) for m, kw in parts(method) if hasattr(m, "between")]
  return [(m.period(**kw), functools.partial(m.between, **kw)) for m, kw in each]


def held(method: Method, params: Any) -> Any:
  """Returns the mask of the frozen leaves that methods change between steps; None if no method does."""
  masks = [m.held(params, **kw) for m, kw in parts(method) if hasattr(m, "held")]
  return jax.tree.map(lambda *ms: any(ms), *masks) if masks else None
