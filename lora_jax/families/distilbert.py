"""DistilBERT (Sanh et al. 2019, https://arxiv.org/abs/1910.01108): BERT without token types and pooler."""

from collections.abc import Mapping

from lora_jax import families
from lora_jax.families import Key, bert, linear, norm
from lora_jax.model import transformer

ARCHITECTURES = {
  "mlm": "DistilBertForMaskedLM",
  "classification": "DistilBertForSequenceClassification",
  "none": "DistilBertModel",
}
PREFIX = "distilbert."
IGNORED = r"embeddings\.position_ids$"
KEYS = (
  Key("embed/kernel", "distilbert.embeddings.word_embeddings.weight", "v d -> v d"),
  Key("embed/positions", "distilbert.embeddings.position_embeddings.weight", "t d -> t d"),
  *norm("embed/norm", "distilbert.embeddings.LayerNorm"),
  *linear("layers/attn/q", "distilbert.transformer.layer.{}.attention.q_lin", "(n h) d -> d n h"),
  *linear("layers/attn/k", "distilbert.transformer.layer.{}.attention.k_lin", "(n h) d -> d n h"),
  *linear("layers/attn/v", "distilbert.transformer.layer.{}.attention.v_lin", "(n h) d -> d n h"),
  *linear("layers/attn/o", "distilbert.transformer.layer.{}.attention.out_lin", "d (n h) -> n h d"),
  *norm("layers/attn_norm", "distilbert.transformer.layer.{}.sa_layer_norm"),
  *linear("layers/mlp/up", "distilbert.transformer.layer.{}.ffn.lin1", "f d -> d f"),
  *linear("layers/mlp/down", "distilbert.transformer.layer.{}.ffn.lin2", "d f -> f d"),
  *norm("layers/mlp_norm", "distilbert.transformer.layer.{}.output_layer_norm"),
  *linear("head/transform", "vocab_transform", "c d -> d c"),
  *norm("head/norm", "vocab_layer_norm"),
  Key("head/kernel", "vocab_projector.weight", "v d -> d v"),
  Key("head/bias", "vocab_projector.bias", "v -> v"),
  *linear("pooler", "pre_classifier", "c d -> d c", ("head", "classification")),
  *linear("classifier", "classifier", "c d -> d c"),
)

HANDLED = "vocab_size dim n_layers n_heads hidden_dim activation max_position_embeddings tie_word_embeddings".split()
DEFAULT = {"tie_weights_": True}
IGNORED_CONFIG = "dropout qa_dropout seq_classif_dropout sinusoidal_pos_embds".split()


def config(hf: Mapping) -> transformer.Config:
  """`transformer.Config` of a `DistilBertConfig` as a dict; UserError for what it does not support."""
  families.check_config(hf, HANDLED, DEFAULT, [*families.BOOKKEEPING, *IGNORED_CONFIG])
  families.require(hf, HANDLED[:5], hf.get("activation", "gelu"))
  return transformer.Config(
    vocab_size=hf["vocab_size"],
    d_model=hf["dim"],
    n_layers=hf["n_layers"],
    n_heads=hf["n_heads"],
    n_kv_heads=hf["n_heads"],
    head_dim=hf["dim"] // hf["n_heads"],
    d_ff=hf["hidden_dim"],
    norm_eps=1e-12,
    activation=hf.get("activation", "gelu"),
    max_seq_len=hf.get("max_position_embeddings", 512),
    n_labels=families.labels(hf),
    tied=bool(hf.get("tie_word_embeddings", True)),
    **(bert.POST_NORM | {"pooler": "relu"}),
  )
