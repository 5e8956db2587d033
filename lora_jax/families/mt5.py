"""mT5: T5 1.1 on many languages (Xue et al. 2021, https://arxiv.org/abs/2010.11934)."""

from lora_jax.families import t5
from lora_jax.families.config_json.option import Option

ARCHITECTURES = {head: f"M{name}" for head, name in t5.ARCHITECTURES.items()}
PREFIX, IGNORED, KEYS, ONE_TABLE = t5.PREFIX, t5.IGNORED, t5.KEYS, t5.ONE_TABLE
# There are two tables, whatever `tie_word_embeddings` says: transformers 5 writes true for every model, and ties them
# only if a file has a single table.
TABLES = Option(
  ("tied",), ("tie_word_embeddings",), lambda hf: {"tied": False}, lambda c: {"tie_word_embeddings": c.tied}
)
TABLE = t5.TABLE.but(
  "mt5",
  ARCHITECTURES,
  t5.feed_forward("gated-gelu"),
  TABLES,
  fixed={"head_scale": None},
  ignored=("scale_decoder_outputs",),
)
config, hf_config = TABLE.config, TABLE.hf_config
