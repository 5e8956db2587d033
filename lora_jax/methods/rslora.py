"""rsLoRA: rank-stabilised LoRA (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732).

The scale is alpha / sqrt(rank). With it neither activations nor gradients grow or vanish with the rank (theorem 3.2).
"""

from typing import Any

import jax

from lora_jax.methods import lora, targeting

KIND = "low rank"
OPTIM = {"learning_rate": 5e-5}  # the paper, from memory
VARIES = lora.VARIES
PEFT = "lora"  # the module of formats/peft that it uses


def init(key: jax.Array, params: Any, **kw: Any) -> tuple[Any, Any]:
  """Returns what `lora.init` returns with rslora=True."""
  return lora.init(key, params, rslora=True, **kw)


init.__signature__ = targeting.signature(init, lora.init, without=("rslora", "lora_bias", "tied"))
