"""Full and partial finetuning: the pretrained weights themselves are trained."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import tree


def init(key: jax.Array, params: Any, *, targets: str | Sequence[str] = ".*") -> tuple[Any, Any]:
  """Trains every leaf whose name one of the regexes `targets` is found in; those become float32 masters.

  Returns:
    (params, mask).
  """
  del key
  mask = tree.mask(params, [targets] if isinstance(targets, str) else list(targets), "config.method.targets")
  return jax.tree.map(lambda x, m: x.astype(jnp.float32) if m else x, params, mask), mask
