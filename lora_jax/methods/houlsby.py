"""Adapters after attention and after feed-forward (Houlsby et al. 2019, https://arxiv.org/abs/1902.00751, section 2).

`h + up(gelu(down(h)))`, both with bias, on the output h of a layer's attention projection and of its feed-forward
projection, before the residual is added. A module of size m has 2 m D + D + m parameters. The norms are also trained;
whether a classifier is trained is up to the experiment.
"""

from collections.abc import Sequence
from typing import Any

import jax

from lora_jax.methods import bottleneck
from lora_jax.values import Count

KIND = "bottlenecks"
OPTIM = {"learning_rate": 3e-4}  # the paper's section 3.2
WHOLE = True  # the norms
MERGES = False  # it is not linear


def init(
  key: jax.Array,
  params: Any,
  *,
  size: Count = 64,
  activation: bottleneck.Activation = "gelu",
  init: bottleneck.Init = "zero",
  targets: str | Sequence[str] = (bottleneck.ATTENTION, bottleneck.FEED_FORWARD),
  train_norms: bool = True,
) -> tuple[Any, Any]:
  """Puts a bottleneck after the target matrices.

  Args:
    key: random key of the initial values.
    params: a model's tree.
    size: m, the width of the bottleneck.
    activation: a name in `layers.ACTIVATIONS`.
    init: "paper" draws `down` and `up` from a normal with standard deviation 1e-2, truncated at two deviations; "repo"
      uses 1e-3, as the authors' code; "zero" draws `down` as "paper" and sets `up` to zero; "lora" draws `down`
      uniformly in +-1/sqrt(D) and sets `up` to zero. "paper" and "repo" change the model slightly at first.
    targets: matrices whose output is a vector, see `targeting.select`. The default leaves out cross-attention: an
      encoder-decoder gets two adapters in each layer of the encoder and of the decoder.
    train_norms: whether the scales and biases of all norms are also trained.

  Returns:
    (params, mask).

  Raises:
    UserError: a target matches nothing or has an output with heads, or a feed-forward layer is a mixture of experts.
  """
  return bottleneck.add(key, params, targets, size=size, activation=activation, init=init, train_norms=train_norms)
