"""Checks a user's values for keywords against the annotations of a function.

A signature is the only place that states the type, range and default of a keyword. Annotations come from `typing` or
from this module. Pydantic checks them strictly: True is not a number, 2.5 and "8" are not whole numbers, and nan and
inf are not allowed.
"""

import ast
import contextlib
import dataclasses
import functools
import inspect
import types
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pydantic
from annotated_types import Ge, Gt, Le, Lt

from lora_jax import errors

Count = Annotated[int, Ge(1)]
Size = Annotated[int, Ge(0)]
Seed = Annotated[int, Ge(0), Lt(2**32)]
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Probability = Annotated[float, Ge(0), Lt(1)]
Share = Annotated[float, Ge(0), Le(1)]
Name = Annotated[str, pydantic.StringConstraints(min_length=1)]

REQUIRED = inspect.Parameter.empty
LIMITS = {Ge: ("ge", "at least"), Gt: ("gt", "more than"), Le: ("le", "at most"), Lt: ("lt", "less than")}


@dataclasses.dataclass(frozen=True)
class Field:
  """A keyword: its annotation, and its default or REQUIRED."""

  hint: Any
  default: Any = REQUIRED


def fields(fn: Callable, only: Collection[str] = (), without: Collection[str] = ()) -> dict[str, Field]:
  """The keywords of a function or dataclass, {keyword: Field}: those in `only`, or all except `without` and `**kw`."""
  named = [p for p in inspect.signature(fn).parameters.values() if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
  chosen = [p for p in named if p.name not in without and (not only or p.name in only)]
  return {p.name: Field(_plain(p.annotation), _frozen(p.default)) for p in chosen}


def resolve(table: Mapping[str, Field], given: Mapping[str, Any], where: str) -> dict[str, Any]:
  """Every keyword of `table` with its given value or its default. Sequences become tuples.

  Args:
    where: name of the section in messages, such as "config.method".

  Raises:
    UserError: lists unknown keys, missing keys, and every value of a wrong type or out of range.
  """
  if not isinstance(given, Mapping):
    raise errors.UserError(f"{where} is a section with keys, not {shown(given)}")
  wrong = [f"unknown key {where}.{k}; {errors.nearest(k, table)}" for k in given if k not in table]
  if missing := [k for k, f in table.items() if f.default is REQUIRED and k not in given]:
    wrong.append(f"{where} needs {', '.join(missing)}")
  found = {}
  for k, f in table.items():
    if k in given:
      with errors.listed(wrong):
        found[k] = check(f.hint, given[k], f"{where}.{k}")
    else:
      found[k] = f.default
  if wrong:
    raise errors.UserError("; ".join(wrong))
  return found


def keywords(fn: Callable, given: Mapping[str, Any], where: str, without: Collection[str] = ()) -> dict[str, Any]:
  """The keywords of `fn`, see `resolve`, except those that its caller fills in itself: `without`."""
  return resolve(fields(fn, without=without), given, where)


def check(hint: Any, value: Any, where: str) -> Any:
  """`value` in the form that the annotation asks for: any number as a float for a float, sequences as tuples.

  Raises:
    UserError: the value does not fit the annotation.
  """
  try:
    return _frozen(_adapter(hint).validate_python(_frozen(value)))
  except pydantic.ValidationError:
    pass
  choices = [c for h in _options(hint) if get_origin(h) is Literal for c in get_args(h)]
  near = errors.nearest(value, choices) if isinstance(value, str) else ""
  near = f"; {near}" if near.startswith("did you mean") else ""
  raise errors.UserError(f"{where}={shown(value)}: expected {describe(hint)}{near}")


def parse(hint: Any, text: str, where: str) -> Any:
  """The value of `text` from a command line: the Python literal that it is, or the text itself if that does not fit."""
  candidates = [literal(text), text]
  if text.lower() in ("true", "false"):
    candidates.append(text.lower() == "true")
  for x in candidates:
    with contextlib.suppress(errors.UserError):
      return check(hint, x, where)
  return check(hint, candidates[0], where)


def literal(text: str) -> Any:
  """The value of `text` as a Python literal, or `text` itself."""
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
    return text


def shown(value: Any) -> str:
  """A value in a message, shortened."""
  try:
    text = repr(value)
  except Exception as e:  # an integer with too many digits, or an object whose repr fails
    text = f"a {type(value).__name__} that cannot be shown ({type(e).__name__})"
  return text if len(text) <= 100 else f"{text[:100]}..."


def describe(hint: Any) -> str:
  """An annotation in English: "a whole number, at least 1, or None"."""
  hint = _plain(hint)
  options = [_describe(h) for h in _options(hint)]
  if len(options) == 1:
    return options[0]
  comma = "," if any("," in o for o in options) else ""
  return f"{', '.join(options[:-1])}{comma} or {options[-1]}"


def _describe(hint: Any) -> str:
  origin, args = get_origin(hint), get_args(hint)
  if origin is Annotated:
    limits = [f"{LIMITS[type(m)][1]} {_limit(m)}" for m in args[1:] if type(m) in LIMITS]
    text = [m for m in args[1:] if isinstance(m, pydantic.StringConstraints)]
    name = describe(args[0])
    name += "".join(" that is not empty" if m.min_length else f" like {m.pattern.strip('^$')}" for m in text)
    return ", ".join([name, " and ".join(limits)]) if limits else name
  if origin is Literal:
    return " or ".join(filter(None, (", ".join(map(repr, args[:-1])), repr(args[-1]))))
  if isinstance(origin, type) and issubclass(origin, Mapping):
    return "a mapping" if Any in args else f"a mapping to {describe(args[1])}"
  if isinstance(origin, type) and issubclass(origin, Iterable):
    return f"a list, each {describe(args[0])}"
  if hint is Mapping:
    return "a mapping"
  names = {bool: "True or False", int: "a whole number", float: "a number", str: "text", types.NoneType: "None"}
  return names.get(hint, "anything")


def _limit(limit: Any) -> str:
  value = getattr(limit, LIMITS[type(limit)][0])
  return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _options(hint: Any) -> list[Any]:
  """The annotations of a union, or the single annotation."""
  return list(get_args(hint)) if get_origin(hint) in (Union, types.UnionType) else [hint]


def _plain(hint: Any) -> Any:
  """An annotation without types that a config cannot hold, such as arrays, which stand for numbers inside a program."""
  if get_origin(hint) not in (Union, types.UnionType):
    return hint
  kept = [h for h in get_args(hint) if not getattr(h, "__module__", "").startswith("jax")]
  return functools.reduce(lambda a, b: a | b, kept)


@functools.cache
def _adapter(hint: Any) -> pydantic.TypeAdapter:
  return pydantic.TypeAdapter(hint, config=pydantic.ConfigDict(strict=True, allow_inf_nan=False))


def _frozen(value: Any) -> Any:
  """The value with all sequences as tuples."""
  if isinstance(value, Mapping):
    return {k: _frozen(v) for k, v in value.items()}
  if isinstance(value, Sequence) and not isinstance(value, str | bytes):
    return tuple(map(_frozen, value))
  return value
