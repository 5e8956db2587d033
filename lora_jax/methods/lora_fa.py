"""LoRA-FA: LoRA with A frozen (Zhang et al. 2023, https://arxiv.org/abs/2308.03303, section 3).

The change of the weight stays in the column space of the random A; the backward pass needs no input of A.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from lora_jax import tree
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
  rslora: bool = False,
  init: str = "peft",
  bias: str = "none",
) -> tuple[Any, Any]:
  """As `lora.init`; of each pair the factor that starts at random is frozen: A, of an embedding B."""
  params, mask = lora.init(
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
    init=init,
    bias=bias,
  )
  random = lambda k: k.endswith("/b" if k.startswith(lora.EMBED) else "/a")
  return params, tree.map_named(lambda k, m: m and not random(k), mask)


PEFT_TYPE, to_peft, from_peft = lora.PEFT_TYPE, lora.to_peft, lora.from_peft
