"""P-tuning v2: a prefix in every layer and a trained head (Liu et al. 2022,
https://arxiv.org/abs/2110.07602, section 3.2).

Prefix tuning for understanding: bidirectional encoders, classifiers of sentences. The head is what any method trains
of a classifier; see `methods.train_also`.
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
PEFT = "prefix_tuning"  # the form of formats/peft that it has


def init(key: jax.Array, params: Any, *, hidden: Count | None = None, **kw: Any) -> tuple[Any, Any]:
  """Adds a prefix, see `prefix_tuning.init`.

  Args:
    hidden: the width of the network, which helps on some tasks and harms on others (section 3.3); None is that of the
      embedding.
    **kw: those of `prefix_tuning.init`; `length` is short for simple tasks, up to 100 for hard ones.
  """
  hidden = params["embed"]["kernel"].shape[1] if hidden is None else hidden
  return prefix_tuning.init(key, params, hidden=hidden, **kw)


init.__signature__ = targeting.signature(init, prefix_tuning.init)
