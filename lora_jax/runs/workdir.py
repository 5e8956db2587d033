"""The directory that a command writes: what it may be called, and what may be in it."""

import os
import pathlib

from lora_jax import errors

DIRECTORIES = ("checkpoints", "adapter", "model", "plots", "tensorboard", "members", "groups", "seconds")
FILES = ("config.json", "metrics.jsonl", "summary.json", "report.md")
GLOB = "*?["  # orbax takes them for patterns, and does not find its own files then
ROOM = 160  # characters of the longest path that is written below it


def check(path: str | os.PathLike, where: str = "--workdir") -> pathlib.Path:
  """The directory, `~` expanded, that may be there already; nothing is made.

  Raises:
    UserError: it cannot be made or written, has a name that cannot be written to, or holds a file where a run has a
      directory or the other way round.
  """
  path = pathlib.Path(path)
  try:
    path = path.expanduser()
    fault = _fault(path)
  except (OSError, RuntimeError, ValueError) as e:  # too long, a loop of links, no such user, a null byte
    fault = " ".join(str(e).split())
  if fault:
    raise errors.UserError(f"{where}={str(path)[:200]}: {fault}; give another directory")
  return path


def _fault(path: pathlib.Path) -> str:
  """What is wrong with a directory to write, or ""."""
  if "\0" in str(path):
    return "its path has a null byte"
  if found := [c for c in GLOB if c in str(path.absolute())]:
    return f"its path has {' and '.join(map(repr, found))}, which checkpoints are not found under"
  there = next(p for p in (path.absolute(), *path.absolute().parents) if os.path.lexists(p))
  if there.is_symlink() and not there.exists():
    return f"{there} is a link to {os.readlink(there)}, which is not there"
  if not there.is_dir():
    return f"{there} is a file" if there == path.absolute() else f"it is below {there}, which is a file"
  if not os.access(there, os.W_OK | os.X_OK):
    return f"{there} cannot be written to"
  longest = max(len(os.fsencode(part)) for part in path.absolute().parts)
  if longest > (most := os.pathconf(there, "PC_NAME_MAX")):
    return f"a name in it has {longest} bytes, and {most} is the most"
  if len(os.fsencode(path.absolute())) + ROOM > (most := os.pathconf(there, "PC_PATH_MAX")):
    return f"its path is too long for what is written below it, which has {most} bytes at most"
  for name in DIRECTORIES if there == path.absolute() else ():
    if os.path.lexists(path / name) and not (path / name).is_dir():
      return f"{name} in it is no directory"
  for name in FILES:
    if os.path.lexists(path / name) and not (path / name).is_file():
      return f"{name} in it is no file"
  return ""
