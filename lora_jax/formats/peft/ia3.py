"""`ia3` in the `peft` library's format."""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax import errors, families, tree, weights
from lora_jax.formats.peft import layout
from lora_jax.methods import ia3
from lora_jax.model import architecture
from lora_jax.weights import fused

TYPE = "IA3"
HOLDS = weights.SCALES  # entries of the tree beside kernels


def to_peft(
  params: Any, keys: Sequence[families.Key], trained: Collection[str] = ()
) -> tuple[dict, dict[str, np.ndarray]] | None:
  """(config, tensors) of PEFT's IA3; None without scales. One of a fused matrix's last heads gets ones before it."""
  flat = tree.flatten(params, is_leaf=weights.is_node)
  scales = {k for k in flat if k.rpartition("/")[2] in weights.SCALES}
  tensors, modules = {}, {ia3.INPUT: {}, ia3.OUTPUT: {}}
  for key in keys:
    place, w = key.path.removesuffix("/kernel"), flat[key.path]
    for name in weights.SCALES if place != key.path else ():
      if (k := f"{place}/{name}") not in scales:
        continue
      scales.remove(k)
      stack = key.hf.count("{}")
      sizes, x = key.sizes(w.shape[stack:]), np.asarray(flat[k])
      x = x if name == ia3.INPUT else np.asarray(weights.widened(x, w.shape, stack))
      pattern = layout.reverse(key.low_rank()[name == ia3.OUTPUT])
      for i, row in enumerate(x if stack else x[None]):
        modules[name][key.module.format(i)] = True
        row = row[..., None] if name == ia3.INPUT else row[None]
        tensors[f"{key.module.format(i)}.ia3_l"] = layout.rearrange(row, pattern, sizes)
  if scales:
    raise errors.UserError(f"PEFT has no module for {', '.join(sorted(scales))}")
  if not tensors:
    return None
  feedforward = layout.target_modules(modules[ia3.INPUT], keys, flat)
  if any(m.endswith(tuple(feedforward)) for m in modules[ia3.OUTPUT]):  # PEFT looks for them without a dot before
    feedforward = list(modules[ia3.INPUT])
  config = {
    "peft_type": TYPE,
    "target_modules": layout.target_modules(modules[ia3.OUTPUT], keys, flat) + feedforward,
    "feedforward_modules": feedforward,
    "fan_in_fan_out": any(key.transposed for key in keys),
    "init_ia3_weights": True,
  }
  return config, tensors


def from_peft(
  params: Any, keys: Sequence[families.Key], config: Mapping, left: dict[str, np.ndarray], wrong: list[str]
) -> Any:
  """The inverse of `to_peft`; modules without a vector are scaled by ones. See formats/peft."""
  is_input = _feedforward(config.get("feedforward_modules"))
  linear, found = ia3.matrices(params), {}
  for key in keys:
    if key.path not in linear or "/moe/" in key.path:
      continue
    stack, shape = key.hf.count("{}"), linear[key.path].shape
    ends = stack + architecture.in_axes(key.path)
    axes, patterns = (
      {ia3.INPUT: shape[stack:ends], ia3.OUTPUT: shape[ends:]},
      dict(zip(weights.SCALES, key.low_rank(), strict=True)),
    )
    for i in range(shape[0] if stack else 1):
      k = f"{key.module.format(i)}.ia3_l"
      if k not in left:
        continue
      name = ia3.INPUT if is_input(key.module.format(i)) else ia3.OUTPUT
      size = math.prod(axes[name])
      x = layout.take(left, wrong, k, (1, size) if name == ia3.INPUT else (size, 1))
      ones = np.ones((*shape[:stack], *axes[name]), np.float32)
      scale = found.setdefault(key.path, {}).setdefault(name, ones)
      x = layout.rearrange(x, patterns[name], key.sizes(shape[stack:]))
      scale[i if stack else ...] = x[..., 0] if name == ia3.INPUT else x[0]
  for k, scales in found.items():
    if ia3.OUTPUT in scales and fused.part_names(k):
      scales[ia3.OUTPUT] = _narrow(scales[ia3.OUTPUT], ia3.sizes(params, k)[1])
    params = ia3.put(params, k.split("/")[:-1], {name: jnp.asarray(x) for name, x in scales.items()})
  return params


def _feedforward(modules: Any) -> Any:
  """A function that says of a module's name whether PEFT scales its input."""
  if modules is None or isinstance(modules, list) and all(isinstance(m, str) for m in modules):
    return lambda name: name.endswith(tuple(modules or ()))
  if not isinstance(modules, str):
    raise errors.UserError(f"feedforward_modules is {modules!r:.100}, expected names or a regular expression")
  pattern = tree.compile_pattern(modules)
  return lambda name: bool(re.fullmatch(pattern, name))


def _narrow(scale: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
  """The scale without the first parts of a fused matrix where they are ones, as `to_peft` has filled them up."""
  for size in sizes[:-1]:
    if (scale[..., :size, :] != 1).any():
      break
    scale = scale[..., size:, :]
  return scale
