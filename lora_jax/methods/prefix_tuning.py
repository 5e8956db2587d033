"""Prefix tuning: learned keys and values before the text in every layer (Li & Liang 2021,
https://arxiv.org/abs/2101.00190, section 4).

Keys enter attention as they are, not rotated; the positions of the text begin after them.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from lora_jax import errors, layers, tree
from lora_jax.methods import p_tuning, prompt_tuning

STARTS = "every layer attends to keys that the model has not seen"
MERGES = False


@struct.dataclass
class Prefix:
  """Keys and values, float32 [L, P, K, H]."""

  k: jax.Array
  v: jax.Array

  def __call__(self) -> dict[str, jax.Array]:
    """{"k", "v"}: [L, P, K, H]."""
    return {"k": self.k, "v": self.v}

  @property
  def length(self) -> int:
    """P, how many keys there are in a layer."""
    return self.k.shape[-3]


@struct.dataclass
class Projected:
  """Keys and values that two linear layers with tanh between them compute (section 4.3 of the paper).

  Fields, all float32:
    embedding: [P, D].
    down: {"kernel" [D, C], "bias" [C]}.
    up: {"kernel" [C, L, 2, K, H], "bias" [L, 2, K, H]}: keys, then values.
  """

  embedding: jax.Array
  down: dict
  up: dict

  def __call__(self) -> dict[str, jax.Array]:
    """{"k", "v"}: [L, P, K, H]."""
    with jax.default_matmul_precision("highest"):
      h = jnp.tanh(layers.linear("PD,DC->PC", self.embedding, self.down))
      k, v = jnp.einsum("PC,CLSKH->SLPKH", h, self.up["kernel"]) + self.up["bias"].swapaxes(0, 1)[:, :, None]
    return {"k": k, "v": v}

  @property
  def length(self) -> int:
    """P, how many keys there are in a layer."""
    return self.embedding.shape[-2]

  def bake(self) -> Prefix:
    """What it computes, without the network."""
    return Prefix(**self())


def init(
  key: jax.Array, params: Any, *, length: int = 20, mlp: bool = False, hidden: int = 512, std: float = 0.02
) -> tuple[Any, Any]:
  """Adds a `Prefix`, or a `Projected` one.

  Args:
    length: P.
    mlp: compute keys and values from embeddings [P, D] with a network of width `hidden`, which trains more stably and
      is dropped when the adapter is saved. Its initial values are those of PEFT: embeddings normal, the others uniform
      in +-1/sqrt(fan).
    std: standard deviation of keys and values without `mlp`. PEFT takes 1, which drowns the text at first.

  Returns:
    (params, mask): True at `prefix/...`, float32.

  Raises:
    UserError: the model is an encoder-decoder.
  """
  if "encoder" in params:
    raise errors.UserError("config.method: prefix tuning is for models of one stack, not for encoder-decoders")
  for k, value in (("length", length), ("hidden", hidden)):
    if not isinstance(value, int) or value < 1:
      raise errors.UserError(f"config.method.{k}={value!r} must be a whole number, at least 1")
  if "prefix" in params:
    raise errors.UserError("config.method: one prefix can be trained, not two")
  L, K, H = sizes(params)
  normal = lambda name, *shape: jax.random.normal(tree.fold(key, f"prefix/{name}"), shape)
  if mlp:
    D = params["embed"]["kernel"].shape[1]
    down = p_tuning.dense(key, "prefix/down", (D,), (hidden,))
    up = p_tuning.dense(key, "prefix/up", (hidden,), (L, 2, K, H))
    prefix = Projected(normal("embedding", length, D), down, up)
  else:
    prefix = Prefix(*(std * normal(name, L, length, K, H) for name in "kv"))
  params = params | {"prefix": prefix}
  return params, tree.map_named(lambda k, _: k.startswith("prefix/"), params)


def sizes(params: Any) -> tuple[int, int, int]:
  """(layers, heads of keys, size of a head) of a model's tree."""
  attn = params["layers"]["attn"]
  if "qkv" not in attn:
    L, _, K, H = attn["k"]["kernel"].shape
    return L, K, H
  L, _, M, H = attn["qkv"]["kernel"].shape
  return L, (M - attn["o"]["kernel"].shape[1]) // 2, H


PEFT_TYPE = "PREFIX_TUNING"
_ROW = "l s p k h -> p (l s k h)"  # a row is the keys, then the values, of one layer after the other


def to_peft(
  params: Any, keys: Sequence[Any], trained: Collection[str] = ()
) -> tuple[dict, dict[str, np.ndarray]] | None:
  """(adapter config, {"prompt_embeddings": [P, L 2 K H]}) of a prefix, computed where it is `Projected`."""
  if "prefix" not in params:
    return None
  k, v = (np.asarray(params["prefix"]()[name], np.float32) for name in "kv")
  L, P, K, H = k.shape
  config = {
    "peft_type": PEFT_TYPE,
    "num_virtual_tokens": P,
    "token_dim": K * H,
    "num_transformer_submodules": 1,
    "num_attention_heads": K,
    "num_layers": L,
    "prefix_projection": False,
  }
  return config, {"prompt_embeddings": einops.rearrange(np.stack([k, v], 1), _ROW)}


def from_peft(params: Any, keys: Sequence[Any], config: Mapping, tensors: Mapping[str, np.ndarray]) -> Any:
  """The inverse of `to_peft`: `params` with a `Prefix`; UserError lists what does not fit."""
  table = prompt_tuning.embeddings(tensors)
  if "encoder" in params:
    raise errors.UserError("a prefix of an encoder-decoder is not supported")
  L, K, H = sizes(params)
  P = config.get("num_virtual_tokens") or len(table)
  if table.shape != (P, L * 2 * K * H):
    raise errors.UserError(f"prompt_embeddings is {table.shape}, expected {(P, L * 2 * K * H)}")
  left, right = _ROW.split(" -> ")
  k, v = einops.rearrange(table.astype(np.float32), f"{right} -> s l p k h", l=L, s=2, k=K, h=H)
  return params | {"prefix": Prefix(jnp.asarray(k), jnp.asarray(v))}
