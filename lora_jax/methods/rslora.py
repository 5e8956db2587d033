"""rsLoRA: rank-stabilised LoRA (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732).

The scale is alpha / sqrt(rank), theorem 3.2: neither activations nor gradients grow or vanish with the rank.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from lora_jax.methods import lora


def init(
  key: jax.Array,
  params: Any,
  *,
  rank: int = 8,
  alpha: float = 16.0,
  dropout: float = 0.0,
  targets: str | Sequence[str] = "q,v",
  rank_pattern: Mapping[str, int] | None = None,
  alpha_pattern: Mapping[str, float] | None = None,
  layers_to_transform: int | Sequence[int] | None = None,
  init: str = "peft",
  bias: str = "none",
) -> tuple[Any, Any]:
  """As `lora.init` with rslora=True."""
  return lora.init(
    key,
    params,
    rank=rank,
    alpha=alpha,
    dropout=dropout,
    targets=targets,
    rank_pattern=rank_pattern,
    alpha_pattern=alpha_pattern,
    layers_to_transform=layers_to_transform,
    rslora=True,
    init=init,
    bias=bias,
  )


PEFT_TYPE, to_peft, from_peft = lora.PEFT_TYPE, lora.to_peft, lora.from_peft
