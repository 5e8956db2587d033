"""AdaLoRA's weight node, and the optimiser that decides how many ranks each matrix keeps; see adalora.py."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import PartitionSpec as P

from lora_jax import errors, weights


@struct.dataclass
class AdaLoRA(weights.Additive):
  """`W + scale * A diag(e) B`, A applied first.

  Stacked over layers, every field has a leading L.

  Fields:
    base: the adapted weight [*in, *out], an array or a node.
    a: float32 [*in, R].
    e: float32 [R].
    b: float32 [R, *out].
    scale: float32 []; alpha / (R + 1e-5) as in PEFT, or 0 in layers that are not adapted.
    key: random key []; present only in a training forward, where it switches dropout on.
    dropout: probability that an input element is dropped before A.
    layers: which layers of a stack are adapted; one entry if there is no stack.
    schedule: keywords of `init` and their values, and `total_step` if known; pruning used them, and files store them.
  """

  base: Any
  a: jax.Array
  e: jax.Array
  b: jax.Array
  scale: jax.Array
  key: jax.Array | None = None
  dropout: float = struct.field(pytree_node=False, default=0.0)
  layers: tuple[bool, ...] = struct.field(pytree_node=False, default=(True,))
  schedule: tuple[tuple[str, float], ...] = struct.field(pytree_node=False, default=())

  TRAINABLE = ("a", "e", "b")

  def change(self, spec: str, x: jax.Array, dtype: Any = None) -> jax.Array:
    """Returns `scale * ((dropout(x) A) * e) B`."""
    spec_a, spec_b = weights.split_spec(spec)
    h = weights.dot(spec_a, weights.dropout(x, self.dropout, self.key), self.a, jnp.float32)
    return weights.dot(spec_b, (h * self.e * self.scale).astype(x.dtype), self.b, dtype)

  def layer_delta(self) -> jax.Array:
    """Returns what is added to a weight that is not stacked, float32."""
    return self.scale * jnp.tensordot(self.a * self.e, self.b, 1, precision="highest")

  def place(self, spec: P) -> "AdaLoRA":
    """Returns the partition specs; `a` is split like the inputs, `b` like the outputs."""
    placed = super().place(spec)
    if not len(spec):
      return placed
    stack, inner = self.scale.ndim, self.a.ndim - 1
    return placed.replace(a=P(*spec[:inner], None), b=P(*spec[:stack], None, *spec[inner:]))

  def n_padding(self, mask: "AdaLoRA") -> int:
    """Returns how many trained numbers belong to layers that are not adapted."""
    trained = sum(x.size for x, m in ((self.a, mask.a), (self.e, mask.e), (self.b, mask.b)) if m)
    return trained // len(self.layers) * self.layers.count(False)

  def used(self) -> "AdaLoRA":
    """Returns the node with a, e and b of the adapted layers, always stacked; base, scale and key are None."""
    index = np.flatnonzero(self.layers)
    stacked = self.e.ndim > 1
    pick = lambda x: (x if stacked else x[None])[index]
    return self.replace(a=pick(self.a), e=pick(self.e), b=pick(self.b), base=None, scale=None, key=None)


def is_node(w: Any) -> bool:
  """Returns whether `w` is an `AdaLoRA`."""
  return isinstance(w, AdaLoRA)


class State(NamedTuple):
  """State of `optimiser`.

  Fields:
    count: int32 [], how many steps are done.
    sensitivity: moving average of |w * gradient|, for a, e and b of every node.
    uncertainty: moving average of the deviation of |w * gradient| from `sensitivity`.
    keep: bool for every entry of e, whether the last pruning kept it.
    inner: state of the wrapped transformation.
  """

  count: jax.Array
  sensitivity: Any
  uncertainty: Any
  keep: Any
  inner: Any


def optimiser(
  inner: optax.GradientTransformation,
  *,
  steps: int,
  init_r: int = 12,
  target_r: int = 8,
  tinit: int = 0,
  tfinal: int = 0,
  deltaT: int = 1,
  beta1: float = 0.85,
  beta2: float = 0.85,
  **others: Any,
) -> optax.GradientTransformation:
  """Returns `inner` followed by pruning, which sets the least important entries of e to zero.

  The importance of a number w is its smoothed sensitivity |w * gradient| times the smoothed deviation from it. The
  importance of an entry of e adds the means over its column of A and its row of B (equations 7 to 11). Entries are
  ranked over all matrices, and those beyond the budget are pruned. The budget per matrix falls from `init_r` to
  `target_r` as a cubic of the step (equation 12). As in PEFT, w is the value after the step and steps count from 1. The
  last pruning, at step `steps - tfinal`, reaches the target, and its zeros are permanent.
  """
  del others
  last = steps - tfinal
  if tinit >= last:
    raise errors.UserError(f"AdaLoRA has no step to prune at: tinit={tinit} and tfinal={tfinal} of {steps} steps")
  # One step is not enough to know the importance, so a run of one step prunes nothing.
  due = np.array([s > tinit and s % deltaT == 0 for s in range(last)] + [last > 1, False])

  def init(params: Any) -> State:
    zeros = jax.tree.map(jnp.zeros_like, _tracked(params))
    keep = jax.tree.map(lambda w: jnp.ones(w.e.shape, bool), zeros, is_leaf=is_node)
    return State(jnp.zeros((), jnp.int32), zeros, zeros, keep, inner.init(params))

  def update(grads: Any, state: State, params: Any = None) -> tuple[Any, State]:
    updates, inner_state = inner.update(grads, state.inner, params)
    t = jnp.minimum(state.count + 1, last + 1)
    before = _tracked(params)
    now = jax.tree.map(lambda p, u, g: jnp.abs((p + u) * g), before, _tracked(updates), _tracked(grads))
    smooth = lambda beta: lambda old, new: jnp.where(t < last, beta * old + (1 - beta) * new, old)
    sensitivity = jax.tree.map(smooth(beta1), state.sensitivity, now)
    deviation = jax.tree.map(lambda i, s: jnp.abs(i - s), now, sensitivity)
    uncertainty = jax.tree.map(smooth(beta2), state.uncertainty, deviation)
    scores = jax.tree.map(_importance, jax.tree.map(jnp.multiply, sensitivity, uncertainty), is_leaf=is_node)

    used = jax.tree.map(_used, before, scores, is_leaf=is_node)
    ranked = jnp.sort(jnp.concatenate(jax.tree.leaves(used)))
    n = ranked.size // init_r
    excess = np.array([n * init_r - budget(s, n * init_r, n * target_r, tinit, last) for s in range(last + 2)])
    excess = jnp.asarray(excess, jnp.int32)[t]
    threshold = jnp.where(excess > 0, ranked[jnp.maximum(excess - 1, 0)], -jnp.inf)
    prune = jnp.asarray(due)[t]
    keep = jax.tree.map(lambda k, x: jnp.where(prune, x > threshold, k), state.keep, scores)

    def masked(u, p, k):
      return u.replace(e=jnp.where((prune | (t > last)) & ~k, -p.e, u.e)) if is_node(u) else u

    updates = jax.tree.map(masked, updates, before, keep, is_leaf=is_node)
    return updates, State(state.count + 1, sensitivity, uncertainty, keep, inner_state)

  return optax.GradientTransformation(init, update)


def budget(step: int, start: int, target: int, tinit: int, last: int) -> int:
  """Returns how many entries of e are kept at a step: `start` up to `tinit`, `target` from `last`, a cubic between."""
  if step <= tinit:
    return start
  part = 1 - (min(step, last) - tinit) / (last - tinit)
  return int((start - target) * part**3 + target)


def _tracked(params: Any) -> Any:
  """Returns the tree with a, e and b of AdaLoRA nodes, and None for everything else."""
  only = lambda w: w.replace(base=None, scale=None, key=None) if is_node(w) else None
  return jax.tree.map(only, params, is_leaf=is_node)


def _importance(w: AdaLoRA) -> jax.Array:
  """Returns [*stack, R], the score of every entry of e, from the scores of all numbers."""
  lead = w.e.shape
  a = w.a.reshape(*lead[:-1], -1, lead[-1]).mean(-2)
  return w.e + a + w.b.reshape(*lead, -1).mean(-1)


def _used(w: AdaLoRA, scores: jax.Array) -> jax.Array:
  """Returns the scores of the adapted layers."""
  return scores.reshape(len(w.layers), -1)[np.flatnonzero(w.layers)].ravel()
