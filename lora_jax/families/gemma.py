"""Gemma: Llama with scaled embeddings, norms that multiply by 1 + scale, and GeGLU.

Gemma Team 2024 (https://arxiv.org/abs/2403.08295).
"""

from collections.abc import Mapping

from lora_jax.families import llama
from lora_jax.families.config_json.option import Option, derived, flag

ARCHITECTURES = {head: name.replace("Llama", "Gemma") for head, name in llama.ARCHITECTURES.items()}
PREFIX, IGNORED, KEYS = llama.PREFIX, llama.IGNORED, llama.KEYS
# What all Gemma families share; each has its own option for the activation.
DECODER = llama.DECODER.but(
  "gemma",
  ARCHITECTURES,
  flag("attn_bias", "attention_bias", "all", "none"),
  derived("embed_scale", lambda hf: hf["hidden_size"] ** 0.5),
  absent={
    "num_key_value_heads": 16,
    "head_dim": 256,
    "hidden_act": "gelu",
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
  },
  fixed={"norm_plus_one": True},
  default={"use_bidirectional_attention": False},
  ignored=("cache_implementation",),
)


def _activation(hf: Mapping) -> dict[str, str]:
  """Returns the activation; the first files say "gelu" but mean its tanh approximation."""
  name = hf.get("hidden_activation") or hf.get("hidden_act") or "gelu"
  return {"activation": "gelu_pytorch_tanh" if name == "gelu" else name}


# Some releases of transformers read one key, some the other.
BOTH = ("hidden_activation", "hidden_act")
TABLE = DECODER.but(
  "gemma", ARCHITECTURES, Option(("activation",), BOTH, _activation, lambda c: dict.fromkeys(BOTH, c.activation))
)
config, hf_config = TABLE.config, TABLE.hf_config
