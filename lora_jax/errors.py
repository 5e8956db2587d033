"""Errors that a user can cause, and the lookups that raise them."""

import contextlib
import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any


class UserError(Exception):
  """A mistake in a config, a name, a file or the environment.

  The message says what is wrong, where, and what was expected. Command lines print it without a traceback. It is one
  line of printable characters, since it may quote any bytes of a file.
  """

  def __init__(self, message: str):
    super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(message)))


def line(error: BaseException) -> str:
  """The message of an error, in one line of at most 500 characters."""
  return f"{' '.join(str(error).split()):.500}"


@contextlib.contextmanager
def parsing(what: str) -> Iterator[None]:
  """Turns any error of a block that reads foreign data into a UserError, "`what`: the reason".

  It is for faults that no check has foreseen; a UserError of the block itself says more and passes through.
  """
  try:
    yield
  except UserError:
    raise
  except BaseException as e:
    # A failed assertion in `tokenizers`, which is written in Rust, raises a BaseException.
    if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
      raise
    raise UserError(f"{what}: {type(e).__name__}: {line(e)}") from e


def is_full(error: BaseException) -> bool:
  """Whether an error says that a disk or a quota is full. Each library has its own type for it."""
  return any(text in str(error) for text in ("No space left on device", "Disk quota exceeded"))


def is_out_of_memory(error: BaseException) -> bool:
  """Whether an error says that memory ran out. XLA has several messages for it, and one type for all its errors."""
  return isinstance(error, MemoryError) or any(t in str(error) for t in ("RESOURCE_EXHAUSTED", "Out of memory"))


@contextlib.contextmanager
def listed(wrong: list[str]) -> Iterator[None]:
  """Appends the message of a UserError that ends the block to `wrong`, so that one error can list several mistakes."""
  try:
    yield
  except UserError as e:
    wrong.append(str(e))


@contextlib.contextmanager
def located(where: Any) -> Iterator[None]:
  """Prefixes the message of a UserError that ends the block with `where`."""
  try:
    yield
  except UserError as e:
    raise UserError(f"{where}: {e}") from None


def nearest(name: str, valid: Iterable[str]) -> str:
  """A clause that lists the closest valid names, or all valid names if none is close."""
  valid = sorted(map(str, valid))
  close = difflib.get_close_matches(str(name), valid, n=3, cutoff=0.6)
  if close:
    return "did you mean " + " or ".join(map(repr, close)) + "?"
  return "valid: " + ", ".join(valid) if valid else "there are none"


def choose(name: Any, table: Mapping[str, Any], what: str) -> Any:
  """`table[name]`. Raises UserError with the nearest valid names if there is no such key."""
  if not isinstance(name, str) or name not in table:
    raise UserError(f"unknown {what} {name!r}; {nearest(name, table)}")
  return table[name]
