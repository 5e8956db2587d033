"""`p_tuning` in the `peft` library's format."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from lora_jax.formats.peft import prompt_tuning
from lora_jax.methods import p_tuning

TYPE = "P_TUNING"
HOLDS = ("prompt",)  # entries of the tree beside kernels
from_peft = prompt_tuning.from_peft


def to_peft(
  params: Any, keys: Sequence[Any], trained: Collection[str] = ()
) -> tuple[dict, dict[str, np.ndarray]] | None:
  """Returns (config, {"prompt_embeddings": [P, D]}) of the prompt that a `p_tuning.Encoder` computes; None without one
  or if its placement is not "prefix"."""
  found = prompt_tuning.form(params, TYPE, p_tuning.Encoder)
  if found is None:
    return None
  config, tensors = found
  prompt = params["prompt"]
  hidden = prompt.mlp[0]["kernel"].shape[1] // (2 if prompt.lstm else 1)
  kind = "LSTM" if prompt.lstm else "MLP"
  return config | {"encoder_reparameterization_type": kind, "encoder_hidden_size": hidden}, tensors
