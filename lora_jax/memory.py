"""The memory that devices have and the least that a model needs, to refuse what cannot fit before it is allocated."""

import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lora_jax import errors

GIB = 2**30
SHORTEST = 32  # tokens that texts are padded to, at least


def available() -> int | None:
  """Bytes that a program may use on each of this process's devices; None if the device does not say."""
  device = jax.local_devices()[0]
  stats = device.memory_stats() or {}
  if "bytes_limit" in stats:
    return stats["bytes_limit"]
  info = pathlib.Path("/proc/meminfo")
  if device.platform != "cpu" or not info.exists():
    return None
  # The devices of a CPU share its memory.
  found = next(line for line in info.read_text().splitlines() if line.startswith("MemAvailable"))
  return int(found.split()[1]) * 1024 // jax.local_device_count()


def size(shapes: Any) -> int:
  """Bytes of all arrays or shapes in a tree."""
  return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(shapes))


def states(config: Any, rows: int, length: int = SHORTEST) -> int:
  """Bytes of the output [rows, length, D] of one layer of a model."""
  return rows * length * config.d_model * np.dtype(config.dtype).itemsize


def cache(config: Any, rows: int, length: int) -> int:
  """Bytes of the keys and values of `rows` texts of `length` tokens each, prompt and new tokens together."""
  heads = config.n_layers * config.n_kv_heads * config.head_dim
  return 2 * heads * rows * length * np.dtype(config.dtype).itemsize


def check(need: Mapping[str, int], devices: int = 1) -> None:
  """Raises UserError if `need`, {what for: bytes}, exceeds the memory of `devices` devices together."""
  limit = available()
  total = sum(need.values())
  if limit is None or total <= limit * devices:
    return
  large = sorted((item for item in need.items() if item[1] > total / 20), key=lambda item: -item[1])
  parts = ", ".join(f"{n / GIB:,.1f} GiB for {what}" for what, n in large)
  there = f"{limit * devices / GIB:,.1f} GiB"
  raise errors.UserError(f"this cannot fit into memory: it needs at least {parts}; there are only {there}")
