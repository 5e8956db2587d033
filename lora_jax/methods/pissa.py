"""PiSSA: LoRA that starts at the principal part of the weight (Meng et al. 2024, https://arxiv.org/abs/2404.02948).

`W = U S V^T` is split into its first singular triplets, which are trained as `scale A B`, and the frozen rest,
equations 2 to 4. Here W stays whole, and what A B was at first is subtracted: `W + scale (A B - A0 B0)`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from lora_jax import errors
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
  iterations: int | None = None,
) -> tuple[Any, Any]:
  """As `lora.init` with init="pissa".

  Args:
    alpha: the paper has that of the rank.
    iterations: None for the exact decomposition, else how many subspace iterations approximate it, much faster.
  """
  if iterations is not None and (not isinstance(iterations, int) or iterations < 0):
    raise errors.UserError(f"config.method.iterations={iterations!r} must be a whole number, at least 0, or None")
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
    init="pissa" if iterations is None else f"pissa_niter_{iterations}",
  )


PEFT_TYPE, to_peft, from_peft = lora.PEFT_TYPE, lora.to_peft, lora.from_peft
