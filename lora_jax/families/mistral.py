"""Mistral: Llama with a sliding window (Jiang et al. 2023, https://arxiv.org/abs/2310.06825)."""

from lora_jax.families import llama
from lora_jax.families.config_json.option import optional

ARCHITECTURES = {head: name.replace("Llama", "Mistral") for head, name in llama.ARCHITECTURES.items()}
PREFIX, IGNORED, KEYS = llama.PREFIX, llama.IGNORED, llama.KEYS
TABLE = llama.DECODER.but("mistral", ARCHITECTURES, optional("window", "sliding_window"))
config, hf_config = TABLE.config, TABLE.hf_config
