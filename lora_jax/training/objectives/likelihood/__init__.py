"""Functions of one model's logits and the tokens that followed: cross-entropy, log-likelihoods."""

import functools

import jax
import jax.numpy as jnp

from lora_jax.training import head


def cross_entropy(
  projection: head.Projection,
  targets: jax.Array,
  weights: jax.Array,
  *,
  chunk: int,
  label_smoothing: float = 0.0,
  most: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Weighted sums of cross-entropy and of correct argmax, without the logits of the whole batch.

  Args:
    targets, weights: [B, T]; positions of weight 0 are skipped.
    chunk, most: see `head.sums`.
    label_smoothing: s in (1 - s) times the cross-entropy with the target plus s times its mean over all V tokens
      (Szegedy et al. 2016, https://arxiv.org/abs/1512.00567, section 7).

  Returns:
    float32 (loss, correct).
  """
  fn = functools.partial(_cross_entropy, label_smoothing)
  return head.sums(fn, [projection], (targets, weights), weights != 0, chunk=chunk, most=most)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(smoothing, logits, targets, weights):
  return _cross_entropy_forward(smoothing, logits, targets, weights)[0]


def _cross_entropy_forward(smoothing, logits, targets, weights):
  """Sums of a chunk [B, C, V]; its gradient needs but the exponentials and their sum."""
  best = logits.max(-1, keepdims=True)
  e = jnp.exp(logits - best)
  z = e.sum(-1, keepdims=True)
  picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)
  aim = (1 - smoothing) * picked + smoothing * logits.mean(-1, keepdims=True) if smoothing else picked
  each = (jnp.log(z) + best - aim)[..., 0]
  correct = jnp.sum(weights * (picked == best)[..., 0])
  return (jnp.sum(weights * each), correct), (e, z, each, targets, weights)


def _cross_entropy_backward(smoothing, residuals, cotangents):
  e, z, each, targets, weights = residuals
  hit = jax.lax.broadcasted_iota(jnp.int32, e.shape, 2) == targets[..., None]
  if smoothing:
    hit = (1 - smoothing) * hit + smoothing / e.shape[-1]
  g = cotangents[0]
  return g * (weights[..., None] * (e / z - hit)), None, g * each


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def log_likelihood(
  projection: head.Projection,
  targets: jax.Array,
  used: jax.Array,
  *,
  chunk: int,
  most: jax.Array | None = None,
) -> jax.Array:
  """float32 [B, T]: the log-likelihood of each target, 0 where it is not used; any function of it has a gradient.

  Args:
    targets, used: [B, T].
    chunk, most: see `head.values`.
  """
  return head.values(_log_likelihood, [projection], (targets,), used, chunk=chunk, most=most)


def _log_likelihood(logits, targets):
  picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  return picked - jax.nn.logsumexp(logits, axis=-1)
