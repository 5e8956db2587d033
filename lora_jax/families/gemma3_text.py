"""Gemma 3, text: five local layers to one global, each kind with its own rotation, and normalised q and k.

Gemma Team 2025 (https://arxiv.org/abs/2503.19786).
"""

from collections.abc import Mapping

from lora_jax import errors, families
from lora_jax.families import gemma, gemma2, norm
from lora_jax.model import transformer

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
ABSENT = gemma2.ABSENT | {"max_position_embeddings": 131072}
HANDLED = [*gemma2.HANDLED, "rope_local_base_freq", "sliding_window_pattern", "_sliding_window_pattern"]


def config(hf: Mapping) -> transformer.Config:
  """`transformer.Config` of a `Gemma3TextConfig` as a dict; UserError for what it does not support."""
  families.check(hf)
  pattern = hf.get("sliding_window_pattern") or hf.get("_sliding_window_pattern") or 6
  return gemma.decoder(
    hf,
    ABSENT,
    hf.get("hidden_activation") or "gelu_pytorch_tanh",
    HANDLED,
    {"attn_logit_softcapping": None},
    norm_order="sandwich",
    qk_norm=True,
    attn_scale=hf.get("query_pre_attn_scalar", 256) ** -0.5,
    logit_softcap=hf.get("final_logit_softcapping"),
    **families.windows(hf, hf.get("sliding_window", 4096), lambda i: (i + 1) % pattern > 0),
    **_rotations(hf),
  )


def _rotations(hf: Mapping) -> dict:
  """theta and scaling of global layers, and theta of local ones."""
  given = hf.get("rope_parameters") or {}
  kinds = ("full_attention", "sliding_attention")
  if given.keys() - set(kinds) or not all(isinstance(v or {}, Mapping) for v in given.values()):
    raise errors.UserError(
      f"config.json of a gemma3_text model: rope_parameters should hold an object each for {' and '.join(kinds)}, "
      f"not {dict(given)!r:.200}"
    )
  far = given.get("full_attention") or hf.get("rope_scaling") or {}
  near = {k: v for k, v in (given.get("sliding_attention") or {}).items() if v is not None}
  near = families.rope(hf, {"rope_theta": hf.get("rope_local_base_freq") or 10_000.0} | near)
  if near["rope_scaling"]:
    raise errors.UserError("config.json of a gemma3_text model: scaled rotation of local layers is not supported")
  return families.rope(hf, far, 1_000_000.0) | {"local_rope_theta": near["rope_theta"]}
