"""AdaLoRA: adaptive budget allocation (Zhang et al. 2023, https://arxiv.org/abs/2303.10512).

`W + s A diag(e) B` resembles a singular value decomposition: a penalty keeps A and B near orthogonal. During training,
the entries of e that matter least to the loss are set to zero; they are ranked over all matrices together.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import errors, tree
from lora_jax.methods import budget, targeting
from lora_jax.model import transformer
from lora_jax.values import Count, NonNegative, Probability, Size

KIND = "low rank"
OPTIM = {"learning_rate": 8e-4}  # the paper's rate for SST-2, from memory

optimiser = budget.optimiser
SCHEDULE = ("target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight")  # PEFT's names too


def init(
  key: jax.Array,
  params: Any,
  *,
  init_r: Count = 12,
  target_r: Size = 8,
  tinit: Size = 0,
  tfinal: Size = 0,
  deltaT: Count = 1,
  beta1: Probability = 0.85,
  beta2: Probability = 0.85,
  orth_reg_weight: NonNegative = 0.5,
  alpha: float = 16.0,
  dropout: Probability = 0.0,
  targets: str | Sequence[str] = "q,v",
) -> tuple[Any, Any]:
  """Wraps the target matrices in `AdaLoRA`; e starts at zero, so the model does not change.

  Args:
    key: random key of the initial values; A and B are normal with standard deviation 0.02, as in PEFT.
    params: a model's tree; the adapted weights may be arrays or nodes.
    init_r: R, the initial rank of all matrices.
    target_r: how many entries of e a matrix keeps, on average.
    tinit, tfinal: steps before the first pruning, and after the last.
    deltaT: steps from one pruning to the next.
    beta1, beta2: decay of the moving averages of an entry's sensitivity and of its deviation from that average.
    orth_reg_weight: factor of the penalty.
    alpha: numerator of the scale.
    dropout: probability of dropping an input element of A in training.
    targets: as in `lora.init`.

  Returns:
    (params, mask): True at the leaves `a`, `e` and `b`, float32.
  """
  _check(
    init_r, target_r, tinit, tfinal, deltaT, beta1=beta1, beta2=beta2, orth_reg_weight=orth_reg_weight, dropout=dropout
  )
  params = targeting.split(params, targets)
  chosen = targeting.select(targets, targeting.matrices(params), "config.method.targets")
  schedule = zip(SCHEDULE, (target_r, tinit, tfinal, deltaT, beta1, beta2, orth_reg_weight), strict=True)
  schedule = tuple(schedule)

  def node(k, w, layers):
    stack = layers.shape
    shape = w.shape[len(stack) :]
    n = transformer.in_axes(k)
    normal = lambda name, *shape: 0.02 * jax.random.normal(tree.fold(key, f"{k}/{name}"), (*stack, *shape))
    return budget.AdaLoRA(
      base=w,
      a=normal("a", *shape[:n], init_r),
      e=jnp.zeros((*stack, init_r), jnp.float32),
      b=normal("b", init_r, *shape[n:]),
      scale=jnp.asarray(layers * scale_of(alpha, init_r), jnp.float32),
      dropout=float(dropout),
      layers=tuple(map(bool, np.atleast_1d(layers))),
      schedule=schedule,
    )

  params = targeting.wrap(params, chosen, node)
  return params, targeting.mask(params, budget.AdaLoRA, ("a", "e", "b"))


def scale_of(alpha: float, rank: int) -> float:
  """Returns the factor of the update, alpha / (rank + 1e-5) as in PEFT; an alpha of 0 or less stands for the rank."""
  return (alpha if alpha > 0 else rank) / (rank + 1e-5)


def _check(init_r, target_r, tinit, tfinal, deltaT, *, beta1, beta2, orth_reg_weight, dropout) -> None:
  rules = {
    f"1 <= target_r <= init_r, not {target_r} and {init_r}": 1 <= target_r <= init_r,
    f"tinit, tfinal >= 0 and deltaT >= 1, not {tinit}, {tfinal}, {deltaT}": min(tinit, tfinal, deltaT - 1) >= 0,
    f"0 < beta1, beta2 < 1, not {beta1}, {beta2}": 0 < beta1 < 1 and 0 < beta2 < 1,
    f"orth_reg_weight >= 0, not {orth_reg_weight}": orth_reg_weight >= 0,
    f"0 <= dropout < 1, not {dropout}": 0 <= dropout < 1,
  }
  if bad := [said for said, holds in rules.items() if not holds]:
    raise errors.UserError(f"AdaLoRA needs {'; '.join(bad)}")


def penalty(params: Any, *, orth_reg_weight: NonNegative = 0.5, **others: Any) -> jax.Array:
  """Returns `orth_reg_weight` times the mean of ||A^T A - I||_F and ||B B^T - I||_F over all A and B, float32 [].

  This is equation 4 with norms that are not squared, as in PEFT.
  """
  del others
  nodes = [w.used() for w in jax.tree.leaves(params, is_leaf=budget.is_node) if budget.is_node(w)]

  def distances(gram):
    square = jnp.sum((gram - jnp.eye(gram.shape[-1])) ** 2, (-1, -2))
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)  # no gradient at 0

  found = []
  for w in nodes:
    L, R = w.e.shape
    a, b = w.a.reshape(L, -1, R), w.b.reshape(L, R, -1)
    found += [distances(jnp.einsum("LDR,LDS->LRS", a, a)), distances(jnp.einsum("LRF,LSF->LRS", b, b))]
  return orth_reg_weight * jnp.concatenate(found).mean()
