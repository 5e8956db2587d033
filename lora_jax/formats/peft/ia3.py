"""IA3 in the `peft` library's format: one vector `ia3_l` per module, which scales its outputs or its inputs."""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax import errors, families, tree, weights
from lora_jax.formats.peft import layout
from lora_jax.methods import ia3
from lora_jax.weights import fused

TYPE = "IA3"
SIDES = INPUT, OUTPUT = weights.Scaled.TRAINABLE


def to_peft(
  params: Any, keys: Sequence[families.Key], trained: Collection[str] = ()
) -> tuple[dict, dict[str, np.ndarray]] | None:
  """Returns (config, tensors) of PEFT's IA3; None without scales. Parts of a fused matrix without scales get ones."""
  flat = tree.flatten(params, is_leaf=weights.is_node)
  every = [k for k, w in fused.flatten(params).items() if isinstance(w, weights.Scaled)]
  tensors, modules, written = {}, {side: {} for side in SIDES}, set()
  for key in keys:
    w = flat[key.path]
    whole = _whole(w)
    if whole is None:
      continue
    written |= {k for k in every if k == key.path or k.startswith(f"{key.path}/")}
    stack = key.hf.count("{}")
    for side, x in ((INPUT, whole.input_scale), (OUTPUT, whole.output_scale)):
      rows = () if x is None else np.asarray(x) if stack else np.asarray(x)[None]
      pattern = layout.reverse(key.low_rank()[side == OUTPUT])
      for i, row in enumerate(rows):
        modules[side][key.module.format(i)] = True
        row = row[..., None] if side == INPUT else row[None]
        tensors[f"{key.module.format(i)}.ia3_l"] = layout.rearrange(row, pattern, key.sizes(w.shape[stack:]))
  if left := sorted(set(every) - written):
    raise errors.UserError(f"PEFT has no module for {', '.join(left)}")
  if not tensors:
    return None
  feedforward = layout.target_modules(modules[INPUT], keys, flat)
  if any(m.endswith(tuple(feedforward)) for m in modules[OUTPUT]):  # PEFT matches the ends without a leading dot
    feedforward = list(modules[INPUT])
  config = {
    "peft_type": TYPE,
    "target_modules": layout.target_modules(modules[OUTPUT], keys, flat) + feedforward,
    "feedforward_modules": feedforward,
    "fan_in_fan_out": any(key.transposed for key in keys),
    "init_ia3_weights": True,
  }
  return config, tensors


def _whole(w: Any) -> weights.Scaled | None:
  """Returns the scales of a matrix; scales of parts become one vector. None if PEFT has no such form."""
  if isinstance(w, weights.Scaled):
    return None if isinstance(w.base, fused.Fused | weights.Adapter) else w
  parts = list(w.parts.values()) if isinstance(w, fused.Fused) else []
  found = [p for p in parts if isinstance(p, weights.Scaled)]
  plain = [p.base if isinstance(p, weights.Scaled) else p for p in parts]
  mixed = any(isinstance(p, weights.Adapter) for p in plain)
  if not found or mixed or any(p.input_scale is not None for p in found):
    return None
  outer = found[0].outer
  stack = found[0].output_scale.ndim - outer

  def scale(p):
    if isinstance(p, weights.Scaled):
      return p.output_scale
    return np.ones((*p.shape[:stack], *p.shape[-outer:]), np.float32)

  return found[0].replace(base=None, output_scale=np.concatenate([scale(p) for p in parts], weights.AXIS))


def from_peft(
  params: Any, keys: Sequence[families.Key], config: Mapping, left: dict[str, np.ndarray], wrong: list[str]
) -> Any:
  """Inverts `to_peft`; layers without a vector are scaled by ones."""
  is_input = _feedforward(config.get("feedforward_modules"))
  flat, linear = tree.flatten(params, is_leaf=weights.is_node), ia3.matrices(params)
  for key in keys:
    if key.path in linear and "/moe/" not in key.path:
      scales = _read(key, flat[key.path], is_input, left, wrong)
      flat[key.path] = _put(params, key.path, flat[key.path], scales)
  return tree.map_named(lambda k, _: flat[k], params, is_leaf=weights.is_node)


def _read(key: families.Key, w: Any, is_input: Any, left: dict, wrong: list[str]) -> dict[str, np.ndarray]:
  """Returns {side: scales of all layers} of a matrix."""
  stack, found = key.hf.count("{}"), {}
  for i in range(w.shape[0] if stack else 1):
    module = key.module.format(i)
    if f"{module}.ia3_l" not in left:
      continue
    side = INPUT if is_input(module) else OUTPUT
    if side not in found:
      found[side] = np.array(getattr(ia3.scaled(key.path, w, side), side))
    scale = found[side][i if stack else ...]
    x = layout.take(left, wrong, f"{module}.ia3_l", (1, scale.size) if side == INPUT else (scale.size, 1))
    x = layout.rearrange(x, key.low_rank()[side == OUTPUT], key.sizes(w.shape[stack:]))
    scale[...] = x[..., 0] if side == INPUT else x[0]
  return found


def _put(params: Any, k: str, w: Any, scales: Mapping[str, np.ndarray]) -> Any:
  """Returns a matrix with scales; leading parts of a fused matrix whose scales are all ones stay unscaled.

  `to_peft` fills in such ones.
  """
  names = fused.part_names(k)
  if INPUT in scales or not names:
    for side, x in scales.items():
      w = ia3.scaled(k, w, side).replace(**{side: jnp.asarray(x)})
    return w
  if OUTPUT not in scales:
    return w
  split = tree.flatten(fused.split(params, [k]), is_leaf=weights.is_node)[k]
  ends = np.cumsum([p.shape[weights.AXIS] for p in split.parts.values()])
  each = dict(zip(split.parts, np.split(scales[OUTPUT], ends[:-1], axis=weights.AXIS), strict=True))
  first = next((i for i, x in enumerate(each.values()) if (x != 1).any()), len(each) - 1)

  def part(name, p):
    if name in list(each)[:first]:
      return p
    return ia3.scaled(f"{k}/{name}", p, OUTPUT).replace(output_scale=jnp.asarray(each[name]))

  return split.map(part)


def _feedforward(modules: Any) -> Any:
  """Returns a function from a module's name to whether PEFT scales its input."""
  if modules is None or isinstance(modules, list) and all(isinstance(m, str) for m in modules):
    return lambda name: name.endswith(tuple(modules or ()))
  if not isinstance(modules, str):
    raise errors.UserError(f"feedforward_modules is {modules!r:.100}, expected names or a regular expression")
  pattern = tree.compile_pattern(modules)
  return lambda name: bool(re.fullmatch(pattern, name))
