"""Gemma 2: soft-capped logits, local and global layers in turn, and norms around each sublayer.

Gemma Team 2024 (https://arxiv.org/abs/2408.00118).
"""

from lora_jax.families import gemma, llama, norm
from lora_jax.families.config_json.option import inverse_root, optional, windows

ARCHITECTURES = {head: name.replace("Llama", "Gemma2") for head, name in llama.ARCHITECTURES.items()}
PREFIX, IGNORED = llama.PREFIX, llama.IGNORED
KEYS = (
  *(k for k in llama.KEYS if "layers/mlp_norm" not in k.path),
  *norm("layers/attn_post_norm", "model.layers.{}.post_attention_layernorm"),
  *norm("layers/mlp_norm", "model.layers.{}.pre_feedforward_layernorm"),
  *norm("layers/mlp_post_norm", "model.layers.{}.post_feedforward_layernorm"),
)
# What Gemma 3 shares.
DECODER = gemma.DECODER.but(
  "gemma2",
  ARCHITECTURES,
  optional("activation", "hidden_activation", null="gelu_pytorch_tanh"),
  inverse_root("attn_scale", "query_pre_attn_scalar"),
  optional("logit_softcap", "final_logit_softcapping"),
  absent={"num_key_value_heads": 4, "query_pre_attn_scalar": 256},
  fixed={"norm_order": "sandwich"},
  ignored=("hidden_act",),
)
TABLE = DECODER.but(
  "gemma2",
  ARCHITECTURES,
  optional("attn_softcap", "attn_logit_softcapping"),
  windows(
    ("sliding_window_size",),
    lambda hf: hf.get("sliding_window", hf.get("sliding_window_size", 4096)),
    lambda hf, layer: layer % 2 == 0,
  ),
  absent={"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
)
config, hf_config = TABLE.config, TABLE.hf_config
