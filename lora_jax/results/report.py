"""The outcome of a run: summary.json and report.md."""

import importlib.metadata
import math
import pathlib
import platform
import re
import resource
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lora_jax import __version__, errors, files
from lora_jax.results import plots
from lora_jax.training import metrics

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
# Numbers of a member's summary that a table can show beside the metrics of its task.
MEASURED = (
  *("trainable_params", "total_params", "saved_bytes", "step_memory_bytes", "peak_memory_bytes", "wall_seconds"),
  *("train.steps", "train.loss_first", "train.loss_last", "train.tokens_per_second", "train.compile_seconds"),
  *("train.step_seconds", "train_examples", "cut", "population"),
)
NO_PERCENT = ("loss", "perplexity", "examples", "tokens", "seconds")  # metrics that are not shares of a whole


def versions() -> dict[str, str | None]:
  """`{package: version}` of the packages that a result depends on; None for one that is not installed."""

  def version(package):
    try:
      return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      return None

  return {"python": platform.python_version(), **{p: version(p) for p in PACKAGES}, "lora_jax": __version__}


def peak_memory_bytes() -> int:
  """The most memory in use so far: on the fullest local accelerator, or resident in this process on CPU."""
  stats = [d.memory_stats() or {} for d in jax.local_devices()]
  peak = max(s.get("peak_bytes_in_use", 0) for s in stats)
  return peak or _peak_resident()


def _peak_resident() -> int:
  # On Linux ru_maxrss includes the peak of the process that started this one.
  status = pathlib.Path("/proc/self/status")
  if status.exists():
    return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1])
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


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
  step_seconds: float,
  wall_seconds: float,
  **more: Any,
) -> dict[str, Any]:
  """The content of `summary.json`; `more` are further top-level keys, such as `dtype`. `step_seconds` is the median.

  Peak memory and versions are read from this process, now.
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
      "step_seconds": step_seconds,
    },
    "peak_memory_bytes": peak_memory_bytes(),
    "wall_seconds": wall_seconds,
    "versions": versions(),
    **more,
  }


def check(summary: Mapping[str, Any], where: str) -> None:
  """Raises UserError, which begins with `where`, for the fields of a wrong type in a summary read from a file.

  Numbers may be null: that is how numbers that are not finite are written.
  """
  text = lambda x: isinstance(x, str)
  number = lambda x: x is None or isinstance(x, int | float) and not isinstance(x, bool)
  numbers = lambda x: isinstance(x, Mapping) and all(map(number, x.values()))
  rules = dict.fromkeys(("model", "method", "kind", "task", "group"), ("a string", text))
  rules |= dict.fromkeys(("trainable_params", "total_params", "wall_seconds"), ("a number", number))
  rules["eval"] = ("objects of numbers", lambda x: isinstance(x, Mapping) and all(map(numbers, x.values())))
  rules["train"] = ("an object of numbers", numbers)
  rules["versions"] = ("an object", lambda x: isinstance(x, Mapping))
  found = {k: summary[k] for k in rules if k in summary}
  if bad := [f"{k} is {v!r:.60}, expected {rules[k][0]}" for k, v in found.items() if not rules[k][1](v)]:
    raise errors.UserError(f"{where}: {'; '.join(bad)}")


def write_report(
  workdir: str | pathlib.Path,
  summary: Mapping[str, Any],
  history: Sequence[Mapping[str, float]],
  config: Mapping[str, Any],
  command: str = "",
  use: str = "",
  plot: bool = True,
) -> None:
  """Writes `report.md` and `plots/loss.png` into `workdir`, with the texts of its `texts.json` if there is one.

  Args:
    summary: what `summary` returns.
    history: the rows of metrics.jsonl.
    config: the resolved config.
    command: repeats the run.
    use: the section on how to use what the run has left, see `usage.section`.
    plot: whether to draw the loss.
  """
  workdir = pathlib.Path(workdir)
  title = f"{summary['method']} on {summary['model']}: {summary['task']}"
  parts = [f"# {title}", _eval_table(summary["eval"]), *_examples(metrics.read_texts(workdir / "texts.json"))]
  parts += ["## Training", _train_table(summary)]
  if plot and any(not math.isnan(row.get("train/loss", math.nan)) for row in history):
    files.write(workdir / "plots" / "loss.png", loss_curve(history, title))
    parts.append("![Training loss](plots/loss.png)")
  parts += [use] if use else []
  parts += closing(command, Config=config, Versions=summary["versions"])
  files.write(workdir / "report.md", ("\n\n".join(parts) + "\n").encode())


def closing(command: str, **folded: Any) -> list[str]:
  """The last parts of a report: the command, if there is one, and each value as folded JSON under its name."""
  parts = ["## Reproduce", f"```sh\n{command}\n```"] if command else []
  for name, value in folded.items():
    block = f"```json\n{metrics.dumps(value, indent=2)}\n```"
    parts.append(f"<details><summary>{name}</summary>\n\n{block}\n\n</details>")
  return parts


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
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
  return table(["metric", "before", "after", "change"], rows)


def _examples(texts: Mapping[str, Sequence[Mapping[str, str]]]) -> list[str]:
  """The texts that were generated for a few prompts before and after training."""
  known = [k for k in ("before", "after") if k in texts]
  parts = ["## Texts"] if known else []
  for rows in zip(*(texts[k] for k in known), strict=True) if known else ():
    lines = {k: rows[0][k] for k in ("prompt", "expected")} | {k: r["text"] for k, r in zip(known, rows, strict=True)}
    inner = lambda text: textwrap.indent(_shortened(text), 10 * " ").removeprefix(10 * " ")
    lines = [f"{k + ':':10}{inner(v)}".rstrip() for k, v in lines.items()]
    fence = max(["```", *(f"{run}`" for run in re.findall("`{3,}", "".join(lines)))], key=len)
    parts.append("\n".join([f"{fence}text", *lines, fence]))
  return parts


def _shortened(text: str, most: int = 600) -> str:
  """A text, without its middle if it is long."""
  left_out = len(text) - most
  if left_out <= 0:
    return text
  return f"{text[: most // 2]} [... {left_out:,} characters left out ...] {text[-most // 2 :]}"


def _train_table(summary: Mapping[str, Any]) -> str:
  train, trained, total = summary["train"], summary["trainable_params"], summary["total_params"]
  rows = [
    ["trainable parameters", f"{trained:,} of {total:,} ({trained / total:.2%})"],
    *([["training examples cut", f"{summary['cut']:,} of {summary['train_examples']:,}"]] if "cut" in summary else []),
    ["steps", f"{train['steps']:,}"],
    ["loss, first to last", f"{train['loss_first']:.3f} to {train['loss_last']:.3f}"],
    ["speed", f"{train['tokens_per_second']:,.0f} tokens/s"],
    ["compilation", f"{train['compile_seconds']:.1f} s"],
    ["whole run", f"{summary['wall_seconds']:.1f} s"],
    ["peak memory", f"{summary['peak_memory_bytes'] / 2**30:.2f} GiB"],
  ]
  return table(["", ""], rows)


def loss_curve(history: Sequence[Mapping[str, float]], title: str = "") -> bytes:
  """A PNG of `train/loss` against the step, as logged and smoothed, and of `eval/loss` if that was logged."""
  from matplotlib.ticker import MaxNLocator

  def curve(name):
    points = [(row["step"], row[name]) for row in history if math.isfinite(row.get(name, math.nan))]
    return [list(axis) for axis in zip(*points, strict=True)]

  steps, losses = curve("train/loss")
  figure = plots.figure((7, 4))
  axes = figure.add_subplot()
  axes.plot(steps, losses, color="#9ecae1", linewidth=1, label="each logged step")
  axes.plot(steps, smooth(losses), color="#08519c", linewidth=2, label="smoothed")
  if evals := curve("eval/loss"):
    axes.plot(*evals, "o-", color="#d94801", markersize=4, linewidth=1, label="validation")
  axes.set(xlabel="Step", ylabel="Loss")
  axes.set_title(title, loc="left", fontsize=11)
  axes.xaxis.set_major_locator(MaxNLocator(integer=True))
  plots.tidy(axes)
  axes.margins(x=0.01)
  axes.legend(frameon=False)
  return plots.png(figure)


def smooth(values: Sequence[float]) -> np.ndarray:
  """Centred moving average over about a tenth of the values, with Hann weights; the window is cut off at the ends."""
  width = min(max(len(values) // 10, 3), len(values)) | 1
  weights = np.hanning(width + 2)[1:-1]
  total, weight = (np.convolve(x, weights) for x in (values, np.ones(len(values))))
  return (total / weight)[width // 2 : width // 2 + len(values)]
