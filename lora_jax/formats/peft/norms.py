"""`norms` in the `peft` library's format."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax import families, tree, weights
from lora_jax.formats.peft import layout
from lora_jax.methods import norms

TYPE = "LN_TUNING"
WHOLE = True  # trains leaves of the pretrained model
PART = "ln_tuning_layers"


def to_peft(
  params: Any, keys: Sequence[families.Key], trained: Collection[str] = ()
) -> tuple[dict, dict[str, np.ndarray]] | None:
  """Returns (config, tensors) with each trained norm; None without any, or if a trained leaf is not pretrained."""
  flat = tree.flatten(params, is_leaf=weights.is_node)
  found, whole = set(norms.leaves(params)), {key.path for key in keys if not weights.is_node(flat[key.path])}
  if not found & set(trained) or set(trained) - whole:
    return None
  modules = {key.module for key in keys if key.path in found & set(trained)}
  tensors, adapted = {}, {}
  for key in keys:
    if key.module not in modules:
      continue
    x = np.asarray(flat[key.path], np.float32)
    for index in np.ndindex(x.shape[: key.hf.count("{}")]):
      module, _, part = key.hf.format(*index).rpartition(".")
      adapted[module] = True
      tensors[f"{module}.{PART}.{part}"] = key.to_hf(x[index])
  return {"peft_type": TYPE, "target_modules": layout.target_modules(adapted, keys, flat)}, tensors


def from_peft(
  params: Any, keys: Sequence[families.Key], config: Mapping, left: dict[str, np.ndarray], wrong: list[str]
) -> Any:
  """Inverts `to_peft`; see formats/peft."""
  flat, found = tree.flatten(params, is_leaf=weights.is_node), set(norms.leaves(params))
  modules = {k.partition(f".{PART}.")[0] for k in left}
  for key in keys:
    if key.path not in found:
      continue
    stack = flat[key.path].shape[: key.hf.count("{}")]
    new = np.array(flat[key.path], np.float32)
    indices = [i for i in np.ndindex(stack) if key.module.format(*i) in modules]
    for index in indices:
      name = f"{key.module.format(*index)}.{PART}.{key.hf.rpartition('.')[2]}"
      shape = new[index].shape
      new[index] = key.from_hf(layout.take(left, wrong, name, key.hf_shape(shape)), shape)
    flat[key.path] = jnp.asarray(new) if indices else flat[key.path]
  return tree.map_named(lambda k, _: flat[k], params, is_leaf=weights.is_node)
