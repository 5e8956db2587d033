"""A scaled adapter beside feed-forward (He et al. 2022, https://arxiv.org/abs/2110.04366).

`ffn(x) + scale * up(relu(down(x)))`, both with bias, where x is the input of the feed-forward layer: after the norm in
models that normalise first.
"""

from collections.abc import Sequence
from typing import Any

import jax

from lora_jax.methods import bottleneck
from lora_jax.values import Count

KIND = "bottlenecks"
OPTIM = {"learning_rate": 1e-4}  # the paper's table 7
MERGES = False  # it is not linear


def init(
  key: jax.Array,
  params: Any,
  *,
  size: Count = 64,
  scale: float = 4.0,
  activation: bottleneck.Activation = "relu",
  init: bottleneck.Init = "lora",
  targets: str | Sequence[str] = bottleneck.FEED_FORWARD,
) -> tuple[Any, Any]:
  """Puts a bottleneck beside feed-forward layers.

  Args:
    key: of the initial values.
    params: a model's tree.
    size: width of the bottleneck.
    scale: of what it adds.
    activation: a name in `layers.ACTIVATIONS`.
    init: "lora" is uniform in +-1/sqrt(D) for `down` and zero for `up`, as in the authors' code; others as in
      `houlsby.init`.
    targets: which feed-forward layers, named by their last matrix, such as `layers/3/mlp/down/kernel`; those of an
      encoder and a decoder are all chosen by default.

  Returns:
    (params, mask).

  Raises:
    UserError: a target that is none; feed-forward layers that are mixtures of experts.
  """
  return bottleneck.add(key, params, targets, size=size, activation=activation, init=init, scale=scale, beside=True)
