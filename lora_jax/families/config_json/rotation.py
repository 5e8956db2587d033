"""Rotary embeddings in config.json: `rope_theta` and `rope_scaling`, and the newer `rope_parameters`.

It writes the older spelling, which all releases of transformers read.
"""

import math
from collections.abc import Mapping
from typing import Any

from lora_jax import errors
from lora_jax.families.config_json.option import Option
from lora_jax.families.reading import options
from lora_jax.model import architecture, layers

KEYS = ("rope_theta", "rope_scaling", "rope_parameters")


def read(hf: Mapping, given: Mapping | None = None, theta: float = 10_000.0, part: float = 1.0) -> dict[str, Any]:
  """Returns `rope_theta` and `rope_scaling` of `transformer.Config`; raises UserError for what is not understood.

  It reads `rope_theta` and `rope_scaling`, or the newer `rope_parameters`. `given` replaces these dicts, and `part` is
  the rotated share of a head.
  """
  given = (hf.get("rope_parameters") or hf.get("rope_scaling") or {}) if given is None else given
  given = {k: v for k, v in given.items() if v is not None and (k, v) != ("partial_rotary_factor", 1)}
  kind = given.get("rope_type", given.get("type", "default"))  # `type` is the older spelling
  if not isinstance(kind, str):
    raise errors.UserError(
      f"config.json of a {hf.get('model_type')} model: type of rotation is {kind!r:.60}, expected a string"
    )
  kind = "longrope" if kind == "su" else kind
  heads, width = hf.get("num_attention_heads"), hf.get("hidden_size")
  head_dim = hf.get("head_dim") or (width // heads if heads and width else 0)
  options.check_rope(hf, kind, given, int(head_dim * part) // 2)
  theta = float(given.get("rope_theta") or hf.get("rope_theta") or theta)
  given = {k: v for k, v in given.items() if k not in ("rope_theta", "rope_type", "type", "finetuned")}
  if kind == "default":
    return {"rope_theta": theta, "rope_scaling": None}
  if kind in ("longrope", "yarn"):
    length = hf.get("max_position_embeddings", 2048)
    original = given.get("original_max_position_embeddings") or hf.get("original_max_position_embeddings") or length
    given |= {"original_max_position_embeddings": original, "factor": given.get("factor") or length / original}
  scaling = {"rope_type": kind} | {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
  try:
    layers.rope_frequencies(2, theta, {k: v[:1] if isinstance(v, tuple) else v for k, v in scaling.items()})
  except KeyError as e:
    raise errors.UserError(f"rope scaling {kind!r} needs {e}; it has {given}") from None
  return {"rope_theta": theta, "rope_scaling": tuple(sorted(scaling.items()))}


def read_part(hf: Mapping, given: dict, absent: float = 1.0) -> float:
  """Removes the rotated part of a head from a rotation's dict and returns it; UserError unless it is in (0, 1]."""
  part = given.pop("partial_rotary_factor", None) or hf.get("partial_rotary_factor") or absent
  if not options.is_positive(part) or part > 1:
    raise errors.UserError(f"config.json of a {hf.get('model_type')} model rotates {part!r:.60} of a head, not 0 to 1")
  return part


def write(config: architecture.Config) -> dict[str, Any]:
  """Returns the keys of a Config's rotation."""
  scaling = {k: list(v) if isinstance(v, tuple) else v for k, v in config.rope_scaling or ()}
  return {"rope_theta": config.rope_theta, "rope_scaling": scaling or None}


def part(rotated: int, head_dim: int) -> float:
  """Returns the rotated part of a head: a number that, times `head_dim`, is rounded down to `rotated`."""
  share = rotated / head_dim
  return share if int(share * head_dim) == rotated else math.nextafter(share, 2.0)


def option(theta: float = 10_000.0) -> Option:
  """Returns the option for one rotation of whole heads, with `theta` as the default."""
  return Option(("rope_theta", "rope_scaling"), KEYS, lambda hf: read(hf, theta=theta), write)
