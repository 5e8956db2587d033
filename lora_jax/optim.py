"""Optimisers and schedules: names in configs to optax transformations of the trainable tree."""

from collections.abc import Sequence
from typing import Any

import optax

from lora_jax import errors, tree

OPTIMISERS = {
  "adamw": lambda lr, b1, b2, eps, **kw: optax.adamw(lr, b1=b1, b2=b2, eps=eps, **kw),
  "lion": lambda lr, b1, b2, eps, **kw: optax.lion(lr, b1=b1, b2=b2, **kw),
  "sgd": lambda lr, b1, b2, eps, weight_decay, mask: optax.chain(
    optax.add_decayed_weights(weight_decay, mask), optax.sgd(lr, momentum=b1 or None)
  ),
}
SCHEDULES = ("constant", "linear", "cosine")


def make_schedule(name: str, learning_rate: float, steps: int, warmup: float = 0, final: float = 0.0) -> optax.Schedule:
  """From step to learning rate: linear warmup from 0, then the named decay to `final * learning_rate` at `steps`.

  Args:
    name: "constant", "linear" or "cosine" (Loshchilov & Hutter 2017, https://arxiv.org/abs/1608.03983, equation 5).
    warmup: a number of steps, or, below 1, a fraction of `steps`.
  """
  errors.choose(name, dict.fromkeys(SCHEDULES), "config.optim.schedule")
  warm = round(warmup * steps) if warmup < 1 else int(warmup)
  if not 0 <= warm <= steps:
    raise errors.UserError(f"config.optim.warmup={warmup} is not within the {steps} steps of the run")
  rest = max(steps - warm, 1)
  decay = {
    "constant": lambda: optax.constant_schedule(learning_rate),
    "linear": lambda: optax.linear_schedule(learning_rate, final * learning_rate, rest),
    "cosine": lambda: optax.cosine_decay_schedule(learning_rate, rest, alpha=final),
  }[name]()
  return optax.join_schedules([optax.linear_schedule(0.0, learning_rate, warm), decay], [warm]) if warm else decay


def make(
  *,
  steps: int,
  name: str = "adamw",
  learning_rate: float = 2e-4,
  schedule: str = "linear",
  warmup: float = 0.06,
  final: float = 0.0,
  weight_decay: float = 0.0,
  no_decay: Sequence[str] = ("scale$", "bias$"),
  clip_norm: float = 1.0,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """An optimiser for a trainable tree, and its learning-rate schedule.

  Args:
    steps: of the whole run.
    no_decay: regexes; leaves whose name one is found in are not decayed.
    clip_norm: bound on the global norm over the trainable tree; 0 is none.

  Returns:
    (gradient transformation, schedule).
  """
  make_optimiser = errors.choose(name, OPTIMISERS, "config.optim.name")
  rate = make_schedule(schedule, learning_rate, steps, warmup, final)
  spared = tree.first_match([(p, True) for p in no_decay], False)

  def decayed(params: Any) -> Any:
    return tree.map_named(lambda k, _: not spared(k), params)

  optimiser = make_optimiser(rate, b1, b2, eps, weight_decay=weight_decay, mask=decayed)
  return (optax.chain(optax.clip_by_global_norm(clip_norm), optimiser) if clip_norm else optimiser), rate
