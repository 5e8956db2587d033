"""IA3: trained vectors that scale keys, values and hidden units (Liu et al. 2022, https://arxiv.org/abs/2205.05638).

`softmax(q (l_k o k)^T / sqrt(d)) (l_v o v)` in every attention, also to an encoder, and `(l_ff o act(W1 x)) W2`
(section 3.3, equation 1 and what follows): d_k + d_v + d_ff numbers a layer, and d_k + d_v for attention to an encoder.
"""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import architecture, errors, families, fused, tree, weights
from lora_jax.methods import _peft, _targets

INPUT, OUTPUT = weights.SCALES


def init(
  key: jax.Array, params: Any, *, targets: str | Sequence[str] = "k,v", feedforward: str | Sequence[str] = "down"
) -> tuple[Any, Any]:
  """Vectors of ones beside matrices: `output_scale` after the targets, `input_scale` before the feed-forward ones.

  In a gated layer, `down(act(gate(x)) o up(x))`, scaling the input of `down` is the same as scaling the output of `up`,
  as the authors' code does. k and v of a matrix that is q, k and v have one vector, [L, 2K, H].

  Args:
    targets, feedforward: as `targets` of `lora.init`, in all layers; "" is none. Of a fused matrix the last parts can
      be scaled: "k,v", "v" or "q,k,v" of q, k and v, "up" or "gate,up" of gate and up.

  Returns:
    (params, mask): True at the vectors, float32.
  """
  del key
  linear = _matrices(params)
  shapes = {}
  for name, chosen in ((OUTPUT, targets), (INPUT, feedforward)):
    for k, heads in _chosen(params, linear, chosen, name).items():
      stack = architecture.stack_axes(k)
      ends = stack + architecture.in_axes(k)
      shape = linear[k].shape
      outer = shape[ends:] if heads is None else (*shape[ends:-2], heads, shape[-1])
      place = k.removesuffix("/kernel")
      shapes.setdefault(place, {})[name] = shape[:ends] if name == INPUT else (*shape[:stack], *outer)
  if not shapes:
    raise errors.UserError("IA3 scales nothing: config.method.targets and config.method.feedforward are empty")
  if twice := [k for k, s in shapes.items() if len(s) > 1]:
    raise errors.UserError(f"IA3 scales the output or the input of a matrix, not both: {', '.join(twice)}")
  mask = jax.tree.map(lambda _: False, params)
  for place, new in shapes.items():
    params = _put(params, place.split("/"), {name: jnp.ones(shape, jnp.float32) for name, shape in new.items()})
    mask = _put(mask, place.split("/"), dict.fromkeys(new, True))
  return params, mask


def _matrices(params: Any) -> dict[str, Any]:
  """Matrices that `layers.linear` multiplies by, and the parts that fused ones have, whether or not they are split."""
  linear = {k: w for k, w in _targets.matrices(params, experts=True).items() if k != "head/kernel"}
  return linear | {part: w for k, w in linear.items() for part in fused.part_names(k)}


def _chosen(params: Any, linear: Mapping[str, Any], targets: Any, name: str) -> dict[str, int | None]:
  """{name of a whole matrix: None, or how many of its last heads} that `targets` means."""
  what = "config.method.targets" if name == OUTPUT else "config.method.feedforward"
  out, parts = {}, {}
  for k, hit in _targets.select(targets, linear, what).items() if targets else ():
    whole = k.rpartition("/")[0]
    if "/moe/" in k:
      hint = " without them, such as ''" if name == INPUT else ""
      raise errors.UserError(f"IA3 does not scale experts and their router ({k}); choose {what}{hint}")
    if not hit.all():
      raise errors.UserError(f"IA3 has a vector in every layer, but {what} names some layers of {k} only")
    if not fused.part_names(whole):
      out[k] = None
    else:
      parts.setdefault(whole, []).append(k.rpartition("/")[2])
  for k, found in parts.items():
    order, sizes = _sizes(params, k)
    if name == INPUT or tuple(p for p in order if p in found) != order[-len(found) :]:
      raise errors.UserError(
        f"{what} names {', '.join(found)} of {k}; of a fused matrix IA3 scales the last outputs: "
        + " or ".join(repr(",".join(order[i:])) for i in range(len(order)))
      )
    out[k] = sum(sizes[-len(found) :])
  return out


def _sizes(params: Any, k: str) -> tuple[tuple[str, ...], list[int]]:
  """The parts of a fused matrix and how many heads, or rows of its axis, each has."""
  flat = tree.flatten(params, is_leaf=weights.is_node)
  group, name = k.removesuffix("/kernel").rpartition("/")[::2]
  if name != "qkv":
    return fused.PARTS[name], [1, 1]
  n, m = flat[f"{group}/o/kernel"].shape[-3], flat[k].shape[fused.AXIS]
  return fused.PARTS[name], [n, (m - n) // 2, (m - n) // 2]


def _put(params: Any, path: Sequence[str], entries: Mapping[str, Any]) -> Any:
  """The tree with entries in the dict at `path`, which may not be there yet."""
  if path:
    return {**params, path[0]: _put(params[path[0]], path[1:], entries)}
  if taken := entries.keys() & params.keys():
    raise errors.UserError(f"config.method: a matrix has two of {', '.join(taken)}; name IA3 once")
  return {**params, **entries}


PEFT_TYPE = "IA3"


def to_peft(
  params: Any, keys: Sequence[families.Key], trained: Collection[str] = ()
) -> tuple[dict, dict[str, np.ndarray]] | None:
  """(config, tensors) of PEFT's IA3; None without scales. One of a fused matrix's last heads gets ones before it."""
  flat = tree.flatten(params, is_leaf=weights.is_node)
  scales = {k for k in flat if k.rpartition("/")[2] in weights.SCALES}
  tensors, modules = {}, {INPUT: {}, OUTPUT: {}}
  for key in keys:
    place, w = key.path.removesuffix("/kernel"), flat[key.path]
    for name in weights.SCALES if place != key.path else ():
      if (k := f"{place}/{name}") not in scales:
        continue
      scales.remove(k)
      stack = key.hf.count("{}")
      sizes, x = key.sizes(w.shape[stack:]), np.asarray(flat[k])
      x = x if name == INPUT else np.asarray(weights.widened(x, w.shape, stack))
      pattern = _peft.reverse(key.low_rank()[name == OUTPUT])
      for i, row in enumerate(x if stack else x[None]):
        modules[name][key.module.format(i)] = True
        row = row[..., None] if name == INPUT else row[None]
        tensors[f"{key.module.format(i)}.ia3_l"] = _peft.rearrange(row, pattern, sizes)
  if scales:
    raise errors.UserError(f"PEFT has no module for {', '.join(sorted(scales))}")
  if not tensors:
    return None
  feedforward = _peft.target_modules(modules[INPUT], keys, flat)
  if any(m.endswith(tuple(feedforward)) for m in modules[OUTPUT]):  # PEFT looks for them without a dot before
    feedforward = list(modules[INPUT])
  config = {
    "peft_type": PEFT_TYPE,
    "target_modules": _peft.target_modules(modules[OUTPUT], keys, flat) + feedforward,
    "feedforward_modules": feedforward,
    "fan_in_fan_out": any(key.transposed for key in keys),
    "init_ia3_weights": True,
  }
  return config, tensors


def from_peft(
  params: Any, keys: Sequence[families.Key], config: Mapping, left: dict[str, np.ndarray], wrong: list[str]
) -> Any:
  """The inverse of `to_peft`; modules without a vector are scaled by ones. See formats/peft.py."""
  is_input = _feedforward(config.get("feedforward_modules"))
  linear, found = _matrices(params), {}
  for key in keys:
    if key.path not in linear or "/moe/" in key.path:
      continue
    stack, shape = key.hf.count("{}"), linear[key.path].shape
    ends = stack + architecture.in_axes(key.path)
    axes, patterns = (
      {INPUT: shape[stack:ends], OUTPUT: shape[ends:]},
      dict(zip(weights.SCALES, key.low_rank(), strict=True)),
    )
    for i in range(shape[0] if stack else 1):
      k = f"{key.module.format(i)}.ia3_l"
      if k not in left:
        continue
      name = INPUT if is_input(key.module.format(i)) else OUTPUT
      size = math.prod(axes[name])
      x = _peft.take(left, wrong, k, (1, size) if name == INPUT else (size, 1))
      ones = np.ones((*shape[:stack], *axes[name]), np.float32)
      scale = found.setdefault(key.path, {}).setdefault(name, ones)
      x = _peft.rearrange(x, patterns[name], key.sizes(shape[stack:]))
      scale[i if stack else ...] = x[..., 0] if name == INPUT else x[0]
  for k, scales in found.items():
    if OUTPUT in scales and fused.part_names(k):
      scales[OUTPUT] = _narrow(scales[OUTPUT], _sizes(params, k)[1])
    params = _put(params, k.split("/")[:-1], {name: jnp.asarray(x) for name, x in scales.items()})
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
