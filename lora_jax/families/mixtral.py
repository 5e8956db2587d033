"""Mixtral: Mistral with a mixture of experts (Jiang et al. 2024, https://arxiv.org/abs/2401.04088)."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lora_jax.families import Key, llama
from lora_jax.families.config_json import rotation
from lora_jax.families.config_json.option import Option, number, optional
from lora_jax.families.reading import tensor_names

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


def _rotation(hf: Mapping) -> dict:
  """Returns head size and rotation together, as transformers cannot scale a Mixtral's rotation without a head size."""
  head_dim = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]
  return {"head_dim": head_dim} | rotation.read(hf, theta=1e6)


TABLE = llama.DECODER.but(
  "mixtral",
  ARCHITECTURES,
  optional("window", "sliding_window"),
  optional("n_experts", "num_local_experts", "num_experts", null=8),
  number("experts_per_token", "num_experts_per_tok"),
  Option(
    ("head_dim", "rope_theta", "rope_scaling"),
    ("head_dim", *rotation.KEYS),
    _rotation,
    lambda c: {"head_dim": c.head_dim} | rotation.write(c),
  ),
  absent={
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "num_experts_per_tok": 2,
  },
  # The router's noise and loss are used only in pretraining.
  ignored=("output_router_logits", "router_aux_loss_coef", "router_jitter_noise"),
)
config, hf_config = TABLE.config, TABLE.hf_config


def view(tensors: Any) -> Any:
  """Returns the tensors of a file under the names of `KEYS`, see `unfuse`."""
  return unfuse(tensors, "block_sparse_moe", ("w1", "w3", "w2"))


def unfuse(tensors: Any, block: str, parts: Sequence[str]) -> Any:
  """Returns one tensor per expert for files whose experts transformers fused (`save_original_format=False`).

  Args:
    block: the name of the layer's module, which replaces `mlp`.
    parts: the names of an expert's gate, up and down.
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
