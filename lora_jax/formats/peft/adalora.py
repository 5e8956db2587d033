"""`adalora` in the `peft` library's format."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax import families, tree, weights
from lora_jax.formats.peft import layout, lora
from lora_jax.methods import adalora, budget
from lora_jax.model import architecture, transformer

TYPE = "ADALORA"
FIELDS = {"a": "lora_A", "e": "lora_E", "b": "lora_B"}


def to_peft(
  params: Any, keys: Sequence[families.Key], trained: Collection[str] = ()
) -> tuple[dict, dict[str, np.ndarray]] | None:
  """Returns (config, tensors by Hugging Face module name) of the AdaLoRA nodes in `params`; None if there are none.

  `lora_A` is [r, in], `lora_E` [r, 1] and `lora_B` [out, r]. After pruning, only the remaining ranks are written, and
  `rank_pattern` says which they are.
  """
  nodes = layout.nodes(params, keys, budget.AdaLoRA)
  if not nodes:
    return None
  kept = {key: np.asarray(w.used().e) != 0 for key, w in nodes.items()}
  some = any(k.any() for k in kept.values()) and not all(k.all() for k in kept.values())
  tensors, pattern = {}, {}
  for key, node in nodes.items():
    sizes = key.sizes(node.shape[node.scale.ndim :])
    used = node.used()
    for i, a, e, b, k in zip(np.flatnonzero(node.layers), used.a, used.e, used.b, kept[key], strict=True):
      module, k = key.module.format(i), k if some else np.ones_like(k)
      pattern[f"{module}.lora_E"] = k.tolist()
      pairs = zip("ab", (np.asarray(a)[..., k], np.asarray(b)[k]), key.low_rank(), strict=True)
      tensors |= {f"{module}.{FIELDS[f]}": layout.rearrange(x, layout.reverse(p), sizes) for f, x, p in pairs}
      tensors[f"{module}.lora_E"] = np.asarray(e)[k, None]
  first = next(iter(nodes.values()))
  rank, scale, schedule = first.e.shape[-1], float(np.max(np.asarray(first.scale))), dict(first.schedule)
  least = schedule.get("tinit", 0) + schedule.get("tfinal", 0) + 1  # the fewest steps that PEFT accepts
  modules = {k.removesuffix(".lora_E"): rank for k in pattern}
  config = {
    "peft_type": TYPE,
    "init_r": rank,
    "lora_alpha": float(f"{scale * (rank + 1e-5):.6g}"),
    "lora_dropout": first.dropout,
    "target_modules": layout.target_modules(modules, keys, tree.flatten(params, is_leaf=weights.is_node)),
    "rank_pattern": pattern if some else None,
    **schedule,
    "total_step": max(schedule.get("total_step", 0), least),
    "bias": "none",
    "fan_in_fan_out": any(key.transposed for key in nodes),
  }
  return config, tensors


def from_peft(
  params: Any, keys: Sequence[families.Key], config: Mapping, left: dict[str, np.ndarray], wrong: list[str]
) -> Any:
  """Inverts `to_peft`: returns `params` with AdaLoRA nodes, whose e is zero where it was pruned; see formats/peft."""
  rank, pattern = config.get("init_r", 12), dict(config.get("rank_pattern") or {})
  flat = tree.flatten(params, is_leaf=weights.is_node)
  wrong += lora.unsupported(config, lora.INHERITED)
  for key in keys:
    w, n = flat[key.path], transformer.in_axes(key.path)
    if not n or architecture.stack_axes(key.path) > 1:  # not a matrix, or one of experts
      continue
    modules = [key.module.format(i) for i in range(w.shape[0] if "{}" in key.hf else 1)]
    found = [any(f"{m}.{s}" in left for s in FIELDS.values()) for m in modules]
    if not any(found):
      continue
    shape = w.shape["{}" in key.hf :]
    full = [(*shape[:n], rank), (rank,), (rank, *shape[n:])]
    arrays = {f: np.zeros((len(modules), *s), np.float32) for f, s in zip(FIELDS, full, strict=True)}
    patterns = dict(zip("aeb", (key.low_rank()[0], "r i -> (r i)", key.low_rank()[1]), strict=True))
    for i in np.flatnonzero(found):
      flags = pattern.pop(f"{modules[i]}.lora_E", [True] * rank)
      if len(flags) != rank:
        wrong.append(f"rank_pattern of {modules[i]} has {len(flags)} entries, expected init_r={rank}")
        flags = [True] * rank
      at, sizes = {"a": (..., flags), "e": flags, "b": flags}, key.sizes(shape) | {"i": 1}
      for f, s in FIELDS.items():
        expected = layout.rearrange(arrays[f][i][at[f]], layout.reverse(patterns[f]), sizes).shape
        x = layout.take(left, wrong, f"{modules[i]}.{s}", expected)
        arrays[f][i][at[f]] = layout.rearrange(x, patterns[f], sizes)
    stack = slice(None) if "{}" in key.hf else 0
    schedule = tuple((k, config[k]) for k in (*adalora.SCHEDULE, "total_step") if config.get(k) is not None)
    scale = np.float32(found) * np.float32(adalora.scale_of(config.get("lora_alpha", 8), rank))
    arrays = {f: jnp.asarray(x[stack]) for f, x in arrays.items()}
    dropout = float(config.get("lora_dropout") or 0.0)
    flat[key.path] = budget.AdaLoRA(
      w, **arrays, scale=jnp.asarray(scale[stack]), dropout=dropout, layers=tuple(found), schedule=schedule
    )
  wrong += [f"rank_pattern of no adapted matrix: {sorted(pattern)}"] if pattern else []
  return tree.map_named(lambda k, _: flat[k], params, is_leaf=weights.is_node)
