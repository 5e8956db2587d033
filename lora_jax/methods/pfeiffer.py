"""One adapter per layer, after feed-forward (Pfeiffer et al. 2021, AdapterFusion, https://arxiv.org/abs/2005.00247).

It is the module of houlsby.py with a ReLU: `h + up(relu(down(h)))` on the output h of the feed-forward projection,
before the residual is added. Norms stay frozen. AdapterHub's `SeqBnConfig` adds in the same place, but the input of its
`down` is h plus the residual, after the pretrained norm if one follows the sum, as in BERT.
"""

from collections.abc import Sequence
from typing import Any

import jax

from lora_jax.methods import bottleneck
from lora_jax.values import Count

KIND = "bottlenecks"
OPTIM = {"learning_rate": 1e-4}  # the paper
MERGES = False  # it is not linear


def init(
  key: jax.Array,
  params: Any,
  *,
  size: Count = 64,
  activation: bottleneck.Activation = "relu",
  init: bottleneck.Init = "zero",
  targets: str | Sequence[str] = bottleneck.FEED_FORWARD,
) -> tuple[Any, Any]:
  """Puts a bottleneck after the target matrices.

  Args:
    size, activation, init, targets: as in `houlsby.init`.

  Returns:
    (params, mask).
  """
  return bottleneck.add(key, params, targets, size=size, activation=activation, init=init)
