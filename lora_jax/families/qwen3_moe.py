"""Qwen3 with a mixture of experts in every layer (Yang et al. 2025, https://arxiv.org/abs/2505.09388)."""

from typing import Any

from lora_jax.families import Key, llama, mixtral, norm
from lora_jax.families.config_json.option import flag, number, optional, switched

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
TABLE = llama.DECODER.but(
  "qwen3_moe",
  ARCHITECTURES,
  flag("attn_bias", "attention_bias", "all", "none"),
  switched("window", "use_sliding_window", "sliding_window"),
  number("d_ff", "moe_intermediate_size"),
  optional("n_experts", "num_experts", "num_local_experts", null=128),
  number("experts_per_token", "num_experts_per_tok"),
  flag("norm_topk", "norm_topk_prob"),
  absent={
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "moe_intermediate_size": 768,
    "num_experts_per_tok": 8,
  },
  fixed={"qk_norm": True},
  default={"decoder_sparse_step": 1, "mlp_only_layers": []},
  # No layer is dense. Without `layer_types`, transformers ignores `max_window_layers`: all layers are local or none.
  ignored=(*mixtral.TABLE.ignored, "intermediate_size", "max_window_layers"),
)
config, hf_config = TABLE.config, TABLE.hf_config


def view(tensors: Any) -> Any:
  """Returns the tensors of a file under the names of `KEYS`, see `mixtral.unfuse`."""
  return mixtral.unfuse(tensors, "mlp", ("gate_proj", "up_proj", "down_proj"))
