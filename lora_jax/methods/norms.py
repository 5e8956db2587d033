"""Norm tuning: only the scales and biases of the norms are trained (Zhao et al. 2023, "Tuning LayerNorm in Attention",
https://arxiv.org/abs/2312.11420, section 2)."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import errors, tree, weights

KIND = "scales and biases"
# Norms as Liu et al. 2022 (T-Few) train them, https://arxiv.org/abs/2205.05638.
OPTIM = {"name": "adafactor", "learning_rate": 3e-4, "schedule": "constant", "warmup": 0.0}
WHOLE = True  # trains leaves of the pretrained model
NORM = r"(^|/)\w*norm/(scale|bias)$"


def init(key: jax.Array, params: Any, *, targets: str | Sequence[str] = "norm") -> tuple[Any, Any]:
  """Trains the scale of each chosen norm, and its bias where it has one, as float32 masters.

  If a model multiplies by 1 + scale (Gemma), the tree still holds `scale`.

  Args:
    targets: "norm" for all norms; names of norms ("attn_norm,mlp_norm"); regexes found in names of leaves such as
      `layers/attn_norm/scale`, where `^norm/` is the final norm; or a sequence of these.

  Returns:
    (params, mask).
  """
  del key
  picked = chosen(targets, leaves(params), "config.method.targets")
  mask = tree.map_named(lambda k, _: k in picked, params)
  return tree.map_named(lambda k, x: x.astype(jnp.float32) if k in picked else x, params), mask


def leaves(params: Any) -> list[str]:
  """Returns the names of the scales and biases of all norms."""
  return [k for k in tree.names(params, is_leaf=weights.is_node) if re.search(NORM, k)]


def chosen(targets: str | Sequence[str], names: Iterable[str], what: str) -> set[str]:
  """Returns the names that `targets` selects.

  Args:
    targets: short names, the last part but one of a name ("q,v"); "norm" (every norm); "all"; regexes; or a sequence.
    what: the key of the config, for messages.

  Raises:
    UserError: a target matches no name.
  """
  names, out = list(names), set()
  short = {k.split("/")[-2] for k in names} | {"all"}
  for target in [targets] if isinstance(targets, str) else targets:
    is_words = re.fullmatch(r"[\w\s,-]+", target)
    for word in filter(None, map(str.strip, target.split(","))) if is_words else [target]:
      pattern = {"all": "", "norm": NORM}.get(word, rf"(^|/){word}/\w+$") if is_words else word
      found = {k for k in names if tree.compile_pattern(pattern).search(k)}
      if not found:
        raise errors.UserError(f"{what} {word!r} matches nothing; {errors.nearest(word, short if is_words else names)}")
      out |= found
  return out
