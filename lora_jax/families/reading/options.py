"""Types and ranges of the values in a config.json, by key, so that families can rely on them."""

import numbers
import sys
from collections.abc import Callable, Mapping
from typing import Any

from lora_jax import errors

LARGEST, DEEPEST = 2**31 - 1, 10_000


def is_size(x: Any, largest: int = LARGEST) -> bool:
  """Returns whether a value is a whole number from 1 to `largest`."""
  return isinstance(x, numbers.Integral) and not isinstance(x, bool) and 1 <= x <= largest


def is_number(x: Any) -> bool:
  """Returns whether a value is a real number that a float can hold."""
  return isinstance(x, numbers.Real) and not isinstance(x, bool) and abs(x) <= sys.float_info.max


def is_positive(x: Any) -> bool:
  """Returns whether a value is a finite number above zero."""
  return is_number(x) and x > 0


def _each(test: Callable) -> Callable:
  return lambda x: isinstance(x, list | tuple) and all(map(test, x))


def _is_text(x):
  return isinstance(x, str)


def _has_type(kind):
  return lambda x: isinstance(x, kind)


# (keys, what is expected, a function that checks a value); null is treated like an absent key.
RULES = (
  (
    "num_hidden_layers n_layer n_layers num_layers num_decoder_layers",
    f"a whole number from 1 to {DEEPEST}",
    lambda x: is_size(x, DEEPEST),
  ),
  (
    "vocab_size hidden_size num_attention_heads num_key_value_heads head_dim intermediate_size dim hidden_dim n_heads "
    "n_embd n_head n_inner n_positions max_position_embeddings original_max_position_embeddings type_vocab_size "
    "ffn_dim word_embed_proj_dim d_model d_kv d_ff num_heads relative_attention_num_buckets "
    "relative_attention_max_distance sliding_window sliding_window_size sliding_window_pattern "
    "_sliding_window_pattern moe_intermediate_size num_experts num_local_experts num_experts_per_tok num_labels",
    "a positive whole number",
    is_size,
  ),
  ("max_window_layers pad_token_id", "a whole number", lambda x: is_number(x) and isinstance(x, numbers.Integral)),
  (
    "rms_norm_eps layer_norm_eps layer_norm_epsilon rope_theta rotary_emb_base rotary_pct partial_rotary_factor "
    "rope_local_base_freq query_pre_attn_scalar attn_logit_softcapping final_logit_softcapping",
    "a positive number",
    is_positive,
  ),
  (
    "tie_word_embeddings attention_bias mlp_bias enable_bias do_layer_norm_before _remove_final_layer_norm "
    "scale_attn_weights use_parallel_residual use_sliding_window norm_topk_prob is_gated_act scale_decoder_outputs",
    "true or false",
    _has_type(bool),
  ),
  (
    "model_type hidden_act hidden_activation activation_function activation feed_forward_proj dense_act_fn",
    "a string",
    _is_text,
  ),
  ("architectures layer_types", "a list of strings", _each(_is_text)),
  ("id2label rope_scaling rope_parameters", "an object", _has_type(Mapping)),
)
# Keys that have a default in a family if they are absent, but no meaning in transformers if they are null.
NOT_NULL = frozenset(
  "rms_norm_eps layer_norm_eps layer_norm_epsilon max_position_embeddings n_positions type_vocab_size "
  "relative_attention_num_buckets relative_attention_max_distance num_experts_per_tok query_pre_attn_scalar".split()
)


def check(hf: Mapping) -> None:
  """Raises UserError that lists every key of a Hugging Face config whose value has a wrong type or range."""
  bad = [
    f"{k} is {hf[k]!r:.60}, expected {what}"
    for keys, what, fits in RULES
    for k in keys.split()
    if k in hf and not (fits(hf[k]) if hf[k] is not None else k not in NOT_NULL)
  ]
  if bad:
    raise errors.UserError(f"config.json of a {hf.get('model_type')} model: " + "; ".join(bad))


# The keys that each kind of rotation reads, and keys that may also occur with any kind.
ROPE = {
  "default": (),
  "linear": ("factor",),
  "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
  "yarn": ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
  "longrope": ("factor", "attention_factor", "short_factor", "long_factor"),
  "factors": ("factors",),
}
ANY_ROPE = ("rope_theta", "rope_type", "type", "original_max_position_embeddings", "finetuned")


def check_rope(hf: Mapping, kind: str, given: Mapping, pairs: int) -> None:
  """Raises UserError that lists what is unknown or wrong in a rotation's dict.

  Args:
    kind: its type, such as "yarn"; for an unknown type only the values are checked.
    pairs: number of rotated pairs of a head, 0 if the config does not say.
  """
  lists, bad = ("short_factor", "long_factor", "factors"), []
  for k, v in given.items():
    if kind in ROPE and k not in (*ROPE[kind], *ANY_ROPE):
      bad.append(f"{k}={v!r:.60} (unknown)")
    elif k in lists and not _each(is_positive)(v):
      bad.append(f"{k} is {v!r:.60}, expected a list of positive numbers")
    elif k in lists and pairs and len(v) != pairs:
      bad.append(f"{len(v)} values in {k} for {pairs} rotated pairs of a head")
    elif k == "truncate" and not isinstance(v, bool):
      bad.append(f"{k} is {v!r:.60}, expected true or false")
    elif k not in (*lists, "rope_type", "type", "truncate", "finetuned") and not is_positive(v):
      bad.append(f"{k} is {v!r:.60}, expected a positive number")
  if bad:
    raise errors.UserError(
      f"config.json of a {hf.get('model_type')} model, rotation of type {kind!r}: {'; '.join(bad)}"
    )
