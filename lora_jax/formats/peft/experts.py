"""LoRA on a mixture of experts in PEFT's format.

transformers holds the matrices of a layer's experts as two parameters of the module `mlp.experts`, gate_up_proj
[E, 2F, D] and down_proj [E, D, F], and the router as `mlp.gate.weight`. PEFT adapts them by `target_parameters`:
lora_A.weight is [E * R, in], and lora_B.weight is [out, R * E] with the expert as the fastest axis. If both parameters
are adapted, the tensors of the first are under `base_layer`. In transformers 4 each expert's matrices were modules with
names of their own; such adapters are read as well.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax import families, weights
from lora_jax.formats.peft import parts as parts_lib

PARAMETERS = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}


def rows(keys: Sequence[families.Key]) -> dict[str, families.Key]:
  """Returns {"router", "gate", "up" or "down": row} of a family's table; empty without experts."""
  return {k.path.split("/")[-2]: k for k in keys if "/moe/" in k.path and k.path.endswith("/kernel")}


def _blocks(key: families.Key, layers: int) -> list[str]:
  """Returns the name of the module that holds the router and the experts, for each layer."""
  prefix = key.module.rpartition(".")[0].rpartition(".")[0]  # of `model.layers.{}.block_sparse_moe.gate`
  return [f"{prefix.format(i)}.mlp" for i in range(layers)]


def to_peft(
  keys: Sequence[families.Key], flat: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, int], dict[str, float], list[str]]:
  """Returns (tensors, ranks, scales, `target_parameters`) of LoRA on experts and routers.

  Ranks and scales are dicts by adapted parameter. Gate and up share one A in PEFT; if ours differ, the rank is the sum
  of both.
  """
  table = rows(keys)
  nodes = {name: flat[k.path] for name, k in table.items() if isinstance(flat[k.path], weights.LoRA)}
  tensors, ranks, scales = {}, {}, {}

  def put(module, parameter, a, b, scale):  # a [E, in, R], b [E, R, out]
    tensors[f"{module}.lora_A.weight"] = np.swapaxes(a, 1, 2).reshape(-1, a.shape[1])
    tensors[f"{module}.lora_B.weight"] = np.transpose(b, (2, 1, 0)).reshape(b.shape[2], -1)
    ranks[parameter], scales[parameter] = a.shape[2], scale

  layers = flat[table["router"].path].shape[0] if nodes else 0
  names = _blocks(table["router"], layers) if nodes else []
  for i, name in enumerate(names):
    made = {parameter: _joined(parts, nodes, flat, table, i) for parameter, parts in PARAMETERS.items()}
    made = {parameter: x for parameter, x in made.items() if x is not None}
    for parameter, x in made.items():
      inner = ".base_layer" if len(made) == 2 and parameter == "gate_up_proj" else ""
      put(f"{name}.experts{inner}", f"{name}.experts.{parameter}", *x)
    if "router" in nodes and nodes["router"].rank[i]:
      a, b, scale = nodes["router"].layer((i,))
      put(f"{name}.gate", f"{name}.gate.weight", a[None], b[None], scale)
  return tensors, ranks, scales, _targets(ranks, names)


def _targets(adapted: Mapping[str, Any], names: Sequence[str]) -> list[str]:
  """Returns the ends of the names of parameters that are adapted in all layers, and the full names of others."""
  ends = {name.partition(".mlp.")[2] for name in adapted}
  everywhere = {end for end in ends if all(f"{name}.{end}" in adapted for name in names)}
  whole = [k for k in adapted if k.partition(".mlp.")[2] not in everywhere]
  return sorted(f"mlp.{end}" for end in everywhere) + whole


def _joined(parts, nodes, flat, table, i):
  """Returns (a, b, scale) of one layer's parameter, or None if no part of it is adapted."""
  made = [nodes[p].layer((i,)) if p in nodes and nodes[p].rank[i] else None for p in parts]
  given = [x for x in made if x is not None]
  if not given:
    return None
  widths = [flat[table[p].path].shape[-1] for p in parts]
  if len(given) == 2 and np.array_equal(given[0][0], given[1][0]):
    (a, gate, scale), (_, up, other) = given
    return a, np.concatenate([gate, up * (other / scale if scale else 1.0)], -1), scale
  return parts_lib.block(made, widths, -1)


def from_peft(
  keys: Sequence[families.Key],
  config: Mapping,
  left: dict[str, np.ndarray],
  wrong: list[str],
  flat: dict[str, Any],
  scale: Callable[[Mapping, str, int], float],
) -> dict:
  """Puts the adapter's LoRA on experts and routers into `flat`.

  Args:
    scale: function from the config, the name of a module or parameter, and its rank to the scale.

  Returns:
    The config without the keys that were read.
  """
  table = rows(keys)
  targets = config.get("target_parameters") or []
  config = {k: v for k, v in config.items() if k != "target_parameters"}
  if not table:
    wrong += [f"target_parameters {t!r} of no matrix of this model" for t in targets]
    return config
  layers, E = flat[table["gate"].path].shape[:2]
  found = {name: {} for name in table}  # {part: {(layer, expert): (a [R, in], b [out, R], scale)}}
  used = set()

  def take(module, parameter, experts):  # [(a, b, scale)] of each expert, or None
    a, b = (left.pop(f"{module}.lora_{c}.weight", None) for c in "AB")
    if a is None and b is None:
      return None
    if a is None or b is None or a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or a.shape[0] % experts:
      wrong.append(f"{module}.lora_A.weight is {_shape(a)} and lora_B.weight {_shape(b)}, for {experts} matrices")
      return None
    s = scale(config, parameter, a.shape[0] // experts)
    b = b.reshape(b.shape[0], -1, experts)
    return [(x, b[..., e], s) for e, x in enumerate(a.reshape(experts, -1, a.shape[1]))]

  for i, name in enumerate(_blocks(table["router"], layers)):
    hit = {p: [t for t in targets if f".{name}.{p}".endswith(f".{t}")] for p in _parameters()}
    used |= {t for ts in hit.values() for t in ts}
    both = all(hit[f"experts.{p}"] for p in PARAMETERS)
    for parameter, parts in PARAMETERS.items():
      inner = ".base_layer" if both and parameter == "gate_up_proj" else ""
      if not hit[f"experts.{parameter}"]:
        continue
      for e, (a, b, s) in enumerate(take(f"{name}.experts{inner}", f"{name}.experts.{parameter}", E) or ()):
        for part, own in zip(parts, np.array_split(b, len(parts)), strict=True):
          found[part][i, e] = a, own, s
    if hit["gate.weight"] and (pair := take(f"{name}.gate", f"{name}.gate.weight", 1)):
      found["router"][(i,)] = pair[0]
    for part, key in table.items():
      for index in np.ndindex((layers, E)[: key.hf.count("{}")]):
        module = key.module.format(*index)
        if index[0] == i and index not in found[part] and (pair := take(module, module, 1)):
          found[part][index] = pair[0]
  for part, each in found.items():
    if each:
      k = table[part].path
      flat[k] = _node(flat[k], each, bool(config.get("use_rslora")), table[part].module, wrong)
  wrong += [f"target_parameters {t!r} of no matrix of this model" for t in targets if t not in used]
  return config


def _parameters() -> list[str]:
  return [*(f"experts.{p}" for p in PARAMETERS), "gate.weight"]


def _shape(x: np.ndarray | None) -> tuple | None:
  return None if x is None else x.shape


def _node(w, each, rslora, module, wrong) -> weights.LoRA:
  """Returns LoRA from the factors of single matrices; the matrices of a layer share one rank and one scale."""
  stack, (inner, outer) = w.shape[:-2], w.shape[-2:]
  rank = max(a.shape[0] for a, _, _ in each.values())
  a, b = np.zeros((*stack, inner, rank), np.float32), np.zeros((*stack, rank, outer), np.float32)
  scales, ranks = np.zeros(stack[0], np.float32), np.zeros(stack[0], np.int32)
  for index, (a_, _, s) in each.items():
    scales[index[0]], ranks[index[0]] = max(scales[index[0]], s, key=abs), max(ranks[index[0]], a_.shape[0])
  for index, (a_, b_, s) in each.items():
    if (a_.shape[1], b_.shape[0]) != (inner, outer):
      wrong.append(f"LoRA of {module.format(*index)} is {b_.shape[0], a_.shape[1]}, expected {outer, inner}")
      continue
    r, most = a_.shape[0], scales[index[0]]
    a[index][..., :r], b[index][:r] = a_.T, b_.T * (s / most if most else 0.0)
  arrays = dict(a=a, b=b, scale=scales, rank=ranks)
  return weights.LoRA(base=w, **{k: jnp.asarray(x) for k, x in arrays.items()}, rslora=rslora)
