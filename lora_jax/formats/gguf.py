"""GGUF files (llama.cpp): the configuration and the tensors, under Hugging Face's names and layouts.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian. The header
is parsed here, since `gguf.GGUFReader` makes arrays of each word of a vocabulary and takes seconds; the block
formats are decoded by `gguf.quants`.
"""

import dataclasses
import math
import os
import re
import struct
from typing import Any

import gguf
import numpy as np

from lora_jax import errors

MAGIC = b"GGUF"
STRING, ARRAY = 8, 9
SCALARS = dict(zip((*range(8), 10, 11, 12), "BbHhIif?Qqd", strict=True))  # value type -> struct format

# Architecture -> {name stem in the file: in Hugging Face's layout}; N stands for the layer.
ARCHITECTURES = {
  "llama": {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "blk.N.attn_norm": "model.layers.N.input_layernorm",
    "blk.N.attn_q": "model.layers.N.self_attn.q_proj",
    "blk.N.attn_k": "model.layers.N.self_attn.k_proj",
    "blk.N.attn_v": "model.layers.N.self_attn.v_proj",
    "blk.N.attn_output": "model.layers.N.self_attn.o_proj",
    "blk.N.ffn_norm": "model.layers.N.post_attention_layernorm",
    "blk.N.ffn_gate": "model.layers.N.mlp.gate_proj",
    "blk.N.ffn_up": "model.layers.N.mlp.up_proj",
    "blk.N.ffn_down": "model.layers.N.mlp.down_proj",
  }
}
ROPE_FACTORS = "rope_freqs.weight"

LLAMA_KEYS = {
  "embedding_length": "hidden_size",
  "feed_forward_length": "intermediate_size",
  "block_count": "num_hidden_layers",
  "attention.head_count": "num_attention_heads",
  "attention.layer_norm_rms_epsilon": "rms_norm_eps",
  "context_length": "max_position_embeddings",
}
FLOATS = {"attention.layer_norm_rms_epsilon", "rope.freq_base"}
YARN = {
  "rope.scaling.original_context_length": "original_max_position_embeddings",
  "rope.scaling.yarn_beta_fast": "beta_fast",
  "rope.scaling.yarn_beta_slow": "beta_slow",
}
LLAMA_OPTIONAL = {
  *("vocab_size", "tensor_data_layout", "rope.dimension_count", "rope.freq_base", "rope.scale_linear"),
  *("attention.head_count_kv", "attention.key_length", "attention.value_length"),
  *("rope.scaling.type", "rope.scaling.factor", "rope.scaling.finetuned", *YARN),
}


@dataclasses.dataclass(frozen=True)
class Tensor:
  """Where one tensor lies: its name in the file, shape, block format, and bytes [start, start + nbytes)."""

  name: str
  shape: tuple[int, ...]
  type: gguf.GGMLQuantizationType
  start: int
  nbytes: int


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """An open GGUF file: nothing is decoded before `read`.

  Fields:
    path: the file.
    metadata: its key/value fields.
    config: what Hugging Face's config.json would say. Llama 3's rope scaling is stored as numbers, not as a
      formula: rope_scaling {"rope_type": "factors", "factors": [head_dim / 2 floats]}, which divide the
      inverse frequencies.
    tensors: where each tensor lies, by its Hugging Face name.
    data: the mapped bytes of the whole file.
  """

  path: str
  metadata: dict[str, Any]
  config: dict[str, Any]
  tensors: dict[str, Tensor]
  data: np.ndarray

  def names(self) -> list[str]:
    """Hugging Face tensor names, in file order."""
    return list(self.tensors)

  def shape(self, name: str) -> tuple[int, ...]:
    """The shape of `read(name)`: (out, in) for a projection."""
    return errors.choose(name, self.tensors, f"tensor of {self.path}").shape

  def read(self, name: str) -> np.ndarray:
    """One tensor as float32, rows of q and k in Hugging Face's order; a copy, not a view of the file."""
    tensor = errors.choose(name, self.tensors, f"tensor of {self.path}")
    w = _decode(self.path, self.data, tensor)
    if ".q_proj." in name:
      return _unpermute(w, self.config["num_attention_heads"])
    if ".k_proj." in name:
      return _unpermute(w, self.config["num_key_value_heads"])
    return w


def open(path: str | os.PathLike) -> Checkpoint:
  """Opens a GGUF file and checks its header, tensor names and extent.

  Raises:
    UserError: no readable, whole GGUF file; an architecture, metadata key or tensor that is not known.
  """
  path = os.fspath(path)
  data, metadata, tensors = _load(path)
  names = errors.choose(str(metadata.get("general.architecture")), ARCHITECTURES, f"architecture in {path}:")
  if (parts := metadata.get("split.count", 1)) != 1:
    raise errors.UserError(f"{path} is one of {parts} parts; join them with `llama-gguf-split --merge`")
  factors = tensors.pop(ROPE_FACTORS, None)
  renamed = {k: _rename(k, names) for k in tensors}
  if unknown := sorted(k for k, v in renamed.items() if v is None):
    raise errors.UserError(f"{path} has tensors that are not understood: {', '.join(unknown)}")
  by_name = {renamed[k]: t for k, t in tensors.items()}
  config = _llama_config(path, metadata, by_name)
  if factors is not None:
    if config["rope_scaling"]:
      raise errors.UserError(f"{path} has both llama.rope.scaling and {ROPE_FACTORS}; expected one")
    config["rope_scaling"] = {"rope_type": "factors", "factors": _decode(path, data, factors).tolist()}
  return Checkpoint(path, metadata, config, by_name, data)


def metadata(path: str | os.PathLike) -> dict[str, Any]:
  """The key/value fields of a GGUF file as Python values: what `tokenizer.from_gguf` takes."""
  return _load(os.fspath(path))[1]


def _rename(name: str, names: dict[str, str]) -> str | None:
  m = re.fullmatch(r"((?:blk\.(0|[1-9]\d*)\.)?\w+)\.(weight|bias)", name)
  if not m:
    return None
  stem, layer, kind = m.groups()
  if layer is not None:
    stem = "blk.N." + stem.split(".", 2)[2]
  return f"{names[stem].replace('N', layer or '')}.{kind}" if stem in names else None


def _unpermute(w: np.ndarray, heads: int) -> np.ndarray:
  # llama.cpp rotates neighbouring rows, Hugging Face halves of a head: its converter interleaves the halves.
  return w.reshape(heads, -1, 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def _decode(path: str, data: np.ndarray, tensor: Tensor) -> np.ndarray:
  raw = np.array(data[tensor.start : tensor.start + tensor.nbytes])
  rows = gguf.quant_shape_to_byte_shape(tensor.shape, tensor.type)
  try:
    return gguf.dequantize(raw.reshape(rows), tensor.type)
  except NotImplementedError as e:
    raise errors.UserError(f"{path}: {tensor.name} is {tensor.type.name}, which `gguf` cannot decode") from e


def _llama_config(path: str, metadata: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
  keys = {k.removeprefix("llama."): v for k, v in metadata.items() if k.startswith("llama.")}
  # Floats have 32 bits; the shortest decimal that rounds to the same is what was meant, such as 1e-05.
  keys = {k: float(str(np.float32(v))) if isinstance(v, float) else v for k, v in keys.items()}
  # An unknown key at zero, such as expert_count, says that the model lacks the feature.
  if unknown := sorted(k for k in keys.keys() - LLAMA_KEYS.keys() - LLAMA_OPTIONAL if keys[k]):
    raise errors.UserError(f"{path}: metadata that is not understood: llama.{', llama.'.join(unknown)}")
  numbers = [*LLAMA_KEYS, *(keys.keys() & {"attention.head_count_kv", "attention.key_length", *FLOATS})]
  if bad := [k for k in numbers if not isinstance(keys.get(k), float if k in FLOATS else int) or keys[k] <= 0]:
    raise errors.UserError(f"{path}: expected one positive number in metadata llama.{', llama.'.join(bad)}")
  config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu"}
  config |= {hf: keys[k] for k, hf in LLAMA_KEYS.items()}
  heads = config["num_attention_heads"]
  head_dim = keys.get("attention.key_length", config["hidden_size"] // heads)
  config |= {
    "num_key_value_heads": keys.get("attention.head_count_kv", heads),
    "head_dim": head_dim,
    "rope_theta": keys.get("rope.freq_base", 10000.0),
    "rope_scaling": _rope_scaling(path, keys),
    "tie_word_embeddings": "lm_head.weight" not in tensors,
    "attention_bias": any(k.endswith(".bias") and ".self_attn." in k for k in tensors),
    "mlp_bias": any(k.endswith(".bias") and ".mlp." in k for k in tensors),
  }
  for k in ("rope.dimension_count", "attention.value_length"):
    if keys.get(k, head_dim) != head_dim:
      raise errors.UserError(f"{path}: llama.{k} is {keys[k]}, expected the size of a head, {head_dim}")
  for k, t in tensors.items():
    rows = head_dim * config["num_key_value_heads" if ".k_proj." in k else "num_attention_heads"]
    if (".q_proj." in k or ".k_proj." in k) and (t.shape[0] != rows or head_dim % 2):
      raise errors.UserError(f"{path}: {t.name} has {t.shape[0]} rows, expected {rows}, heads of {head_dim}")
  if "model.embed_tokens.weight" not in tensors:
    raise errors.UserError(f"{path}: no tensor token_embd.weight")
  config["vocab_size"] = tensors["model.embed_tokens.weight"].shape[0]
  ids = {k: metadata.get(f"tokenizer.ggml.{k}_token_id") for k in ("bos", "eos", "padding")}
  return config | {f"{k[:3]}_token_id": v for k, v in ids.items() if v is not None}


def _rope_scaling(path: str, keys: dict[str, Any]) -> dict[str, Any] | None:
  factor = keys.get("rope.scaling.factor", keys.get("rope.scale_linear"))
  kind = keys.get("rope.scaling.type", "linear" if factor else "none")
  if kind == "none":
    return None
  if kind not in ("linear", "yarn") or not factor:
    raise errors.UserError(f"{path}: rope scaling {kind!r} by {factor}; known types: none, linear, yarn")
  rest = {hf: keys[k] for k, hf in YARN.items() if k in keys and kind == "yarn"}
  return {"rope_type": kind, "factor": factor, **rest}


def _load(path: str) -> tuple[np.ndarray, dict[str, Any], dict[str, Tensor]]:
  try:
    data = np.memmap(path, mode="r").view(np.ndarray) if os.path.getsize(path) else np.empty(0, np.uint8)
  except OSError as e:
    raise errors.UserError(f"cannot read {path}: {e.strerror}") from e
  start = bytes(data[:4])
  if start != MAGIC:
    raise errors.UserError(f"{path} is no GGUF file: it {f'starts with {start!r}' if start else 'is empty'}")
  at = _Cursor(memoryview(data))
  try:
    metadata, tensors = _header(at)
  except EOFError as e:
    raise errors.UserError(f"{path} is truncated: the header is longer than its {len(data)} bytes") from e
  except ValueError as e:
    raise errors.UserError(f"{path} is damaged or of an unknown kind, near byte {at.position}: {e}") from e
  end = max((t.start + t.nbytes for t in tensors.values()), default=0)
  if end > len(data):
    raise errors.UserError(f"{path} is truncated: it has {len(data)} of at least {end} bytes")
  return data, metadata, tensors


def _header(at: "_Cursor") -> tuple[dict[str, Any], dict[str, Tensor]]:
  """Metadata and tensors of a file; EOFError where it ends too early, ValueError where it makes no sense."""
  at.bytes(len(MAGIC))
  version = at.scalar("I")
  if version not in (2, 3):
    raise ValueError(f"format version {version}, expected 2 or 3, little-endian")
  n_tensors, n_fields = at.scalar("Q"), at.scalar("Q")
  metadata = {}
  for _ in range(n_fields):
    k = at.string()
    if k in metadata:
      raise ValueError(f"{k} stands twice")
    metadata[k] = at.value(at.scalar("I"))
  alignment = metadata.get("general.alignment", 32)
  if not isinstance(alignment, int) or alignment < 1:
    raise ValueError(f"general.alignment is {alignment!r}")
  tensors = {}
  for _ in range(n_tensors):
    t = _tensor(at)
    if t.name in tensors:
      raise ValueError(f"tensor {t.name} stands twice")
    tensors[t.name] = t
  start = -(-at.position // alignment) * alignment
  return metadata, {k: dataclasses.replace(t, start=start + t.start) for k, t in tensors.items()}


def _tensor(at: "_Cursor") -> Tensor:
  # `start` counts from the end of the header, which is not known yet.
  name, rank = at.string(), at.scalar("I")
  if not 1 <= rank <= 4:
    raise ValueError(f"tensor {name} has {rank} axes")
  shape = tuple(at.scalar("Q") for _ in range(rank))[::-1]
  if 0 in shape:
    raise ValueError(f"tensor {name} is empty")
  kind, start = gguf.GGMLQuantizationType(at.scalar("I")), at.scalar("Q")
  return Tensor(name, shape, kind, start, math.prod(gguf.quant_shape_to_byte_shape(shape, kind)))


class _Cursor:
  """Reads values from `view`, one after another."""

  def __init__(self, view: memoryview):
    self.view, self.position = view, 0

  def bytes(self, n: int) -> memoryview:
    start, end = self.position, self.position + n
    if end > len(self.view):
      raise EOFError
    self.position = end
    return self.view[start:end]

  def scalar(self, fmt: str) -> Any:
    return struct.unpack("<" + fmt, self.bytes(struct.calcsize("<" + fmt)))[0]

  def string(self) -> str:
    return str(self.bytes(self.scalar("Q")), "utf-8")

  def value(self, kind: int) -> Any:
    if kind == STRING:
      return self.string()
    if kind in SCALARS:
      return self.scalar(SCALARS[kind])
    if kind != ARRAY:
      raise ValueError(f"metadata of unknown type {kind}")
    kind, n = self.scalar("I"), self.scalar("Q")
    if kind == STRING:
      return [self.string() for _ in range(n)]
    if kind not in SCALARS:
      raise ValueError(f"an array of type {kind}")
    raw = self.bytes(n * struct.calcsize("<" + SCALARS[kind]))
    return list(struct.unpack(f"<{n}{SCALARS[kind]}", raw))
