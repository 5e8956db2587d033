"""Texts to arrays, a kind of batches a module: those that have a `train_iterator`."""

import importlib
import pkgutil
from types import ModuleType


def kinds() -> list[ModuleType]:
  """The modules that training can read batches of."""
  modules = [importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)]
  return [m for m in modules if hasattr(m, "train_iterator")]
