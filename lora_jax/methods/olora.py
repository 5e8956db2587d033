"""OLoRA: LoRA that starts at an orthonormal basis (Büyükakyüz 2024, https://arxiv.org/abs/2406.01775, algorithm 1).

B and A are the first columns of Q and the first rows of R of `W = Q R`, where W is [out, in]. W stays whole, and the
initial A B is subtracted: `W + scale (A B - A0 B0)`.
"""

from typing import Any

import jax

from lora_jax.methods import lora, targeting

KIND = "low rank"
VARIES = lora.VARIES
PEFT = "lora"  # the module of formats/peft that it uses


def init(key: jax.Array, params: Any, *, alpha: float = 8.0, **kw: Any) -> tuple[Any, Any]:
  """Returns what `lora.init` returns with init="olora"; the default of alpha is PEFT's."""
  return lora.init(key, params, alpha=alpha, init="olora", **kw)


init.__signature__ = targeting.signature(init, lora.init, without=("init", "bias", "lora_bias", "tied"))
