"""BERT (Devlin et al. 2018, https://arxiv.org/abs/1810.04805), and sentence encoders of its shape, such as MiniLM."""

from typing import Any

from lora_jax.families import Key, linear, norm
from lora_jax.families.config_json import ConfigJson
from lora_jax.families.config_json.option import LABELS, equal_heads, flag, number, optional
from lora_jax.families.reading import tensor_names

ARCHITECTURES = {
  "mlm": "BertForMaskedLM",
  "classification": "BertForSequenceClassification",
  "none": "BertModel",
}
PREFIX = "bert."
IGNORED = r"embeddings\.position_ids$|^cls\.seq_relationship\."


def body(prefix: str) -> tuple[Key, ...]:
  """Returns the rows of an encoder without a head."""
  embeddings, layer = f"{prefix}embeddings", f"{prefix}encoder.layer.{{}}"
  return (
    Key("embed/kernel", f"{embeddings}.word_embeddings.weight", "v d -> v d"),
    Key("embed/positions", f"{embeddings}.position_embeddings.weight", "t d -> t d"),
    Key("embed/types", f"{embeddings}.token_type_embeddings.weight", "c d -> c d"),
    *norm("embed/norm", f"{embeddings}.LayerNorm"),
    *linear("layers/attn/q", f"{layer}.attention.self.query", "(n h) d -> d n h"),
    *linear("layers/attn/k", f"{layer}.attention.self.key", "(n h) d -> d n h"),
    *linear("layers/attn/v", f"{layer}.attention.self.value", "(n h) d -> d n h"),
    *linear("layers/attn/o", f"{layer}.attention.output.dense", "d (n h) -> n h d"),
    *norm("layers/attn_norm", f"{layer}.attention.output.LayerNorm"),
    *linear("layers/mlp/up", f"{layer}.intermediate.dense", "f d -> d f"),
    *linear("layers/mlp/down", f"{layer}.output.dense", "d f -> f d"),
    *norm("layers/mlp_norm", f"{layer}.output.LayerNorm"),
  )


KEYS = (
  *body(PREFIX),
  *linear("pooler", "bert.pooler.dense", "c d -> d c"),
  *linear("head/transform", "cls.predictions.transform.dense", "c d -> d c"),
  *norm("head/norm", "cls.predictions.transform.LayerNorm"),
  Key("head/kernel", "cls.predictions.decoder.weight", "v d -> d v"),
  Key("head/bias", "cls.predictions.decoder.bias", "v -> v", ("tied", False)),
  Key("head/bias", "cls.predictions.bias", "v -> v", also=("cls.predictions.decoder.bias",)),
  *linear("classifier", "classifier", "c d -> d c"),
)

# What BERT and the encoders derived from it have in common.
POST_NORM = dict(
  norm="layer",
  norm_order="post",
  final_norm=False,
  embed_norm=True,
  gated=False,
  attn_bias="all",
  mlp_bias=True,
  head_bias=True,
  causal=False,
  position="learned",
  pooler="tanh",
)
TABLE = ConfigJson(
  "bert",
  ARCHITECTURES,
  (
    number("vocab_size", "vocab_size"),
    number("d_model", "hidden_size"),
    number("n_layers", "num_hidden_layers"),
    number("n_heads", "num_attention_heads"),
    *equal_heads("hidden_size", "num_attention_heads"),
    number("d_ff", "intermediate_size"),
    optional("activation", "hidden_act"),
    number("norm_eps", "layer_norm_eps"),
    number("max_seq_len", "max_position_embeddings"),
    number("n_types", "type_vocab_size"),
    flag("tied", "tie_word_embeddings"),
    LABELS,
  ),
  absent={
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "tie_word_embeddings": True,
  },
  fixed=POST_NORM,
  default={"position_embedding_type": "absolute"},
  # The poolers and the direction were written by the conversion from TensorFlow.
  ignored=(
    *"hidden_dropout_prob attention_probs_dropout_prob directionality pooler_fc_size".split(),
    *"pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head pooler_type".split(),
  ),
  aliases={"BertForPreTraining": "mlm"},
)
config, hf_config = TABLE.config, TABLE.hf_config


def view(tensors: Any) -> Any:
  """Returns the tensors of a file, see `used_bias`."""
  return used_bias(tensors, "cls.predictions")


def used_bias(tensors: Any, head: str) -> Any:
  """Returns the tensors without the LM head's own bias if the decoder has one, which transformers always uses."""
  names, unused = tensors.names(), f"{head}.bias" if f"{head}.decoder.bias" in tensors.names() else None
  return tensor_names.View(tensors, {k: (k, ()) for k in names if k != unused})
