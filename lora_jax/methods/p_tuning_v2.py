"""P-tuning v2: a prefix in every layer and a trained head (Liu et al. 2022,
https://arxiv.org/abs/2110.07602, section 3.2).

Prefix tuning for understanding: bidirectional encoders, classifiers of sentences. The head is what any method trains
of a classifier; see `methods.train_also`.
"""

from typing import Any

import jax

from lora_jax.methods import prefix_tuning
from lora_jax.methods.prefix_tuning import MERGES, PEFT_TYPE, STARTS, from_peft, to_peft  # noqa: F401, its own too


def init(
  key: jax.Array, params: Any, *, length: int = 20, mlp: bool = False, hidden: int | None = None, std: float = 0.02
) -> tuple[Any, Any]:
  """Adds a prefix, see `prefix_tuning.init`.

  Args:
    length: short for simple tasks, up to 100 for hard ones.
    mlp: whether a network computes the prefix, which helps on some tasks and harms on others (section 3.3).
    hidden: the network's width; None is that of the embedding.
  """
  hidden = params["embed"]["kernel"].shape[1] if hidden is None else hidden
  return prefix_tuning.init(key, params, length=length, mlp=mlp, hidden=hidden, std=std)
