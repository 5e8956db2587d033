"""Next-token cross-entropy, weighted; of an encoder-decoder that of its response."""

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import errors, tasks
from lora_jax.batches import causal, encoder_decoder
from lora_jax.model import architecture
from lora_jax.training.objectives import likelihood
from lora_jax.values import Count, Probability, Share

HEAD = "lm"


def batches(
  config: architecture.Config, task: tasks.Task, *, prompt_loss_weight: Share | None = None
) -> tuple[ModuleType, dict]:
  """Those of batches/causal.py, or batches/encoder_decoder.py where there is an encoder.

  Args:
    prompt_loss_weight: the weight of a prompt's tokens in the loss, where a response's have 1; None is what suits the
      task, or 0.1 where it does not say.
  """
  if config.encoder_layers:
    if prompt_loss_weight is not None:
      raise errors.UserError(
        "config.objective.prompt_loss_weight: an encoder-decoder does not predict prompts; leave it out"
      )
    return encoder_decoder, {}
  asked = prompt_loss_weight, task.prompt_loss_weight
  return causal, {"prompt_loss_weight": next((float(x) for x in asked if x is not None), 0.1)}


def common(batch: dict) -> jax.Array:
  """int32 []: the most positions that a row has with a weight."""
  return jnp.count_nonzero(batch["weights"], axis=-1).max()


def loss(
  forward,
  params: Any,
  batch: dict,
  aux: None,
  *,
  step: jax.Array,
  common: jax.Array | None = None,
  chunk: Count = 2048,
  label_smoothing: Probability = 0.0,
) -> tuple[dict, dict]:
  """The sum of weighted losses, and the weighted count of targets that are the argmax.

  Args:
    batch: `tokens`, `targets`, `positions`, `segment_ids` int32 [B, T] and `weights` float32 [B, T]. The weights hold
      `prompt_loss_weight` at prompt targets, 1 at response targets and 0 at padding; see batches/causal.py.
    chunk: about how many positions' logits exist at once, see `head.sums`.
    label_smoothing: how much of each target goes to the mean over the vocabulary, see `likelihood.cross_entropy`.
  """
  del aux, step
  if not 0 <= label_smoothing < 1:
    raise errors.UserError(f"config.objective.label_smoothing={label_smoothing} must be at least 0 and below 1")
  weights, how = batch["weights"], {"chunk": forward.share(chunk), "label_smoothing": label_smoothing, "most": common}
  found, correct = likelihood.cross_entropy(forward.projection(params, batch), batch["targets"], weights, **how)
  total = weights.sum()
  return {"loss": (found, total)}, {"accuracy": (correct, total)}
