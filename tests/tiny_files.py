"""A tiny Llama with every file that a model can have, as a directory and as GGUF, written without transformers."""

import json

import gguf as ggml
import numpy as np
import tokenizers

from lora_jax.formats import hf

TEMPLATE = (
  "{% for m in messages %}{{ '<|' + m.role + '|>' + m['content'] | trim }}{% endfor %}{% if tools %}{{ tools|tojson }}"
  "{% endif %}{% if add_generation_prompt %}{{ bos_token }}{% endif %}"
)
MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a b"}]
CONFIG = {
  **{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 8, "hidden_size": 8},
  **{"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "rms_norm_eps": 1e-5},
  **{"intermediate_size": 8, "hidden_act": "silu", "max_position_embeddings": 64, "tie_word_embeddings": True},
  **{"rope_theta": 10000.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}, "attention_bias": False},
  **{"bos_token_id": 0, "eos_token_id": 1, "id2label": {"0": "a", "1": "b"}, "torch_dtype": "float32"},
}


def llama(directory):
  """A tiny Llama with all the files that one can have."""
  d, f, v, kv = 8, 8, 8, 4
  shapes = {"embed_tokens": (v, d), "norm": (d,)}
  p = "layers.0."
  shapes |= {p + "input_layernorm": (d,), p + "post_attention_layernorm": (d,)}
  shapes |= {p + f"self_attn.{k}_proj": s for k, s in {"q": (d, d), "k": (kv, d), "v": (kv, d), "o": (d, d)}.items()}
  shapes |= {p + f"mlp.{k}_proj": (f, d) if k != "down" else (d, f) for k in ("gate", "up", "down")}
  rng = np.random.default_rng(0)
  tensors = {f"model.{k}.weight": rng.standard_normal(s, np.float32) for k, s in shapes.items()}
  directory.mkdir()
  hf.save_tensors(directory / "model.safetensors", tensors)
  write(directory / "model.safetensors.index.json", {"weight_map": dict.fromkeys(tensors, "model.safetensors")})
  write(directory / "config.json", CONFIG)
  write(directory / "generation_config.json", {"eos_token_id": [1, 2], "bos_token_id": 0, "max_length": 20})
  vocab = {t: i for i, t in enumerate(["<s>", "</s>", "a", "b", "h", "i", "\u0120", "<|user|>"])}
  backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[("h", "i")] if "hi" in vocab else []))
  backend.normalizer = tokenizers.normalizers.Replace(tokenizers.Regex("c+"), "a")
  cut = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"\p{L}+|\s"), "isolated")
  byte = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([cut, byte])
  backend.decoder = tokenizers.decoders.ByteLevel()
  backend.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
  backend.add_special_tokens(["<s>", "</s>"])
  backend.save(str(directory / "tokenizer.json"))
  write(directory / "special_tokens_map.json", {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}})
  more = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 10**30, "pad_token": None}
  write(directory / "tokenizer_config.json", {"bos_token": "<s>", "chat_template": TEMPLATE, **more})
  return directory


def write(path, value):
  path.write_text(json.dumps(value))


METADATA = {
  **{"general.architecture": "llama", "llama.block_count": 1, "llama.context_length": 64, "llama.embedding_length": 8},
  **{"llama.feed_forward_length": 8, "llama.attention.head_count": 2, "llama.attention.head_count_kv": 1},
  **{"llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.rope.freq_base": 10000.0, "llama.rope.dimension_count": 4},
  **{"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0, "general.alignment": 32},
  **{"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.bos_token_id": 0},
  **{"tokenizer.ggml.tokens": ["<s>", "</s>", "h", "i", "hi", "a", "b", "c"], "tokenizer.ggml.merges": ["h i"]},
  **{"tokenizer.ggml.token_type": [3, 3, 1, 1, 1, 1, 1, 4], "tokenizer.ggml.scores": [0.0] * 8},
  **{"tokenizer.ggml.eos_token_id": 1, "tokenizer.chat_template": TEMPLATE, "tokenizer.ggml.add_bos_token": True},
}


def write_gguf(path, metadata):
  """A GGUF file of these fields, of whatever types they are; False where the format has no place for one."""
  w = ggml.GGUFWriter(path, "llama")
  kinds = {bool: w.add_bool, float: w.add_float64, str: w.add_string, list: w.add_array}
  try:
    for k, v in metadata.items():
      if k != "general.architecture":
        integer = w.add_uint32 if isinstance(v, int) and 0 <= v < 2**32 else w.add_int64
        kinds.get(type(v), integer)(k, v)
    if (name := metadata.get("general.architecture")) != "llama":
      del w.kv_data[0]["general.architecture"]
      kinds.get(type(name), w.add_int64)("general.architecture", name)
    for k, s in {"token_embd": (8, 8), "output_norm": (8,), "blk.0.attn_norm": (8,), "blk.0.ffn_norm": (8,)}.items():
      w.add_tensor(f"{k}.weight", np.ones(s, np.float32))
    for k, s in {"attn_q": (8, 8), "attn_k": (4, 8), "attn_v": (4, 8), "attn_output": (8, 8)}.items():
      w.add_tensor(f"blk.0.{k}.weight", np.ones(s, np.float32))
    for k in ("gate", "up", "down"):
      w.add_tensor(f"blk.0.ffn_{k}.weight", np.ones((8, 8), np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
  except Exception:
    return False
  finally:
    w.close()
  return True
