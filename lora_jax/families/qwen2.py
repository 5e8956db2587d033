"""Qwen2 and Qwen2.5: Llama with biases on q, k and v (Yang et al. 2024, https://arxiv.org/abs/2407.10671)."""

from lora_jax.families import llama
from lora_jax.families.config_json.option import windows

ARCHITECTURES = {head: name.replace("Llama", "Qwen2") for head, name in llama.ARCHITECTURES.items()}
PREFIX, IGNORED, KEYS = llama.PREFIX, llama.IGNORED, llama.KEYS
# Without `layer_types` the layers from `max_window_layers` on are local.
WINDOWS = windows(
  ("max_window_layers",),
  lambda hf: hf.get("sliding_window", 4096) if hf.get("use_sliding_window") else None,
  lambda hf, layer: layer >= hf.get("max_window_layers", 28),
  switch="use_sliding_window",
)
ABSENT = {"num_key_value_heads": 32, "max_position_embeddings": 32768}
TABLE = llama.DECODER.but(
  "qwen2", ARCHITECTURES, WINDOWS, absent=ABSENT, fixed={"attn_bias": "qkv"}, default={"use_mrope": False}
)
config, hf_config = TABLE.config, TABLE.hf_config
