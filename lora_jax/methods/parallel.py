"""A scaled adapter parallel to feed-forward (He et al. 2022, https://arxiv.org/abs/2110.04366).

`ffn(x) + scale * up(relu(down(x)))`, both with bias, where x is the input of the feed-forward layer. In pre-norm models
x is the output of the norm.
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
  """Puts a bottleneck in parallel with feed-forward layers.

  Args:
    key: random key of the initial values.
    params: a model's tree.
    size: width of the bottleneck.
    scale: factor of the bottleneck's output.
    activation: a name in `layers.ACTIVATIONS`.
    init: "lora" draws `down` uniformly in +-1/sqrt(D) and sets `up` to zero, as in the authors' code; the others are as
      in `houlsby.init`.
    targets: feed-forward layers, named by their last matrix, such as `layers/3/mlp/down/kernel`. The default selects
      all of them, in the encoder and in the decoder.

  Returns:
    (params, mask).

  Raises:
    UserError: a target matches nothing, or the feed-forward layers are mixtures of experts.
  """
  return bottleneck.add(key, params, targets, size=size, activation=activation, init=init, scale=scale, beside=True)
