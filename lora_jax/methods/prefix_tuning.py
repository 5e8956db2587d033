"""Prefix tuning: learned keys and values before the text in every layer (Li & Liang 2021,
https://arxiv.org/abs/2101.00190, section 4).

The keys enter attention without rotation, and the positions of the text begin after them.

An encoder-decoder has a prefix in its decoder, as in PEFT, so the encoder's reading of the text is unchanged. With
`encoder=True` the encoder also has a prefix, as in figure 2. With `cross=True` the decoder's attention to the encoder
also has one.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from lora_jax import errors, tree, weights
from lora_jax.methods import p_tuning
from lora_jax.model import layers
from lora_jax.values import Count, NonNegative

KIND = "soft prompts"
OPTIM = {"learning_rate": 8e-5}  # the paper's table 5, E2E
STARTS = "every layer attends to keys that the model has not seen"
MERGES = False


@struct.dataclass
class Prefix(weights.Added):
  """Keys and values, float32 [L, P, K, H]; `cross` is {"k", "v"} for attention to an encoder, or {}."""

  k: jax.Array
  v: jax.Array
  cross: dict = struct.field(default_factory=dict)

  def __call__(self) -> dict[str, dict[str, jax.Array]]:
    """Returns {"attn": {"k", "v"}}, and "cross" if there is one; all are float32 [L, P, K, H]."""
    return {"attn": {"k": self.k, "v": self.v}} | ({"cross": self.cross} if self.cross else {})

  @property
  def length(self) -> int:
    """P, the number of keys in a layer."""
    return self.k.shape[-3]


@struct.dataclass
class Projected(weights.Added):
  """Keys and values that two linear layers with tanh between them compute (section 4.3 of the paper).

  Fields, all float32:
    embedding: [P, D].
    down: {"kernel" [D, C], "bias" [C]}.
    up: {"kernel" [C, L, S, K, H], "bias" [L, S, K, H]}: keys, then values; S is 2, or 4 with cross-attention.
  """

  embedding: jax.Array
  down: dict
  up: dict

  def __call__(self) -> dict[str, dict[str, jax.Array]]:
    """Returns what `Prefix` returns."""
    return self.bake()()

  @property
  def length(self) -> int:
    """P, the number of keys in a layer."""
    return self.embedding.shape[-2]

  def bake(self) -> Prefix:
    """Returns the computed `Prefix`, without the network."""
    with jax.default_matmul_precision("highest"):
      h = jnp.tanh(layers.linear("PD,DC->PC", self.embedding, self.down))
      k, v, *cross = jnp.einsum("PC,CLSKH->SLPKH", h, self.up["kernel"]) + self.up["bias"].swapaxes(0, 1)[:, :, None]
    return Prefix(k, v, dict(zip("kv", cross, strict=False)))


def init(
  key: jax.Array,
  params: Any,
  *,
  length: Count = 20,
  mlp: bool = False,
  hidden: Count = 512,
  std: NonNegative = 0.02,
  cross: bool = False,
  encoder: bool = False,
) -> tuple[Any, Any]:
  """Adds a `Prefix`, or a `Projected` with `mlp`.

  Args:
    length: P.
    mlp: compute keys and values from embeddings [P, D] with a network. It trains more stably, and it is dropped when
      the adapter is saved. It is initialised as in PEFT: embeddings normal, other leaves uniform in +-1/sqrt(fan).
    hidden: width of that network.
    std: standard deviation of keys and values without `mlp`. PEFT uses 1, which drowns out the text at first.
    cross: for an encoder-decoder, also prepend keys and values to those of the encoder's states, in every layer.
    encoder: for an encoder-decoder, also add a prefix to the encoder, which has its own network if `mlp`.

  Returns:
    (params, mask): True at `prefix/...` and `encoder/prefix/...`, float32.
  """
  for k, value in (("length", length), ("hidden", hidden)):
    if not isinstance(value, int) or value < 1:
      raise errors.UserError(f"config.method.{k}={value!r} must be a whole number, at least 1")
  for k in (k for k, value in (("cross", cross), ("encoder", encoder)) if value and "encoder" not in params):
    raise errors.UserError(f"config.method.{k}=True is for encoder-decoders, and the model has no separate encoder")
  if "prefix" in params:
    raise errors.UserError("config.method: one prefix can be trained, not two")
  D = params["embed"]["kernel"].shape[1]

  def make(name, stack, parts):
    L, K, H = sizes(stack)
    normal = lambda part, *shape: jax.random.normal(tree.fold(key, f"{name}/{part}"), shape)
    if not mlp:
      k, v, *rest = (std * normal(part, L, length, K, H) for part in parts)
      return Prefix(k, v, dict(zip("kv", rest, strict=False)))
    down = p_tuning.dense(key, f"{name}/down", (D,), (hidden,))
    up = p_tuning.dense(key, f"{name}/up", (hidden,), (L, len(parts), K, H))
    return Projected(normal("embedding", length, D), down, up)

  own, across = ("k", "v"), ("cross/k", "cross/v")
  added = {"prefix": make("prefix", params, own + across if cross else own)}
  if encoder:
    stack = params["encoder"]
    added["encoder"] = stack | {"prefix": make("encoder/prefix", stack, own)}
  params = params | added
  return params, tree.map_named(lambda k, _: k.startswith(("prefix/", "encoder/prefix/")), params)


def sizes(params: Any) -> tuple[int, int, int]:
  """Returns (layers, key heads, head size) of a model's tree."""
  attn = params["layers"]["attn"]
  if "qkv" not in attn:
    L, _, K, H = attn["k"]["kernel"].shape
    return L, K, H
  L, _, M, H = attn["qkv"]["kernel"].shape
  return L, (M - attn["o"]["kernel"].shape[1]) // 2, H
