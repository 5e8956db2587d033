"""LoRA-FA: LoRA with A frozen (Zhang et al. 2023, https://arxiv.org/abs/2308.03303, section 3).

The change of the weight stays in the column space of the random A. The backward pass does not need the input of A.
"""

from typing import Any

import jax

from lora_jax import tree
from lora_jax.methods import lora, targeting

KIND = "low rank"
VARIES = lora.VARIES
PEFT = "lora"  # the module of formats/peft that it uses


def init(key: jax.Array, params: Any, **kw: Any) -> tuple[Any, Any]:
  """Returns what `lora.init` returns, with the random factor of each pair frozen: A, or B for an embedding."""
  params, mask = lora.init(key, params, **kw)
  random = lambda k: k.endswith("/b" if k.startswith(lora.EMBED) else "/a")
  return params, tree.map_named(lambda k, m: m and not random(k), mask)


init.__signature__ = targeting.signature(init, lora.init, without=("lora_bias", "tied"))
