"""Qwen2 and Qwen2.5: Llama with biases on q, k and v (Yang et al. 2024, https://arxiv.org/abs/2407.10671)."""

from collections.abc import Mapping

from lora_jax import families
from lora_jax.families import llama
from lora_jax.model import transformer

ARCHITECTURES = {head: name.replace("Llama", "Qwen2") for head, name in llama.ARCHITECTURES.items()}
PREFIX, IGNORED, KEYS = llama.PREFIX, llama.IGNORED, llama.KEYS
WINDOW = ["use_sliding_window", "sliding_window", "max_window_layers", "layer_types"]
ABSENT = {"num_key_value_heads": 32, "max_position_embeddings": 32768}  # transformers' values of absent keys


def config(hf: Mapping) -> transformer.Config:
  """`transformer.Config` of a `Qwen2Config` as a dict; UserError for what it does not support."""
  default = llama.DEFAULT | {"use_mrope": False}
  return llama.decoder(ABSENT | dict(hf), WINDOW, default, attn_bias="qkv", **windows(hf))


def windows(hf: Mapping) -> dict:
  """`window` and `local`: without `layer_types` the layers from `max_window_layers` on are local."""
  families.check(hf)
  window = hf.get("sliding_window", 4096) if hf.get("use_sliding_window") else None
  return families.windows(hf, window, lambda i: i >= hf.get("max_window_layers", 28))
