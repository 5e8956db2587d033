"""OPT (Zhang et al. 2022, https://arxiv.org/abs/2205.01068)."""

from collections.abc import Mapping

from lora_jax.families import Key, linear, norm
from lora_jax.families.config_json import ConfigJson
from lora_jax.families.config_json.option import LABELS, Option, equal_heads, flag, number, optional
from lora_jax.model.architecture import Config

ARCHITECTURES = {"lm": "OPTForCausalLM", "classification": "OPTForSequenceClassification", "none": "OPTModel"}
PREFIX = "model."
IGNORED = r"^$"
KEYS = (
  Key("embed/kernel", "model.decoder.embed_tokens.weight", "v d -> v d"),
  Key("embed/positions", "model.decoder.embed_positions.weight", "t d -> t d"),
  Key("embed/project/kernel", "model.decoder.project_in.weight", "d c -> c d"),
  *norm("layers/attn_norm", "model.decoder.layers.{}.self_attn_layer_norm"),
  *linear("layers/attn/q", "model.decoder.layers.{}.self_attn.q_proj", "(n h) d -> d n h"),
  *linear("layers/attn/k", "model.decoder.layers.{}.self_attn.k_proj", "(n h) d -> d n h"),
  *linear("layers/attn/v", "model.decoder.layers.{}.self_attn.v_proj", "(n h) d -> d n h"),
  *linear("layers/attn/o", "model.decoder.layers.{}.self_attn.out_proj", "d (n h) -> n h d"),
  *norm("layers/mlp_norm", "model.decoder.layers.{}.final_layer_norm"),
  *linear("layers/mlp/up", "model.decoder.layers.{}.fc1", "f d -> d f"),
  *linear("layers/mlp/down", "model.decoder.layers.{}.fc2", "d f -> f d"),
  *norm("norm", "model.decoder.final_layer_norm"),
  Key("project/kernel", "model.decoder.project_out.weight", "c d -> d c"),
  Key("head/kernel", "lm_head.weight", "v d -> d v"),
  Key("classifier/kernel", "score.weight", "c d -> d c"),
)


def _norms(hf: Mapping) -> dict:
  before = bool(hf["do_layer_norm_before"])
  return {"norm_order": "pre" if before else "post", "final_norm": before and not hf.get("_remove_final_layer_norm")}


def _norm_keys(c: Config) -> dict:
  before = c.norm_order == "pre"
  return {"do_layer_norm_before": before, "_remove_final_layer_norm": before and not c.final_norm}


def _table(hf: Mapping) -> dict:
  width = hf.get("word_embed_proj_dim")
  return {"embed_dim": None if width == hf["hidden_size"] else width}


TABLE = ConfigJson(
  "opt",
  ARCHITECTURES,
  (
    number("vocab_size", "vocab_size"),
    number("d_model", "hidden_size"),
    number("n_layers", "num_hidden_layers"),
    number("n_heads", "num_attention_heads"),
    *equal_heads("hidden_size", "num_attention_heads"),
    number("d_ff", "ffn_dim"),
    optional("activation", "activation_function", null="relu"),
    number("max_seq_len", "max_position_embeddings"),
    Option(("norm_order", "final_norm"), ("do_layer_norm_before", "_remove_final_layer_norm"), _norms, _norm_keys),
    Option(
      ("attn_bias", "mlp_bias"),
      ("enable_bias",),
      lambda hf: (
        {"attn_bias": "all", "mlp_bias": True} if hf["enable_bias"] else {"attn_bias": "none", "mlp_bias": False}
      ),
      lambda c: {"enable_bias": c.mlp_bias},
    ),
    Option(
      ("embed_dim",), ("word_embed_proj_dim",), _table, lambda c: {"word_embed_proj_dim": c.embed_dim or c.d_model}
    ),
    flag("tied", "tie_word_embeddings"),
    LABELS,
  ),
  absent={
    "max_position_embeddings": 2048,
    "do_layer_norm_before": True,
    "enable_bias": True,
    "tie_word_embeddings": True,
  },
  fixed=dict(norm="layer", gated=False, position="learned", position_offset=2, pool="last"),
  default={"layer_norm_elementwise_affine": True, "scale_embeddings": False, "learned_embeddings": True},
  ignored=("activation_dropout", "dropout", "layerdrop", "init_std"),
)
config, hf_config = TABLE.config, TABLE.hf_config
