"""Files that are whole or absent: written in one step, or made once and kept in a cache."""

import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable

from lora_jax import errors

LEFTOVER_SECONDS = 24 * 3600


def cache(kind: str) -> pathlib.Path:
  """Where files of a kind live: `$LORA_JAX_CACHE/kind`, by default `~/.cache/lora_jax/kind`."""
  return pathlib.Path(os.environ.get("LORA_JAX_CACHE") or pathlib.Path.home() / ".cache" / "lora_jax", kind)


def publish(path: pathlib.Path, build: Callable[[pathlib.Path], None]) -> None:
  """Fills a fresh directory by `build(directory)` and renames it to `path`.

  `path` is complete or absent at any moment, whoever is killed. Of several processes that do this at once the
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
  """Removes what processes killed long ago left behind."""
  for old in directory.glob("incomplete.*"):
    if time.time() - old.stat().st_mtime > LEFTOVER_SECONDS:
      shutil.rmtree(old, ignore_errors=True)


WRITER = ""  # which of several processes that write into one directory this is, such as ".0-of-4"


def write(path: pathlib.Path, content: bytes) -> None:
  """Writes a file that is whole or absent, whatever happens meanwhile; of several `WRITER`s the last one's stays."""
  path.parent.mkdir(parents=True, exist_ok=True)
  # The same each time, so that what a killed process has left is written over.
  part = path.with_name(f"{path.name}{WRITER}.tmp")
  try:
    with part.open("wb") as f:
      f.write(content)
      f.flush()
      os.fsync(f.fileno())
    os.replace(part, path)
  finally:
    part.unlink(missing_ok=True)
