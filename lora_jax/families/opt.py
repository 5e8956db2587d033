"""OPT (Zhang et al. 2022, https://arxiv.org/abs/2205.01068)."""

from collections.abc import Mapping

from lora_jax import families
from lora_jax.families import Key, linear, norm
from lora_jax.model import transformer

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

HANDLED = (
  "vocab_size hidden_size num_hidden_layers num_attention_heads ffn_dim activation_function max_position_embeddings "
  "do_layer_norm_before _remove_final_layer_norm word_embed_proj_dim enable_bias tie_word_embeddings"
).split()
DEFAULT = {"layer_norm_elementwise_affine": True, "scale_embeddings": False, "learned_embeddings": True}
IGNORED_CONFIG = "activation_dropout dropout layerdrop init_std".split()


def config(hf: Mapping) -> transformer.Config:
  """`transformer.Config` of an `OPTConfig` as a dict; UserError for what it does not support."""
  families.check_config(hf, HANDLED, DEFAULT, [*families.BOOKKEEPING, *IGNORED_CONFIG])
  activation = hf.get("activation_function") or "relu"
  families.require(hf, HANDLED[:5], activation)
  heads, d_model, table = hf["num_attention_heads"], hf["hidden_size"], hf.get("word_embed_proj_dim")
  pre, bias = hf.get("do_layer_norm_before", True), hf.get("enable_bias", True)
  return transformer.Config(
    vocab_size=hf["vocab_size"],
    d_model=d_model,
    n_layers=hf["num_hidden_layers"],
    n_heads=heads,
    n_kv_heads=heads,
    head_dim=d_model // heads,
    d_ff=hf["ffn_dim"],
    norm="layer",
    norm_order="pre" if pre else "post",
    final_norm=pre and not hf.get("_remove_final_layer_norm", False),
    activation=activation,
    gated=False,
    attn_bias="all" if bias else "none",
    mlp_bias=bias,
    position="learned",
    position_offset=2,
    max_seq_len=hf.get("max_position_embeddings", 2048),
    embed_dim=None if table in (None, d_model) else table,
    tied=bool(hf.get("tie_word_embeddings", True)),
    pool="last",
    n_labels=families.labels(hf),
  )
