"""What there is of memory, and what a model needs at the least: what cannot fit is refused before it is allocated."""

import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lora_jax import errors

GIB = 2**30
SHORTEST = 32  # tokens that texts are padded to at least


def available() -> int | None:
  """Bytes that each of this process's devices has for a program; None where it does not say."""
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
  """Bytes of a tree of arrays or shapes."""
  return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(shapes))


def states(config: Any, rows: int, length: int = SHORTEST) -> int:
  """Bytes of what one layer of a model gives, [rows, length, D]."""
  return rows * length * config.d_model * np.dtype(config.dtype).itemsize


def cache(config: Any, rows: int, length: int) -> int:
  """Bytes of the keys and values of `rows` texts of so many tokens, those that a model writes among them."""
  heads = config.n_layers * config.n_kv_heads * config.head_dim
  return 2 * heads * rows * length * np.dtype(config.dtype).itemsize


def check(need: Mapping[str, int], devices: int = 1) -> None:
  """Raises UserError where {what asks for it: bytes} is more than so many devices have together."""
  limit, total = available(), sum(need.values())
  if limit is None or total <= limit * devices:
    return
  large = sorted((item for item in need.items() if item[1] > total / 20), key=lambda item: -item[1])
  parts = ", ".join(f"{n / GIB:,.1f} GiB for {what}" for what, n in large)
  there = f"{limit * devices / GIB:,.1f} GiB"
  raise errors.UserError(f"this cannot fit into memory: it needs at least {parts}; there are {there}")
