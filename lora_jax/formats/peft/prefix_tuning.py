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
_ROW = "l s p k h -> p (l s k h)"  # a row holds layer after layer, the keys before the values


def to_peft(
  params: Any, keys: Sequence[Any], trained: Collection[str] = ()
) -> tuple[dict, dict[str, np.ndarray]] | None:
  """Returns (config, {"prompt_embeddings": [P, n 2 K H]}) of a prefix, or of the prefix that a `Projected` computes.

  n is the number of layers, except for encoder-decoders. There PEFT 0.21 repeats its table and splits it as if keys and
  values for cross-attention came after each layer's, and then drops those, so layer i gets entry 2i mod n. PEFT sets n
  to the number of layers of the encoder. If that is even, layers i and i + n/2 share an entry, and every other entry is
  unused. This function writes an odd n, so that each layer has its own entry; an entry left over is zero.

  Raises:
    UserError: the encoder or cross-attention has a prefix, which PEFT does not support.
  """
  if "prefix" not in params:
    return None
  prefix = params["prefix"]()
  if "cross" in prefix or "prefix" in params.get("encoder", {}):
    raise errors.UserError("PEFT does not support a prefix of an encoder or of attention to it")
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
  """Returns which of the n entries of PEFT's table each layer uses."""
  return stacks * np.arange(layers) % n


def from_peft(params: Any, keys: Sequence[Any], config: Mapping, left: dict[str, np.ndarray], wrong: list[str]) -> Any:
  """Inverts `to_peft`: returns `params` with a `prefix_tuning.Prefix`; see formats/peft."""
  rows, columns = prompt_tuning.size(left)
  L, K, H = prefix_tuning.sizes(params)
  P, encoder = config.get("num_virtual_tokens") or rows, "encoder" in params
  n = max(L, columns // (2 * K * H)) if encoder else L
  table = layout.take(left, wrong, "prompt_embeddings", (P, n * 2 * K * H))
  ours, theirs = _ROW.split(" -> ")
  both = einops.rearrange(table, f"{theirs} -> {ours}", l=n, s=2, k=K, h=H)
  both = both[_rows(L, n, config.get("num_transformer_submodules") or 1 + encoder)]
  return params | {"prefix": prefix_tuning.Prefix(jnp.asarray(both[:, 0]), jnp.asarray(both[:, 1]))}
