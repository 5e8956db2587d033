"""Phi-3, Phi-4 and Phi-4-mini: Llama with q, k, v in one matrix and gate, up in another, kept so.

Abdin et al. 2024 (https://arxiv.org/abs/2404.14219).
"""

from collections.abc import Mapping

from lora_jax.families import Key, llama
from lora_jax.families.config_json import rotation
from lora_jax.families.config_json.option import Option, optional
from lora_jax.model.architecture import Config

ARCHITECTURES = {head: name.replace("Llama", "Phi3") for head, name in llama.ARCHITECTURES.items()}
PREFIX, IGNORED = llama.PREFIX, llama.IGNORED
APART = tuple(f"layers/{k}/" for k in ("attn/q", "attn/k", "attn/v", "mlp/gate", "mlp/up"))
KEYS = (
  *(k for k in llama.KEYS if not k.path.startswith(APART)),
  Key("layers/attn/qkv/kernel", "model.layers.{}.self_attn.qkv_proj.weight", "(m h) d -> d m h"),
  Key("layers/mlp/gate_up/kernel", "model.layers.{}.mlp.gate_up_proj.weight", "(c f) d -> d c f"),
)


def _rotation(hf: Mapping) -> dict:
  """Returns LongRoPE, which covers a part of each head."""
  given = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
  # The key beside the dict overrides the one in it. "su" and "yarn" are older names of LongRoPE here.
  given["original_max_position_embeddings"] = hf["original_max_position_embeddings"]
  if given.get("rope_type", given.get("type")) in ("su", "yarn"):
    given["rope_type"] = "longrope"
  part = rotation.read_part(hf, given)
  head_dim = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]
  return rotation.read(hf, given, part=part) | {"rope_dim": int(head_dim * part)}


def _written(c: Config) -> dict:
  keys = rotation.write(c)
  scaling = keys["rope_scaling"] or {}
  keys |= {k: scaling.pop(k) for k in ("original_max_position_embeddings",) if k in scaling}
  return keys | ({"partial_rotary_factor": rotation.part(c.rope_dim, c.head_dim)} if c.rope_dim else {})


TABLE = llama.DECODER.but(
  "phi3",
  ARCHITECTURES,
  optional("window", "sliding_window"),
  Option(
    ("rope_theta", "rope_scaling", "rope_dim"),
    (*rotation.KEYS, "partial_rotary_factor", "original_max_position_embeddings"),
    _rotation,
    _written,
  ),
  absent={"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096},
  fixed={"fused": True},
  default={
    "attention_bias": False,
    "mlp_bias": False,
    "lm_head_bias": False,
    "full_attn_mod": 1,
    "interpolate_factor": 1,
  },
  ignored=("resid_pdrop", "embd_pdrop"),
)
config, hf_config = TABLE.config, TABLE.hf_config
