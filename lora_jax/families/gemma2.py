"""Gemma 2: soft-capped logits, local and global layers in turn, and norms around each sublayer.

Gemma Team 2024 (https://arxiv.org/abs/2408.00118).
"""

from collections.abc import Mapping

from lora_jax import families
from lora_jax.families import gemma, llama, norm
from lora_jax.model import transformer

ARCHITECTURES = {head: name.replace("Llama", "Gemma2") for head, name in llama.ARCHITECTURES.items()}
PREFIX, IGNORED = llama.PREFIX, llama.IGNORED
KEYS = (
  *(k for k in llama.KEYS if "layers/mlp_norm" not in k.path),
  *norm("layers/attn_post_norm", "model.layers.{}.post_attention_layernorm"),
  *norm("layers/mlp_norm", "model.layers.{}.pre_feedforward_layernorm"),
  *norm("layers/mlp_post_norm", "model.layers.{}.post_feedforward_layernorm"),
)
ABSENT = gemma.ABSENT | {"num_key_value_heads": 4}
HANDLED = ["query_pre_attn_scalar", "sliding_window", "layer_types", "final_logit_softcapping"]


def config(hf: Mapping) -> transformer.Config:
  """`transformer.Config` of a `Gemma2Config` as a dict; UserError for what it does not support."""
  families.check(hf)
  return gemma.decoder(
    hf,
    ABSENT,
    hf.get("hidden_activation") or "gelu_pytorch_tanh",
    [*HANDLED, "attn_logit_softcapping", "sliding_window_size"],
    norm_order="sandwich",
    attn_scale=hf.get("query_pre_attn_scalar", 256) ** -0.5,
    attn_softcap=hf.get("attn_logit_softcapping", 50.0),
    logit_softcap=hf.get("final_logit_softcapping", 30.0),
    **families.windows(hf, hf.get("sliding_window", hf.get("sliding_window_size", 4096)), lambda i: i % 2 == 0),
  )
