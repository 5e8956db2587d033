"""The one term of an objective, as sums."""

from lora_jax.training import objectives


def sums(forward, params, batch, name="causal_lm", **kw):
  """(loss, weight, {metric: sum}) of a batch."""
  terms, metrics = objectives.make(name, **kw).loss(forward, params, batch, None, step=0)
  ((loss, weight),) = terms.values()
  return loss, weight, {k: x for k, (x, _) in metrics.items()}
