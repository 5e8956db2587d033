"""Hugging Face model directories: config.json and safetensors, single or sharded."""

import json
import os
import pathlib
from collections.abc import Iterable

import numpy as np
import safetensors
import safetensors.numpy

from lora_jax import errors

SHARD_BYTES = 4 * 2**30


def read_json(path: str | os.PathLike) -> dict:
  """A JSON object from a file; UserError when it is missing or is none."""
  path = pathlib.Path(path)
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    raise errors.UserError(f"{path} does not exist") from None
  except (ValueError, OSError) as e:
    raise errors.UserError(f"{path} is no readable JSON: {e}") from e
  if not isinstance(value, dict):
    raise errors.UserError(f"{path} should hold a JSON object, not {type(value).__name__}")
  return value


class Tensors:
  """The tensors of one or more safetensors files, read one at a time.

  Raises UserError, naming the file, for one that is missing, truncated or no safetensors.
  """

  def __init__(self, paths: Iterable[str | os.PathLike]):
    self._files = {}
    for path in map(str, paths):
      if not os.path.exists(path):
        raise errors.UserError(f"{path} does not exist")
      try:
        file = safetensors.safe_open(path, framework="numpy")
      except (safetensors.SafetensorError, OSError) as e:
        raise errors.UserError(f"{path} is no complete safetensors file: {e}") from e
      for k in file.keys():  # noqa: SIM118, no mapping
        if k in self._files:
          raise errors.UserError(f"tensor {k} stands twice, last in {path}")
        self._files[k] = file

  def names(self) -> list[str]:
    """All tensor names."""
    return list(self._files)

  def shape(self, k: str) -> tuple[int, ...]:
    """Shape of a tensor, without reading it."""
    return tuple(self._files[k].get_slice(k).get_shape())

  def read(self, k: str) -> np.ndarray:
    """The tensor in its stored dtype (bfloat16 through ml_dtypes)."""
    return self._files[k].get_tensor(k)


def open(directory: str | os.PathLike) -> tuple[dict, Tensors]:  # noqa: A001
  """(config.json, tensors) of a model directory."""
  directory = pathlib.Path(directory)
  config = read_json(directory / "config.json")
  index = directory / "model.safetensors.index.json"
  if index.exists():
    shards = sorted(set(read_json(index).get("weight_map", {}).values()))
    bad = [s for s in shards if os.path.basename(s) != s]
    if bad or not shards:
      raise errors.UserError(f"{index}: 'weight_map' should name files of that directory, not {bad or 'nothing'}")
    return config, Tensors(directory / s for s in shards)
  if not (directory / "model.safetensors").exists():
    found = sorted(p.name for p in directory.iterdir())[:10]
    raise errors.UserError(f"{directory} has no model.safetensors (pickled .bin files are not read); it holds {found}")
  return config, Tensors([directory / "model.safetensors"])


def save(directory: str | os.PathLike, config: dict, tensors: Iterable[tuple[str, np.ndarray]]) -> None:
  """Writes config.json and (name, array) pairs as safetensors in shards of at most about 4 GiB.

  Tensors are taken one at a time; index and config, which make the directory readable, are written last.
  """
  directory = pathlib.Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  weight_map, shard, size, files = {}, {}, 0, []

  def flush():
    nonlocal shard, size
    files.append(directory / f".shard-{len(files)}.tmp")
    safetensors.numpy.save_file(shard, files[-1], metadata={"format": "pt"})
    shard, size = {}, 0

  for k, x in tensors:
    if shard and size + x.nbytes > SHARD_BYTES:
      flush()
    shard[k], weight_map[k] = np.ascontiguousarray(x), len(files)
    size += x.nbytes
  flush()
  final = [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
  final = ["model.safetensors"] if len(files) == 1 else final
  for temporary, k in zip(files, final, strict=True):
    os.replace(temporary, directory / k)
  if len(files) > 1:
    index = {"metadata": {}, "weight_map": {k: final[i] for k, i in weight_map.items()}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
  (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
