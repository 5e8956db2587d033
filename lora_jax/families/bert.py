"""BERT (Devlin et al. 2018, https://arxiv.org/abs/1810.04805), and sentence encoders of its shape, such as MiniLM."""

from collections.abc import Mapping
from typing import Any

from lora_jax import families
from lora_jax.families import Key, linear, norm
from lora_jax.families.reading import tensor_names
from lora_jax.model import transformer

ARCHITECTURES = {
  "mlm": "BertForMaskedLM",
  "classification": "BertForSequenceClassification",
  "none": "BertModel",
}
ALIASES = {"BertForPreTraining": "mlm"}
PREFIX = "bert."
IGNORED = r"embeddings\.position_ids$|^cls\.seq_relationship\."


def body(prefix: str) -> tuple[Key, ...]:
  """The rows of an encoder without a head."""
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

HANDLED = (
  "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size hidden_act layer_norm_eps "
  "max_position_embeddings type_vocab_size tie_word_embeddings"
).split()
DEFAULT = {"position_embedding_type": "absolute"}
# The poolers and the direction were written by the conversion from TensorFlow.
IGNORED_CONFIG = (
  "hidden_dropout_prob attention_probs_dropout_prob directionality pooler_fc_size "
  "pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head pooler_type"
).split()


def view(tensors: Any) -> Any:
  """The tensors of a file, see `used_bias`."""
  return used_bias(tensors, "cls.predictions")


def used_bias(tensors: Any, head: str) -> Any:
  """Without the LM head's own bias where there is the decoder's: what transformers computes with, tied or not."""
  names, unused = tensors.names(), f"{head}.bias" if f"{head}.decoder.bias" in tensors.names() else None
  return tensor_names.View(tensors, {k: (k, ()) for k in names if k != unused})


def config(hf: Mapping) -> transformer.Config:
  """`transformer.Config` of a `BertConfig` as a dict; UserError for what it does not support."""
  return encoder(hf)


def encoder(hf: Mapping, default: Mapping = DEFAULT, **choices: Any) -> transformer.Config:
  """The config of an encoder of BERT's shape.

  Args:
    default: keys that are supported only at that value.
    choices: further fields of the config, or other values of those that are set here.
  """
  families.check_config(hf, HANDLED, default, [*families.BOOKKEEPING, *IGNORED_CONFIG])
  families.require(hf, HANDLED[:5], hf.get("hidden_act", "gelu"))
  heads, d_model = hf["num_attention_heads"], hf["hidden_size"]
  fields = dict(
    vocab_size=hf["vocab_size"],
    d_model=d_model,
    n_layers=hf["num_hidden_layers"],
    n_heads=heads,
    n_kv_heads=heads,
    head_dim=d_model // heads,
    d_ff=hf["intermediate_size"],
    norm_eps=hf.get("layer_norm_eps", 1e-12),
    activation=hf.get("hidden_act", "gelu"),
    max_seq_len=hf.get("max_position_embeddings", 512),
    n_types=hf.get("type_vocab_size", 2),
    n_labels=families.labels(hf),
    tied=bool(hf.get("tie_word_embeddings", True)),
    **POST_NORM,
  )
  return transformer.Config(**(fields | choices))


# What all encoders of the family tree have in common.
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
