"""Functions shared by LoHa and LoKr in the `peft` library's format."""

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lora_jax import errors, families, tree, weights
from lora_jax.formats.peft import layout
from lora_jax.model import transformer


def nodes(params: Any, keys: Sequence[families.Key], kind: type) -> dict[families.Key, Any]:
  """Returns {key: node} of the nodes of a class.

  Raises:
    UserError: a node is not on a whole `nn.Linear`, such as GPT-2's Conv1D or a part of a fused matrix, or it is over
      another adapter.
  """
  flat, every = tree.flatten(params, is_leaf=weights.is_node), {}
  weights.map_nodes(lambda k, w: every.setdefault(k, w) if isinstance(w, kind) else w, params)
  found = {key: flat[key.path] for key in keys if key.path in every}
  odd = [key.path for key, w in found.items() if key.transposed or isinstance(w.base, weights.Adapter)]
  odd += sorted(every.keys() - {key.path for key in found})
  if odd:
    raise errors.UserError(
      f"PEFT supports {kind.__name__} only on a whole `nn.Linear` without other adapters, not on {', '.join(odd)}"
    )
  return found


def adapted(key: families.Key, node: Any) -> list[tuple[Any, str, int]]:
  """Returns (index into the node's arrays, module, rank) for each adapted layer."""
  ranks = np.atleast_1d(np.asarray(node.rank))
  return [(i if node.rank.ndim else ..., key.module.format(i), int(r)) for i, r in enumerate(ranks) if r]


def peft_config(found: Mapping[families.Key, Any], params: Any, keys: Sequence[families.Key]) -> dict[str, Any]:
  """Returns the entries that the configs of PEFT's LoHa and LoKr share."""
  ranks, alphas = {}, {}
  for key, node in found.items():
    for i, module, r in adapted(key, node):
      ranks[module], alphas[module] = r, float(f"{float(node.scale[i]) * r:.6g}")
  (rank, rank_pattern), (alpha, alpha_pattern) = layout.commonest(ranks), layout.commonest(alphas)
  return {
    "r": rank,
    "alpha": int(alpha) if alpha == int(alpha) else alpha,
    "rank_dropout": next(iter(found.values())).dropout,
    "module_dropout": 0.0,
    "target_modules": layout.target_modules(ranks, keys, tree.flatten(params, is_leaf=weights.is_node)),
    "rank_pattern": rank_pattern,
    "alpha_pattern": alpha_pattern,
  }


def check_config(config: Mapping, known: Mapping[str, tuple[str, Callable[[Any], bool]]] | None = None) -> None:
  """Raises UserError that lists the wrong values of a PEFT config, beyond the checks of formats/peft.

  Args:
    known: {key: (what is expected, a function that checks a value)} of the method's own keys.
  """
  number = lambda x: isinstance(x, numbers.Real) and not isinstance(x, bool) and math.isfinite(x)
  rules = {
    "alpha": ("a number", number),
    "rank_dropout": ("a number in [0, 1)", lambda x: x is None or number(x) and 0 <= x < 1),
    "module_dropout": ("0, as dropping whole modules is not supported", lambda x: not x),
    **(known or {}),
  }
  bad = [
    f"{k} is {config[k]!r:.100}, expected {what}"
    for k, (what, fits) in rules.items()
    if k in config and not fits(config[k])
  ]
  if bad:
    raise errors.UserError("; ".join(bad))


def ranks_of(config: Mapping, modules: Sequence[str], rows: Sequence[Mapping]) -> tuple[list[int], list[float]]:
  """Returns the (ranks, scales) that PEFT gives modules; both are 0 for modules without tensors."""
  matched = lambda pattern, m, default: layout.pattern_value(config.get(pattern), m, config.get(*default))
  ranks = [matched("rank_pattern", m, ("r", 8)) if row else 0 for m, row in zip(modules, rows, strict=True)]
  alphas = [matched("alpha_pattern", m, ("alpha", 8)) for m in modules]
  return ranks, [a / r if r else 0.0 for a, r in zip(alphas, ranks, strict=True)]


def read(
  params: Any,
  keys: Sequence[families.Key],
  left: dict[str, np.ndarray],
  names: Sequence[str],
  build: Callable[[families.Key, Any, list[str], list[dict]], Any],
) -> Any:
  """Returns `params` with `build(key, weight, modules, tensors of each)` in place of each matrix that has tensors.

  Args:
    names: the parts of the tensors' names that follow the module's name.
  """
  flat = tree.flatten(params, is_leaf=weights.is_node)
  for key in keys:
    if not transformer.in_axes(key.path) or key.transposed or key.hf.count("{}") > 1:
      continue
    w = flat[key.path]
    modules = [key.module.format(i) for i in range(w.shape[0] if "{}" in key.hf else 1)]
    rows = [{k: left.pop(k) for n in names if (k := f"{m}.{n}") in left} for m in modules]
    if any(rows):
      flat[key.path] = build(key, w, modules, rows)
  return tree.map_named(lambda k, _: flat[k], params, is_leaf=weights.is_node)
