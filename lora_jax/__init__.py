"""Adapts pretrained transformers in JAX.

Offers the names that users type. Modules are imported when they are first used, so importing this one is cheap.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

# What `lora_jax.NAME` stands for: a module, or a name in a module.
NAMES = {
  "UserError": "errors.UserError",
  "adapt": "bridges.adapt",
  "evaluate": "inference.evaluate",
  "experiment": "runs.experiment",
  "generate": "inference.generate",
  "load": "models.load",
  "optim": "training.optim",
}
MODULES = ("bridges", "methods", "models", "tasks", "tree", "weights")
__all__ = [*NAMES, *MODULES]


def __getattr__(name: str) -> Any:
  if name in MODULES:
    return importlib.import_module(f"lora_jax.{name}")
  if name not in NAMES:
    raise AttributeError(f"module 'lora_jax' has no attribute {name!r}")
  module, _, own = NAMES[name].rpartition(".")
  found = importlib.import_module(f"lora_jax.{module}")
  return getattr(found, own) if hasattr(found, own) else importlib.import_module(f"lora_jax.{NAMES[name]}")
