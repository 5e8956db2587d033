"""Full and partial finetuning: the pretrained weights themselves are trained."""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lora_jax import errors, tree, weights

KIND = "whole weights"
OPTIM = {"learning_rate": 2e-5}  # Devlin et al. 2018, appendix A.3
WHOLE = True  # trains leaves of the pretrained model
MODEL = True  # so many of them that the whole model is what a run leaves

DTYPES = ("float32", "bfloat16")
Dtype = Literal[DTYPES]


def init(
  key: jax.Array, params: Any, *, targets: str | Sequence[str] = ".*", dtype: Dtype = "float32"
) -> tuple[Any, Any]:
  """Trains every weight whose name one of the regexes `targets` is found in, see `weights.mask`.

  Args:
    targets: one regex or several.
    dtype: of what is trained: "float32" masters, or "bfloat16", half as large, to which updates are rounded
      stochastically (`updates.round_stochastically`); the optimiser's moments are float32 either way, and the model
      computes in its own dtype.

  Returns:
    (params, mask).
  """
  del key
  patterns = [targets] if isinstance(targets, str) else list(targets)
  mask = weights.mask(params, patterns, "config.method.targets")
  return masters(params, mask, dtype), mask


def masters(params: Any, mask: Any, dtype: str = "float32") -> Any:
  """The tree with what is trained in `dtype`; norms and biases, which models hold in float32, stay float32.

  Raises:
    UserError: a dtype that there is not.
  """
  errors.choose(dtype, dict.fromkeys(DTYPES), "config.method.dtype")

  def leaf(k, x, m):
    if not m:
      return x
    return x.astype(jnp.float32 if dtype == "float32" or k.endswith(("/scale", "/bias")) else dtype)

  return tree.map_named(leaf, params, mask)
