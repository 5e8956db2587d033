"""Errors that a user can cause, and the lookups that raise them."""

import contextlib
import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any


class UserError(Exception):
  """A mistake in a config, a name, a file or the environment.

  The message says what is wrong, where, and what was expected; command lines print it without a traceback. It is one
  line that any terminal can show: what is quoted of files may be anything.
  """

  def __init__(self, message: str):
    super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(message)))


def line(error: BaseException) -> str:
  """What an error says, in one line of at most 500 characters."""
  return f"{' '.join(str(error).split()):.500}"


@contextlib.contextmanager
def parsing(what: str) -> Iterator[None]:
  """Whatever the block raises becomes a UserError, "`what`: the reason": it reads what others have written.

  It is for what no check before it has foreseen; what the block refuses itself says more.
  """
  try:
    yield
  except UserError:
    raise
  except BaseException as e:
    # What `tokenizers`, which is Rust, fails an assertion with is no Exception.
    if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
      raise
    raise UserError(f"{what}: {type(e).__name__}: {line(e)}") from e


def is_full(error: BaseException) -> bool:
  """Whether an error is that a disk is full, or a quota: each library has a type of its own for it."""
  return any(text in str(error) for text in ("No space left on device", "Disk quota exceeded"))


def is_out_of_memory(error: BaseException) -> bool:
  """Whether an error is that memory did not suffice; XLA has several for it, of one type with all its others."""
  return isinstance(error, MemoryError) or any(t in str(error) for t in ("RESOURCE_EXHAUSTED", "Out of memory"))


@contextlib.contextmanager
def listed(wrong: list[str]) -> Iterator[None]:
  """Adds the message of a UserError that ends the block to `wrong`, so that one error can list several mistakes."""
  try:
    yield
  except UserError as e:
    wrong.append(str(e))


@contextlib.contextmanager
def located(where: Any) -> Iterator[None]:
  """Puts `where` before the message of a UserError that ends the block."""
  try:
    yield
  except UserError as e:
    raise UserError(f"{where}: {e}") from None


def nearest(name: str, valid: Iterable[str]) -> str:
  """A clause that names the closest valid names, or all of them when none is close."""
  valid = sorted(map(str, valid))
  close = difflib.get_close_matches(str(name), valid, n=3, cutoff=0.6)
  if close:
    return "did you mean " + " or ".join(map(repr, close)) + "?"
  return "valid: " + ", ".join(valid) if valid else "there is none"


def choose(name: Any, table: Mapping[str, Any], what: str) -> Any:
  """`table[name]`; a name that is none of its keys raises UserError with the nearest valid ones."""
  if not isinstance(name, str) or name not in table:
    raise UserError(f"unknown {what} {name!r}; {nearest(name, table)}")
  return table[name]
