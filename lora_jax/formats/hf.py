"""Hugging Face model directories: config.json and safetensors, single or sharded."""

import json
import os
import pathlib
import re
from collections.abc import Iterable, Mapping

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from lora_jax import errors, files
from lora_jax.formats import conversion

SHARD_BYTES = 4 * 2**30
DTYPES = {
  **{f"F{n}": np.dtype(f"float{n}") for n in (16, 32, 64)},
  **{f"I{n}": np.dtype(f"int{n}") for n in (8, 16, 32, 64)},
  **{f"U{n}": np.dtype(f"uint{n}") for n in (8, 16, 32, 64)},
  "BOOL": np.dtype(bool),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
  "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}


def read_json(path: str | os.PathLike, **kinds: type) -> dict:
  """The JSON object in a file.

  Args:
    kinds: keys that it must have, and the types of their values.

  Raises:
    UserError: the file is missing or malformed, or holds something else.
  """
  value = files.parse_json(files.read(path), str(path))
  if not isinstance(value, dict):
    raise errors.UserError(f"{path} should hold a JSON object, not {type(value).__name__}")
  for k, kind in kinds.items():
    if not isinstance(value.get(k), kind) or isinstance(value[k], bool):
      raise errors.UserError(f"{path}: {k} should be {kind.__name__}, not {value.get(k)!r:.60}")
  return value


def write_json(path: str | os.PathLike, value: dict) -> None:
  """Writes a JSON object to a file, whole or not at all."""
  files.write(pathlib.Path(path), json.dumps(value, indent=2, sort_keys=True).encode())


class Tensors:
  """The tensors of one or more safetensors files, mapped one at a time.

  Raises:
    UserError: a file is missing, truncated or not safetensors; the message names it.
  """

  def __init__(self, paths: Iterable[str | os.PathLike]):
    self._where = {}
    for path in map(str, paths):
      if not os.path.exists(path):
        raise errors.UserError(f"{path} does not exist{conversion.of_pickle(path)}")
      for stored, where in _header(path).items():
        k = stored.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        if k in self._where:
          raise errors.UserError(f"tensor {k} occurs twice, last in {path}")
        self._where[k] = where
    conversion.check_names(self._where)

  def names(self) -> list[str]:
    """All tensor names."""
    return list(self._where)

  def shape(self, k: str) -> tuple[int, ...]:
    """The shape of a tensor, without reading it."""
    return self._where[k]["shape"]

  def read(self, k: str) -> np.ndarray:
    """The tensor in its stored dtype (bfloat16 of ml_dtypes). It is a view of the file; its pages are freed with it."""
    return np.memmap(mode="r", **self._where[k])


def not_finite(tensors: Mapping[str, np.ndarray]) -> list[str]:
  """A message for each tensor that holds values that are not finite."""
  return [f"{k} has values that are not finite" for k, x in tensors.items() if not np.isfinite(x).all()]


def _header(path: str) -> dict[str, dict]:
  """The arguments of `np.memmap` for each tensor of a safetensors file, after the library has found it complete."""
  what = f"{path} is not a complete safetensors file"
  with files.open(path) as f, errors.parsing(what), safetensors.safe_open(path, framework="numpy"):
    size = int.from_bytes(f.read(8), "little")
    header = files.parse_json(f.read(size), path)
  header.pop("__metadata__", None)
  unknown = sorted({v["dtype"] for v in header.values()} - DTYPES.keys())
  if unknown:
    raise errors.UserError(f"{path} has tensors of a type that cannot be read: {', '.join(unknown)}")
  return {
    k: dict(filename=path, dtype=DTYPES[v["dtype"]], shape=tuple(v["shape"]), offset=8 + size + v["data_offsets"][0])
    for k, v in header.items()
  }


def weight_files(directory: pathlib.Path) -> list[str]:
  """The names of the safetensors files that make up the model in a directory, whether or not they exist."""
  index = directory / "model.safetensors.index.json"
  if not index.exists():
    return ["model.safetensors"]
  weight_map = read_json(index).get("weight_map")
  shards = list(weight_map.values()) if isinstance(weight_map, dict) else []
  if not shards or not all(isinstance(s, str) and re.fullmatch(r"[\w.-]+\.safetensors", s) for s in shards):
    shown = f"{weight_map!r:.200}"
    raise errors.UserError(f"{index}: 'weight_map' should name safetensors files of that directory, not {shown}")
  return sorted(set(shards))


def open(directory: str | os.PathLike) -> tuple[dict, Tensors]:  # noqa: A001
  """The contents of config.json and the tensors of a model directory."""
  directory = pathlib.Path(directory)
  config = read_json(directory / "config.json")
  names = weight_files(directory)
  if not (directory / names[0]).exists() and len(names) == 1:
    found = sorted(p.name for p in directory.iterdir())
    how = conversion.of_pickled_model(directory, found, config)
    raise errors.UserError(f"{directory} has no model.safetensors; it holds {found[:10]}{how}")
  return config, Tensors(directory / name for name in names)


def save_tensors(path: str | os.PathLike, tensors: dict[str, np.ndarray]) -> None:
  """Writes a safetensors file with the permissions of the umask; the library would make it private."""
  safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
  umask = os.umask(0)
  os.umask(umask)
  os.chmod(path, 0o666 & ~umask)


def save(directory: str | os.PathLike, config: dict, tensors: Iterable[tuple[str, np.ndarray]]) -> None:
  """Writes config.json and (name, array) pairs as safetensors in shards of at most about 4 GiB.

  Tensors are taken one at a time. The index and the config, which make the directory readable, are written last.
  """
  directory = pathlib.Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  weight_map, shard, parts = {}, {}, []
  size = 0

  def flush():
    nonlocal size
    parts.append(directory / f".shard-{len(parts)}.tmp")
    save_tensors(parts[-1], shard)
    shard.clear()
    size = 0

  try:
    for k, x in tensors:
      if shard and size + x.nbytes > SHARD_BYTES:
        flush()
      shard[k] = np.ascontiguousarray(x)
      weight_map[k] = len(parts)
      size += x.nbytes
    flush()
  except BaseException:
    for temporary in parts:
      temporary.unlink(missing_ok=True)
    raise
  # Remove an earlier model: first the files that make the directory one, then its shards.
  for name in ("config.json", "model.safetensors.index.json", "model*.safetensors"):
    for old in directory.glob(name):
      old.unlink()
  final = [f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors" for i in range(len(parts))]
  final = ["model.safetensors"] if len(parts) == 1 else final
  for temporary, k in zip(parts, final, strict=True):
    os.replace(temporary, directory / k)
  if len(parts) > 1:
    index = {"metadata": {}, "weight_map": {k: final[i] for k, i in weight_map.items()}}
    write_json(directory / "model.safetensors.index.json", index)
  write_json(directory / "config.json", config)
