"""P-tuning v2: a prefix in every layer and a trained head (Liu et al. 2022,
https://arxiv.org/abs/2110.07602, section 3.2).

It is prefix tuning for language understanding, with bidirectional encoders and sentence classifiers. The head is
trained as in every method for a classifier; see `methods.train_also`.
"""

from typing import Any

import jax

from lora_jax.methods import prefix_tuning, targeting
from lora_jax.methods.prefix_tuning import (
  MERGES,  # noqa: F401, names of users
  STARTS,  # noqa: F401, names of users
)
from lora_jax.values import Count

KIND = "soft prompts"
OPTIM = {"learning_rate": 5e-3}  # the authors' scripts
PEFT = "prefix_tuning"  # the module of formats/peft that it uses


def init(key: jax.Array, params: Any, *, hidden: Count | None = None, **kw: Any) -> tuple[Any, Any]:
  """Adds a prefix, see `prefix_tuning.init`.

  Args:
    hidden: width of the network, which helps on some tasks and hurts on others (section 3.3); None means the width of
      the embedding.
    **kw: as in `prefix_tuning.init`; the paper uses a short `length` for simple tasks and up to 100 for hard ones.
  """
  hidden = params["embed"]["kernel"].shape[1] if hidden is None else hidden
  return prefix_tuning.init(key, params, hidden=hidden, **kw)


init.__signature__ = targeting.signature(init, prefix_tuning.init)
