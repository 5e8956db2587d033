"""`dora` in the `peft` library's format."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import families, tree, weights
from lora_jax.formats.peft import layout, lora
from lora_jax.methods import dora
from lora_jax.model import architecture, transformer

TYPE, FLAG = lora.TYPE, "use_dora"
MAGNITUDE = "lora_magnitude_vector"


def to_peft(
  params: Any, keys: Sequence[families.Key], trained: Collection[str] = ()
) -> tuple[dict, dict[str, np.ndarray]] | None:
  """Returns what `lora.to_peft` returns, with `lora_magnitude_vector` [out] per module; None without DoRA nodes."""
  nodes = layout.nodes(params, keys, dora.DoRA, lambda w: w.base.base)
  plain = lambda w: w.base if isinstance(w, dora.DoRA) else weights.base(w)
  form = nodes and lora.to_peft(jax.tree.map(plain, params, is_leaf=weights.is_node), keys, trained)
  if not form:
    return None
  config, tensors = form
  for key, node in nodes.items():
    stack = node.base.scale.ndim
    sizes, pattern = key.sizes(node.shape[stack:]), layout.reverse(key.low_rank()[1])
    for i, m in enumerate(np.asarray(node.magnitude).reshape(-1, *node.magnitude.shape[stack:])):
      module = key.module.format(i)
      if np.atleast_1d(node.base.scale)[i]:
        tensors[f"{module}.{MAGNITUDE}"] = layout.rearrange(m[None], pattern, sizes)[:, 0]
  return config | {"use_dora": True}, tensors


def from_peft(
  params: Any, keys: Sequence[families.Key], config: Mapping, left: dict[str, np.ndarray], wrong: list[str]
) -> Any:
  """Inverts `to_peft`; see formats/peft."""
  params = lora.from_peft(params, keys, {k: v for k, v in config.items() if k != "use_dora"}, left, wrong)
  flat = tree.flatten(params, is_leaf=weights.is_node)
  for key in keys:
    if not isinstance(w := flat[key.path], weights.LoRA):
      continue
    if w.bias is not None or not transformer.in_axes(key.path) or architecture.stack_axes(key.path) > 1:
      wrong.append(f"use_dora: DoRA of {key.module} is not supported, nor is lora_bias with it")
      continue
    node, stack = dora.node(w), w.scale.ndim
    sizes, pattern = key.sizes(w.shape[stack:]), key.low_rank()[1]
    magnitude = np.array(node.norm).reshape(-1, *node.norm.shape[stack:])
    for i, m in enumerate(magnitude):
      name = f"{key.module.format(i)}.{MAGNITUDE}"
      if np.atleast_1d(w.scale)[i] or name in left:
        m[...] = layout.rearrange(layout.take(left, wrong, name, (m.size,))[:, None], pattern, sizes)[0]
    flat[key.path] = node.replace(magnitude=jnp.asarray(magnitude.reshape(node.norm.shape)))
  return tree.map_named(lambda k, _: flat[k], params, is_leaf=weights.is_node)
