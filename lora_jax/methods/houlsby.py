"""Adapters after attention and after feed-forward (Houlsby et al. 2019, https://arxiv.org/abs/1902.00751, section 2).

`h + up(gelu(down(h)))`, both with bias, on the output h of a layer's attention projection and of its feed-forward
projection, each before the residual is added. A module of size m has 2 m D + D + m parameters. The norms are trained
besides; a classifier is the experiment's.
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
    key: of the initial values.
    params: a model's tree.
    size: m, the width of the bottleneck.
    activation: a name in `layers.ACTIVATIONS`.
    init: "zero" starts `up` at zero, so that the model does not change at first, and `down` as "paper": a normal of
      deviation 1e-2, cut at two deviations, for both; "repo" has 1e-3 as the authors' code; "lora" is
      uniform in +-1/sqrt(D) and zero. With "paper" and "repo" the model is only nearly what it was.
    targets: matrices whose output is a vector, see `targeting.select`. The default has no cross-attention: an
      encoder-decoder gets two adapters in each layer of the encoder and of the decoder.
    train_norms: whether scales and biases of all norms are trained too.

  Returns:
    (params, mask).

  Raises:
    UserError: a target that is none, or whose output has heads; feed-forward layers that are mixtures of experts.
  """
  return bottleneck.add(key, params, targets, size=size, activation=activation, init=init, train_norms=train_norms)
