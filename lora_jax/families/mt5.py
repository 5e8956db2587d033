"""mT5: T5 1.1 on many languages (Xue et al. 2021, https://arxiv.org/abs/2010.11934)."""

from collections.abc import Mapping

from lora_jax import transformer
from lora_jax.families import t5

ARCHITECTURES = {head: f"M{name}" for head, name in t5.ARCHITECTURES.items()}
PREFIX, IGNORED, KEYS = t5.PREFIX, t5.IGNORED, t5.KEYS


def config(hf: Mapping) -> transformer.Config:
  """`transformer.Config` of an `MT5Config` as a dict; UserError for what it does not support.

  The head is never tied, whatever `tie_word_embeddings` says: transformers 5 writes it as true for every model.
  """
  return t5.encoder_decoder(hf, "gated-gelu", tied=False)
