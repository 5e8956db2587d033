"""mT5: T5 1.1 on many languages (Xue et al. 2021, https://arxiv.org/abs/2010.11934)."""

from collections.abc import Mapping

from lora_jax.families import t5
from lora_jax.model import transformer

ARCHITECTURES = {head: f"M{name}" for head, name in t5.ARCHITECTURES.items()}
PREFIX, IGNORED, KEYS, ONE_TABLE = t5.PREFIX, t5.IGNORED, t5.KEYS, t5.ONE_TABLE


def config(hf: Mapping) -> transformer.Config:
  """`transformer.Config` of an `MT5Config` as a dict; UserError for what it does not support.

  Two tables, whatever `tie_word_embeddings` says: transformers 5 writes it as true for every model, and ties them only
  where a file has no other.
  """
  return t5.encoder_decoder(hf, "gated-gelu", tied=False)
