"""Makes Hugging Face's config.json for the model in a GGUF file."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_jax import errors
from lora_jax.families.config_json import rotation
from lora_jax.formats.gguf import tables

# Keys that do not change what is computed here.
IGNORED = {"vocab_size", "tensor_data_layout", "rope.scaling.finetuned", "pooling_type", "attention.causal"}
FLOATS = {
  *("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon", "rope.freq_base", "rope.freq_base_swa"),
  *("attn_logit_softcapping", "final_logit_softcapping", "rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor"),
  *("rope.scaling.factor", "rope.scale_linear", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"),
}
# Metadata that may be other than a positive number.
OTHER_TYPES = {
  *("rope.scaling.type", "use_parallel_residual", "attention.sliding_window_pattern", "decoder_start_token_id"),
}


def keys(metadata: Mapping[str, Any], name: str) -> dict[str, Any]:
  """The metadata of the architecture `name`, without its prefix."""
  found = {k.removeprefix(f"{name}."): v for k, v in metadata.items() if k.startswith(f"{name}.")}
  # Floats have 32 bits. The shortest decimal that rounds to the same float is the one that was meant, such as 1e-05.
  return {k: float(str(np.float32(v))) if isinstance(v, float) else v for k, v in found.items()}


def build(
  path: str,
  name: str,
  architecture: tables.Architecture,
  metadata: Mapping[str, Any],
  shapes: Mapping[str, tuple[int, ...]],
  factors: Mapping[str, list[float]],
) -> dict[str, Any]:
  """The contents of config.json for a file.

  Args:
    path: the file, for messages.
    name: name of the architecture in the file.
    shapes: shapes of the tensors, by their Hugging Face names.
    factors: contents of those tensors of `architecture.factors` that the file has.

  Raises:
    UserError: metadata is unknown, missing or inconsistent, or the file has no embedding.
  """
  where = f"{path}: metadata {name}."
  given = keys(metadata, name)
  _check(path, name, architecture, given)
  given = {k: v for k, v in given.items() if v or k not in architecture.optional and not k.startswith("rope.scal")}
  config = dict(architecture.config)
  config |= {hf: given[k] for k, hf in {**architecture.numbers, **architecture.optional}.items() if k in given}
  if set(tables.ROPE) <= set(architecture.other):
    config |= _rotated(where, given, factors, partial=config["model_type"] == "phi3")
  elif given.get("attention.head_count_kv", given["attention.head_count"]) != given["attention.head_count"]:
    raise errors.UserError(f"{where}attention.head_count_kv is {given['attention.head_count_kv']}, expected all heads")
  if "output" in architecture.tensors:
    config["tie_word_embeddings"] = f"{architecture.tensors['output']}.weight" not in shapes
  table = f"{architecture.tensors['token_embd']}.weight"
  if table not in shapes:
    raise errors.UserError(f"{path}: no tensor token_embd.weight")
  config["vocab_size"] = shapes[table][0]
  config |= FAMILIES.get(config["model_type"], lambda *_: {})(where, given, shapes, config)
  ids = {k: metadata.get(f"tokenizer.ggml.{k}_token_id") for k in ("bos", "eos", "padding")}
  return config | {f"{k[:3]}_token_id": v for k, v in ids.items() if v is not None}


def _check(path: str, name: str, architecture: tables.Architecture, given: Mapping[str, Any]) -> None:
  known = {*architecture.numbers, *architecture.optional, *architecture.other, *IGNORED}
  join = lambda ks: f"{name}." + f", {name}.".join(ks)
  # An unknown key at zero, such as expert_count, says that the model lacks the feature.
  if unknown := sorted(k for k in given.keys() - known if given[k]):
    raise errors.UserError(f"{path}: metadata that is not understood: {join(unknown)}")
  if given.get("attention.causal", architecture.causal) != architecture.causal:
    raise errors.UserError(f"{path}: metadata {name}.attention.causal is {not architecture.causal}; not supported")

  def bad(k):
    v = given.get(k)
    kind = int | float if k in FLOATS else int
    return not isinstance(v, kind) or isinstance(v, bool) or not v > 0 or math.isinf(v)

  present = [k for k in (*architecture.optional, *architecture.other) if given.get(k) or k == "attention.head_count_kv"]
  numbers = {*architecture.numbers, *(k for k in present if k in given and k not in OTHER_TYPES)}
  if wrong := sorted(filter(bad, numbers)):
    raise errors.UserError(f"{path}: expected one positive number in metadata {join(wrong)}")


def _rotated(where: str, given: Mapping, factors: Mapping, partial: bool) -> dict[str, Any]:
  """The entries for heads and RoPE of a decoder like Llama."""
  heads = given["attention.head_count"]
  head_dim = given.get("attention.key_length", given["embedding_length"] // heads)
  for k in ("attention.value_length",) if partial else ("rope.dimension_count", "attention.value_length"):
    if given.get(k, head_dim) != head_dim:
      raise errors.UserError(f"{where}{k} is {given[k]}, expected the size of a head, {head_dim}")
  theta = given.get("rope.freq_base", 10000.0)
  config = {
    "num_key_value_heads": given.get("attention.head_count_kv", heads),
    "head_dim": head_dim,
    "rope_theta": theta,
    "rope_scaling": _scaling(where, given, factors, theta),
  }
  part = _rotary_part(where, given, head_dim)
  return config | ({"partial_rotary_factor": part} if part != 1 else {})


def _rotary_part(where: str, given: Mapping, head_dim: int) -> float:
  """The share of a head that is rotated: times `head_dim` and rounded down, it gives the file's number."""
  rotated = given.get("rope.dimension_count", head_dim)
  if rotated > head_dim:
    raise errors.UserError(f"{where}rope.dimension_count is {rotated}, more than the size of a head, {head_dim}")
  return rotation.part(rotated, head_dim)


def _scaling(where: str, given: Mapping, factors: Mapping, theta: float) -> dict[str, Any] | None:
  factor = given.get("rope.scaling.factor", given.get("rope.scale_linear"))
  kind = given.get("rope.scaling.type", "linear" if factor else "none")
  if factors and kind not in ("none", "longrope"):
    raise errors.UserError(
      f"{where}rope.scaling.type is {kind}, and the file has {', '.join(factors)}; expected only one"
    )
  if "rope_freqs.weight" in factors:
    return _llama3(factors["rope_freqs.weight"], theta)
  if factors and len(factors) == 2:
    long, short = (factors[f"rope_factors_{k}.weight"] for k in ("long", "short"))
    scaling = {"rope_type": "longrope", "long_factor": long, "short_factor": short}
    return scaling | _amplitude(given)
  if kind == "none" and not factors:
    return None
  if kind not in ("linear", "yarn") or not factor:
    raise errors.UserError(f"{where}rope.scaling.type is {kind!r} by {factor}; known types: none, linear, yarn")
  rest = {hf: given[k] for k, hf in tables.YARN.items() if k in given and kind == "yarn"}
  return {"rope_type": kind, "factor": factor, **rest}


def _amplitude(given: Mapping) -> dict[str, float]:
  """LongRoPE's factor of attention, unless it is the one that follows from the lengths."""
  stated = given.get("rope.scaling.attn_factor")
  original = given.get("rope.scaling.original_context_length")
  if stated is None:
    return {}
  if original is not None and original > 1:
    ratio = given["context_length"] / original
    usual = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
    if math.isclose(stated, usual, rel_tol=1e-6):
      return {}
  return {"attention_factor": stated}


def _llama3(factors: list[float], theta: float) -> dict[str, Any]:
  """Llama 3's formula, whose files state it as numbers; the numbers themselves if they follow another formula."""
  n, factor = len(factors), max(factors)
  original = 8192
  turns = original / (2 * math.pi) * theta ** (-np.arange(n) / n)
  keep = np.clip((turns - 1) / (4 - 1), 0, 1)
  if not np.allclose(factors, 1 / (keep + (1 - keep) / factor), rtol=1e-5):
    return {"rope_type": "factors", "factors": factors}
  scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
  return scaling | {"original_max_position_embeddings": original}


def _llama(where, given, shapes, config):
  biased = [k for k in shapes if k.endswith(".bias")]
  return {
    "attention_bias": any(".self_attn." in k for k in biased),
    "mlp_bias": any(".mlp." in k for k in biased),
  }


def _qwen3(where, given, shapes, config):
  return {"attention_bias": _llama(where, given, shapes, config)["attention_bias"]}


def _gemma2(where, given, shapes, config, period=2, largest=46):
  # Only the largest model scales attention by D / N, and a file shows its size only by its depth.
  n = config["num_hidden_layers"]
  width = config["hidden_size"] // config["num_attention_heads"]
  pattern = given.get("attention.sliding_window_pattern", period)
  local = [pattern == 0 or (i + 1) % pattern > 0 for i in range(n)] if isinstance(pattern, int) else pattern
  if not isinstance(local, list) or len(local) != n:
    raise errors.UserError(f"{where}attention.sliding_window_pattern is {pattern!r}; expected a number, or {n} of them")
  return {
    "layer_types": ["sliding_attention" if x else "full_attention" for x in local],
    "query_pre_attn_scalar": width if n == largest else config["head_dim"],
  }


def _gemma3(where, given, shapes, config):
  more = _gemma2(where, given, shapes, config, period=6, largest=62)
  if "sliding_window" not in config:
    more |= {"layer_types": ["full_attention"] * config["num_hidden_layers"]}
  return more | {"rope_local_base_freq": config.get("rope_local_base_freq", 10000.0)}


def _gpt_neox(where, given, shapes, config):
  head_dim = config["hidden_size"] // config["num_attention_heads"]
  return {
    "rotary_pct": _rotary_part(where, given, head_dim),
    "use_parallel_residual": bool(given.get("use_parallel_residual", True)),
  }


def _bert(where, given, shapes, config):
  return {"type_vocab_size": shapes["embeddings.token_type_embeddings.weight"][0]}


def _distilbert(where, given, shapes, config):
  if (eps := given.get("attention.layer_norm_epsilon", 1e-12)) != 1e-12:
    raise errors.UserError(f"{where}attention.layer_norm_epsilon is {eps}; DistilBERT's is 1e-12")
  return {}


def _t5(where, given, shapes, config):
  same = {"attention.value_length": config["d_kv"], "attention.layer_norm_rms_epsilon": config["layer_norm_epsilon"]}
  if bad := [f"{k} is {given[k]}, expected {v}" for k, v in same.items() if given.get(k, v) != v]:
    raise errors.UserError(where + "; ".join(bad))
  return {"decoder_start_token_id": given.get("decoder_start_token_id", 0)}


# The remaining entries for each model type, from (where, its metadata, shapes of tensors, the config so far).
FAMILIES = {
  "llama": _llama,
  "qwen3": _qwen3,
  "qwen3_moe": _qwen3,
  "gemma2": _gemma2,
  "gemma3_text": _gemma3,
  "gpt_neox": _gpt_neox,
  "bert": _bert,
  "distilbert": _distilbert,
  "t5": _t5,
}
