"""The training step: jitted, donated, over a split tree."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from lora_jax import transformer, tree, weights


@struct.dataclass
class State:
  """What a step changes: the number of finished steps, the trainable tree and the optimiser's state."""

  step: jax.Array
  trainable: Any
  opt_state: Any


@dataclasses.dataclass(frozen=True)
class Forward:
  """A model's forward on a training batch, for objectives.

  Fields:
    config: of the model.
    packed: whether rows hold several examples. Without, padding on the right of a causal model needs no mask, so that
      attention can be fused.
  """

  config: transformer.Config
  packed: bool = False

  def __call__(self, params: Any, batch: dict) -> jax.Array:
    """The states before the head, [B, T, D]; of an encoder-decoder those of the decoder, see seq2seq.py."""
    keys = ["token_types"] if self.config.n_types else []
    if self.packed or not self.config.causal:
      keys += ["positions", "segment_ids"]
    given = {k: batch[k] for k in keys if k in batch}
    if self.config.encoder_layers:
      segments = batch["input_segments"]
      given["encoded"] = transformer.encode(self.config, params, batch["inputs"], segments)
      given["seen"] = segments > 0
    length = None if self.packed or "segment_ids" not in batch else (batch["segment_ids"] > 0).sum(1).max()
    return transformer.hidden(self.config, params, batch["tokens"], length=length, **given)[0]

  def logits(self, head: dict, x: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
    """Logits [B, T, V] of states; `head` is what `transformer.head` gives."""
    return transformer.logits(self.config, head, x, dtype)

  def classify(self, params: Any, batch: dict) -> jax.Array:
    """float32 outputs [B, C] of the classifier."""
    return transformer.classify(self.config, params, self(params, batch), batch["lengths"])


def init_state(trainable: Any, optimiser: optax.GradientTransformation) -> State:
  """The state before the first step."""
  return State(jnp.zeros((), jnp.int32), trainable, optimiser.init(trainable))


def make_step(
  forward: Callable,
  objective: Callable,
  optimiser: optax.GradientTransformation,
  schedule: optax.Schedule,
  *,
  seed: int = 0,
  accumulate: int = 1,
) -> Callable[[State, Any, dict], tuple[State, dict]]:
  """A function `(state, frozen, batch) -> (state, metrics)`, to be jitted.

  The gradient is that of the mean loss over the whole batch, summed over `accumulate` micro-batches and then divided
  by the summed weight. A step whose loss or gradient is not finite changes nothing but `state.step`.

  Metrics (float32 scalars): loss, what the objective returns, per unit of weight, grad_norm, learning_rate, tokens
  (not padding; those of an encoder too), finite.
  """

  def loss(trainable, frozen, micro, key):
    params = weights.with_dropout(tree.join(trainable, frozen), key)
    loss_sum, weight_sum, metrics = objective(forward, params, micro)
    return loss_sum, {"weight": weight_sum, **metrics, "loss": loss_sum}

  def step(state: State, frozen: Any, batch: dict) -> tuple[State, dict]:
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    grad = jax.grad(loss, has_aux=True)
    if accumulate == 1:
      grads, sums = grad(state.trainable, frozen, batch, key)
    else:
      micro = jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch)

      def add(total, xs):
        return jax.tree.map(jnp.add, total, grad(state.trainable, frozen, *xs)), None

      xs = (micro, jax.random.split(key, accumulate))
      shapes = jax.eval_shape(grad, state.trainable, frozen, *jax.tree.map(lambda x: x[0], xs))
      (grads, sums), _ = jax.lax.scan(add, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes), xs)
    total = jnp.maximum(sums.pop("weight"), jnp.finfo(jnp.float32).tiny)
    grads = jax.tree.map(lambda g: g / total, grads)
    metrics = {k: v / total for k, v in sums.items()}
    norm = optax.tree.norm(grads)
    real = sum(jnp.sum(batch[k] > 0) for k in ("segment_ids", "input_segments") if k in batch)
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
    updates, opt_state = optimiser.update(grads, state.opt_state, state.trainable)
    new = (optax.apply_updates(state.trainable, updates), opt_state)
    trainable, opt_state = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, (state.trainable, state.opt_state))
    metrics |= {
      "grad_norm": norm,
      "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
      "tokens": real.astype(jnp.float32),
      "finite": finite.astype(jnp.float32),
    }
    return State(state.step + 1, trainable, opt_state), metrics

  return step


class Stepper:
  """A step compiled once a batch shape, with the state donated; knows how long compiling took."""

  def __init__(self, step: Callable, state: State):
    placement = jax.tree.map(lambda x: x.sharding, state)
    self._step = jax.jit(step, donate_argnums=0, out_shardings=(placement, None))
    self._compiled = {}
    self.compile_seconds = 0.0

  def __call__(self, state: State, frozen: Any, batch: dict) -> tuple[State, dict]:
    """Runs the step; the given `state` may not be used again."""
    shape = tuple(x.shape for x in jax.tree.leaves(batch))
    if shape not in self._compiled:
      start = time.perf_counter()
      self._compiled[shape] = self._step.lower(state, frozen, batch).compile()
      self.compile_seconds += time.perf_counter() - start
    return self._compiled[shape](state, frozen, batch)
