"""Biases of the pretrained model in the `peft` library's format, which every adapter can hold beside its own tensors.

A config's `bias` says which: "all" for all biases, or "lora_only" or "vera_only" for biases of adapted modules.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax import families, tree, weights
from lora_jax.formats.peft import layout

PLACES = ("base_layer.", "token_adapter.base_layer.")  # in the wrapper of an adapted module


def write(
  flat: Mapping[str, Any], keys: Sequence[families.Key], trained: Collection[str], adapted: Collection[str]
) -> tuple[str, dict[str, np.ndarray]]:
  """Returns (`bias`, {PEFT name: bias}); "none" if no bias is trained outside modules that are saved whole."""
  whole = {key.module for key in keys if key.path in trained and not key.path.endswith("/bias")}
  tensors, used = {}, set()
  for key in keys:
    if not key.path.endswith("/bias") or key.module in whole or weights.is_node(flat[key.path]):
      continue
    x = np.asarray(flat[key.path], np.float32)
    for index in np.ndindex(x.shape[: key.hf.count("{}")]):
      module = key.module.format(*index)
      tensors[module] = key.to_hf(x[index])
      used |= {module} if key.path in trained else set()
  kind = "none" if not used else "lora_only" if used <= set(adapted) else "all"
  said = {"none": (), "lora_only": [m for m in tensors if m in adapted], "all": tensors}[kind]
  return kind, {f"{m}{'.base_layer' * (m in adapted)}.bias": tensors[m] for m in said}


def read(
  params: Any,
  keys: Sequence[families.Key],
  config: Mapping,
  left: dict[str, np.ndarray],
  wrong: list[str],
  whole: Collection[str],
) -> Any:
  """Returns `params` with an adapter's biases, except the tensors in `whole`, which belong to modules saved whole."""
  kind = str(config.get("bias"))
  adapted = {k[: found.start()] for k in left if (found := re.search(r"\.(lora|vera)_", k))}
  flat, missing = tree.flatten(params, is_leaf=weights.is_node), []
  for key in {key.path: key for key in keys if key.hf.endswith(".bias")}.values():
    x = flat[key.path]
    stack, new = x.shape[: key.hf.count("{}")], {}
    for i in [i for i in np.ndindex(stack) if key.hf.format(*i) not in whole]:
      # If a bias has two names, transformers computes with the last one.
      modules = [k.rpartition(".")[0].format(*i) for k in (key.hf, *key.also)]
      for name in (f"{m}.{place}bias" for m in modules for place in ("", *PLACES)):
        if name in left:
          shape = x.shape[len(stack) :]
          new[i] = key.from_hf(layout.take(left, wrong, name, key.hf_shape(shape)), shape)
      if i not in new and (kind == "all" or kind.endswith("_only") and not adapted.isdisjoint(modules)):
        missing.append(key.hf.format(*i))
    x = np.array(x) if new else x
    for i, row in new.items():
      x[i] = row
    flat[key.path] = jnp.asarray(x) if new else x
  wrong += [f"bias={kind!r} of the config without tensors: {', '.join(missing)}"] if missing else []
  return tree.map_named(lambda k, _: flat[k], params, is_leaf=weights.is_node)
