"""`lokr` in the `peft` library's format."""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import errors, families
from lora_jax.formats.peft import lycoris
from lora_jax.methods import lokr
from lora_jax.model import transformer

TYPE = "LOKR"
# (field, index in a pair) of each tensor; torch's tensors are transposed.
NAMES = {
  "lokr_w1": ("left", None),
  "lokr_w1_a": ("left", 1),
  "lokr_w1_b": ("left", 0),
  "lokr_w2": ("right", None),
  "lokr_w2_a": ("right", 1),
  "lokr_w2_b": ("right", 0),
}


def in_order(key: families.Key) -> bool:
  """Returns whether their flattened axes are in our order, as a Kronecker product needs; false for GPT-NeoX's qkv."""
  letters = lambda side: [c for c in re.findall(r"\w+", side) if c != "r"]
  return all(letters(left) == letters(right) for left, right in (p.split("->") for p in key.low_rank()))


def to_peft(
  params: Any, keys: Sequence[families.Key], trained: Collection[str] = ()
) -> tuple[dict, dict[str, np.ndarray]] | None:
  """Returns (config, tensors) of PEFT's LoKr; None without LoKr nodes.

  Raises:
    UserError: as in `lycoris.nodes`; axes are not `in_order`; nodes differ in `factor`, `both`, `rescale` or dropout.
  """
  found = lycoris.nodes(params, keys, lokr.LoKr)
  if not found:
    return None
  static = {(w.factor, w.both, w.dropout, w.rescale) for w in found.values()}
  if odd := [key.path for key in found if not in_order(key)]:
    raise errors.UserError(f"PEFT interleaves the axes of {', '.join(odd)}, so they do not form a Kronecker product")
  if len(static) > 1:
    raise errors.UserError("PEFT has one decompose_factor, decompose_both and dropout for all LoKr matrices")
  tensors = {}
  for key, node in found.items():
    for i, module, r in lycoris.adapted(key, node):
      for name, (field, part) in NAMES.items():
        f = getattr(node, field)
        if isinstance(f, tuple) == (part is not None):
          x = np.asarray(f if part is None else f[part])[i].T
          tensors[f"{module}.{name}"] = x if part is None else x[:, :r] if part == 1 else x[:r]
  factor, both, _, rescale = static.pop()
  own = {"decompose_factor": factor, "decompose_both": both, "rank_dropout_scale": rescale, "init_weights": True}
  return {"peft_type": TYPE, **own, **lycoris.peft_config(found, params, keys)}, tensors


def from_peft(
  params: Any, keys: Sequence[families.Key], config: Mapping, left: dict[str, np.ndarray], wrong: list[str]
) -> Any:
  """Inverts `to_peft`; see formats/peft."""
  boolean = ("true or false", lambda x: isinstance(x, bool))
  whole = ("a whole number", lambda x: isinstance(x, int) and not isinstance(x, bool))
  rules = {"decompose_factor": whole, "decompose_both": boolean, "rank_dropout_scale": boolean}
  lycoris.check_config(config, rules)
  static = dict(
    dropout=float(config.get("rank_dropout") or 0.0),
    rescale=bool(config.get("rank_dropout_scale")),
    factor=config.get("decompose_factor", -1),
    both=bool(config.get("decompose_both")),
  )

  def build(key, w, modules, rows):
    axes, n = w.shape["{}" in key.hf :], transformer.in_axes(key.path)
    ranks, scale = lycoris.ranks_of(config, modules, rows)
    if not in_order(key):
      wrong.append(f"{key.module}: a Kronecker product over its interleaved axes is not supported")
      return w
    layout = {}
    with errors.listed(wrong):
      layout = lokr.layout_of(key.module, math.prod(axes[:n]), math.prod(axes[n:]), ranks, static)
    if not layout:
      return w
    fields = {f: _zeros(len(rows), size) for f, size in layout.items()}
    for i, (module, row, r) in enumerate(zip(modules, rows, ranks, strict=True)):
      for name, (field, part) in NAMES.items() if r else ():
        f, x = fields[field], row.get(f"{module}.{name}")
        view = f[i] if part is None and not isinstance(f, tuple) else None
        if isinstance(f, tuple) and part is not None:
          view = f[1][i, :r] if part else f[0][i, :, :r]
        expected = None if view is None else view.T.shape
        if (None if x is None else x.shape) != expected:
          wrong.append(f"{module}.{name} is {None if x is None else x.shape}, expected {expected}")
        elif x is not None:
          view[...] = x.astype(np.float32).T
    stack = slice(None) if "{}" in key.hf else 0
    arrays = jax.tree.map(lambda x: jnp.asarray(x[stack]), fields)
    scale, rank = jnp.asarray(np.float32(scale)[stack]), jnp.asarray(np.int32(ranks)[stack])
    return lokr.LoKr(base=w, **arrays, scale=scale, rank=rank, **static)

  return lycoris.read(params, keys, left, NAMES, build)


def _zeros(layers: int, size: tuple[int, ...]) -> Any:
  if len(size) == 2:
    return np.zeros((layers, *size), np.float32)
  return np.zeros((layers, *size[:2]), np.float32), np.zeros((layers, *size[1:]), np.float32)
