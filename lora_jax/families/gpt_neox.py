"""GPT-NeoX, such as Pythia (Black et al. 2022, https://arxiv.org/abs/2204.06745; Biderman et al. 2023,
https://arxiv.org/abs/2304.01373).

Attention and feed-forward layer side by side, part of each head rotated; query, key and value are one matrix, whose
rows are sorted by head first.
"""

from collections.abc import Mapping

from lora_jax.families import Key, linear, norm
from lora_jax.families.config_json import ConfigJson, rotation
from lora_jax.families.config_json.option import LABELS, Option, equal_heads, flag, number, optional
from lora_jax.model.architecture import Config

ARCHITECTURES = {
  "lm": "GPTNeoXForCausalLM",
  "classification": "GPTNeoXForSequenceClassification",
  "none": "GPTNeoXModel",
}
PREFIX = "gpt_neox."
IGNORED = r"attention\.((masked_)?bias|rotary_emb\.inv_freq)$"
KEYS = (
  Key("embed/kernel", "gpt_neox.embed_in.weight", "v d -> v d"),
  *norm("layers/attn_norm", "gpt_neox.layers.{}.input_layernorm"),
  *linear("layers/attn/qkv", "gpt_neox.layers.{}.attention.query_key_value", "(n c h) d -> d (c n) h"),
  *linear("layers/attn/o", "gpt_neox.layers.{}.attention.dense", "d (n h) -> n h d"),
  *norm("layers/mlp_norm", "gpt_neox.layers.{}.post_attention_layernorm"),
  *linear("layers/mlp/up", "gpt_neox.layers.{}.mlp.dense_h_to_4h", "f d -> d f"),
  *linear("layers/mlp/down", "gpt_neox.layers.{}.mlp.dense_4h_to_h", "d f -> f d"),
  *norm("norm", "gpt_neox.final_layer_norm"),
  Key("head/kernel", "embed_out.weight", "v d -> d v", torch="lm_head.weight"),
  Key("classifier/kernel", "score.weight", "c d -> d c"),
)


def _rotation(hf: Mapping) -> dict:
  """Returns the rotation, which covers a part of each head."""
  given = dict(hf.get("rope_scaling") or hf.get("rope_parameters") or {})
  part = rotation.read_part(hf, given, hf.get("rotary_pct") or 0.25)
  head_dim = hf["hidden_size"] // hf["num_attention_heads"]
  return rotation.read(hf, given, hf.get("rotary_emb_base") or 10_000, part) | {"rope_dim": int(head_dim * part)}


def _written(c: Config) -> dict:
  keys = rotation.write(c)
  part = {"rotary_pct": rotation.part(c.rope_dim, c.head_dim)} if c.rope_dim else {}
  return {"rotary_emb_base": keys.pop("rope_theta")} | keys | part


TABLE = ConfigJson(
  "gpt_neox",
  ARCHITECTURES,
  (
    number("vocab_size", "vocab_size"),
    number("d_model", "hidden_size"),
    number("n_layers", "num_hidden_layers"),
    number("n_heads", "num_attention_heads"),
    *equal_heads("hidden_size", "num_attention_heads"),
    number("d_ff", "intermediate_size"),
    number("norm_eps", "layer_norm_eps"),
    number("max_seq_len", "max_position_embeddings"),
    optional("activation", "hidden_act"),
    flag("parallel", "use_parallel_residual"),
    flag("attn_bias", "attention_bias", "all", "none"),
    flag("tied", "tie_word_embeddings"),
    Option(
      ("rope_theta", "rope_scaling", "rope_dim"),
      (*rotation.KEYS, "rotary_pct", "rotary_emb_base", "partial_rotary_factor"),
      _rotation,
      _written,
    ),
    LABELS,
  ),
  absent={
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "hidden_act": "gelu",
    "use_parallel_residual": True,
    "attention_bias": True,
  },
  fixed=dict(norm="layer", gated=False, fused=True, mlp_bias=True, pool="last"),
  ignored=("hidden_dropout", "attention_probs_dropout_prob", "hidden_dropout_prob"),
)
config, hf_config = TABLE.config, TABLE.hf_config
