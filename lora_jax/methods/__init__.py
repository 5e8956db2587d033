"""Finetuning methods, one module each: what is trained.

A method module has `init(key, params, **kw) -> (params, mask)`: the tree with the method's nodes in it, and a tree of
booleans that says which leaves are trained. What it saves as an adapter is described in
formats/peft.py.
"""

import importlib
import pkgutil
from types import ModuleType

from lora_jax import errors


def names() -> list[str]:
  """Names of all methods."""
  return [m.name for m in pkgutil.iter_modules(__path__)]


def get(name: str) -> ModuleType:
  """The module of a method."""
  return importlib.import_module(f"{__name__}.{errors.choose(name, dict.fromkeys(names()), 'method') or name}")
