"""Mixtral: Mistral with a mixture of experts (Jiang et al. 2024, https://arxiv.org/abs/2401.04088)."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lora_jax import families
from lora_jax.families import Key, llama
from lora_jax.families.reading import tensor_names
from lora_jax.model import transformer

ARCHITECTURES = {head: name.replace("Llama", "Mixtral") for head, name in llama.ARCHITECTURES.items()}
PREFIX, IGNORED = llama.PREFIX, llama.IGNORED
SHARED = tuple(k for k in llama.KEYS if "/mlp/" not in k.path)
KEYS = (
  *SHARED,
  Key("layers/moe/router/kernel", "model.layers.{}.block_sparse_moe.gate.weight", "e d -> d e"),
  Key("layers/moe/gate/kernel", "model.layers.{}.block_sparse_moe.experts.{}.w1.weight", "f d -> d f"),
  Key("layers/moe/up/kernel", "model.layers.{}.block_sparse_moe.experts.{}.w3.weight", "f d -> d f"),
  Key("layers/moe/down/kernel", "model.layers.{}.block_sparse_moe.experts.{}.w2.weight", "d f -> f d"),
)
# The router's noise and loss are of pretraining.
HANDLED = (
  "sliding_window num_local_experts num_experts num_experts_per_tok output_router_logits router_aux_loss_coef "
  "router_jitter_noise"
).split()
ABSENT = {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072}  # as in transformers


def config(hf: Mapping) -> transformer.Config:
  """`transformer.Config` of a `MixtralConfig` as a dict; UserError for what it does not support."""
  families.check(hf)
  return llama.decoder(
    ABSENT | dict(hf),
    HANDLED,
    window=hf.get("sliding_window"),
    n_experts=hf.get("num_local_experts") or hf.get("num_experts") or 8,
    experts_per_token=hf.get("num_experts_per_tok", 2),
    **families.rope(hf, theta=1e6),
  )


def view(tensors: Any) -> Any:
  """The tensors of a file under the names of `KEYS`, see `unfuse`."""
  return unfuse(tensors, "block_sparse_moe", ("w1", "w3", "w2"))


def unfuse(tensors: Any, block: str, parts: Sequence[str]) -> Any:
  """A tensor an expert, where transformers wrote those of a layer as one (`save_original_format=False`).

  Args:
    block: what the names of the layer's tensors have in place of `mlp`.
    parts: what an expert's gate, up and down are called.
  """
  found = {}
  for k in tensors.names():
    fused = re.fullmatch(r"(.*)\.mlp\.experts\.(gate_up_proj|down_proj)", k)
    shape = tensors.shape(k)
    if fused is None or len(shape) != 3:
      found[k.replace(".mlp.gate.", f".{block}.gate.")] = k, ()
      continue
    half = shape[1] // 2
    rows = (
      {parts[0]: slice(half), parts[1]: slice(half, None)} if fused[2] == "gate_up_proj" else {parts[2]: slice(None)}
    )
    for part, at in rows.items():
      found |= {f"{fused[1]}.{block}.experts.{e}.{part}.weight": (k, (e, at)) for e in range(shape[0])}
  return tensor_names.View(tensors, found)
