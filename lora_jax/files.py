"""Reads regular files, and writes files and cached directories whole or not at all."""

import builtins
import json
import os
import pathlib
import shutil
import stat
import tempfile
import time
from collections.abc import Callable
from typing import Any, BinaryIO

from lora_jax import errors

LEFTOVER_SECONDS = 24 * 3600
LARGEST = 2**28  # bytes of a text that is read whole; tokenizers with large vocabularies have 2**25
KINDS = {
  stat.S_IFDIR: "a directory",
  stat.S_IFIFO: "a named pipe",
  stat.S_IFSOCK: "a socket",
  stat.S_IFCHR: "a device",
  stat.S_IFBLK: "a device",
}


def open(path: str | os.PathLike) -> BinaryIO:  # noqa: A001
  """An existing regular file, opened for reading bytes.

  Raises:
    UserError: it is missing, unreadable, or not a regular file; a pipe or a device may never answer.
  """
  path = os.fspath(path)
  try:
    kind = stat.S_IFMT(os.stat(path).st_mode)
    if kind == stat.S_IFREG:
      return builtins.open(path, "rb")
  except FileNotFoundError:
    raise errors.UserError(f"{path} does not exist") from None
  except (OSError, ValueError) as e:  # ValueError: a null byte in its name
    raise errors.UserError(f"cannot read {path}: {getattr(e, 'strerror', None) or e}") from e
  raise errors.UserError(f"cannot read {path}: it is {KINDS.get(kind, 'of an unknown kind')}, expected a file")


def read(path: str | os.PathLike, largest: float = LARGEST) -> str:
  """The text of a file in UTF-8.

  Raises:
    UserError: as for `open`, or the file is longer than `largest` bytes or not UTF-8.
  """
  try:
    with open(path) as f:
      if (size := os.fstat(f.fileno()).st_size) > largest:
        raise errors.UserError(f"cannot read {path}: it has {size:,} bytes, expected at most {largest:,}")
      return f.read().decode()
  except UnicodeDecodeError as e:
    raise errors.UserError(f"cannot read {path}: it is not UTF-8: {e}") from e
  except OSError as e:
    raise errors.UserError(f"cannot read {path}: {e.strerror}") from e


def parse_json(text: str | bytes, where: str) -> Any:
  """The value of a JSON text.

  Raises:
    UserError: "`where`: not JSON: the reason". Nesting that is too deep for Python, integers that are too long for it,
      and lone surrogates, which UTF-8 cannot encode, count as faults too.
  """
  try:
    value = json.loads(text)
    if (b"\\u" if isinstance(text, bytes) else "\\u") in text:
      json.dumps(value, ensure_ascii=False).encode()
  except RecursionError as e:
    raise errors.UserError(f"{where}: not JSON: it is nested too deeply") from e
  except ValueError as e:
    raise errors.UserError(f"{where}: not JSON: {errors.line(e)}") from e
  return value


def cache(kind: str) -> pathlib.Path:
  """The cache directory for files of a kind: `$LORA_JAX_CACHE/kind`, by default `~/.cache/lora_jax/kind`."""
  return pathlib.Path(os.environ.get("LORA_JAX_CACHE") or pathlib.Path.home() / ".cache" / "lora_jax", kind)


def publish(path: pathlib.Path, build: Callable[[pathlib.Path], None]) -> None:
  """Fills a fresh directory with `build(directory)` and renames it to `path`.

  `path` is complete or absent at any moment, even if a process is killed. If several processes do this at once, the
  first to finish wins and the others use its result.
  """
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path.parent)
    work = pathlib.Path(tempfile.mkdtemp(prefix="incomplete.", dir=path.parent))
  except OSError as e:
    raise errors.UserError(f"cannot write to {path.parent}: {e}; set LORA_JAX_CACHE to another directory") from e
  try:
    build(work)
    os.rename(work, path)
  except OSError as e:
    if not path.is_dir():
      raise errors.UserError(f"cannot prepare {path}: {e}; set LORA_JAX_CACHE to another directory") from e
  finally:
    shutil.rmtree(work, ignore_errors=True)


def _remove_leftovers(directory: pathlib.Path) -> None:
  """Removes the leftovers of processes that were killed long ago."""
  for old in directory.glob("incomplete.*"):
    if time.time() - old.stat().st_mtime > LEFTOVER_SECONDS:
      shutil.rmtree(old, ignore_errors=True)


WRITER = ""  # distinguishes several processes that write into one directory, such as ".0-of-4"


def write(path: pathlib.Path, content: bytes) -> None:
  """Writes a file that is whole or absent, whatever happens meanwhile. Of several `WRITER`s the last one wins."""
  path.parent.mkdir(parents=True, exist_ok=True)
  # Always the same name, so that the leftover of a killed process is overwritten.
  part = path.with_name(f"{path.name}{WRITER}.tmp")
  try:
    with builtins.open(part, "wb") as f:
      f.write(content)
      f.flush()
      os.fsync(f.fileno())
    os.replace(part, path)
  finally:
    part.unlink(missing_ok=True)
