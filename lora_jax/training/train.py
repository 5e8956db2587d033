"""The training step: jitted, donated, over a split tree."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from lora_jax import tree, weights
from lora_jax.model import transformer
from lora_jax.training import auxiliary, head
from lora_jax.weights import updates as updates_lib

# What a step logs of itself, and the log of a row: no objective has a metric of such a name.
OWN = ("loss", "grad_norm", "learning_rate", "tokens", "finite")
ROW = ("steps", "seconds", "compile_seconds", "tokens_per_second")


@struct.dataclass
class State:
  """What training changes.

  Fields:
    step: int32 [], how many steps are done.
    trainable: the trainable tree.
    opt_state: of the optimiser.
    held: frozen leaves that the method changes between steps, such as the matrices that ReLoRA merges into; None where
      there are none.
  """

  step: jax.Array
  trainable: Any
  opt_state: Any
  held: Any = None

  def params(self, frozen: Any) -> Any:
    """The whole tree."""
    params = tree.join(self.trainable, frozen)
    return params if self.held is None else tree.join(params, self.held)


@dataclasses.dataclass(frozen=True)
class Forward:
  """A model's forward on a training batch, for objectives.

  Fields:
    config: of the model.
    packed: whether rows hold several examples. Without, padding on the right of a causal model needs no mask, so that
      attention can be fused.
    members: how many models of a population it computes together.
  """

  config: transformer.Config
  packed: bool = False
  members: int = 1

  def __call__(self, params: Any, batch: dict) -> jax.Array:
    """The states before the head, [B, T, D]; of an encoder-decoder those of the decoder."""
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

  def projection(self, params: Any, batch: dict) -> head.Projection:
    """What training/head.py makes logits of, chunk by chunk."""
    return head.Projection(self(params, batch), transformer.head(params), self.logits)

  def share(self, chunk: int) -> int:
    """How many positions a member may take of a chunk: the logits of a chunk are those of all."""
    return max(chunk // self.members, 1)

  def classify(self, params: Any, batch: dict) -> jax.Array:
    """float32 outputs [B, C] of the classifier."""
    return transformer.classify(self.config, params, self(params, batch), batch["lengths"])


def init_state(trainable: Any, optimiser: optax.GradientTransformation, held: Any = None) -> State:
  """The state before the first step. The optimiser's own is float32, whatever the parameters are."""
  return State(jnp.zeros((), jnp.int32), trainable, optimiser.init(_float32(trainable)), held)


def _float32(x: Any) -> Any:
  return jax.tree.map(lambda x: x.astype(jnp.float32), x)


def unshared(state: State, others: Any = None) -> State:
  """The state with copies of the leaves whose buffers it has twice or `others` have: a step gives its own away."""
  seen = {auxiliary.pointer(x) for x in jax.tree.leaves(others)} - {None}

  def leaf(x):
    x = jnp.copy(x) if auxiliary.pointer(x) in seen else x
    seen.update({auxiliary.pointer(x)} - {None})
    return x

  return jax.tree.map(leaf, state)


def _wide_tables(trainable: Any) -> Any:
  """Embedding tables as float32, so that the gradients of a row that a batch has often are not summed in bfloat16."""
  wide = lambda k, x: x.astype(jnp.float32) if k.startswith("embed/") and x.dtype == jnp.bfloat16 else x
  return tree.map_named(wide, trainable)


def make_step(
  forward: Callable,
  loss: Callable,
  optimiser: optax.GradientTransformation,
  schedule: optax.Schedule,
  *,
  seed: int | jax.Array = 0,
  accumulate: int = 1,
  penalty: Callable[[Any], jax.Array] | None = None,
  rates: Mapping[str, jax.Array] | None = None,
  active: bool | jax.Array = True,
) -> Callable[[State, Any, Any, dict], tuple[State, dict]]:
  """A function `(state, frozen, aux, batch) -> (state, metrics)`, to be jitted.

  The gradient is that of the sum of the objective's terms, each a mean over the whole batch, which may be split into
  `accumulate` micro-batches; the method's `penalty`, a function of the parameters, is added. A step whose loss or
  gradient is not finite changes nothing but `state.step`, nor does one that is not `active`. `rates` are those of
  dropout, see `weights.with_dropout`.

  Args:
    loss: of an objective, `(forward, params, batch, aux, *, step)`, with its keywords; `aux` is a tree, or an
      `auxiliary.Auxiliary` beside `frozen`.

  Metrics (float32 scalars): loss, the terms where there are several, what the objective gives, grad_norm,
  learning_rate, tokens (not padding; those of an encoder too), finite.
  """

  def total(trainable, state, frozen, aux, weight, micro, key):
    """What is differentiated: all terms in the unit of the first, which its own weight then divides."""
    params = weights.with_dropout(state.replace(trainable=_wide_tables(trainable)).params(frozen), key, rates)
    terms, metrics = loss(forward, params, micro, aux, step=state.step)
    _check_names(terms, metrics)
    first, *others = terms
    own = {k: jax.lax.stop_gradient(w) for k, (_, w) in terms.items()}
    weight = own if weight is None else weight
    value = terms[first][0]
    for k in others:
      value += terms[k][0] * (_divisor(weight[first]) / _divisor(weight[k]))
    if penalty is not None:
      value += own[first] * penalty(params)
    return value, {"unit": own[first], "weights": own, "terms": terms, "metrics": metrics}

  def step(state: State, frozen: Any, aux: Any, batch: dict) -> tuple[State, dict]:
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    given = state.trainable, state, frozen, auxiliary.resolve(aux, frozen)
    grads, sums = _gradient(total, given, batch, key, accumulate)
    unit = _divisor(sums["unit"])
    grads = jax.tree.map(lambda g: g.astype(jnp.float32) / unit, grads)
    mean = lambda found: {k: x / _divisor(w) for k, (x, w) in found.items()}
    terms, metrics = mean(sums["terms"]), mean(sums["metrics"])
    metrics |= (terms if len(terms) > 1 else {}) | {"loss": sum(terms.values())}
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
    updates, opt_state = optimiser.update(grads, state.opt_state, state.trainable)
    new = (updates_lib.add(state.trainable, updates, jax.random.fold_in(key, 1)), opt_state)
    keep = lambda a, b: jnp.where(finite & active, a, b)
    trainable, opt_state = jax.tree.map(keep, new, (state.trainable, state.opt_state))
    metrics |= {
      "grad_norm": norm,
      "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
      "tokens": _tokens(batch).astype(jnp.float32),
      "finite": finite.astype(jnp.float32),
    }
    return State(state.step + 1, trainable, opt_state, state.held), metrics

  return step


def _gradient(total: Callable, given: tuple, batch: dict, key: jax.Array, accumulate: int) -> tuple[Any, dict]:
  """The gradient of `total` with respect to the first of `given`, and its sums, over all micro-batches."""
  grad = jax.grad(total, has_aux=True)
  if accumulate == 1:
    return grad(*given, None, batch, key)
  micro = jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch)
  xs = micro, jax.random.split(key, accumulate)
  shapes = jax.eval_shape(grad, *given, None, *jax.tree.map(lambda x: x[0], xs))
  # Sums of what bfloat16 parameters have as gradients would lose the last micro-batches.
  zero = lambda s: jnp.zeros(s.shape, jnp.promote_types(s.dtype, jnp.float32))

  def summed(fn, shapes):
    add = lambda found, x: (jax.tree.map(jnp.add, found, fn(*x)), None)
    return jax.lax.scan(add, jax.tree.map(zero, shapes), xs)[0]

  weight = None
  if len(shapes[1]["terms"]) > 1:
    # Weights are of the batch alone: the compiler leaves out the forward pass.
    weight = summed(lambda *x: total(*given, None, *x)[1]["weights"], shapes[1]["weights"])
  return summed(lambda *x: grad(*given, weight, *x), shapes)


def _divisor(weight: jax.Array) -> jax.Array:
  """A weight to divide by; what has none is a sum of nothing."""
  return jnp.where(weight == 0, 1, weight)


def _check_names(terms: Mapping, metrics: Mapping) -> None:
  """ValueError for names that mean something else in the log, or two things."""
  shown = [*(terms if len(terms) > 1 else ()), *metrics]
  if twice := sorted({k for k in shown if k in (*OWN, *ROW) or shown.count(k) > 1}):
    raise ValueError(f"an objective has terms or metrics of names that are taken: {', '.join(twice)}")


def _tokens(batch: Mapping[str, jax.Array]) -> jax.Array:
  """int32 []: tokens that are no padding, or all of them where a batch does not tell."""
  pairs = ("segment_ids", "tokens"), ("input_segments", "inputs")
  counts = [jnp.sum(batch[k] > 0) if k in batch else batch[all_].size for k, all_ in pairs if {k, all_} & batch.keys()]
  return jnp.asarray(sum(counts), jnp.int32)


class Stepper:
  """A step compiled once a batch shape, with the state donated.

  Fields:
    compile_seconds: how long compiling took.
    memory_bytes: what the largest of the programs needs on a device, arguments included, by the compiler's account.
  """

  def __init__(self, step: Callable, state: State, options: Mapping[str, Any] | None = None):
    """A step and the state that it will be called with; `options` are the compiler's, by name."""
    placement = jax.tree.map(lambda x: x.sharding, state)
    self._step = jax.jit(step, donate_argnums=0, out_shardings=(placement, None), compiler_options=options)
    self._compiled = {}
    self.compile_seconds = 0.0
    self.memory_bytes = 0

  def __call__(self, state: State, *rest: Any) -> tuple[State, dict]:
    """Runs the step on a state, which may not be used again, and what the step takes after it; a batch is the last."""
    return self.compile(state, *rest)(state, *rest)

  def compile(self, state: State, *rest: Any) -> Callable:
    """The program for arguments of these shapes, which are not touched."""
    shape = tuple(x.shape for x in jax.tree.leaves(rest[-1]))
    if shape not in self._compiled:
      start = time.perf_counter()
      self._compiled[shape] = self._step.lower(state, *rest).compile()
      self.compile_seconds += time.perf_counter() - start
      if m := self._compiled[shape].memory_analysis():
        new = m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes - m.alias_size_in_bytes
        self.memory_bytes = max(self.memory_bytes, new)
    return self._compiled[shape]
