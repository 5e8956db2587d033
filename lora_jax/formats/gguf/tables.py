"""llama.cpp's names for the fields and tensors of each architecture, and the changes that its converter makes.

Names are from `gguf.constants`; the layouts follow from https://github.com/ggml-org/llama.cpp, conversion/.
"""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Architecture:
  """One kind of model.

  Fields:
    config: entries of config.json that a file does not state.
    numbers: {metadata key: key of config.json}, all required and positive.
    tensors: {name stem in the file: name stem in Hugging Face's layout}. The first `{}` stands for the layer. A second
      `{}` on the right stands for the expert, since the file stacks the matrices of experts.
    optional: like `numbers`, but may be absent or zero if the model lacks the feature.
    other: further metadata keys that are read.
    changes: {name stem: how the tensor differs from Hugging Face's}. "unpermute q" and "unpermute k": rows of a head
      are interleaved. "minus one": a norm's scale is stored as 1 + weight. "transpose": it is transposed. "interleave":
      q, k and v are stacked, not side by side in each head.
    factors: tensors that divide the frequencies of RoPE.
    causal: whether a token sees only the tokens before it.
  """

  config: Mapping
  numbers: Mapping[str, str]
  tensors: Mapping[str, str]
  optional: Mapping[str, str] = dataclasses.field(default_factory=dict)
  other: tuple[str, ...] = ()
  changes: Mapping[str, str] = dataclasses.field(default_factory=dict)
  factors: tuple[str, ...] = ()
  causal: bool = True


def _of(model_type: str, name: str, **more) -> dict:
  return {"model_type": model_type, "architectures": [name], **more}


def _layer(prefix: str, names: Mapping[str, str], block: str = "blk.{}.") -> dict[str, str]:
  return {block + k: prefix + v for k, v in names.items()}


# Only older T5 models have it, and they do not use it.
IGNORED_TENSORS = {"dec.blk.{}.cross_attn_rel_b"}
YARN = {
  "rope.scaling.original_context_length": "original_max_position_embeddings",
  "rope.scaling.yarn_attn_factor": "attention_factor",
  "rope.scaling.yarn_beta_fast": "beta_fast",
  "rope.scaling.yarn_beta_slow": "beta_slow",
}
ROPE = (
  *("attention.head_count_kv", "attention.key_length", "attention.value_length", "rope.dimension_count"),
  *("rope.freq_base", "rope.scale_linear", "rope.scaling.type", "rope.scaling.factor", *YARN),
)
SIZES = {
  "embedding_length": "hidden_size",
  "feed_forward_length": "intermediate_size",
  "block_count": "num_hidden_layers",
  "attention.head_count": "num_attention_heads",
  "context_length": "max_position_embeddings",
}
DECODER = SIZES | {"attention.layer_norm_rms_epsilon": "rms_norm_eps"}
WINDOW = {"attention.sliding_window": "sliding_window"}

ENDS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
ATTENTION = {f"attn_{k}": f"self_attn.{k}_proj" for k in "qkv"} | {"attn_output": "self_attn.o_proj"}
MLP = {f"ffn_{k}": f"mlp.{k}_proj" for k in ("gate", "up", "down")}
QK_NORM = {f"attn_{k}_norm": f"self_attn.{k}_norm" for k in "qk"}
LLAMA = ENDS | _layer("model.layers.{}.", NORMS | ATTENTION | MLP)
MIXTRAL_MOE = {"ffn_gate_inp": "block_sparse_moe.gate"} | {
  f"ffn_{k}_exps": f"block_sparse_moe.experts.{{}}.{w}" for k, w in (("gate", "w1"), ("down", "w2"), ("up", "w3"))
}
QWEN3_MOE = {"ffn_gate_inp": "mlp.gate"} | {
  f"ffn_{k}_exps": f"mlp.experts.{{}}.{k}_proj" for k in ("gate", "up", "down")
}
SANDWICH = {
  "attn_norm": "input_layernorm",
  "post_attention_norm": "post_attention_layernorm",
  "ffn_norm": "pre_feedforward_layernorm",
  "post_ffw_norm": "post_feedforward_layernorm",
}
GEMMA2 = ENDS | _layer("model.layers.{}.", SANDWICH | ATTENTION | MLP)
GEMMA3 = GEMMA2 | _layer("model.layers.{}.", QK_NORM)
PHI3 = ENDS | _layer(
  "model.layers.{}.",
  NORMS
  | {"attn_qkv": "self_attn.qkv_proj", "attn_output": "self_attn.o_proj"}
  | {"ffn_up": "mlp.gate_up_proj", "ffn_down": "mlp.down_proj"},
)
GPT2 = {
  "token_embd": "transformer.wte",
  "position_embd": "transformer.wpe",
  "output_norm": "transformer.ln_f",
  "output": "lm_head",
} | _layer(
  "transformer.h.{}.",
  {"attn_norm": "ln_1", "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj"}
  | {"ffn_norm": "ln_2", "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"},
)
GPT_NEOX = {
  "token_embd": "gpt_neox.embed_in",
  "output_norm": "gpt_neox.final_layer_norm",
  "output": "embed_out",
} | _layer(
  "gpt_neox.layers.{}.",
  NORMS
  | {"attn_qkv": "attention.query_key_value", "attn_output": "attention.dense"}
  | {"ffn_up": "mlp.dense_h_to_4h", "ffn_down": "mlp.dense_4h_to_h"},
)
EMBEDDINGS = {
  "token_embd": "embeddings.word_embeddings",
  "position_embd": "embeddings.position_embeddings",
  "token_embd_norm": "embeddings.LayerNorm",
}
BERT = (
  EMBEDDINGS
  | {"token_types": "embeddings.token_type_embeddings"}
  | _layer(
    "encoder.layer.{}.",
    {f"attn_{k[0]}": f"attention.self.{k}" for k in ("query", "key", "value")}
    | {"attn_output": "attention.output.dense", "attn_output_norm": "attention.output.LayerNorm"}
    | {"ffn_up": "intermediate.dense", "ffn_down": "output.dense", "layer_output_norm": "output.LayerNorm"},
  )
)
DISTILBERT = EMBEDDINGS | _layer(
  "transformer.layer.{}.",
  {f"attn_{k}": f"attention.{k}_lin" for k in "qkv"}
  | {"attn_output": "attention.out_lin", "attn_output_norm": "sa_layer_norm"}
  | {"ffn_up": "ffn.lin1", "ffn_down": "ffn.lin2", "layer_output_norm": "output_layer_norm"},
)


def _t5_attention(layer: str, name: str) -> dict[str, str]:
  return {f"attn_{k}": f"{layer}.{name}.{k}" for k in "qkvo"} | {"attn_norm": f"{layer}.layer_norm"}


def _t5_mlp(layer: str) -> dict[str, str]:
  dense = f"{layer}.DenseReluDense"
  return {"ffn_norm": f"{layer}.layer_norm", "ffn_gate": f"{dense}.wi_0", "ffn_up": f"{dense}.wi_1"} | {
    "ffn_down": f"{dense}.wo"
  }


_SELF = _t5_attention("layer.0", "SelfAttention") | {"attn_rel_b": "layer.0.SelfAttention.relative_attention_bias"}
_CROSS = {f"cross_{k}": v for k, v in _t5_attention("layer.1", "EncDecAttention").items()}
T5 = {
  "token_embd": "shared",
  "output": "lm_head",
  "enc.output_norm": "encoder.final_layer_norm",
  "dec.output_norm": "decoder.final_layer_norm",
  **_layer("encoder.block.{}.", _SELF | _t5_mlp("layer.1"), "enc.blk.{}."),
  **_layer("decoder.block.{}.", _SELF | _CROSS | _t5_mlp("layer.2"), "dec.blk.{}."),
}
# Without a gate the only matrix is `wi`.
T5_UNGATED = {k: v.replace(".wi_1", ".wi") for k, v in T5.items() if not k.endswith("ffn_gate")}

LLAMA_CHANGES = {f"blk.{{}}.attn_{k}": f"unpermute {k}" for k in "qk"}


def _gemma_changes(tensors: Mapping[str, str]) -> dict[str, str]:
  return {k: "minus one" for k in tensors if k.endswith("_norm")}


TANH = {"hidden_activation": "gelu_pytorch_tanh"}
SILU = {"hidden_act": "silu"}
LLAMA_ARCHITECTURE = Architecture(
  _of("llama", "LlamaForCausalLM", **SILU),
  DECODER,
  LLAMA,
  other=ROPE,
  changes=LLAMA_CHANGES,
  factors=("rope_freqs.weight",),
)
ARCHITECTURES = {
  "llama": LLAMA_ARCHITECTURE,
  "qwen2": Architecture(_of("qwen2", "Qwen2ForCausalLM", **SILU), DECODER, LLAMA, other=ROPE),
  "qwen3": Architecture(
    _of("qwen3", "Qwen3ForCausalLM", **SILU), DECODER, LLAMA | _layer("model.layers.{}.", QK_NORM), other=ROPE
  ),
  "qwen3moe": Architecture(
    # llama.cpp always scales the weights of a token's experts to sum to one.
    _of("qwen3_moe", "Qwen3MoeForCausalLM", **SILU, norm_topk_prob=True),
    {k: v for k, v in DECODER.items() if k != "feed_forward_length"}
    | {"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"}
    | {"expert_feed_forward_length": "moe_intermediate_size"},
    ENDS | _layer("model.layers.{}.", NORMS | ATTENTION | QK_NORM | QWEN3_MOE),
    optional={"feed_forward_length": "intermediate_size"},
    other=ROPE,
  ),
  "gemma": Architecture(
    _of("gemma", "GemmaForCausalLM", hidden_act="gelu_pytorch_tanh"),
    DECODER,
    LLAMA,
    other=ROPE,
    changes=_gemma_changes(LLAMA),
  ),
  "gemma2": Architecture(
    _of("gemma2", "Gemma2ForCausalLM", **TANH),
    DECODER,
    GEMMA2,
    optional=WINDOW
    | {"attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping"},
    other=(*ROPE, "attention.sliding_window_pattern"),
    changes=_gemma_changes(GEMMA2),
  ),
  "gemma3": Architecture(
    _of("gemma3_text", "Gemma3ForCausalLM", **TANH),
    DECODER,
    GEMMA3,
    optional=WINDOW
    | {"final_logit_softcapping": "final_logit_softcapping", "rope.freq_base_swa": "rope_local_base_freq"},
    other=(*ROPE, "attention.sliding_window_pattern"),
    changes=_gemma_changes(GEMMA3),
  ),
  "phi3": Architecture(
    _of("phi3", "Phi3ForCausalLM", **SILU),
    DECODER,
    PHI3,
    optional=WINDOW | {"rope.scaling.original_context_length": "original_max_position_embeddings"},
    other=(*ROPE, "rope.scaling.attn_factor"),
    factors=("rope_factors_long.weight", "rope_factors_short.weight"),
  ),
  "gpt2": Architecture(
    _of("gpt2", "GPT2LMHeadModel", activation_function="gelu_new"),
    {"embedding_length": "n_embd", "feed_forward_length": "n_inner", "block_count": "n_layer"}
    | {"attention.head_count": "n_head", "context_length": "n_positions"}
    | {"attention.layer_norm_epsilon": "layer_norm_epsilon"},
    GPT2,
    other=("attention.head_count_kv",),
    changes={f"blk.{{}}.{k}": "transpose" for k in ("attn_qkv", "attn_output", "ffn_up", "ffn_down")},
  ),
  "gptneox": Architecture(
    _of("gpt_neox", "GPTNeoXForCausalLM", hidden_act="gelu"),
    SIZES | {"attention.layer_norm_epsilon": "layer_norm_eps"},
    GPT_NEOX,
    optional={"rope.freq_base": "rotary_emb_base"},
    other=("rope.dimension_count", "use_parallel_residual", "attention.head_count_kv"),
    changes={"blk.{}.attn_qkv": "interleave"},
  ),
  "bert": Architecture(
    _of("bert", "BertModel", hidden_act="gelu"),
    SIZES | {"attention.layer_norm_epsilon": "layer_norm_eps"},
    BERT,
    other=("attention.head_count_kv",),
    causal=False,
  ),
  "t5": Architecture(
    _of("t5", "T5ForConditionalGeneration", feed_forward_proj="gated-gelu"),
    {"embedding_length": "d_model", "feed_forward_length": "d_ff", "block_count": "num_layers"}
    | {"attention.head_count": "num_heads", "attention.key_length": "d_kv", "context_length": "n_positions"}
    | {"attention.layer_norm_epsilon": "layer_norm_epsilon"}
    | {"attention.relative_buckets_count": "relative_attention_num_buckets"},
    T5,
    optional={"decoder_block_count": "num_decoder_layers"},
    other=("attention.head_count_kv", "attention.value_length")
    + ("attention.layer_norm_rms_epsilon", "decoder_start_token_id"),
  ),
}
# Hugging Face's model types that share an architecture of llama.cpp.
MISTRAL = dataclasses.replace(
  LLAMA_ARCHITECTURE,
  config=_of("mistral", "MistralForCausalLM", **SILU),
  numbers=DECODER | WINDOW,
)
MIXTRAL = dataclasses.replace(
  LLAMA_ARCHITECTURE,
  config=_of("mixtral", "MixtralForCausalLM", **SILU),
  numbers=DECODER | {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
  tensors=ENDS | _layer("model.layers.{}.", NORMS | ATTENTION | MIXTRAL_MOE),
  optional=WINDOW,
)
DISTILBERT_ARCHITECTURE = dataclasses.replace(
  ARCHITECTURES["bert"],
  config=_of("distilbert", "DistilBertModel", activation="gelu"),
  numbers={"embedding_length": "dim", "feed_forward_length": "hidden_dim", "block_count": "n_layers"}
  | {"attention.head_count": "n_heads", "context_length": "max_position_embeddings"},
  tensors=DISTILBERT,
  other=("attention.head_count_kv", "attention.layer_norm_epsilon"),
)
UNGATED = dataclasses.replace(
  ARCHITECTURES["t5"],
  config=_of("t5", "T5ForConditionalGeneration", feed_forward_proj="relu"),
  tensors=T5_UNGATED,
)


def choose(name: str, keys: Mapping, tensors: Mapping) -> Architecture:
  """The architecture of a file, from its name in `ARCHITECTURES`, its metadata keys and its tensor names."""
  if name == "llama" and keys.get("expert_count"):
    return MIXTRAL
  if name == "llama" and keys.get("attention.sliding_window"):
    return MISTRAL
  if name == "bert" and "token_types.weight" not in tensors:
    return DISTILBERT_ARCHITECTURE
  if name == "t5" and "enc.blk.0.ffn_gate.weight" not in tensors:
    return UNGATED
  return ARCHITECTURES[name]
