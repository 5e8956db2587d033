"""What is minimised. An objective is `(forward, params, batch, **kw) -> (loss_sum, weight_sum, metrics)`.

`forward` is a `train.Forward`: called with `(params, batch)` it gives the states before the head. Losses and metrics
are sums: those of micro-batches, packed rows and devices add up to what one big batch gives.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import errors
from lora_jax.model import transformer
from lora_jax.values import Count, Probability


def causal_lm(
  forward,
  params: Any,
  batch: dict,
  *,
  chunk: Count = 2048,
  label_smoothing: Probability = 0.0,
  most: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, dict]:
  """Next-token cross-entropy, weighted.

  Args:
    batch: `tokens`, `targets`, `positions`, `segment_ids` int32 [B, T] and `weights` float32 [B, T]. The weights hold
      `prompt_loss_weight` at prompt targets, 1 at response targets and 0 at padding; see batches/causal.py.
    chunk: about how many positions' logits exist at once, see `cross_entropy`.
    label_smoothing: how much of each target goes to the mean over the vocabulary, see `cross_entropy`.
    most: see `cross_entropy`.

  Returns:
    (sum of weighted losses, sum of weights, {"accuracy": weighted count of targets that are the argmax}).
  """
  if not 0 <= label_smoothing < 1:
    raise errors.UserError(f"config.objective.label_smoothing={label_smoothing} must be at least 0 and below 1")
  x = forward(params, batch)
  head, loss_weights = transformer.head(params), batch["weights"]
  targets = batch["targets"]
  loss, correct = cross_entropy(forward.logits, chunk, x, head, targets, loss_weights, label_smoothing, most)
  return loss, loss_weights.sum(), {"accuracy": correct}


def cross_entropy(
  project: Callable,
  chunk: int,
  x: jax.Array,
  w: Any,
  targets: jax.Array,
  weights: jax.Array,
  label_smoothing: float = 0.0,
  most: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Weighted sums of cross-entropy and of correct argmax, without the logits of the whole batch.

  Positions of weight 0 are moved behind the others in their row and skipped. The rest goes through the head in
  chunks of columns, as many as the fullest row needs; each chunk's gradient is computed while its logits exist, so
  the backward pass only scales it. Gradients reach `w` only where one of its leaves is being differentiated.

  Args:
    project: `(w, x, dtype)` to logits [B, T, V].
    chunk: about how many positions are in one chunk; a chunk is at least 8 columns of the batch.
    x: [B, T, D] states.
    w: the parameters of the head.
    targets, weights: [B, T].
    label_smoothing: s in (1 - s) times the cross-entropy with the target plus s times its mean over all V tokens
      (Szegedy et al. 2016, https://arxiv.org/abs/1512.00567, section 7).
    most: int32 [], no fewer positions than any row has with a weight; None counts them. Under `jax.vmap` one number for
      all spares them asking each other, and from device to device, whether the loop has ended.

  Returns:
    float32 (loss, correct).
  """
  B, T = targets.shape
  columns = min(T, max(8, chunk // B))
  chunks = ((jnp.count_nonzero(weights, axis=1).max() if most is None else most) + columns - 1) // columns
  order = jnp.argsort(weights == 0, axis=1, stable=True)
  x = jnp.take_along_axis(x, order[:, :, None], axis=1)
  targets, weights = (jnp.take_along_axis(a, order, axis=1) for a in (targets, weights))
  pad = -T % columns
  x, targets, weights = (jnp.pad(a, [(0, 0), (0, pad)] + [(0, 0)] * (a.ndim - 2)) for a in (x, targets, weights))
  return _chunked(project, columns, label_smoothing, chunks, x, w, targets, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _chunked(project, columns, smoothing, chunks, x, w, targets, weights):
  (loss, correct, *_), _ = _loop(project, columns, smoothing, chunks, x, w, targets, weights, None)
  return loss, correct


def _loop(project, columns, smoothing, chunks, x, w, targets, weights, trained):
  """Sums over chunks; with `trained` (a list: which leaves of `w` need gradients) also the gradients of the loss."""
  leaves, structure = jax.tree.flatten(w)
  B, T = targets.shape

  def head(x, diff, dtype):
    it = iter(diff)
    full = [next(it) if t else v for v, t in zip(leaves, trained or [False] * len(leaves), strict=True)]
    return project(jax.tree.unflatten(structure, full), x, dtype)

  def step(i, carry):
    loss, correct, dx, dw = carry
    cut = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=i * columns, slice_size=columns, axis=1)
    xc, t, c = cut(x), cut(targets)[..., None], cut(weights)
    diff = [v for v, t in zip(leaves, trained or [], strict=False) if t]
    logits = head(xc, diff, jnp.float32)
    best = logits.max(-1, keepdims=True)
    e = jnp.exp(logits - best)
    z = e.sum(-1, keepdims=True)
    picked = jnp.take_along_axis(logits, t, axis=-1)
    aim = (1 - smoothing) * picked + smoothing * logits.mean(-1, keepdims=True) if smoothing else picked
    loss += jnp.sum(c * (jnp.log(z) + best - aim)[..., 0])
    correct += jnp.sum(c * (picked == best)[..., 0])
    if trained is not None:
      hit = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2) == t
      if smoothing:
        hit = (1 - smoothing) * hit + smoothing / logits.shape[-1]
      dlogits = (c[..., None] * (e / z - hit)).astype(x.dtype)
      pull = jax.vjp(lambda x, d: head(x, d, x.dtype), xc, diff)[1]
      dxc, dwc = pull(dlogits)
      dx = jax.lax.dynamic_update_slice_in_dim(dx, dxc, i * columns, axis=1)
      dw = [a + b for a, b in zip(dw, dwc, strict=True)]
    return loss, correct, dx, dw

  zero = jnp.zeros((), jnp.float32)
  dx = None if trained is None else jnp.zeros_like(x)
  dw = [jnp.zeros(v.shape, jnp.float32) for v, t in zip(leaves, trained or [], strict=False) if t]
  return jax.lax.fori_loop(0, chunks, step, (zero, zero, dx, dw)), leaves


def _forward(project, columns, smoothing, chunks, x, w, targets, weights):
  trained = [leaf.perturbed for leaf in jax.tree.leaves(w, is_leaf=_is_primal)]
  value = functools.partial(jax.tree.map, lambda p: p.value, is_leaf=_is_primal)
  chunks, x, w, targets, weights = map(value, (chunks, x, w, targets, weights))
  (loss, correct, dx, dw), leaves = _loop(project, columns, smoothing, chunks, x, w, targets, weights, trained)
  it = iter(dw)
  dw = jax.tree.unflatten(
    jax.tree.structure(w),
    [next(it).astype(v.dtype) if t else None for v, t in zip(leaves, trained, strict=True)],
  )
  return (loss, correct), (dx, dw)


def _is_primal(x):
  return hasattr(x, "perturbed")


def _backward(project, columns, smoothing, gradients, cotangents):
  g = cotangents[0]
  if isinstance(g, jax.custom_derivatives.SymbolicZero):
    return None, None, None, None, None
  dx, dw = jax.tree.map(lambda d: (g * d).astype(d.dtype), gradients)
  return None, dx, dw, None, None


_chunked.defvjp(_forward, _backward, symbolic_zeros=True)


def classification(forward, params: Any, batch: dict) -> tuple[jax.Array, jax.Array, dict]:
  """Cross-entropy of a classifier, or squared error where it has one output.

  Args:
    batch: `labels` int32 or float32 [B], `weights` float32 [B], and what `forward` takes.

  Returns:
    (sum of weighted losses, sum of weights, {"accuracy": weighted count} or {}).
  """
  y, w = forward.classify(params, batch), batch["weights"]
  if y.shape[-1] == 1:
    return jnp.sum(w * jnp.square(y[:, 0] - batch["labels"])), w.sum(), {}
  loss = -jnp.take_along_axis(jax.nn.log_softmax(y), batch["labels"][:, None], axis=1)[:, 0]
  return jnp.sum(w * loss), w.sum(), {"accuracy": jnp.sum(w * (y.argmax(-1) == batch["labels"]))}


OBJECTIVES = {"causal_lm": causal_lm, "classification": classification}
