"""Llama 2, Llama 3.x and models of their shape, such as SmolLM2.

Touvron et al. 2023 (https://arxiv.org/abs/2307.09288); Grattafiori et al. 2024 (https://arxiv.org/abs/2407.21783).
"""

from lora_jax.families import Key, linear, norm
from lora_jax.families.config_json import ConfigJson, rotation
from lora_jax.families.config_json.option import LABELS, fallback, flag, number, optional

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

# What all decoders like Llama share; families with optional biases add those options.
DECODER = ConfigJson(
  "llama",
  ARCHITECTURES,
  (
    number("vocab_size", "vocab_size"),
    number("d_model", "hidden_size"),
    number("n_layers", "num_hidden_layers"),
    number("n_heads", "num_attention_heads"),
    fallback("n_kv_heads", "num_key_value_heads", lambda hf: hf["num_attention_heads"]),
    fallback("head_dim", "head_dim", lambda hf: hf["hidden_size"] // hf["num_attention_heads"]),
    number("d_ff", "intermediate_size"),
    number("norm_eps", "rms_norm_eps"),
    optional("activation", "hidden_act"),
    number("max_seq_len", "max_position_embeddings"),
    flag("tied", "tie_word_embeddings"),
    LABELS,
    rotation.option(),
  ),
  absent={"rms_norm_eps": 1e-6, "hidden_act": "silu", "max_position_embeddings": 2048},
  fixed={"pool": "last"},
  default={"pretraining_tp": 1, "quantization_config": None},
)
TABLE = DECODER.but(
  "llama", ARCHITECTURES, flag("attn_bias", "attention_bias", "all", "none"), flag("mlp_bias", "mlp_bias")
)
config, hf_config = TABLE.config, TABLE.hf_config
