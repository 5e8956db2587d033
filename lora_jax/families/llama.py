"""Llama 2, Llama 3.x and models of their shape, such as SmolLM2.

Touvron et al. 2023 (https://arxiv.org/abs/2307.09288); Grattafiori et al. 2024 (https://arxiv.org/abs/2407.21783).
"""

from collections.abc import Mapping
from typing import Any

from lora_jax import families
from lora_jax.families import Key, linear, norm
from lora_jax.model import transformer

ARCHITECTURES = {"lm": "LlamaForCausalLM", "classification": "LlamaForSequenceClassification", "none": "LlamaModel"}
PREFIX = "model."
IGNORED = r"rotary_emb\.inv_freq$"
KEYS = (
  Key("embed/kernel", "model.embed_tokens.weight", "v d -> v d"),
  *norm("layers/attn_norm", "model.layers.{}.input_layernorm"),
  *linear("layers/attn/q", "model.layers.{}.self_attn.q_proj", "(n h) d -> d n h"),
  *linear("layers/attn/k", "model.layers.{}.self_attn.k_proj", "(n h) d -> d n h"),
  *linear("layers/attn/v", "model.layers.{}.self_attn.v_proj", "(n h) d -> d n h"),
  *linear("layers/attn/o", "model.layers.{}.self_attn.o_proj", "d (n h) -> n h d"),
  *norm("layers/mlp_norm", "model.layers.{}.post_attention_layernorm"),
  *linear("layers/mlp/gate", "model.layers.{}.mlp.gate_proj", "f d -> d f"),
  *linear("layers/mlp/up", "model.layers.{}.mlp.up_proj", "f d -> d f"),
  *linear("layers/mlp/down", "model.layers.{}.mlp.down_proj", "d f -> f d"),
  *norm("norm", "model.norm"),
  Key("head/kernel", "lm_head.weight", "v d -> d v"),
  Key("classifier/kernel", "score.weight", "c d -> d c"),
)

HANDLED = (
  "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim intermediate_size "
  "rms_norm_eps hidden_act rope_theta rope_scaling rope_parameters max_position_embeddings tie_word_embeddings"
).split()
DEFAULT = {"pretraining_tp": 1, "quantization_config": None}


def config(hf: Mapping) -> transformer.Config:
  """`transformer.Config` of a `LlamaConfig` as a dict; UserError for what it does not support."""
  bias = {"attn_bias": "all" if hf.get("attention_bias") else "none", "mlp_bias": bool(hf.get("mlp_bias"))}
  return decoder(hf, ["attention_bias", "mlp_bias"], **bias)


def decoder(hf: Mapping, handled: list[str], default: Mapping = DEFAULT, **choices: Any) -> transformer.Config:
  """The config of a decoder of Llama's shape.

  Args:
    handled: further keys that the caller has read.
    default: keys that are supported only at that value.
    choices: further fields of the config, or other values of those that are set here.
  """
  families.check_config(hf, [*HANDLED, *handled], default, families.BOOKKEEPING)
  families.require(hf, [*HANDLED[:4], "intermediate_size"], hf.get("hidden_act", "silu"))
  heads = hf["num_attention_heads"]
  fields = dict(
    vocab_size=hf["vocab_size"],
    d_model=hf["hidden_size"],
    n_layers=hf["num_hidden_layers"],
    n_heads=heads,
    n_kv_heads=hf.get("num_key_value_heads") or heads,
    head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
    d_ff=hf["intermediate_size"],
    norm_eps=hf.get("rms_norm_eps", 1e-6),
    activation=hf.get("hidden_act", "silu"),
    max_seq_len=hf.get("max_position_embeddings", 2048),
    tied=bool(hf.get("tie_word_embeddings", False)),
    pool="last",
    n_labels=families.labels(hf),
  )
  return transformer.Config(**(fields | ({} if "rope_theta" in choices else families.rope(hf)) | choices))
