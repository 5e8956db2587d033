"""Qwen3: Llama with normalised q and k and a free head size (Yang et al. 2025, https://arxiv.org/abs/2505.09388)."""

from collections.abc import Mapping

from lora_jax.families import llama, norm, qwen2
from lora_jax.model import transformer

ARCHITECTURES = {head: name.replace("Llama", "Qwen3") for head, name in llama.ARCHITECTURES.items()}
PREFIX, IGNORED = llama.PREFIX, llama.IGNORED
KEYS = (
  *llama.KEYS,
  *norm("layers/attn/q_norm", "model.layers.{}.self_attn.q_norm"),
  *norm("layers/attn/k_norm", "model.layers.{}.self_attn.k_norm"),
)
ABSENT = qwen2.ABSENT | {"head_dim": 128}


def config(hf: Mapping) -> transformer.Config:
  """`transformer.Config` of a `Qwen3Config` as a dict; UserError for what it does not support."""
  bias = "all" if hf.get("attention_bias") else "none"
  handled = [*qwen2.WINDOW, "attention_bias"]
  return llama.decoder(ABSENT | dict(hf), handled, attn_bias=bias, qk_norm=True, **qwen2.windows(hf))
