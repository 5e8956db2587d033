"""LoRA+: LoRA whose B learns faster than A (Hayou et al. 2024, https://arxiv.org/abs/2402.12354, section 4)."""

from typing import Any

import jax
import optax

from lora_jax import tree
from lora_jax.methods import lora, targeting
from lora_jax.values import Positive
from lora_jax.weights import fused

KIND = "low rank"
OPTIM = {"learning_rate": 2e-4}  # the authors' script for GPT-2
VARIES = lora.VARIES
PEFT = "lora"  # the form of formats/peft that it has


def init(
  key: jax.Array, params: Any, *, lr_ratio: Positive = 16.0, embedding_lr_ratio: Positive = 0.005, **kw: Any
) -> tuple[Any, Any]:
  """As `lora.init`.

  Args:
    lr_ratio: learning rate of B, and of biases, over that of A.
    embedding_lr_ratio: that of both factors of an embedding. The authors' code has 1e-6 there whatever the other is;
      the default is that at 2e-4.
  """
  del lr_ratio, embedding_lr_ratio
  return lora.init(key, params, **kw)


init.__signature__ = targeting.signature(init, lora.init, without=("lora_bias", "tied"))


def optimiser(
  inner: optax.GradientTransformation, *, steps: int, lr_ratio: float = 16.0, embedding_lr_ratio: float = 0.005, **_
) -> optax.GradientTransformation:
  """`inner` with updates as if some leaves had other learning rates; see `init` for the ratios."""
  del steps

  def scale(updates: Any, _: Any = None) -> Any:
    return tree.map_named(lambda k, u: u * _ratio(k, lr_ratio, embedding_lr_ratio), updates)

  return optax.chain(inner, optax.stateless(scale))


def _ratio(name: str, lr_ratio: float, embedding_lr_ratio: float) -> float:
  if name.startswith(lora.EMBED) and name.endswith(("/a", "/b")):
    return embedding_lr_ratio
  return lr_ratio if fused.whole(name).endswith(("/b", "/bias")) else 1.0
