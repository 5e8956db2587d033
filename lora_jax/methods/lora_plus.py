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
PEFT = "lora"  # the module of formats/peft that it uses


def init(
  key: jax.Array, params: Any, *, lr_ratio: Positive = 16.0, embedding_lr_ratio: Positive = 0.005, **kw: Any
) -> tuple[Any, Any]:
  """Returns what `lora.init` returns; the ratios configure `optimiser`.

  Args:
    lr_ratio: learning rate of B and of biases, divided by the learning rate of A.
    embedding_lr_ratio: the same for both factors of an embedding. The authors' code fixes that learning rate at 1e-6;
      the default gives 1e-6 for a learning rate of 2e-4.
  """
  del lr_ratio, embedding_lr_ratio
  return lora.init(key, params, **kw)


init.__signature__ = targeting.signature(init, lora.init, without=("lora_bias", "tied"))


def optimiser(
  inner: optax.GradientTransformation, *, steps: int, lr_ratio: float = 16.0, embedding_lr_ratio: float = 0.005, **_
) -> optax.GradientTransformation:
  """Returns `inner` with the updates of B, biases and embeddings multiplied by the ratios of `init`."""
  del steps

  def scale(updates: Any, _: Any = None) -> Any:
    return tree.map_named(lambda k, u: u * _ratio(k, lr_ratio, embedding_lr_ratio), updates)

  return optax.chain(inner, optax.stateless(scale))


def _ratio(name: str, lr_ratio: float, embedding_lr_ratio: float) -> float:
  if name.startswith(lora.EMBED) and name.endswith(("/a", "/b")):
    return embedding_lr_ratio
  return lr_ratio if fused.whole(name).endswith(("/b", "/bias")) else 1.0
