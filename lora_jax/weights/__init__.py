"""Weights that answer `dot`.

Model code never multiplies by a bare array. It calls `dot("BTD,DNH->BTNH", x, w)`, where `w` is an array or a `Weight`:
see protocol.py for what one is, adapters.py and packed.py for the two kinds, trees.py for whole models.
"""

from lora_jax.weights.adapters import Adapter, Additive, dropout, split_spec
from lora_jax.weights.lora import LoRA
from lora_jax.weights.packed import Packed
from lora_jax.weights.protocol import (
  AXIS,
  Added,
  Weight,
  affine,
  at,
  base,
  cut,
  dense,
  dot,
  is_node,
  join,
  merged_bias,
  place,
  take,
)
from lora_jax.weights.scaled import Scaled
from lora_jax.weights.trees import (
  SHARED,
  added,
  addressable,
  bind,
  cuts,
  inherit,
  layout,
  map_nodes,
  mask,
  merge,
  n_params,
  placer,
  settle,
  strip,
  with_dropout,
)

__all__ = [
  "AXIS",
  "SHARED",
  "Adapter",
  "Added",
  "Additive",
  "LoRA",
  "Packed",
  "Scaled",
  "Weight",
  "added",
  "addressable",
  "affine",
  "at",
  "base",
  "bind",
  "cut",
  "cuts",
  "dense",
  "dot",
  "dropout",
  "inherit",
  "is_node",
  "join",
  "layout",
  "map_nodes",
  "mask",
  "merge",
  "merged_bias",
  "n_params",
  "place",
  "placer",
  "settle",
  "split_spec",
  "strip",
  "take",
  "with_dropout",
]
