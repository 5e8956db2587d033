"""IA3: trained vectors that scale keys, values and hidden units (Liu et al. 2022, https://arxiv.org/abs/2205.05638).

`softmax(q (l_k o k)^T / sqrt(d)) (l_v o v)` in every attention, also to an encoder, and `(l_ff o act(W1 x)) W2`
(section 3.3, equation 1 and below): d_k + d_v + d_ff numbers per layer, and d_k + d_v more for attention to an encoder.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import errors, weights
from lora_jax.methods import targeting
from lora_jax.model import architecture

KIND = "scales and biases"
OPTIM = {"name": "adafactor", "learning_rate": 3e-3, "schedule": "linear", "warmup": 0.06}  # the paper's appendix B

INPUT, OUTPUT = weights.Scaled.TRAINABLE


def init(
  key: jax.Array, params: Any, *, targets: str | Sequence[str] = "k,v", feedforward: str | Sequence[str] = "down"
) -> tuple[Any, Any]:
  """Scales the outputs of the targets, and the inputs of the feed-forward matrices, by vectors of ones.

  In a gated layer, `down(act(gate(x)) o up(x))`, scaling the input of `down` equals scaling the output of `up`, which
  the authors' code does.

  Args:
    targets, feedforward: as `targets` in `lora.init`, but always in all layers; "" names no matrix.

  Returns:
    (params, mask): True at the vectors of `weights.Scaled`, float32.
  """
  del key
  sides: dict[str, str] = {}
  for side, chosen in ((OUTPUT, targets), (INPUT, feedforward)):
    if not chosen:
      continue
    params = targeting.split(params, chosen)
    for k, hit in _select(params, chosen, side).items():
      if sides.setdefault(k, side) != side:
        raise errors.UserError(f"IA3 scales the output or the input of a matrix, not both: {k}")
      if not hit.all():
        raise errors.UserError(f"IA3 has a vector in every layer, but {_keyword(side)} names some layers of {k} only")
  if not sides:
    raise errors.UserError("IA3 scales nothing: config.method.targets and config.method.feedforward are empty")
  params = targeting.wrap(params, sides, scaled)
  return params, targeting.mask(params, weights.Scaled, (INPUT, OUTPUT))


def matrices(params: Any) -> dict[str, Any]:
  """Returns {name: matrix} of the matrices that can be scaled: all but the head, with experts."""
  return {k: w for k, w in targeting.matrices(params, experts=True).items() if k != "head/kernel"}


def scaled(k: str, w: Any, side: str) -> weights.Scaled:
  """Returns the matrix `w` of name `k` with its outputs or inputs scaled by ones."""
  stack = architecture.stack_axes(k)
  ends = stack + architecture.in_axes(k)
  axes = w.shape[stack:ends] if side == INPUT else w.shape[ends:]
  ones = jnp.ones((*w.shape[:stack], *axes), jnp.float32)
  return weights.Scaled(w, outer=len(w.shape) - ends, **{side: ones})


def _keyword(side: str) -> str:
  return "config.method.targets" if side == OUTPUT else "config.method.feedforward"


def _select(params: Any, chosen: str | Sequence[str], side: str) -> dict[str, np.ndarray]:
  found = targeting.select(chosen, matrices(params), _keyword(side))
  if experts := [k for k in found if "/moe/" in k]:
    hint = " without them, such as ''" if side == INPUT else ""
    raise errors.UserError(f"IA3 does not scale experts and their router ({experts[0]}); choose {_keyword(side)}{hint}")
  return found
