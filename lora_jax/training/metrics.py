"""What a run writes while it works: metrics.jsonl and TensorBoard events.

Numbers that are not finite are written as null. Files appear under their final names only when they are whole.
"""

import importlib
import json
import math
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import jax

from lora_jax import errors, files
from lora_jax.formats import hf


class Metrics:
  """Writer of `metrics.jsonl` and TensorBoard events.

  In a run of many processes all may call it; process 0 alone writes. Use it as a context manager or call `close`.
  """

  def __init__(self, workdir: str | pathlib.Path, resume_step: int | None = None):
    """Opens the files; what an earlier run in `workdir` logged after `resume_step` is dropped.

    Args:
      workdir: the directory of the run.
      resume_step: step that the run goes on from; None or 0 keeps only what was logged before the first step.

    Raises:
      UserError: a line of `metrics.jsonl` other than a torn last one is not JSON.
    """
    self.path = pathlib.Path(workdir) / "metrics.jsonl"
    self._writes = jax.process_index() == 0
    if not self._writes:
      return
    start = resume_step or 0
    kept = [row for row in read_metrics(self.path) if row["step"] <= start]
    self.path.parent.mkdir(parents=True, exist_ok=True)
    files.write(self.path, "".join(dumps(row) + "\n" for row in kept).encode())
    self._file = self.path.open("a")
    events = str(self.path.parent / "tensorboard")
    self._events = _tensorboard().SummaryWriter(events, purge_step=start + 1 if start else 0, flush_secs=10)

  def log(self, step: int, values: Mapping[str, Any], prefix: str = "train") -> None:
    """Appends `{"step": step, "prefix/name": value, ...}` and the same as events; values are scalars."""
    if not self._writes:
      return
    row = {f"{prefix}/{k}": float(v) for k, v in values.items()}
    self._file.write(dumps({"step": int(step), **row}) + "\n")
    self._file.flush()
    for k, v in row.items():
      if math.isfinite(v):
        self._events.add_scalar(k, v, step)

  def keep_texts(self, prefix: str, texts: Sequence[Mapping[str, str]]) -> None:
    """Writes what `prefix` has generated to `texts.json`, beside what others have: {prefix: texts}."""
    if self._writes and texts:
      path = self.path.with_name("texts.json")
      write_json(path, read_texts(path) | {prefix: texts})

  def history(self) -> list[dict[str, float]]:
    """All rows so far, as `read_metrics`."""
    return read_metrics(self.path)

  def close(self) -> None:
    """Flushes and closes everything."""
    if self._writes:
      self._file.close()
      self._events.close()

  def __enter__(self):
    return self

  def __exit__(self, *exc):
    self.close()


def _tensorboard() -> ModuleType:
  """tensorboardX without torch, which it would import for seconds where it is installed."""
  missing = "torch" not in sys.modules
  if missing:
    sys.modules["torch"] = None
  try:
    return importlib.import_module("tensorboardX")
  finally:
    if missing:
      del sys.modules["torch"]


def read_metrics(path: str | pathlib.Path) -> list[dict[str, float]]:
  """The rows of a `metrics.jsonl`, null as nan; a torn last line is left out, no file is no rows."""
  path = pathlib.Path(path)
  if not path.exists():
    return []
  with files.open(path) as f:
    lines = f.read().splitlines()
  rows = []
  for i, line in enumerate(lines):
    try:
      row = files.parse_json(line, f"{path}:{i + 1}")
      if not _is_row(row):
        raise errors.UserError(f'{path}:{i + 1}: expected a JSON object of numbers with a whole "step"')
      rows.append({k: math.nan if v is None else v for k, v in row.items()})
    except errors.UserError:
      if i + 1 < len(lines):
        raise
  return rows


def _is_row(x: Any) -> bool:
  is_number = lambda v: isinstance(v, int | float) and not isinstance(v, bool)
  return isinstance(x, dict) and type(x.get("step")) is int and all(v is None or is_number(v) for v in x.values())


def read_texts(path: str | pathlib.Path) -> dict[str, list[dict[str, str]]]:
  """What a `texts.json` holds; no file is nothing."""
  path = pathlib.Path(path)
  return hf.read_json(path) if path.exists() else {}


def write_json(path: str | pathlib.Path, obj: Any) -> None:
  """Writes a tree of dicts, lists and scalars (numpy's and jax's too) as JSON, all or nothing."""
  files.write(pathlib.Path(path), (dumps(obj, indent=2) + "\n").encode())


def dumps(obj: Any, **kw: Any) -> str:
  """`json.dumps` of dicts, lists and scalars, numpy's and jax's too; numbers that are not finite become null."""
  return json.dumps(_plain(obj), allow_nan=False, ensure_ascii=False, **kw)


def _plain(x: Any) -> Any:
  """`x` in the types of JSON."""
  if isinstance(x, Mapping):
    return {str(k): _plain(v) for k, v in x.items()}
  if isinstance(x, list | tuple):
    return [_plain(v) for v in x]
  if isinstance(x, os.PathLike):
    return os.fspath(x)
  x = x.item() if hasattr(x, "item") else x
  return None if isinstance(x, float) and not math.isfinite(x) else x
