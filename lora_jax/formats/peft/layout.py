"""What methods share in reading and writing the `peft` library's format: layouts, names of modules, scales."""

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
  """`einops.rearrange` with the sizes of the axes that the pattern has."""
  return einops.rearrange(x, pattern, **{k: n for k, n in sizes.items() if k in pattern})


def reverse(pattern: str) -> str:
  """The einops pattern of the opposite direction."""
  left, right = pattern.split(" -> ")
  return f"{right} -> {left}"


def nodes(
  params: Any, keys: Sequence[families.Key], kind: type, inner: Callable[[Any], Any] = lambda w: w.base
) -> dict[families.Key, Any]:
  """{key: node} of the nodes of a class; empty where one is where PEFT has none: on a part of a fused matrix, or over
  another adapter, as `inner` of a node would be."""
  is_kind = lambda w: isinstance(w, kind)
  every = [w for w in jax.tree.leaves(params, is_leaf=is_kind) if is_kind(w)]
  flat = tree.flatten(params, is_leaf=weights.is_node)
  found = {key: flat[key.path] for key in keys if is_kind(flat[key.path])}
  return found if len(found) == len(every) and not any(isinstance(inner(w), weights.Adapter) for w in every) else {}


def target_modules(adapted: Mapping[str, Any], keys: Sequence[families.Key], flat: Mapping[str, Any]) -> list[str]:
  """Last parts of the names of adapted modules, which PEFT matches from the end; whole names where others end alike."""
  stacks = {key: flat[key.path].shape[: key.hf.count("{}")] for key in keys}
  every = {key.module.format(*index) for key, stack in stacks.items() for index in np.ndindex(stack)}
  short = lambda module: module.rpartition(".")[2]
  taken = {short(module) for module in every - adapted.keys()}
  return list(dict.fromkeys(m if short(m) in taken else short(m) for m in adapted))


def commonest(values: Mapping[str, float]) -> tuple[float, dict[str, float]]:
  """The most frequent value, and the modules that have another, by names that PEFT matches from the end."""
  most = statistics.mode(values.values())
  return most, {m.removeprefix("model."): v for m, v in values.items() if v != most}


def pattern_value(pattern: Mapping[str, float] | None, module: str, default: float) -> float:
  """What PEFT finds for a module in a `rank_pattern` or the like: the value of the first key that ends its name."""
  found = (v for k, v in (pattern or {}).items() if re.match(rf"(.*\.)?({k})$", module))
  return next(found, default)


def peft_rank(config: Mapping, module: str) -> int:
  """The rank that PEFT gives a module, by `r` and `rank_pattern`."""
  return int(pattern_value(config.get("rank_pattern"), module, config.get("r", 8)))


def peft_scale(config: Mapping, module: str, rank: int) -> float:
  """The scale that PEFT gives a module of a rank, by `lora_alpha` and `alpha_pattern`; 0 for rank 0."""
  if not rank:
    return 0.0
  alpha = pattern_value(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
  return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def take(left: dict[str, np.ndarray], wrong: list[str], name: str, shape: Sequence[int]) -> np.ndarray:
  """A float32 tensor out of `left`; zeros, and a note in `wrong`, where it is not there or of another shape."""
  x = left.pop(name, None)
  if x is None or x.shape != tuple(shape):
    wrong.append(f"{name} is {None if x is None else x.shape}, expected {tuple(shape)}")
    return np.zeros(shape, np.float32)
  return x.astype(np.float32)
