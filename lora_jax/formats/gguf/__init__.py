"""GGUF files (llama.cpp): the config and the tensors, under Hugging Face's names and layouts.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian. The header is parsed
here, since `gguf.GGUFReader` makes an array of each word in the vocabulary, which takes seconds. `gguf.quants` decodes
the block formats.
"""

import dataclasses
import math
import os
import re
import struct
from collections.abc import Iterable
from typing import Any

import gguf
import numpy as np

from lora_jax import errors, files
from lora_jax.formats.gguf import hf_config, tables

MAGIC = b"GGUF"
STRING, ARRAY = 8, 9
ROW = 2**15  # numbers in a row that `gguf` decodes at once, up to a factor of two
SCALARS = dict(zip((*range(8), 10, 11, 12), "BbHhIif?Qqd", strict=True))  # value type -> struct format

STEM = re.compile(r"((?:enc\.|dec\.)?)(?:(blk)\.(0|[1-9]\d*)\.)?(\w+)\.(weight|bias)")


@dataclasses.dataclass(frozen=True)
class Tensor:
  """One tensor in a file: its name there, shape, block format, and bytes [start, start + nbytes).

  `change` says how it differs from Hugging Face's tensor, see `tables.Architecture`.
  """

  name: str
  shape: tuple[int, ...]
  type: gguf.GGMLQuantizationType
  start: int
  nbytes: int
  change: str = ""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """An open GGUF file. Nothing is decoded before `read`.

  Fields:
    path: the file.
    metadata: its key/value fields.
    config: the contents of Hugging Face's config.json for the model. Divisors of RoPE's frequencies that do not follow
      Llama 3's formula become rope_scaling {"rope_type": "factors", "factors": [head_dim / 2 floats]}.
    tensors: each tensor by its Hugging Face name. Experts, which the file stacks, are separate tensors.
    data: uint8 [n], the mapped bytes of the whole file.
  """

  path: str
  metadata: dict[str, Any]
  config: dict[str, Any]
  tensors: dict[str, Tensor]
  data: np.ndarray

  def names(self) -> list[str]:
    """The Hugging Face names of all tensors, in file order."""
    return list(self.tensors)

  def shape(self, name: str) -> tuple[int, ...]:
    """The shape of `read(name)`, such as (out, in) for a projection."""
    t = errors.choose(name, self.tensors, f"tensor of {self.path}")
    return t.shape[::-1] if t.change == "transpose" else t.shape

  def read(self, name: str) -> np.ndarray:
    """One tensor as float32 in Hugging Face's layout. It is a copy, not a view of the file."""
    t = errors.choose(name, self.tensors, f"tensor of {self.path}")
    w = _decode(self.path, self.data, t)
    match t.change:
      case "transpose":
        return np.ascontiguousarray(w.T)
      case "minus one":
        return w - 1
      case "unpermute q":
        return _unpermute(w, self.config["num_attention_heads"])
      case "unpermute k":
        return _unpermute(w, self.config["num_key_value_heads"])
      case "interleave":
        return w.reshape(3, self.config["num_attention_heads"], -1, *w.shape[1:]).swapaxes(0, 1).reshape(w.shape)
    return w


def open(path: str | os.PathLike) -> Checkpoint:
  """Opens a GGUF file and checks its header, tensor names and size.

  Raises:
    UserError: the file is unreadable, damaged or not GGUF, or an architecture, metadata key or tensor is unknown.
  """
  path = os.fspath(path)
  with errors.parsing(f"{path} is damaged or of an unknown kind"):
    return _open(path)


def _open(path: str) -> Checkpoint:
  data, metadata, tensors = _load(path)
  name = str(metadata.get("general.architecture"))
  errors.choose(name, tables.ARCHITECTURES, f"architecture in {path}:")
  if (parts := metadata.get("split.count", 1)) != 1:
    raise errors.UserError(f"{path} is one of {parts} parts; join them with `llama-gguf-split --merge`")
  architecture = tables.choose(name, hf_config.keys(metadata, name), tensors)
  factors = {k: _decode(path, data, tensors.pop(k)).tolist() for k in architecture.factors if k in tensors}
  by_name, unknown = {}, []
  for t in tensors.values():
    found = _rename(t, architecture)
    by_name |= found or {}
    unknown += [t.name] if found is None else []
  if unknown:
    raise errors.UserError(f"{path} has tensors that are not understood: {', '.join(sorted(unknown))}")
  shapes = {k: t.shape for k, t in by_name.items()}
  config = hf_config.build(path, name, architecture, metadata, shapes, factors)
  _check_rows(path, by_name.values(), config)
  return Checkpoint(path, metadata, config, by_name, data)


def metadata(path: str | os.PathLike) -> dict[str, Any]:
  """The key/value fields of a GGUF file as Python values, which `tokenizer.from_gguf` takes."""
  return _load(os.fspath(path))[1]


def _rename(t: Tensor, architecture: tables.Architecture) -> dict[str, Tensor] | None:
  """The tensors that one tensor of the file stands for, by their Hugging Face names; None if it is unknown."""
  m = STEM.fullmatch(t.name)
  if not m:
    return None
  side, block, layer, stem, kind = m.groups()
  stem = f"{side}blk.{{}}.{stem}" if block else side + stem
  if stem in tables.IGNORED_TENSORS:
    return {}
  theirs = architecture.tensors.get(stem)
  if theirs is None:
    return None
  t = dataclasses.replace(t, change=architecture.changes.get(stem, ""))
  if theirs.count("{}") < 2:
    return {f"{theirs.format(layer)}.{kind}": t}
  if len(t.shape) != 3:
    return None
  size = t.nbytes // t.shape[0]

  def part(i):
    return dataclasses.replace(t, shape=t.shape[1:], start=t.start + i * size, nbytes=size)

  return {f"{theirs.format(layer, i)}.{kind}": part(i) for i in range(t.shape[0])}


def _check_rows(path: str, tensors: Iterable[Tensor], config: dict[str, Any]) -> None:
  """Raises UserError for tensors whose rows cannot be reordered."""
  for t in tensors:
    if t.change in ("unpermute q", "unpermute k"):
      size = config["head_dim"]
      rows = size * config["num_attention_heads" if t.change.endswith("q") else "num_key_value_heads"]
    elif t.change == "interleave":
      size = config["hidden_size"] // config["num_attention_heads"]
      rows = 3 * size * config["num_attention_heads"]
    else:
      continue
    if t.shape[0] != rows or size % 2:
      raise errors.UserError(f"{path}: {t.name} has {t.shape[0]} rows, expected {rows}, heads of {size}")


def _unpermute(w: np.ndarray, heads: int) -> np.ndarray:
  # llama.cpp rotates neighbouring rows, Hugging Face halves of a head: its converter interleaves the halves.
  return w.reshape(heads, -1, 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def _decode(path: str, data: np.ndarray, tensor: Tensor) -> np.ndarray:
  raw = np.array(data[tensor.start : tensor.start + tensor.nbytes])
  *rows, columns = gguf.quant_shape_to_byte_shape(tensor.shape, tensor.type)
  # `gguf` decodes 16 rows at a time. Longer rows take fewer steps, and blocks do not depend on where a row ends.
  longer = columns * math.gcd(math.prod(rows), 1 << (ROW // tensor.shape[-1]).bit_length())
  try:
    return gguf.dequantize(raw.reshape(-1, longer), tensor.type).reshape(tensor.shape)
  except NotImplementedError as e:
    raise errors.UserError(f"{path}: {tensor.name} is {tensor.type.name}, which `gguf` cannot decode") from e


def _load(path: str) -> tuple[np.ndarray, dict[str, Any], dict[str, Tensor]]:
  with files.open(path) as f, errors.parsing(f"cannot read {path}"):
    data = np.memmap(f, mode="r").view(np.ndarray) if os.path.getsize(path) else np.empty(0, np.uint8)
  start = bytes(data[:4])
  if start != MAGIC:
    raise errors.UserError(f"{path} is not a GGUF file: it {f'starts with {start!r}' if start else 'is empty'}")
  at = _Cursor(memoryview(data))
  try:
    metadata, tensors = _header(at)
  except EOFError as e:
    raise errors.UserError(f"{path} is truncated: the header is longer than its {len(data)} bytes") from e
  except Exception as e:  # damaged numbers can lead to any error
    raise errors.UserError(f"{path} is damaged or of an unknown kind, near byte {at.position}: {errors.line(e)}") from e
  end = max((t.start + t.nbytes for t in tensors.values()), default=0)
  if end > len(data):
    raise errors.UserError(f"{path} is truncated: it has {len(data)} of at least {end} bytes")
  return data, metadata, tensors


def _header(at: "_Cursor") -> tuple[dict[str, Any], dict[str, Tensor]]:
  """The metadata and tensors of a file. Raises EOFError if it ends too early, ValueError if it makes no sense."""
  at.bytes(len(MAGIC))
  version = at.scalar("I")
  if version not in (2, 3):
    raise ValueError(f"format version {version}, expected 2 or 3, little-endian")
  n_tensors, n_fields = at.scalar("Q"), at.scalar("Q")
  metadata = {}
  for _ in range(n_fields):
    k = at.string()
    if k in metadata:
      raise ValueError(f"{k} occurs twice")
    metadata[k] = at.value(at.scalar("I"))
  alignment = metadata.get("general.alignment", 32)
  if not isinstance(alignment, int) or alignment < 1:
    raise ValueError(f"general.alignment is {alignment!r}")
  tensors = {}
  for _ in range(n_tensors):
    t = _tensor(at)
    if t.name in tensors:
      raise ValueError(f"tensor {t.name} occurs twice")
    tensors[t.name] = t
  start = -(-at.position // alignment) * alignment
  return metadata, {k: dataclasses.replace(t, start=start + t.start) for k, t in tensors.items()}


def _tensor(at: "_Cursor") -> Tensor:
  # `start` counts from the end of the header, which is not known yet.
  name = at.string()
  rank = at.scalar("I")
  if not 1 <= rank <= 4:
    raise ValueError(f"tensor {name} has {rank} axes")
  shape = tuple(at.scalar("Q") for _ in range(rank))[::-1]
  if 0 in shape:
    raise ValueError(f"tensor {name} is empty")
  kind = gguf.GGMLQuantizationType(at.scalar("I"))
  start = at.scalar("Q")
  return Tensor(name, shape, kind, start, math.prod(gguf.quant_shape_to_byte_shape(shape, kind)))


class _Cursor:
  """Reads values from `view`, one after another."""

  def __init__(self, view: memoryview):
    self.view = view
    self.position = 0

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
