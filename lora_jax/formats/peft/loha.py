"""`loha` in the `peft` library's format."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax import families
from lora_jax.formats.peft import layout, lycoris
from lora_jax.methods import loha
from lora_jax.model import transformer

TYPE = "LOHA"
NAMES = {"hada_w1_a": "b1", "hada_w1_b": "a1", "hada_w2_a": "b2", "hada_w2_b": "a2"}


def to_peft(
  params: Any, keys: Sequence[families.Key], trained: Collection[str] = ()
) -> tuple[dict, dict[str, np.ndarray]] | None:
  """Returns (config, tensors) of PEFT's LoHa; None without LoHa nodes. UserError as in `lycoris.nodes`."""
  found = lycoris.nodes(params, keys, loha.LoHa)
  if not found:
    return None
  tensors = {}
  for key, node in found.items():
    patterns = dict(zip("ab", map(layout.reverse, key.low_rank()), strict=True))
    sizes = key.sizes(node.shape[node.scale.ndim :])
    for i, module, r in lycoris.adapted(key, node):
      for name, field in NAMES.items():
        x = np.asarray(getattr(node, field))[i]
        x = x[..., :r] if field[0] == "a" else x[:r]
        tensors[f"{module}.{name}"] = layout.rearrange(x, patterns[field[0]], sizes)
  return {"peft_type": TYPE, "init_weights": True, **lycoris.peft_config(found, params, keys)}, tensors


def from_peft(
  params: Any, keys: Sequence[families.Key], config: Mapping, left: dict[str, np.ndarray], wrong: list[str]
) -> Any:
  """Inverts `to_peft`; see formats/peft."""
  lycoris.check_config(config)

  def build(key, w, modules, rows):
    shape = w.shape[1:] if "{}" in key.hf else w.shape
    patterns, sizes = dict(zip("ab", key.low_rank(), strict=True)), key.sizes(shape)
    n, ranks, scale = transformer.in_axes(key.path), *lycoris.ranks_of(config, modules, rows)
    inner, outer = shape[:n], shape[n:]
    fields = {
      f: np.zeros((len(rows), *inner, max(ranks)) if f[0] == "a" else (len(rows), max(ranks), *outer), np.float32)
      for f in loha.FACTORS
    }
    for i, (module, row, r) in enumerate(zip(modules, rows, ranks, strict=True)):
      theirs = {"a": (r, math.prod(inner)), "b": (math.prod(outer), r)}
      for name, f in NAMES.items() if r else ():
        x = layout.take(row, wrong, f"{module}.{name}", theirs[f[0]])
        view = fields[f][i, ..., :r] if f[0] == "a" else fields[f][i, :r]
        view[...] = layout.rearrange(x, patterns[f[0]], sizes)
    stack = slice(None) if "{}" in key.hf else 0
    arrays = {f: jnp.asarray(x[stack]) for f, x in fields.items()}
    scale, rank = jnp.asarray(np.float32(scale)[stack]), jnp.asarray(np.int32(ranks)[stack])
    return loha.LoHa(base=w, **arrays, scale=scale, rank=rank, dropout=float(config.get("rank_dropout") or 0.0))

  return lycoris.read(params, keys, left, NAMES, build)
