"""`prompt_tuning` in the `peft` library's format."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.formats.peft import layout
from lora_jax.methods import prompt_tuning

TYPE = "PROMPT_TUNING"
HOLDS = ("prompt",)  # entries of the tree beside kernels


def to_peft(
  params: Any, keys: Sequence[Any], trained: Collection[str] = ()
) -> tuple[dict, dict[str, np.ndarray]] | None:
  """Returns (config, {"prompt_embeddings": [P, D]}) of a `Prompt` with placement "prefix"; None for others.

  Its `scaled` must be False, which `prompts.unscaled` ensures.
  """
  return form(params, TYPE, prompt_tuning.Prompt)


def form(params: Any, kind: str, node: type) -> tuple[dict, dict[str, np.ndarray]] | None:
  """Returns the (config, tensors) of the table that a soft prompt of class `node` computes; see `to_peft`."""
  prompt = params.get("prompt")
  if not isinstance(prompt, node) or prompt.placement != "prefix":
    return None
  table = np.asarray(prompt(), np.float32)
  layers = params["layers"]["attn"]
  config = {
    "peft_type": kind,
    "num_virtual_tokens": len(table),
    "token_dim": table.shape[1],
    "num_transformer_submodules": 1,  # PEFT's encoder-decoders have two tables, but use only the first
    "num_attention_heads": layers["o"]["kernel"].shape[1],
    "num_layers": layers["o"]["kernel"].shape[0],
  }
  return config, {"prompt_embeddings": table}


def from_peft(params: Any, keys: Sequence[Any], config: Mapping, left: dict[str, np.ndarray], wrong: list[str]) -> Any:
  """Inverts `to_peft`: returns `params` with a `prompt_tuning.Prompt`; see formats/peft."""
  rows, _ = size(left)
  count = config.get("num_virtual_tokens") or rows
  shape = (rows if rows == 2 * count else count, params["embed"]["kernel"].shape[1])
  table = layout.take(left, wrong, "prompt_embeddings", shape)
  return params | {"prompt": prompt_tuning.Prompt(jnp.asarray(table[:count]))}


def size(tensors: Mapping[str, np.ndarray]) -> tuple[int, int]:
  """Returns (rows, columns) of the tensor of a prompt-learning adapter; zeros if it is missing or not a matrix."""
  shape = np.shape(tensors.get("prompt_embeddings", ()))
  return shape if len(shape) == 2 else (0, 0)
