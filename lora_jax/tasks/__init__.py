"""Tasks: one dataset a module, found by the module's name.

A task module has three functions and two constants:

  load(split, **kw) -> Sequence[dict]        examples of "train", "validation" or "test", by index
  format(example, **kw) -> Formatted | Chat  the text of one example
  score(example, text, **kw) -> dict         metrics of a generated `text`; each is averaged over examples
  LABELS                                     all responses of a classification task, in label order, or None
  PROMPT_LOSS_WEIGHT                         the weight that suits the task, or None for the objective's default

A module whose labels depend on keywords has a function `labels(**kw)` instead of LABELS. A module may also have

  texts(example, **kw) -> tuple[str, ...]    one or two sentences for a model with a head; by default the prompt
  target(example, **kw) -> int | float       what the head learns: by default the index of the response in the labels,
                                             or -1 if it is not a label; without labels a number, for regression
  metrics(predictions, references, **kw)     {name: value} over all examples, from label indices, or from floats in a
                                             regression, where nan is a generated text without a number; by default
                                             `accuracy` for a task with labels
  corpus(texts, examples, **kw)              {name: value} over all examples, from the generated texts

A task is judged by its first metric: the first of `metrics`, else of `corpus`, else of `score`.

Keywords are keyword-only parameters. A keyword that several functions take is given to each of them.
"""

import dataclasses
import functools
import importlib
import inspect
import math
import pkgutil
import re
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

from lora_jax import errors, values

SPLITS = ("train", "validation", "test")
FUNCTIONS = ("load", "format", "score", "labels", "texts", "target", "metrics", "corpus")


@dataclasses.dataclass(frozen=True)
class Formatted:
  """A prompt and the response to learn. A response that continues a line starts with a space."""

  prompt: str
  response: str

  @property
  def weight(self) -> float:
    """The weight of the response in the loss."""
    return 1.0


@dataclasses.dataclass(frozen=True)
class Chat:
  """A conversation that ends with the assistant's message: the response.

  Fields:
    messages: `{"role", "content"}` and whatever else the chat template reads from a message, such as `tool_calls`. The
      `weight` of an assistant message is its weight in the loss, 1 by default.
    tools: JSON schemas of the tools that the assistant may call.
    template_kwargs: further variables of the chat template.
  """

  messages: tuple[Mapping[str, Any], ...]
  tools: Sequence[Mapping[str, Any]] | None = None
  template_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def prompt(self) -> str:
    """The messages before the response, one a line."""
    return "\n".join(m.get("content") or "" for m in self.messages[:-1])

  @property
  def response(self) -> str:
    """What the assistant says last; "" if it only calls tools."""
    return self.messages[-1].get("content") or ""

  @property
  def weight(self) -> float:
    """The weight of the response in the loss."""
    return self.messages[-1].get("weight", 1.0)

  @property
  def variables(self) -> dict[str, Any]:
    """The variables of the chat template other than the messages."""
    return ({"tools": list(self.tools)} if self.tools else {}) | dict(self.template_kwargs)


@dataclasses.dataclass(frozen=True)
class Task:
  """A task: the functions of its module with the user's keywords bound. See the module docstring."""

  name: str
  load: Callable[[str], Sequence[dict]]
  format: Callable[[dict], Formatted | Chat]
  score: Callable[[dict, str], dict[str, float]]
  labels: tuple[str, ...] | None
  prompt_loss_weight: float | None
  texts: Callable[[dict], tuple[str, ...]]
  target: Callable[[dict], int | float] | None
  metrics: Callable[[Sequence, Sequence], dict[str, float]]
  corpus: Callable[[Sequence[str], Sequence[dict]], dict[str, float]] | None = None

  @property
  def n_outputs(self) -> int:
    """Number of outputs of a head: one for each label, 1 for a regression, 0 for a task of free text."""
    return len(self.labels) if self.labels else int(self.target is not None)


@functools.cache
def names() -> list[str]:
  """Names of all tasks."""
  return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.ispkg)


def get(name: str, **keywords: Any) -> Task:
  """The task `name`.

  Raises:
    UserError: the name or a keyword is unknown, or a keyword is missing.
  """
  keywords = values.resolve(fields(name), keywords, "config.task")
  module, functions = _module(name)
  bound = {k: _bind(f, keywords) for k, f in functions.items()}
  load = bound.pop("load")
  labels = bound.pop("labels")() if "labels" in bound else module.LABELS
  labels = None if labels is None else tuple(labels)
  return Task(
    name=name,
    load=lambda split: load(errors.choose(split, {s: s for s in SPLITS}, "split")),
    labels=labels,
    prompt_loss_weight=module.PROMPT_LOSS_WEIGHT,
    **(_defaults(bound["format"], labels) | bound),
  )


@functools.cache
def fields(name: str) -> dict[str, values.Field]:
  """The keywords of a task."""
  _, functions = _module(name)
  return {k: f for fn in functions.values() for k, f in values.fields(fn, only=("", *_keyword_only(fn))).items()}


def _module(name: str) -> tuple[ModuleType, dict[str, Callable]]:
  """The module of a task, and which of `FUNCTIONS` it has."""
  module = importlib.import_module(f"{__name__}.{errors.choose(name, {k: k for k in names()}, 'task')}")
  return module, {k: getattr(module, k) for k in FUNCTIONS if hasattr(module, k)}


def accuracy(predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
  """`accuracy`: the share of predictions that equal their reference."""
  right = sum(int(p) == int(r) for p, r in zip(predictions, references, strict=True))
  return {"accuracy": right / len(references)}


def number(text: str) -> float:
  """The first decimal number in a text, or nan."""
  found = re.search(r"-?[0-9]*\.?[0-9]+", text)
  return float(found[0]) if found else math.nan


def exact_match(example_response: str, text: str) -> dict[str, float]:
  """`exact_match`: 1 if `text` is the response up to white space around it, else 0."""
  return {"exact_match": float(text.strip() == example_response.strip())}


def _defaults(format: Callable, labels: tuple[str, ...] | None) -> dict[str, Callable | None]:
  """The functions that stand in for `texts`, `target` and `metrics` where a module lacks them."""

  def index(example):
    response = format(example).response
    return labels.index(response) if response in labels else -1

  return {
    "texts": lambda example: (format(example).prompt,),
    "target": index if labels else None,
    "metrics": accuracy if labels else lambda predictions, references: {},
  }


def _keyword_only(function: Callable) -> dict[str, inspect.Parameter]:
  parameters = inspect.signature(function).parameters
  return {k: p for k, p in parameters.items() if p.kind is p.KEYWORD_ONLY}


def _bind(function: Callable, keywords: Mapping[str, Any]) -> Callable:
  return functools.partial(function, **{k: keywords[k] for k in _keyword_only(function) if k in keywords})
