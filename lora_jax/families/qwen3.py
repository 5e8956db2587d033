"""Qwen3: Llama with normalised q and k and a free head size (Yang et al. 2025, https://arxiv.org/abs/2505.09388)."""

from lora_jax.families import llama, norm, qwen2
from lora_jax.families.config_json.option import flag

ARCHITECTURES = {head: name.replace("Llama", "Qwen3") for head, name in llama.ARCHITECTURES.items()}
PREFIX, IGNORED = llama.PREFIX, llama.IGNORED
KEYS = (
  *llama.KEYS,
  *norm("layers/attn/q_norm", "model.layers.{}.self_attn.q_norm"),
  *norm("layers/attn/k_norm", "model.layers.{}.self_attn.k_norm"),
)
TABLE = llama.DECODER.but(
  "qwen3",
  ARCHITECTURES,
  flag("attn_bias", "attention_bias", "all", "none"),
  qwen2.WINDOWS,
  absent=qwen2.ABSENT | {"head_dim": 128},
  fixed={"qk_norm": True},
)
config, hf_config = TABLE.config, TABLE.hf_config
