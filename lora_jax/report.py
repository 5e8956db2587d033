"""What a run tells its user: progress, metrics, summary and report.

Files appear under their final names only when they are whole. Numbers that are not finite are written as null.
"""

import importlib.metadata
import io
import json
import math
import os
import pathlib
import platform
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tqdm

from lora_jax import errors

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "lora_jax")
NO_PERCENT = ("loss", "perplexity", "examples", "tokens", "seconds")  # metrics that are no share of a whole


def say(text: str) -> None:
  """Prints a status line to standard error, above the progress bar if there is one."""
  tqdm.tqdm.write(text, file=sys.stderr)


class Progress:
  """How far some long work is: a bar on a terminal, plain lines elsewhere, both on standard error."""

  def __init__(self, total: int, label: str = "step", start: int = 0):
    self.total, self.label = total, label
    self._first, self._last_line = None, time.monotonic()
    self._bar = None
    if sys.stderr.isatty():
      layout = "{desc} {n_fmt}/{total_fmt} |{bar}| time left {remaining}{postfix}"
      self._bar = tqdm.tqdm(
        total=total, initial=start, desc=label, bar_format=layout, smoothing=0.1, dynamic_ncols=True
      )

  def update(self, done: int, text: str = "") -> None:
    """Shows that `done` of `total` is done.

    Without a terminal this prints a line when there is `text` and otherwise every 10 seconds.
    """
    now = time.monotonic()
    self._first = self._first or (done, now)
    if self._bar is not None:
      if text:
        self._bar.set_postfix_str(text, refresh=False)
      self._bar.update(done - self._bar.n)
    elif text or now - self._last_line > 10:
      self._last_line = now
      parts = [f"{self.label} {done:,}/{self.total:,}", text]
      if done > self._first[0]:
        left = (self.total - done) * (now - self._first[1]) / (done - self._first[0])
        parts.append(f"time left {tqdm.tqdm.format_interval(left)}")
      say("  ".join(filter(None, parts)))

  def close(self) -> None:
    """Leaves the bar as it is."""
    if self._bar is not None:
      self._bar.close()


class Metrics:
  """Writer of `metrics.jsonl` and TensorBoard events, and the progress display of a training run.

  In a run of many processes all may call it; process 0 alone writes. Use it as a context manager or call `close`.
  """

  def __init__(self, workdir: str | pathlib.Path, total_steps: int, resume_step: int | None = None):
    """Opens the files; what an earlier run in `workdir` logged after `resume_step` is dropped.

    Args:
      workdir: the directory of the run.
      total_steps: steps of the whole run.
      resume_step: step that the run goes on from, None or 0 for a run that starts anew.

    Raises:
      UserError: a line of `metrics.jsonl` other than a torn last one is not JSON.
    """
    from tensorboardX import SummaryWriter

    self.path = pathlib.Path(workdir) / "metrics.jsonl"
    self._writes = jax.process_index() == 0
    if not self._writes:
      return
    start = resume_step or 0
    kept = [row for row in read_metrics(self.path) if row["step"] <= start] if start else []
    self.path.parent.mkdir(parents=True, exist_ok=True)
    _write(self.path, "".join(_dumps(row) + "\n" for row in kept).encode())
    self._file = self.path.open("a")
    events = str(self.path.parent / "tensorboard")
    self._events = SummaryWriter(events, purge_step=start + 1 if start else 0, flush_secs=10)
    self._progress = Progress(total_steps, "step", start)

  def log(self, step: int, values: Mapping[str, Any], prefix: str = "train") -> None:
    """Appends `{"step": step, "prefix/name": value, ...}` and the same as events; values are scalars."""
    if not self._writes:
      return
    row = {f"{prefix}/{k}": float(v) for k, v in values.items()}
    self._file.write(_dumps({"step": int(step), **row}) + "\n")
    self._file.flush()
    for k, v in row.items():
      if math.isfinite(v):
        self._events.add_scalar(k, v, step)

  def progress(self, step: int, loss: float | None = None, tokens_per_second: float | None = None) -> None:
    """Moves the bar to `step`, which may be called at every step; off a terminal prints where values are given."""
    if self._writes:
      text = [] if loss is None else [f"loss {float(loss):.3f}"]
      text += [] if tokens_per_second is None else [f"{float(tokens_per_second):,.0f} tokens/s"]
      self._progress.update(step, "  ".join(text))

  def history(self) -> list[dict[str, float]]:
    """All rows so far, as `read_metrics`."""
    return read_metrics(self.path)

  def close(self) -> None:
    """Flushes and closes everything."""
    if self._writes:
      self._progress.close()
      self._file.close()
      self._events.close()

  def __enter__(self):
    return self

  def __exit__(self, *exc):
    self.close()


def read_metrics(path: str | pathlib.Path) -> list[dict[str, float]]:
  """The rows of a `metrics.jsonl`, null as nan; a torn last line is left out, no file is no rows."""
  path = pathlib.Path(path)
  lines = path.read_bytes().splitlines() if path.exists() else []
  rows = []
  for i, line in enumerate(lines):
    try:
      row = json.loads(line)
      rows.append({"step": row["step"], **{k: math.nan if v is None else v for k, v in row.items()}})
    except (ValueError, TypeError, KeyError) as e:
      if i + 1 < len(lines):
        raise errors.UserError(f'{path}:{i + 1}: expected a JSON object with "step"') from e
  return rows


def write_json(path: str | pathlib.Path, obj: Any) -> None:
  """Writes a tree of dicts, lists and scalars (numpy's and jax's too) as JSON, all or nothing."""
  _write(pathlib.Path(path), (_dumps(obj, indent=2) + "\n").encode())


def _dumps(obj: Any, **kw: Any) -> str:
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


def _write(path: pathlib.Path, content: bytes) -> None:
  """Writes a file that is whole or absent, whatever happens meanwhile."""
  path.parent.mkdir(parents=True, exist_ok=True)
  part = path.with_name(path.name + ".tmp")
  try:
    with part.open("wb") as f:
      f.write(content)
      f.flush()
      os.fsync(f.fileno())
    os.replace(part, path)
  finally:
    part.unlink(missing_ok=True)


def versions() -> dict[str, str | None]:
  """`{package: version}` of what a result depends on; None for a package that is not installed."""

  def version(package):
    try:
      return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      return None

  return {"python": platform.python_version(), **{p: version(p) for p in PACKAGES}}


def peak_memory_bytes() -> int:
  """The most memory in use so far: on the fullest local accelerator, or resident in this process on CPU."""
  stats = [d.memory_stats() or {} for d in jax.local_devices()]
  peak = max(s.get("peak_bytes_in_use", 0) for s in stats)
  return peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def summary(
  *,
  model: str,
  method: str,
  task: str,
  trainable_params: int,
  total_params: int,
  before: Mapping[str, float],
  after: Mapping[str, float],
  steps: int,
  loss_first: float,
  loss_last: float,
  tokens_per_second: float,
  compile_seconds: float,
  wall_seconds: float,
  **more: Any,
) -> dict[str, Any]:
  """The content of `summary.json`; `more` are further top-level keys, such as `dtype`.

  Peak memory and versions are those of this process, now.
  """
  return {
    "model": model,
    "method": method,
    "task": task,
    "trainable_params": trainable_params,
    "total_params": total_params,
    "eval": {"before": dict(before), "after": dict(after)},
    "train": {
      "steps": steps,
      "loss_first": loss_first,
      "loss_last": loss_last,
      "tokens_per_second": tokens_per_second,
      "compile_seconds": compile_seconds,
    },
    "peak_memory_bytes": peak_memory_bytes(),
    "wall_seconds": wall_seconds,
    "versions": versions(),
    **more,
  }


def write_report(
  workdir: str | pathlib.Path,
  summary: Mapping[str, Any],
  history: Sequence[Mapping[str, float]],
  config: Mapping[str, Any],
  command: str = "",
  base_model: str = "",
) -> None:
  """Writes `report.md` and `plots/loss.png` into `workdir`.

  `summary` and `history` are as `summary` and `Metrics.history` return them, `config` is the resolved config, `command`
  repeats the run. `base_model` is what transformers loads the base model from (a hub name, a directory, a GGUF file),
  if that is not `summary["model"]`; it is shown when there is a directory `workdir/adapter`.
  """
  workdir = pathlib.Path(workdir)
  title = f"{summary['method']} on {summary['model']}: {summary['task']}"
  parts = [f"# {title}", _eval_table(summary["eval"]), "## Training", _train_table(summary)]
  if any(not math.isnan(row.get("train/loss", math.nan)) for row in history):
    _write(workdir / "plots" / "loss.png", loss_curve(history, title))
    parts.append("![Training loss](plots/loss.png)")
  if (workdir / "adapter").is_dir():
    parts += ["## Use the adapter", _load_code(base_model or summary["model"], workdir / "adapter")]
  if command:
    parts += ["## Reproduce", f"```sh\n{command}\n```"]
  for name, value in (("Config", config), ("Versions", summary["versions"])):
    block = f"```json\n{_dumps(value, indent=2)}\n```"
    parts.append(f"<details><summary>{name}</summary>\n\n{block}\n\n</details>")
  _write(workdir / "report.md", ("\n\n".join(parts) + "\n").encode())


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """A Markdown table whose first column is text and whose others are numbers."""
  rule = ["---", *["---:"] * (len(header) - 1)]
  cells = [[c.replace("|", "\\|") for c in row] for row in (header, rule, *rows)]
  return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _eval_table(scores: Mapping[str, Mapping[str, float]]) -> str:
  """Metrics before and after; shares of a whole in percent, their change in points."""
  rows = []
  for k in dict.fromkeys([*scores["before"], *scores["after"]]):
    before, after = (float(scores[when].get(k, math.nan)) for when in ("before", "after"))
    if any(word in k for word in NO_PERCENT) or any(abs(x) > 1 for x in (before, after)):
      shown = [f"{before:,.4g}", f"{after:,.4g}", f"{after - before:+,.4g}"]
    else:
      shown = [f"{before:.1%}", f"{after:.1%}", f"{(after - before) * 100:+.1f} points"]
    rows.append([k, *("-" if "nan" in cell else cell for cell in shown)])
  return _table(["metric", "before", "after", "change"], rows)


def _train_table(summary: Mapping[str, Any]) -> str:
  train, trained, total = summary["train"], summary["trainable_params"], summary["total_params"]
  rows = [
    ["trainable parameters", f"{trained:,} of {total:,} ({trained / total:.2%})"],
    ["steps", f"{train['steps']:,}"],
    ["loss, first to last", f"{train['loss_first']:.3f} to {train['loss_last']:.3f}"],
    ["speed", f"{train['tokens_per_second']:,.0f} tokens/s"],
    ["compilation", f"{train['compile_seconds']:.1f} s"],
    ["whole run", f"{summary['wall_seconds']:.1f} s"],
    ["peak memory", f"{summary['peak_memory_bytes'] / 2**30:.2f} GiB"],
  ]
  return _table(["", ""], rows)


def _load_code(base_model: str, adapter: pathlib.Path) -> str:
  """Python that loads the adapter with Hugging Face's `peft`."""
  source = json.dumps(base_model)
  if base_model.endswith(".gguf"):
    path = pathlib.Path(base_model)
    source = f"{json.dumps(str(path.parent))}, gguf_file={json.dumps(path.name)}"
  return f"""```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({source})
model = PeftModel.from_pretrained(base, {json.dumps(str(adapter))})
```"""


def loss_curve(history: Sequence[Mapping[str, float]], title: str = "") -> bytes:
  """A PNG of `train/loss` against the step, as logged and smoothed, and of `eval/loss` where there is some."""
  from matplotlib.figure import Figure
  from matplotlib.ticker import MaxNLocator

  def curve(name):
    points = [(row["step"], row[name]) for row in history if math.isfinite(row.get(name, math.nan))]
    return [list(axis) for axis in zip(*points, strict=True)]

  steps, losses = curve("train/loss")
  figure = Figure(figsize=(7, 4), dpi=160, layout="constrained")
  axes = figure.add_subplot()
  axes.plot(steps, losses, color="#9ecae1", linewidth=1, label="each logged step")
  axes.plot(steps, smooth(losses), color="#08519c", linewidth=2, label="smoothed")
  if evals := curve("eval/loss"):
    axes.plot(*evals, "o-", color="#d94801", markersize=4, linewidth=1, label="validation")
  axes.set(xlabel="Step", ylabel="Loss")
  axes.set_title(title, loc="left", fontsize=11)
  axes.xaxis.set_major_locator(MaxNLocator(integer=True))
  axes.grid(color="#e6e6e6", linewidth=0.8)
  axes.set_axisbelow(True)
  axes.spines[["top", "right"]].set_visible(False)
  axes.margins(x=0.01)
  axes.legend(frameon=False)
  png = io.BytesIO()
  figure.savefig(png, format="png")
  return png.getvalue()


def smooth(values: Sequence[float]) -> np.ndarray:
  """Centred moving average over about a tenth of the values, with Hann weights; the window is cut off at the ends."""
  width = min(max(len(values) // 10, 3), len(values)) | 1
  weights = np.hanning(width + 2)[1:-1]
  total, weight = (np.convolve(x, weights) for x in (values, np.ones(len(values))))
  return (total / weight)[width // 2 : width // 2 + len(values)]
