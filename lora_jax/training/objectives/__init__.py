"""What is minimised, one objective a module; a package here holds what several share.

An objective module has `HEAD`, the head of the model that it trains ("lm", "classification"), and

  batches(config, task, **kw) -> (module, kw)   the module of batches/ that it reads for a model of this architecture,
                                and keywords of its `train_iterator`
  loss(forward, params, batch, aux, *, step, **kw) -> (terms, metrics)

`forward` is a `train.Forward`; `step` is the traced number of the step. Terms and metrics are {name: (sum, weight)} of
float32 []: sums over the rows of a batch, and what normalises them. What is minimised is the sum over terms of
sum / weight, both over the whole batch: micro-batches, packed rows and devices give what one big batch gives, since
sums add up. `loss` may see some of the rows alone, so that what belongs together, such as a pair of texts, is one row.
The weights have no gradient.

It may define

  aux(model, **kw) -> tree      other arrays that the loss needs, from the pretrained model before a method has changed
                                it: its own parameters, an adapter, another model. They are not trained, and members of
                                a population share them. Leaves that the frozen tree has too are not held twice.
  common(batch)                 what all members of a population need and is computed once for them, of a batch
                                [B, ...] or, where their data differ, [K, B, ...]; `loss` gets it as the keyword
                                `common`, None in a run of one

Keywords of these functions, what follows a `*`, are the keys of config.objective, with types from values.py and a line
under `Args:`. A tree of `aux` may have static parts, such as the `train.Forward` of a model of another architecture.
"""

import dataclasses
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable
from types import ModuleType
from typing import Any

from lora_jax import errors, values

DEFAULT = "causal_lm"
GIVEN = ("step", "common")  # keywords that no config sets
HOOKS = ("loss", "batches", "aux")


@dataclasses.dataclass(frozen=True)
class Objective:
  """An objective whose keywords are set.

  Fields:
    head: of the model.
    loss, batches: as in the module.
    aux, common: as in the module, or None.
  """

  head: str
  loss: Callable[..., tuple[dict, dict]]
  batches: Callable[..., tuple[ModuleType, dict]]
  aux: Callable[[Any], Any] | None = None
  common: Callable[[dict], Any] | None = None


def names() -> list[str]:
  """Names of all objectives."""
  return [m.name for m in pkgutil.iter_modules(__path__) if not m.ispkg]


def get(name: str) -> ModuleType:
  """The module of an objective."""
  return importlib.import_module(f"{__name__}.{errors.choose(name, {k: k for k in names()}, 'objective')}")


def functions(name: str) -> dict[str, Callable]:
  """The functions of an objective that a config has keywords for."""
  module = get(name)
  return {k: getattr(module, k) for k in HOOKS if hasattr(module, k)}


def fields(name: str) -> dict[str, values.Field]:
  """The keywords of an objective."""
  return {k: f for fn in functions(name).values() for k, f in values.fields(fn).items() if k in _keywords(fn)}


def _keywords(fn: Callable) -> list[str]:
  """What of a function a config sets."""
  parameters = inspect.signature(fn).parameters.values()
  return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in GIVEN]


def make(name: str = DEFAULT, **kw: Any) -> Objective:
  """The objective with keywords, of which each of its functions gets its own."""
  module, known = get(name), fields(name)
  if unknown := [k for k in kw if k not in known]:
    raise errors.UserError(f"unknown key config.objective.{unknown[0]}; {errors.nearest(unknown[0], known)}")
  own = lambda fn: {k: v for k, v in kw.items() if k in _keywords(fn)}
  bound = {hook: functools.partial(fn, **own(fn)) for hook, fn in functions(name).items()}
  return Objective(module.HEAD, **bound, common=getattr(module, "common", None))
