"""PiSSA: LoRA that starts at the principal part of the weight (Meng et al. 2024, https://arxiv.org/abs/2404.02948).

`W = U S V^T` is split into its first singular triplets, which are trained as `scale A B`, and a frozen rest (equations
2 to 4). Here W stays whole, and the initial A B is subtracted: `W + scale (A B - A0 B0)`.
"""

from typing import Any

import jax

from lora_jax import errors
from lora_jax.methods import lora, targeting
from lora_jax.values import Size

KIND = "low rank"
OPTIM = {"learning_rate": 2e-5}  # the authors' README
VARIES = lora.VARIES
PEFT = "lora"  # the module of formats/peft that it uses


def init(
  key: jax.Array, params: Any, *, alpha: float = 8.0, iterations: Size | None = None, **kw: Any
) -> tuple[Any, Any]:
  """Returns what `lora.init` returns with init="pissa".

  Args:
    alpha: numerator of the scale; the paper sets it to the rank.
    iterations: number of subspace iterations, which are fast but approximate; None for the exact decomposition.
  """
  if iterations is not None and (not isinstance(iterations, int) or iterations < 0):
    raise errors.UserError(f"config.method.iterations={iterations!r} must be a whole number, at least 0, or None")
  how = "pissa" if iterations is None else f"pissa_niter_{iterations}"
  return lora.init(key, params, alpha=alpha, init=how, **kw)


init.__signature__ = targeting.signature(init, lora.init, without=("init", "bias", "lora_bias", "tied"))
