"""Finetuning methods, one module each: what is trained.

A method module has `init(key, params, **kw) -> (params, mask)`: the tree with the method's nodes in it, and a tree of
booleans that says which leaves are trained. What it saves as an adapter is described in
formats/peft.py.
"""

import importlib
import pkgutil
from collections.abc import Collection
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import errors, tree


def names() -> list[str]:
  """Names of all methods."""
  return [m.name for m in pkgutil.iter_modules(__path__)]


def get(name: str) -> ModuleType:
  """The module of a method."""
  return importlib.import_module(f"{__name__}.{errors.choose(name, dict.fromkeys(names()), 'method') or name}")


def train_also(params: Any, mask: Any, names: Collection[str]) -> tuple[Any, Any]:
  """(params, mask) with the leaves `names` trained besides, as float32 masters."""
  mask = tree.map_named(lambda k, m: m or k in names, mask)
  return jax.tree.map(lambda x, m: x.astype(jnp.float32) if m else x, params, mask), mask
