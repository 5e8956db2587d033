"""Phi-3, Phi-4 and Phi-4-mini: Llama with q, k, v in one matrix and gate, up in another, kept so.

Abdin et al. 2024 (https://arxiv.org/abs/2404.14219).
"""

import dataclasses
from collections.abc import Mapping

from lora_jax import families
from lora_jax.families import Key, llama
from lora_jax.model import transformer

ARCHITECTURES = {head: name.replace("Llama", "Phi3") for head, name in llama.ARCHITECTURES.items()}
PREFIX, IGNORED = llama.PREFIX, llama.IGNORED
APART = tuple(f"layers/{k}/" for k in ("attn/q", "attn/k", "attn/v", "mlp/gate", "mlp/up"))
KEYS = (
  *(k for k in llama.KEYS if not k.path.startswith(APART)),
  Key("layers/attn/qkv/kernel", "model.layers.{}.self_attn.qkv_proj.weight", "(m h) d -> d m h"),
  Key("layers/mlp/gate_up/kernel", "model.layers.{}.mlp.gate_up_proj.weight", "(c f) d -> d c f"),
)
HANDLED = ["sliding_window", "partial_rotary_factor", "original_max_position_embeddings", "resid_pdrop", "embd_pdrop"]
DEFAULT = llama.DEFAULT | {
  "attention_bias": False,
  "mlp_bias": False,
  "lm_head_bias": False,
  "full_attn_mod": 1,
  "interpolate_factor": 1,
}
# transformers' values of keys that a config.json leaves out.
ABSENT = {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096}


def config(hf: Mapping) -> transformer.Config:
  """`transformer.Config` of a `Phi3Config` as a dict; UserError for what it does not support."""
  families.check(hf)
  hf = ABSENT | dict(hf)
  rotation = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
  # The key beside the dict wins over the one in it, and "su" and "yarn" are older names of LongRoPE here.
  rotation["original_max_position_embeddings"] = hf["original_max_position_embeddings"]
  if rotation.get("rope_type", rotation.get("type")) in ("su", "yarn"):
    rotation["rope_type"] = "longrope"
  part = families.rope_part(hf, rotation)
  rotation = families.rope(hf, rotation, part=part)
  c = llama.decoder(hf, HANDLED, DEFAULT, fused=True, window=hf.get("sliding_window"), **rotation)
  return dataclasses.replace(c, rope_dim=int(c.head_dim * part))
