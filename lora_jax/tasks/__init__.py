"""Tasks: one dataset a module, found by the module's name.

A task module has three functions and two constants:

  load(split, **kw) -> Sequence[dict]        examples of "train", "validation" or "test", by index
  format(example, **kw) -> Formatted | Chat  the text of one example
  score(example, text, **kw) -> dict         metrics of a generated `text`; each is averaged over examples
  LABELS                                     all responses of a classification task, in label order, or None
  PROMPT_LOSS_WEIGHT                         what suits the task, or None for the objective's own default

Where the labels depend on keywords the module has a function `labels(**kw)` instead of LABELS. Keywords are
keyword-only parameters; one that several functions take is given to each of them.
"""

import dataclasses
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lora_jax import errors

SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class Formatted:
  """A prompt and the response to learn; a response that continues a line starts with a space."""

  prompt: str
  response: str


@dataclasses.dataclass(frozen=True)
class Chat:
  """A conversation `{"role", "content"}`, ending with the assistant's message: the response."""

  messages: tuple[Mapping[str, str], ...]

  @property
  def response(self) -> str:
    """What the assistant says last."""
    return self.messages[-1]["content"]


@dataclasses.dataclass(frozen=True)
class Task:
  """A task module's functions with the user's keywords bound; see the module docstring."""

  name: str
  load: Callable[[str], Sequence[dict]]
  format: Callable[[dict], Formatted | Chat]
  score: Callable[[dict, str], dict[str, float]]
  labels: tuple[str, ...] | None
  prompt_loss_weight: float | None

  def label_index(self, example: dict) -> int:
    """Which of `labels` is the response of `example`; -1 where it is hidden."""
    response = self.format(example).response
    return self.labels.index(response) if response in self.labels else -1


def names() -> list[str]:
  """Names of all tasks."""
  return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def get(name: str, **keywords: Any) -> Task:
  """The task `name`; UserError for an unknown name, an unknown keyword or a missing one."""
  name = errors.choose(name, {k: k for k in names()}, "task")
  module = importlib.import_module(f"{__name__}.{name}")
  functions = [module.load, module.format, module.score]
  if hasattr(module, "labels"):
    functions.append(module.labels)
  errors.check_keywords(_union(functions), keywords, "config.task")
  load, format, score, *labels = [_bind(f, keywords) for f in functions]
  choices = labels[0]() if labels else module.LABELS
  return Task(
    name=name,
    load=lambda split: load(errors.choose(split, {s: s for s in SPLITS}, "split")),
    format=format,
    score=score,
    labels=None if choices is None else tuple(choices),
    prompt_loss_weight=module.PROMPT_LOSS_WEIGHT,
  )


def exact_match(example_response: str, text: str) -> dict[str, float]:
  """Whether `text` is the response, white space around them aside."""
  return {"exact_match": float(text.strip() == example_response.strip())}


def _keyword_only(function: Callable) -> dict[str, inspect.Parameter]:
  parameters = inspect.signature(function).parameters
  return {k: p for k, p in parameters.items() if p.kind is p.KEYWORD_ONLY}


def _union(functions: Sequence[Callable]) -> Callable:
  """A function whose signature has the keywords of all."""

  def union():
    pass

  parameters = {k: p for f in functions for k, p in _keyword_only(f).items()}
  union.__signature__ = inspect.Signature(list(parameters.values()))
  return union


def _bind(function: Callable, keywords: Mapping[str, Any]) -> Callable:
  return functools.partial(function, **{k: keywords[k] for k in _keyword_only(function) if k in keywords})
