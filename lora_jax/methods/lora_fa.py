"""LoRA-FA: LoRA with A frozen (Zhang et al. 2023, https://arxiv.org/abs/2308.03303, section 3).

The change of the weight stays in the column space of the random A; the backward pass needs no input of A.
"""

from typing import Any

import jax

from lora_jax import tree
from lora_jax.methods import lora, targeting

KIND = "low rank"
VARIES = lora.VARIES
PEFT = "lora"  # the form of formats/peft that it has


def init(key: jax.Array, params: Any, **kw: Any) -> tuple[Any, Any]:
  """As `lora.init`; of each pair the factor that starts at random is frozen: A, of an embedding B."""
  params, mask = lora.init(key, params, **kw)
  random = lambda k: k.endswith("/b" if k.startswith(lora.EMBED) else "/a")
  return params, tree.map_named(lambda k, m: m and not random(k), mask)


init.__signature__ = targeting.signature(init, lora.init, without=("lora_bias", "tied"))
