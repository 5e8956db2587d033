"""Llama 2, Llama 3.x and models of their shape, such as SmolLM2.

Touvron et al. 2023 (https://arxiv.org/abs/2307.09288); Grattafiori et al. 2024 (https://arxiv.org/abs/2407.21783).
"""

from collections.abc import Mapping

from lora_jax import errors, families, layers, transformer
from lora_jax.families import Key

KEYS = (
  Key("embed/kernel", "model.embed_tokens.weight", "v d -> v d"),
  Key("layers/attn_norm/scale", "model.layers.{}.input_layernorm.weight", "d -> d"),
  Key("layers/attn/q/kernel", "model.layers.{}.self_attn.q_proj.weight", "(n h) d -> d n h"),
  Key("layers/attn/k/kernel", "model.layers.{}.self_attn.k_proj.weight", "(n h) d -> d n h"),
  Key("layers/attn/v/kernel", "model.layers.{}.self_attn.v_proj.weight", "(n h) d -> d n h"),
  Key("layers/attn/o/kernel", "model.layers.{}.self_attn.o_proj.weight", "d (n h) -> n h d"),
  Key("layers/mlp_norm/scale", "model.layers.{}.post_attention_layernorm.weight", "d -> d"),
  Key("layers/mlp/gate/kernel", "model.layers.{}.mlp.gate_proj.weight", "f d -> d f"),
  Key("layers/mlp/up/kernel", "model.layers.{}.mlp.up_proj.weight", "f d -> d f"),
  Key("layers/mlp/down/kernel", "model.layers.{}.mlp.down_proj.weight", "d f -> f d"),
  Key("norm/scale", "model.norm.weight", "d -> d"),
  Key("head/kernel", "lm_head.weight", "v d -> d v"),
)

HANDLED = (
  "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim intermediate_size "
  "rms_norm_eps hidden_act rope_theta rope_scaling rope_parameters max_position_embeddings tie_word_embeddings"
).split()
DEFAULT = {"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1, "quantization_config": None}


def config(hf: Mapping) -> transformer.Config:
  """`transformer.Config` of a `LlamaConfig` as a dict; UserError for what it does not support."""
  families.check_config(hf, HANDLED, DEFAULT, families.BOOKKEEPING)
  missing = [k for k in HANDLED[:4] + ["intermediate_size"] if k not in hf]
  if missing:
    raise errors.UserError(f"config.json of a llama model lacks {', '.join(missing)}")
  errors.choose(hf.get("hidden_act", "silu"), layers.ACTIVATIONS, "hidden_act")
  heads = hf["num_attention_heads"]
  theta, scaling = rope(hf)
  return transformer.Config(
    vocab_size=hf["vocab_size"],
    d_model=hf["hidden_size"],
    n_layers=hf["num_hidden_layers"],
    n_heads=heads,
    n_kv_heads=hf.get("num_key_value_heads") or heads,
    head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
    d_ff=hf["intermediate_size"],
    norm_eps=hf.get("rms_norm_eps", 1e-6),
    activation=hf.get("hidden_act", "silu"),
    rope_theta=theta,
    rope_scaling=scaling,
    max_seq_len=hf.get("max_position_embeddings", 2048),
    tied=hf.get("tie_word_embeddings", False),
  )


def rope(hf: Mapping) -> tuple[float, tuple | None]:
  """(theta, scaling items or None) from `rope_theta` and `rope_scaling`, or from the newer `rope_parameters`."""
  given = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
  theta = float(given.pop("rope_theta", None) or hf.get("rope_theta") or 10_000.0)
  kind = given.pop("type", None)  # the older spelling of rope_type
  kind = given.pop("rope_type", kind) or "default"
  if kind == "default":
    return theta, None
  scaling = {"rope_type": kind} | {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
  layers.rope_frequencies(2, theta, scaling)
  return theta, tuple(sorted(scaling.items()))
