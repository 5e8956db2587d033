"""Qwen3 with a mixture of experts in every layer (Yang et al. 2025, https://arxiv.org/abs/2505.09388)."""

from collections.abc import Mapping
from typing import Any

from lora_jax.families import Key, llama, mixtral, norm
from lora_jax.model import transformer

ARCHITECTURES = {head: name.replace("Llama", "Qwen3Moe") for head, name in llama.ARCHITECTURES.items()}
PREFIX, IGNORED = llama.PREFIX, llama.IGNORED
KEYS = (
  *mixtral.SHARED,
  *norm("layers/attn/q_norm", "model.layers.{}.self_attn.q_norm"),
  *norm("layers/attn/k_norm", "model.layers.{}.self_attn.k_norm"),
  Key("layers/moe/router/kernel", "model.layers.{}.mlp.gate.weight", "e d -> d e"),
  Key("layers/moe/gate/kernel", "model.layers.{}.mlp.experts.{}.gate_proj.weight", "f d -> d f"),
  Key("layers/moe/up/kernel", "model.layers.{}.mlp.experts.{}.up_proj.weight", "f d -> d f"),
  Key("layers/moe/down/kernel", "model.layers.{}.mlp.experts.{}.down_proj.weight", "d f -> f d"),
)
# Without `layer_types` transformers reads `max_window_layers` nowhere: all layers are local or none.
HANDLED = [
  *mixtral.HANDLED,
  *("attention_bias", "use_sliding_window", "max_window_layers", "moe_intermediate_size", "norm_topk_prob"),
]
DEFAULT = llama.DEFAULT | {"decoder_sparse_step": 1, "mlp_only_layers": []}
ABSENT = {"num_key_value_heads": 4, "max_position_embeddings": 32768, "intermediate_size": 6144}  # as in transformers


def config(hf: Mapping) -> transformer.Config:
  """`transformer.Config` of a `Qwen3MoeConfig` as a dict; UserError for what it does not support."""
  return llama.decoder(
    ABSENT | dict(hf),
    HANDLED,
    DEFAULT,
    attn_bias="all" if hf.get("attention_bias") else "none",
    qk_norm=True,
    window=hf.get("sliding_window", 4096) if hf.get("use_sliding_window") else None,
    d_ff=hf.get("moe_intermediate_size", 768),
    n_experts=hf.get("num_experts") or hf.get("num_local_experts") or 128,
    experts_per_token=hf.get("num_experts_per_tok", 8),
    norm_topk=bool(hf.get("norm_topk_prob")),
  )


def view(tensors: Any) -> Any:
  """The tensors of a file under the names of `KEYS`, see `mixtral.unfuse`."""
  return mixtral.unfuse(tensors, "mlp", ("gate_proj", "up_proj", "down_proj"))
