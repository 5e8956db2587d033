"""RoBERTa: BERT with other training (Liu et al. 2019, https://arxiv.org/abs/1907.11692).

Positions begin behind the row of the padding token; a dense layer of the classifier takes the pooler's place.
"""

from collections.abc import Mapping
from typing import Any

from lora_jax.families import Key, bert, linear, norm
from lora_jax.families.config_json.option import Option
from lora_jax.model.architecture import Config

ARCHITECTURES = {
  "mlm": "RobertaForMaskedLM",
  "classification": "RobertaForSequenceClassification",
  "none": "RobertaModel",
}
PREFIX = "roberta."
IGNORED = r"embeddings\.position_ids$"
KEYS = (
  *bert.body(PREFIX),
  *linear("pooler", "roberta.pooler.dense", "c d -> d c", ("head", "none")),
  *linear("head/transform", "lm_head.dense", "c d -> d c"),
  *norm("head/norm", "lm_head.layer_norm"),
  Key("head/kernel", "lm_head.decoder.weight", "v d -> d v"),
  Key("head/bias", "lm_head.decoder.bias", "v -> v", ("tied", False)),
  Key("head/bias", "lm_head.bias", "v -> v", also=("lm_head.decoder.bias",)),
  *linear("pooler", "classifier.dense", "c d -> d c", ("head", "classification")),
  *linear("classifier", "classifier.out_proj", "c d -> d c"),
)


def view(tensors: Any) -> Any:
  """Returns the tensors of a file, see `bert.used_bias`."""
  return bert.used_bias(tensors, "lm_head")


def _positions(hf: Mapping) -> dict:
  padding = hf.get("pad_token_id")
  offset = (1 if padding is None else padding) + 1
  return {"position_offset": offset, "max_seq_len": hf["max_position_embeddings"] - offset}


def _position_keys(c: Config) -> dict:
  return {"pad_token_id": c.position_offset - 1, "max_position_embeddings": c.max_seq_len + c.position_offset}


TABLE = bert.TABLE.but(
  "roberta",
  ARCHITECTURES,
  Option(("position_offset", "max_seq_len"), ("pad_token_id", "max_position_embeddings"), _positions, _position_keys),
  fixed={"activation": "gelu"},
  default={"hidden_act": "gelu"},  # its LM head always has GELU
)
config, hf_config = TABLE.config, TABLE.hf_config
