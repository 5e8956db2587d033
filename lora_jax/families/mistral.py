"""Mistral: Llama with a sliding window (Jiang et al. 2023, https://arxiv.org/abs/2310.06825)."""

from collections.abc import Mapping

from lora_jax.families import llama
from lora_jax.model import transformer

ARCHITECTURES = {head: name.replace("Llama", "Mistral") for head, name in llama.ARCHITECTURES.items()}
PREFIX, IGNORED, KEYS = llama.PREFIX, llama.IGNORED, llama.KEYS


def config(hf: Mapping) -> transformer.Config:
  """`transformer.Config` of a `MistralConfig` as a dict; UserError for what it does not support."""
  return llama.decoder(hf, ["sliding_window"], window=hf.get("sliding_window"))
