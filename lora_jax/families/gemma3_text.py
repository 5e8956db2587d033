"""Gemma 3, text: five local layers to one global, each kind with its own rotation, and normalised q and k.

Gemma Team 2025 (https://arxiv.org/abs/2503.19786).
"""

from collections.abc import Mapping

from lora_jax import errors
from lora_jax.families import gemma2, norm
from lora_jax.families.config_json import rotation
from lora_jax.families.config_json.option import Option, windows

ARCHITECTURES = {
  "lm": "Gemma3ForCausalLM",
  "classification": "Gemma3TextForSequenceClassification",
  "none": "Gemma3TextModel",
}
PREFIX, IGNORED = gemma2.PREFIX, gemma2.IGNORED
KEYS = (
  *gemma2.KEYS,
  *norm("layers/attn/q_norm", "model.layers.{}.self_attn.q_norm"),
  *norm("layers/attn/k_norm", "model.layers.{}.self_attn.k_norm"),
)


def _rotations(hf: Mapping) -> dict:
  """Returns theta and scaling of global layers, and theta of local layers."""
  given = hf.get("rope_parameters") or {}
  kinds = ("full_attention", "sliding_attention")
  if given.keys() - set(kinds) or not all(isinstance(v or {}, Mapping) for v in given.values()):
    raise errors.UserError(
      f"config.json of a gemma3_text model: rope_parameters should hold an object each for {' and '.join(kinds)}, "
      f"not {dict(given)!r:.200}"
    )
  far = given.get("full_attention") or hf.get("rope_scaling") or {}
  near = {k: v for k, v in (given.get("sliding_attention") or {}).items() if v is not None}
  near = rotation.read(hf, {"rope_theta": hf.get("rope_local_base_freq") or 10_000.0} | near)
  if near["rope_scaling"]:
    raise errors.UserError("config.json of a gemma3_text model: scaled rotation of local layers is not supported")
  return rotation.read(hf, far, 1_000_000.0) | {"local_rope_theta": near["rope_theta"]}


def _is_local(hf: Mapping, layer: int) -> bool:
  pattern = hf.get("sliding_window_pattern") or hf.get("_sliding_window_pattern") or 6
  return (layer + 1) % pattern > 0


TABLE = gemma2.DECODER.but(
  "gemma3_text",
  ARCHITECTURES,
  windows(("sliding_window_pattern", "_sliding_window_pattern"), lambda hf: hf.get("sliding_window", 4096), _is_local),
  Option(
    ("rope_theta", "rope_scaling", "local_rope_theta"),
    (*rotation.KEYS, "rope_local_base_freq"),
    _rotations,
    lambda c: rotation.write(c) | {"rope_local_base_freq": c.local_rope_theta},
  ),
  absent={"max_position_embeddings": 131072},
  fixed={"qk_norm": True},
  default={"attn_logit_softcapping": None},
)
config, hf_config = TABLE.config, TABLE.hf_config
