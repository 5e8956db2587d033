"""Functions shared by all forms in the `peft` library's format: layouts, names of modules, ranks and scales."""

import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import einops
import jax
import numpy as np

from lora_jax import families, tree, weights


def rearrange(x: np.ndarray, pattern: str, sizes: Mapping[str, int]) -> np.ndarray:
  """Returns `einops.rearrange(x, pattern)` with the sizes of the axes in the pattern."""
  return einops.rearrange(x, pattern, **{k: n for k, n in sizes.items() if k in pattern})


def reverse(pattern: str) -> str:
  """Returns the einops pattern of the opposite direction."""
  left, right = pattern.split(" -> ")
  return f"{right} -> {left}"


def nodes(
  params: Any, keys: Sequence[families.Key], kind: type, inner: Callable[[Any], Any] = lambda w: w.base
) -> dict[families.Key, Any]:
  """Returns {key: node} of the nodes of a class.

  It is empty if PEFT cannot express one of them: a node on a part of a fused matrix, or over another adapter, which
  `inner` finds.
  """
  is_kind = lambda w: isinstance(w, kind)
  every = [w for w in jax.tree.leaves(params, is_leaf=is_kind) if is_kind(w)]
  flat = tree.flatten(params, is_leaf=weights.is_node)
  found = {key: flat[key.path] for key in keys if is_kind(flat[key.path])}
  return found if len(found) == len(every) and not any(isinstance(inner(w), weights.Adapter) for w in every) else {}


def target_modules(adapted: Mapping[str, Any], keys: Sequence[families.Key], flat: Mapping[str, Any]) -> list[str]:
  """Returns the last parts of the names of adapted modules, or the full name if another module has the same last part.

  PEFT matches names from the end.
  """
  stacks = {key: flat[key.path].shape[: key.hf.count("{}")] for key in keys}
  every = {key.module.format(*index) for key, stack in stacks.items() for index in np.ndindex(stack)}
  short = lambda module: module.rpartition(".")[2]
  taken = {short(module) for module in every - adapted.keys()}
  return list(dict.fromkeys(m if short(m) in taken else short(m) for m in adapted))


def commonest(values: Mapping[str, float]) -> tuple[float, dict[str, float]]:
  """Returns (the most frequent value, {module: value} of the others), by names that PEFT matches from the end."""
  most = statistics.mode(values.values())
  return most, {m.removeprefix("model."): v for m, v in values.items() if v != most}


def pattern_value(pattern: Mapping[str, float] | None, module: str, default: float) -> float:
  """Returns a module's value in a `rank_pattern` or `alpha_pattern`: the first key that matches the end of its name."""
  found = (v for k, v in (pattern or {}).items() if re.match(rf"(.*\.)?({k})$", module))
  return next(found, default)


def peft_rank(config: Mapping, module: str) -> int:
  """Returns the rank that PEFT gives a module, from `r` and `rank_pattern`."""
  return int(pattern_value(config.get("rank_pattern"), module, config.get("r", 8)))


def peft_scale(config: Mapping, module: str, rank: int) -> float:
  """Returns the scale that PEFT gives a module of a rank, from `lora_alpha` and `alpha_pattern`; 0 for rank 0."""
  if not rank:
    return 0.0
  alpha = pattern_value(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
  return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def take(left: dict[str, np.ndarray], wrong: list[str], name: str, shape: Sequence[int]) -> np.ndarray:
  """Removes a tensor from `left` and returns it in float32.

  If it is missing or has another shape, the function returns zeros and adds a message to `wrong`.
  """
  x = left.pop(name, None)
  if x is None or x.shape != tuple(shape):
    wrong.append(f"{name} is {None if x is None else x.shape}, expected {tuple(shape)}")
    return np.zeros(shape, np.float32)
  return x.astype(np.float32)
