"""DistilBERT (Sanh et al. 2019, https://arxiv.org/abs/1910.01108): BERT without token types and pooler."""

from lora_jax.families import Key, bert, linear, norm
from lora_jax.families.config_json import ConfigJson
from lora_jax.families.config_json.option import LABELS, equal_heads, flag, number, optional

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

TABLE = ConfigJson(
  "distilbert",
  ARCHITECTURES,
  (
    number("vocab_size", "vocab_size"),
    number("d_model", "dim"),
    number("n_layers", "n_layers"),
    number("n_heads", "n_heads"),
    *equal_heads("dim", "n_heads"),
    number("d_ff", "hidden_dim"),
    optional("activation", "activation"),
    number("max_seq_len", "max_position_embeddings"),
    flag("tied", "tie_word_embeddings"),
    LABELS,
  ),
  absent={"activation": "gelu", "max_position_embeddings": 512, "tie_word_embeddings": True},
  fixed=bert.POST_NORM | {"pooler": "relu", "norm_eps": 1e-12},
  default={"tie_weights_": True},
  ignored=("dropout", "qa_dropout", "seq_classif_dropout", "sinusoidal_pos_embds"),
)
config, hf_config = TABLE.config, TABLE.hf_config
