"""Adapt pretrained transformers in JAX.

The names that users type; modules are imported when they are first used, so that this one is light.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

MODULES = (
  "bridges",
  "data",
  "evaluate",
  "experiment",
  "generate",
  "methods",
  "models",
  "objectives",
  "optim",
  "tasks",
  "weights",
)
__all__ = ["UserError", "adapt", "load", *MODULES]


def __getattr__(name: str) -> Any:
  if name == "load":
    return importlib.import_module("lora_jax.models").load
  if name == "adapt":
    return importlib.import_module("lora_jax.foreign").adapt
  if name == "UserError":
    return importlib.import_module("lora_jax.errors").UserError
  if name in MODULES:
    return importlib.import_module(f"lora_jax.{name}")
  raise AttributeError(f"module 'lora_jax' has no attribute {name!r}")
