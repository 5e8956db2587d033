"""Cross-entropy of a classifier, or squared error where it has one output."""

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import tasks
from lora_jax.batches import classification
from lora_jax.model import architecture

HEAD = "classification"


def batches(config: architecture.Config, task: tasks.Task) -> tuple[ModuleType, dict]:
  """Those of batches/classification.py."""
  del config, task
  return classification, {}


def loss(forward, params: Any, batch: dict, aux: None, *, step: jax.Array) -> tuple[dict, dict]:
  """The sum of weighted losses, and of a classifier the weighted count of correct labels.

  Args:
    batch: `labels` int32 or float32 [B], `weights` float32 [B], and what `forward` takes.
  """
  del aux, step
  y, w = forward.classify(params, batch), batch["weights"]
  total = w.sum()
  if y.shape[-1] == 1:
    return {"loss": (jnp.sum(w * jnp.square(y[:, 0] - batch["labels"])), total)}, {}
  each = -jnp.take_along_axis(jax.nn.log_softmax(y), batch["labels"][:, None], axis=1)[:, 0]
  correct = jnp.sum(w * (y.argmax(-1) == batch["labels"]))
  return {"loss": (jnp.sum(w * each), total)}, {"accuracy": (correct, total)}
