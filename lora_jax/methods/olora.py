"""OLoRA: LoRA that starts at an orthonormal basis (Büyükakyüz 2024, https://arxiv.org/abs/2406.01775, algorithm 1).

B and A are the first columns of Q and rows of R of `W = Q R`, W being [out, in]. W stays whole, and what A B was at
first is subtracted: `W + scale (A B - A0 B0)`.
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
  alpha: float = 8.0,
  dropout: float = 0.0,
  targets: str | Sequence[str] = "q,v",
  rank_pattern: Mapping[str, int] | None = None,
  alpha_pattern: Mapping[str, float] | None = None,
  layers_to_transform: int | Sequence[int] | None = None,
  rslora: bool = False,
) -> tuple[Any, Any]:
  """As `lora.init` with init="olora"; alpha is PEFT's."""
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
    rslora=rslora,
    init="olora",
  )


PEFT_TYPE, to_peft, from_peft = lora.PEFT_TYPE, lora.to_peft, lora.from_peft
