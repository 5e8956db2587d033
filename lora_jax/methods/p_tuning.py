"""P-tuning: a soft prompt that a small network computes (Liu et al. 2021, https://arxiv.org/abs/2103.10385, section 3).

The network relates the tokens of the prompt to each other. Only its output is needed after training.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct

from lora_jax import errors, tree, weights
from lora_jax.methods import prompt_tuning
from lora_jax.model import layers, prompts
from lora_jax.values import Count

KIND = "soft prompts"
OPTIM = {"learning_rate": 1e-5}  # the authors' code
STARTS = prompt_tuning.STARTS
MERGES = False
ENCODERS = ("mlp", "lstm")


@struct.dataclass
class Encoder(weights.Added):
  """An embedding, a bidirectional LSTM if `lstm` is not empty, and linear layers with ReLU between them.

  Fields, all float32:
    embedding: [P, D].
    lstm: per layer {"forward", "backward"}: {"input" [C, 4, H], "state" [H, 4, H], "bias" [4, H]}. The gates are in
      torch's order: input, forget, cell, output.
    mlp: per layer {"kernel", "bias"}.
    placement: one of `prompts.PLACEMENTS`.
  """

  embedding: jax.Array
  lstm: list
  mlp: list
  placement: str = struct.field(pytree_node=False, default="prefix")

  def __call__(self) -> jax.Array:
    """Returns the prompt, float32 [P, D]."""
    x = self.embedding
    with jax.default_matmul_precision("highest"):
      for layer in self.lstm:
        x = jnp.concatenate([run(layer["forward"], x), run(layer["backward"], x[::-1])[::-1]], axis=-1)
      for i, layer in enumerate(self.mlp):
        x = layers.linear("PC,CD->PD", jax.nn.relu(x) if i else x, layer)
    return x

  @property
  def length(self) -> int:
    """P, the number of soft tokens."""
    return self.embedding.shape[-2]

  @property
  def scaled(self) -> bool:
    """False: see `prompt_tuning.Prompt`."""
    return False

  def bake(self) -> prompt_tuning.Prompt:
    """Returns the computed prompt, without the network."""
    return prompt_tuning.Prompt(self(), self.placement)


def run(cell: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
  """Returns the states [P, H] of an LSTM over x [P, C] (Hochreiter & Schmidhuber 1997; forget gate, no peepholes)."""

  def step(carry, x):
    h, c = carry
    i, f, g, o = x + jnp.einsum("H,HGC->GC", h, cell["state"])
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    h = jax.nn.sigmoid(o) * jnp.tanh(c)
    return (h, c), h

  x = jnp.einsum("PC,CGH->PGH", x, cell["input"]) + cell["bias"]
  zero = jnp.zeros(cell["state"].shape[-1], x.dtype)
  return jax.lax.scan(step, (zero, zero), x)[1]


def init(
  key: jax.Array,
  params: Any,
  *,
  length: Count = 20,
  encoder: Literal[ENCODERS] = "mlp",
  hidden: Count | None = None,
  placement: Literal[prompts.PLACEMENTS] = "prefix",
) -> tuple[Any, Any]:
  """Adds an `Encoder`, initialised as in PEFT: embeddings normal, other leaves uniform in +-1/sqrt(fan).

  Args:
    length: P.
    encoder: "mlp" has three linear layers; "lstm" has two bidirectional LSTM layers and two linear layers.
    hidden: width of the linear layers and of each direction of the LSTM; None means the width of the embedding.
    placement: see `prompt_tuning.init`.

  Returns:
    (params, mask): True at `prompt/...`, float32.
  """
  prompt_tuning.check(params, length, placement)
  errors.choose(encoder, dict.fromkeys(ENCODERS), "config.method.encoder")
  if hidden is not None and (not isinstance(hidden, int) or hidden < 1):
    raise errors.UserError(f"config.method.hidden={hidden!r} must be a whole number, at least 1")
  D = params["embed"]["kernel"].shape[1]
  H = D if hidden is None else hidden
  widths, lstm = [D, H, H, D], []
  if encoder == "lstm":
    shapes = lambda C: {"input": (C, 4, H), "state": (H, 4, H), "bias": (4, H)}
    cell = lambda name, C: {k: uniform(key, f"prompt/lstm/{name}/{k}", s, H) for k, s in shapes(C).items()}
    sides = ("forward", "backward")
    lstm = [{side: cell(f"{i}/{side}", C) for side in sides} for i, C in enumerate((D, 2 * H))]
    widths = [2 * H, 2 * H, D]
  pairs = zip(widths[:-1], widths[1:], strict=True)
  mlp = [dense(key, f"prompt/mlp/{i}", (C,), (O,)) for i, (C, O) in enumerate(pairs)]
  embedding = jax.random.normal(tree.fold(key, "prompt/embedding"), (length, D))
  return prompt_tuning.add(params, Encoder(embedding, lstm, mlp, placement))


def uniform(key: jax.Array, name: str, shape: tuple[int, ...], fan: int) -> jax.Array:
  """Returns float32 values uniform in +-1/sqrt(fan), as torch initialises linear and recurrent layers."""
  return jax.random.uniform(tree.fold(key, name), shape, minval=-1.0, maxval=1.0) / math.sqrt(fan)


def dense(key: jax.Array, name: str, inner: tuple[int, ...], outer: tuple[int, ...]) -> dict[str, jax.Array]:
  """Returns {"kernel" [*inner, *outer], "bias" [*outer]} of a linear layer, initialised as in torch."""
  fan = math.prod(inner)
  parts = {"kernel": (*inner, *outer), "bias": outer}
  return {k: uniform(key, f"{name}/{k}", shape, fan) for k, shape in parts.items()}
