"""Compares the members of a sweep: a table and plots of accuracy, forgetting, size, memory and time."""

import itertools
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from lora_jax import files
from lora_jax.results import plots, point_labels, report

# Colours of the kinds that methods name in their files; other kinds take what is left of plots.PALETTE.
COLOURS = {
  "low rank": "#08519c",
  "bottlenecks": "#238b45",
  "scales and biases": "#d94801",
  "soft prompts": "#6a51a3",
  "subspaces": "#a50f15",
  "whole weights": "#525252",
}
OTHER = "other"  # the kind of a method whose results say none


def main_metric(scores: Mapping[str, float]) -> str | None:
  """The metric that a task is judged by: its first, see tasks/__init__.py."""
  return next((k for k in scores if k != "general_loss"), None)


def rows(members: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """The numbers that are compared, of the members that finished; None where a run lacks one."""
  found = []
  for m in members:
    if "error" in m:
      continue
    before, after, train = m["eval"]["before"], m["eval"]["after"], m["train"]
    metric = main_metric(after)
    forgot = after["general_loss"] - before["general_loss"] if "general_loss" in after else None
    found.append(
      {
        "name": m["name"],
        "kind": m.get("kind", OTHER),
        "learning_rate": m["overrides"].get("optim", {}).get("learning_rate"),
        "metric": metric,
        "before": before.get(metric),
        "after": after.get(metric),
        "forgetting": forgot,
        "trainable_params": m["trainable_params"],
        "share": m["trainable_params"] / m["total_params"],
        "step_memory_bytes": m.get("step_memory_bytes"),
        "step_seconds": train.get("step_seconds"),
        "compile_seconds": train["compile_seconds"],
        "saved_bytes": m["saved_bytes"],
      }
    )
  return found


def _cells(row: Mapping[str, Any]) -> list[str]:
  show = lambda x, form: "-" if x is None else form(x)
  return [
    row["name"],
    show(row["learning_rate"], "{:.0e}".format),
    show(row["after"], lambda x: f"{x:.1%}" if 0 <= x <= 1 else f"{x:.4g}"),
    show(row["forgetting"], "{:+.3f}".format),
    f"{row['trainable_params']:,}",
    f"{row['share']:.3%}",
    show(row["step_memory_bytes"], lambda x: f"{x / 2**30:.2f}"),
    show(row["step_seconds"], lambda x: f"{1000 * x:.1f}"),
    f"{row['compile_seconds']:.0f}",
    f"{row['saved_bytes'] / 1e6:.2f}",
  ]


HEADER = "method,lr,{},forgetting,trained,share,step GiB,step ms,compile s,saved MB"


def _header(found: Sequence[Mapping[str, Any]]) -> list[str]:
  return HEADER.format(found[0]["metric"] if found else "score").split(",")


def text_table(members: Sequence[Mapping[str, Any]]) -> str:
  """The table as plain text, followed by the members that failed."""
  found = rows(members)
  lines = [_header(found), *(_cells(r) for r in found)]
  widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
  align = lambda i, c: c.ljust(widths[i]) if i == 0 else c.rjust(widths[i])
  out = ["  ".join(align(i, c) for i, c in enumerate(line)) for line in lines]
  return "\n".join([*out, *(f"{m['name']}: {m['error']}" for m in members if "error" in m)])


def write_report(workdir: str | pathlib.Path, summary: Mapping[str, Any], command: str = "") -> None:
  """Writes report.md and plots/ of a sweep into `workdir`."""
  workdir = pathlib.Path(workdir)
  members = summary["members"]
  found = rows(members)
  done = [m for m in members if "error" not in m]
  parts = ["# Comparison"]
  if done:
    first = done[0]
    metric = found[0]["metric"]
    parts[0] = f"# {first['task']}: {len(members)} methods on {first['model']}"
    parts.append(
      f"{first['train']['steps']} steps on {first['devices']}, {first['dtype']}. Before training {metric} is "
      f"{_cells(found[0] | {'after': found[0]['before']})[2]}. Forgetting is the loss on general text after minus "
      "before, in nats a token; memory is the compiler's account of one step, parameters included."
    )
    parts.append(report.table(_header(found), [_cells(r) for r in found]))
    for name, draw in (("tradeoff", tradeoff), ("costs", costs)):
      files.write(workdir / "plots" / f"{name}.png", draw(found))
      parts.append(f"![{name}](plots/{name}.png)")
  parts += [f"**{m['name']}** failed: {m['error']}" for m in members if "error" in m]
  parts += report.closing(command, Versions=summary["versions"])
  files.write(workdir / "report.md", ("\n\n".join(parts) + "\n").encode())


def colours(found: Sequence[Mapping[str, Any]]) -> dict[str, str]:
  """{kind: colour} of the kinds in rows: first the kinds in `COLOURS`, in its order, then the others."""
  there = dict.fromkeys(r["kind"] for r in found)
  spare = itertools.cycle([c for c in plots.PALETTE if c not in COLOURS.values()])
  known = {kind: colour for kind, colour in COLOURS.items() if kind in there}
  return known | {kind: next(spare) for kind in there if kind not in known}


def tradeoff(found: Sequence[Mapping[str, Any]]) -> bytes:
  """A PNG of the metric against the trained parameters and, where it was measured, against forgetting."""
  axis = {"trainable_params": "Trained parameters", "forgetting": "Forgetting, nats a token"}
  axis = {k: label for k, label in axis.items() if any(r[k] is not None for r in found)}
  figure = plots.figure((8, 3.9 * len(axis) + 0.3))
  panels = figure.subplots(len(axis), 1, squeeze=False)[:, 0]
  shade = colours(found)
  handles = [panels[0].plot([], [], "o", color=colour, label=kind)[0] for kind, colour in shade.items()]
  figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False, fontsize=8)
  points = {k: [r for r in found if None not in (r[k], r["after"])] for k in axis}
  for axes, (key, label) in zip(panels, axis.items(), strict=True):
    for r in points[key]:
      axes.plot(r[key], r["after"], "o", color=shade[r["kind"]], markersize=5)
    axes.set(xlabel=label, ylabel=(found[0]["metric"] or "score").capitalize())
    axes.margins(0.08)
    plots.tidy(axes)
  panels[0].set_xscale("log")
  for axes in panels[1:]:
    axes.set_xscale("symlog", linthresh=0.01)  # most forget little, and some a lot
  for axes, key in zip(panels, axis, strict=True):
    point_labels.write(axes, [(r[key], r["after"], r["name"], shade[r["kind"]]) for r in points[key]])
  return plots.png(figure)


def costs(found: Sequence[Mapping[str, Any]]) -> bytes:
  """A PNG of bars: the time and the memory of a step, and the size of what is saved."""
  columns = [("step_seconds", "Step, ms", 1e3), ("step_memory_bytes", "Memory of a step, GiB", 2**-30)]
  columns.append(("saved_bytes", "Saved, MB", 1e-6))
  shade = colours(found)
  figure = plots.figure((11, 0.24 * len(found) + 1.2))
  for axes, (key, label, unit) in zip(figure.subplots(1, 3, sharey=True), columns, strict=True):
    values = [math.nan if r[key] is None else r[key] * unit for r in found]
    axes.barh([r["name"] for r in found], values, color=[shade[r["kind"]] for r in found], height=0.7)
    axes.set_xlabel(label)
    if key == "saved_bytes":
      axes.set_xscale("log")
    axes.tick_params(axis="y", labelsize=8)
    plots.tidy(axes)
  axes.invert_yaxis()
  return plots.png(figure)
