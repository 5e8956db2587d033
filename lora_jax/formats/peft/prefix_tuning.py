"""`prefix_tuning` in the `peft` library's format."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import einops
import jax.numpy as jnp
import numpy as np

from lora_jax import errors
from lora_jax.formats.peft import layout, prompt_tuning
from lora_jax.methods import prefix_tuning

TYPE = "PREFIX_TUNING"
HOLDS = ("prefix",)  # entries of the tree beside kernels
_ROW = "l s p k h -> p (l s k h)"  # a row is the keys, then the values, of one layer after the other


def to_peft(
  params: Any, keys: Sequence[Any], trained: Collection[str] = ()
) -> tuple[dict, dict[str, np.ndarray]] | None:
  """(adapter config, {"prompt_embeddings": [P, n 2 K H]}) of a prefix, computed where it is `Projected`.

  n is the number of layers but for encoder-decoders. There PEFT 0.21 splits its table, twice over, as if keys and
  values for cross-attention were between those of two layers, and then drops these: layer i gets what is number
  2i mod n. With n as PEFT sets it, the number of layers of the encoder, layers i and i + n/2 share theirs if it is even
  and every other one is never used. With the odd n that is written here each layer has its own; one left over is zero.

  Raises:
    UserError: an encoder has a prefix, or cross-attention, which PEFT has no place for.
  """
  if "prefix" not in params:
    return None
  prefix = params["prefix"]()
  if "cross" in prefix or "prefix" in params.get("encoder", {}):
    raise errors.UserError("PEFT has no prefix of an encoder or of attention to it")
  both = np.stack([np.asarray(prefix["attn"][name], np.float32) for name in "kv"], 1)
  L, _, P, K, H = both.shape
  stacks, n = (2, L | 1) if "encoder" in params else (1, L)
  table = np.zeros((n, *both.shape[1:]), np.float32)
  table[_rows(L, n, stacks)] = both
  config = {
    "peft_type": TYPE,
    "num_virtual_tokens": P,
    "token_dim": K * H,
    "num_transformer_submodules": stacks,
    "num_attention_heads": K,
    "num_layers": n,
    "prefix_projection": False,
  }
  return config, {"prompt_embeddings": einops.rearrange(table, _ROW)}


def _rows(layers: int, n: int, stacks: int) -> np.ndarray:
  """Which of the n keys and values of PEFT's table each layer has."""
  return stacks * np.arange(layers) % n


def from_peft(params: Any, keys: Sequence[Any], config: Mapping, left: dict[str, np.ndarray], wrong: list[str]) -> Any:
  """The inverse of `to_peft`: `params` with a `prefix_tuning.Prefix`; see formats/peft."""
  rows, columns = prompt_tuning.size(left)
  L, K, H = prefix_tuning.sizes(params)
  P, encoder = config.get("num_virtual_tokens") or rows, "encoder" in params
  n = max(L, columns // (2 * K * H)) if encoder else L
  table = layout.take(left, wrong, "prompt_embeddings", (P, n * 2 * K * H))
  ours, theirs = _ROW.split(" -> ")
  both = einops.rearrange(table, f"{theirs} -> {ours}", l=n, s=2, k=K, h=H)
  both = both[_rows(L, n, config.get("num_transformer_submodules") or 1 + encoder)]
  return params | {"prefix": prefix_tuning.Prefix(jnp.asarray(both[:, 0]), jnp.asarray(both[:, 1]))}
