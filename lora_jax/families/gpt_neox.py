"""GPT-NeoX, such as Pythia (Black et al. 2022, https://arxiv.org/abs/2204.06745; Biderman et al. 2023,
https://arxiv.org/abs/2304.01373).

Attention and feed-forward layer side by side, part of each head rotated; query, key and value are one matrix, whose
rows are sorted by head first.
"""

from collections.abc import Mapping

from lora_jax import families
from lora_jax.families import Key, linear, norm
from lora_jax.model import transformer

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

HANDLED = (
  "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size hidden_act layer_norm_eps "
  "max_position_embeddings tie_word_embeddings use_parallel_residual attention_bias rotary_pct rotary_emb_base "
  "rope_parameters rope_scaling rope_theta partial_rotary_factor"
).split()
IGNORED_CONFIG = ("hidden_dropout", "attention_probs_dropout_prob", "hidden_dropout_prob")


def config(hf: Mapping) -> transformer.Config:
  """`transformer.Config` of a `GPTNeoXConfig` as a dict; UserError for what it does not support."""
  families.check_config(hf, HANDLED, {}, [*families.BOOKKEEPING, *IGNORED_CONFIG])
  families.require(hf, HANDLED[:5], hf.get("hidden_act", "gelu"))
  heads, d_model = hf["num_attention_heads"], hf["hidden_size"]
  rope = dict(hf.get("rope_scaling") or hf.get("rope_parameters") or {})
  rotated = families.rope_part(hf, rope, hf.get("rotary_pct") or 0.25)
  return transformer.Config(
    vocab_size=hf["vocab_size"],
    d_model=d_model,
    n_layers=hf["num_hidden_layers"],
    n_heads=heads,
    n_kv_heads=heads,
    head_dim=d_model // heads,
    d_ff=hf["intermediate_size"],
    norm="layer",
    norm_eps=hf.get("layer_norm_eps", 1e-5),
    activation=hf.get("hidden_act", "gelu"),
    parallel=hf.get("use_parallel_residual", True),
    gated=False,
    fused=True,
    attn_bias="all" if hf.get("attention_bias", True) else "none",
    mlp_bias=True,
    rope_dim=int(d_model // heads * rotated),
    max_seq_len=hf.get("max_position_embeddings", 2048),
    tied=bool(hf.get("tie_word_embeddings", False)),
    pool="last",
    n_labels=families.labels(hf),
    **families.rope(hf, rope, hf.get("rotary_emb_base") or 10_000, rotated),
  )
