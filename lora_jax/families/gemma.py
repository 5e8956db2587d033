"""Gemma: Llama with scaled embeddings, norms that multiply by 1 + scale, and GeGLU.

Gemma Team 2024 (https://arxiv.org/abs/2403.08295).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from lora_jax import families
from lora_jax.families import llama
from lora_jax.model import transformer

ARCHITECTURES = {head: name.replace("Llama", "Gemma") for head, name in llama.ARCHITECTURES.items()}
PREFIX, IGNORED, KEYS = llama.PREFIX, llama.IGNORED, llama.KEYS
# transformers' values of keys that a config.json leaves out.
ABSENT = {"num_key_value_heads": 16, "head_dim": 256, "max_position_embeddings": 8192, "tie_word_embeddings": True}


def config(hf: Mapping) -> transformer.Config:
  """`transformer.Config` of a `GemmaConfig` as a dict; UserError for what it does not support."""
  activation = hf.get("hidden_activation") or hf.get("hidden_act") or "gelu"
  # The first files say "gelu" and mean its approximation by tanh.
  return decoder(hf, ABSENT, "gelu_pytorch_tanh" if activation == "gelu" else activation)


def decoder(
  hf: Mapping,
  absent: Mapping,
  activation: str,
  handled: Sequence[str] = (),
  default: Mapping | None = None,
  **choices: Any,
) -> transformer.Config:
  """The config of any Gemma; arguments as of `llama.decoder`, and `absent`: values of keys that `hf` lacks."""
  families.check(hf)
  hf = {**absent, **hf, "hidden_act": activation}
  return llama.decoder(
    hf,
    ["attention_bias", "hidden_activation", "cache_implementation", *handled],
    llama.DEFAULT | {"use_bidirectional_attention": False} | dict(default or {}),
    attn_bias="all" if hf.get("attention_bias") else "none",
    norm_plus_one=True,
    embed_scale=hf.get("hidden_size", 1) ** 0.5,
    **choices,
  )
