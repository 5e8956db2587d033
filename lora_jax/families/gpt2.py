"""GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners").

Its matrices are stored [in, out], and query, key and value are one.
"""

from collections.abc import Mapping

from lora_jax import families
from lora_jax.families import Key, linear, norm
from lora_jax.model import transformer

ARCHITECTURES = {"lm": "GPT2LMHeadModel", "classification": "GPT2ForSequenceClassification", "none": "GPT2Model"}
PREFIX = "transformer."
IGNORED = r"\.attn\.(masked_)?bias$"
KEYS = (
  Key("embed/kernel", "transformer.wte.weight", "v d -> v d"),
  Key("embed/positions", "transformer.wpe.weight", "t d -> t d"),
  *norm("layers/attn_norm", "transformer.h.{}.ln_1"),
  *linear("layers/attn/qkv", "transformer.h.{}.attn.c_attn", "d (m h) -> d m h"),
  *linear("layers/attn/o", "transformer.h.{}.attn.c_proj", "(n h) d -> n h d"),
  *norm("layers/mlp_norm", "transformer.h.{}.ln_2"),
  *linear("layers/mlp/up", "transformer.h.{}.mlp.c_fc", "d f -> d f"),
  *linear("layers/mlp/down", "transformer.h.{}.mlp.c_proj", "f d -> f d"),
  *norm("norm", "transformer.ln_f"),
  Key("head/kernel", "lm_head.weight", "v d -> d v"),
  Key("classifier/kernel", "score.weight", "c d -> d c"),
)

HANDLED = (
  "vocab_size n_embd n_layer n_head n_inner n_positions activation_function layer_norm_epsilon scale_attn_weights "
  "tie_word_embeddings"
).split()
DEFAULT = {"scale_attn_by_inverse_layer_idx": False}
# `n_ctx` is what `n_positions` was called, and the summaries belong to a head that is not supported.
IGNORED_CONFIG = (
  "n_ctx attn_pdrop embd_pdrop resid_pdrop reorder_and_upcast_attn summary_type summary_use_proj summary_activation "
  "summary_proj_to_labels summary_first_dropout n_special predict_special_tokens"
).split()


def config(hf: Mapping) -> transformer.Config:
  """`transformer.Config` of a `GPT2Config` as a dict; UserError for what it does not support."""
  families.check_config(hf, HANDLED, DEFAULT, [*families.BOOKKEEPING, *IGNORED_CONFIG])
  activation = hf.get("activation_function") or "gelu_new"
  families.require(hf, HANDLED[:4], activation)
  heads, d_model = hf["n_head"], hf["n_embd"]
  return transformer.Config(
    vocab_size=hf["vocab_size"],
    d_model=d_model,
    n_layers=hf["n_layer"],
    n_heads=heads,
    n_kv_heads=heads,
    head_dim=d_model // heads,
    d_ff=hf.get("n_inner") or 4 * d_model,
    norm="layer",
    norm_eps=hf.get("layer_norm_epsilon", 1e-5),
    activation=activation,
    gated=False,
    fused=True,
    attn_bias="all",
    mlp_bias=True,
    attn_scale=None if hf.get("scale_attn_weights", True) else 1.0,
    position="learned",
    max_seq_len=hf.get("n_positions", 1024),
    tied=bool(hf.get("tie_word_embeddings", True)),
    pool="last",
    n_labels=families.labels(hf),
  )
