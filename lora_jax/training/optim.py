"""Optimisers and schedules: names in configs to optax transformations of the trainable tree."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from lora_jax import errors, tree
from lora_jax.values import NonNegative, Probability, Size

# Gradient transformations to a direction, before weight decay and learning rate.
OPTIMISERS = {
  "adamw": lambda b1, b2, eps: optax.scale_by_adam(b1, b2, eps),
  "lion": lambda b1, b2, eps: optax.scale_by_lion(b1, b2),
  "sgd": lambda b1, b2, eps: optax.trace(b1) if not isinstance(b1, int | float) or b1 else optax.identity(),
  # As in prompt tuning and T-Few: no relative step sizes, no scaling by the parameters.
  "adafactor": lambda b1, b2, eps: optax.chain(
    optax.adafactor(None, multiply_by_parameter_scale=False, clipping_threshold=1.0), optax.scale(-1.0)
  ),
}
SCHEDULES = ("constant", "linear", "cosine", "cosine_restarts")


def make_schedule(
  schedule: str,
  learning_rate: float,
  steps: int,
  warmup: float = 0,
  final: float = 0.0,
  cycle: int = 0,
  restart_warmup: int = 100,
) -> optax.Schedule:
  """From step to learning rate: linear warmup from 0, then the named decay to `final * learning_rate` at `steps`.

  Args:
    schedule: "constant", "linear", "cosine" (Loshchilov & Hutter 2017, https://arxiv.org/abs/1608.03983, equation 5),
      or "cosine_restarts": the cosine, but after every `cycle` steps it is reached in a linear warmup from 0 of
      `restart_warmup` steps (Lialin et al. 2023, https://arxiv.org/abs/2307.05695, section 3).
    learning_rate: the highest, after the warmup.
    warmup: a number of steps, or, below 1, a fraction of `steps`.
    final: the last learning rate as a share of the highest.
    cycle, restart_warmup: of "cosine_restarts", in steps.
  """
  errors.choose(schedule, dict.fromkeys(SCHEDULES), "config.optim.schedule")
  warm = round(warmup * steps) if warmup < 1 else int(warmup)
  if not 0 <= warm <= steps:
    raise errors.UserError(f"config.optim.warmup={warmup} is not within the {steps} steps of the run")
  rest = max(steps - warm, 1)
  cosine = optax.cosine_decay_schedule(learning_rate, rest, alpha=final)
  decay = {
    "constant": optax.constant_schedule(learning_rate),
    "linear": optax.linear_schedule(learning_rate, final * learning_rate, rest),
  }.get(schedule, cosine)
  rate = optax.join_schedules([optax.linear_schedule(0.0, learning_rate, warm), decay], [warm]) if warm else decay
  if schedule != "cosine_restarts":
    return rate
  if not (warm <= cycle and 0 <= restart_warmup <= cycle and cycle > 0):
    raise errors.UserError(
      f"config.optim.cycle={cycle}: 'cosine_restarts' needs the steps of a cycle, no fewer than the warmup ({warm}) "
      f"and restart_warmup ({restart_warmup})"
    )

  def jagged(step):
    start, since = step // cycle * cycle, step % cycle
    rising = cosine(start + restart_warmup - warm) * since / max(restart_warmup, 1)
    return jnp.where((step >= cycle) & (since < restart_warmup), rising, rate(step))

  return jagged


def make(
  *,
  steps: int,
  schedule: Literal[SCHEDULES] = "linear",
  learning_rate: NonNegative = 2e-4,
  warmup: NonNegative = 0.06,
  final: NonNegative = 0.0,
  cycle: Size = 0,
  restart_warmup: Size = 100,
  **kw: Any,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """An optimiser for a trainable tree, and its learning-rate schedule.

  Args:
    steps: of the whole run; with the others named here what `make_schedule` takes.
    kw: of `transformation`.

  Returns:
    (gradient transformation, schedule).
  """
  rate = make_schedule(schedule, learning_rate, steps, warmup, final, cycle, restart_warmup)
  return transformation(rate, **kw), rate


SCHEDULE = ("schedule", "learning_rate", "warmup", "final", "cycle", "restart_warmup")  # keywords of the schedule


def transformation(
  rate: optax.Schedule,
  *,
  name: Literal[*OPTIMISERS] = "adamw",
  weight_decay: NonNegative | jax.Array = 0.0,
  no_decay: Sequence[str] = ("scale$", "bias$", r"bias/\w+$"),
  clip_norm: NonNegative | jax.Array = 1.0,
  b1: Probability | jax.Array = 0.9,
  b2: Probability | jax.Array = 0.999,
  eps: NonNegative | jax.Array = 1e-8,
  direction: Sequence[Callable] = (),
  wrap: Sequence[Callable] = (),
) -> optax.GradientTransformation:
  """An optimiser for a trainable tree, whose numbers may be traced arrays: those of one member of a population.

  Args:
    rate: from the step to the learning rate.
    name: "adamw", "lion", "sgd" with momentum b1, or "adafactor".
    weight_decay: decoupled from the gradient, but for SGD.
    b1, b2, eps: decay rates of the moments, and what is added to the denominator.
    no_decay: regexes; leaves whose name one is found in are not decayed.
    clip_norm: bound on the global norm over the trainable tree; 0 is none, and an array that is infinite.
    direction, wrap: what the method makes of the transformation before weight decay and learning rate, and of all but
      the clipping; see `methods.wrappers`.
  """
  make_direction = errors.choose(name, OPTIMISERS, "config.optim.name")
  spared = tree.first_match([(p, True) for p in no_decay], False)

  def decayed(params: Any) -> Any:
    return tree.map_named(lambda k, _: not spared(k), params)

  optimiser = make_direction(b1, b2, eps)
  for fn in direction:
    optimiser = fn(optimiser)
  chain = [optimiser, optax.add_decayed_weights(weight_decay, decayed)]
  # Momentum of SGD sees the decay, as L2 regularisation; that of the others does not.
  optimiser = optax.chain(*(chain[::-1] if name == "sgd" else chain), optax.scale_by_learning_rate(rate))
  for fn in wrap:
    optimiser = fn(optimiser)
  clips = not isinstance(clip_norm, int | float) or clip_norm
  return optax.chain(optax.clip_by_global_norm(clip_norm), optimiser) if clips else optimiser


_keywords = {k: p for fn in (make, transformation) for k, p in inspect.signature(fn).parameters.items()}
make.__signature__ = inspect.Signature([p for k, p in _keywords.items() if k not in ("kw", "rate")])
