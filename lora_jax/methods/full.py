"""Full and partial finetuning: the pretrained weights themselves are trained."""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lora_jax import errors, tree, weights

KIND = "whole weights"
OPTIM = {"learning_rate": 2e-5}  # Devlin et al. 2018, appendix A.3
WHOLE = True  # trains leaves of the pretrained model
MODEL = True  # and so many of them that a run saves the whole model

DTYPES = ("float32", "bfloat16")
Dtype = Literal[DTYPES]


def init(
  key: jax.Array, params: Any, *, targets: str | Sequence[str] = ".*", dtype: Dtype = "float32"
) -> tuple[Any, Any]:
  """Trains every weight whose name matches one of the regexes `targets`, see `weights.mask`.

  Args:
    targets: one regex or several.
    dtype: the dtype of the trained weights: "float32" masters, or "bfloat16", which takes half the memory and rounds
      updates stochastically (`updates.round_stochastically`). The optimiser's moments are float32 in both cases, and
      the model computes in its own dtype.

  Returns:
    (params, mask).
  """
  del key
  patterns = [targets] if isinstance(targets, str) else list(targets)
  mask = weights.mask(params, patterns, "config.method.targets")
  return masters(params, mask, dtype), mask


def masters(params: Any, mask: Any, dtype: str = "float32") -> Any:
  """Returns the tree with the trained leaves in `dtype`; norms and biases are always trained in float32.

  Raises:
    UserError: `dtype` is not one of `DTYPES`.
  """
  errors.choose(dtype, dict.fromkeys(DTYPES), "config.method.dtype")

  def leaf(k, x, m):
    if not m:
      return x
    return x.astype(jnp.float32 if dtype == "float32" or k.endswith(("/scale", "/bias")) else dtype)

  return tree.map_named(leaf, params, mask)
