"""The plots of a sweep, from its summary, and d90: where a curve reaches 90% of full finetuning."""

import collections
import itertools
import math
import statistics
from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_jax.methods import intrinsic
from lora_jax.results import plots, report, subspace, table_layout

FAR = 2  # a published curve that would make the y axis this many times longer has a panel of its own


def images(summary: Mapping[str, Any]) -> dict[str, bytes]:
  """{name: PNG} of every plot that a summary has data for."""
  found = {"metric": metric_plot(summary), "loss": loss_plot(summary)}
  result = (summary.get("analyses") or {}).get("subspace") or {}
  if result.get("similarity"):
    found |= {f"similarity_{side}": subspace.heatmap(result, side) for side in "ab"}
  return {name: png for name, png in found.items() if png is not None}


def metric_plot(summary: Mapping[str, Any]) -> bytes | None:
  """A PNG of each metric against the layout's `x`; None where no member has one.

  Lines are means over members that differ in nothing else that varies. Bands are one standard deviation, faint dots
  are single members, and published values are dashed. Values that are not numbers stand side by side, with error bars.
  Members without a value, such as full finetuning beside ranks, are a level line.
  """
  how = table_layout.of(summary)
  path = how.x or how.columns or how.rows
  lines = how.lines or next((k for k in (how.rows, how.columns) if k and k != path), "")
  metrics = [k for k in how.metrics if not table_layout.SIZES.search(k)]
  done = [m for m in summary["members"] if any(table_layout.score(m, k) is not None for k in metrics)]
  if not done:
    return None
  summary = {**summary, "members": done}
  xs = table_layout.values(summary, how, path)
  groups = table_layout.values(summary, how, lines)
  present = [x for x in xs if x is not None]
  xs = present if present and all(map(table_layout.is_number, present)) else xs
  named = [] if all(map(table_layout.is_number, xs)) else [how.label(path, x) for x in xs]
  at = {x: i if named else x for i, x in enumerate(xs)}
  shades = plots.colours(len(groups), ordered=len(groups) > 2 and all(map(table_layout.is_number, groups)))
  colour = {how.label(lines, g) if lines else "": c for g, c in zip(groups, shades, strict=True)}
  panels = []
  for metric in metrics:
    label = how.metric_label(metric)
    label = label[:1].upper() + label[1:] + (", %" if table_layout.is_share(summary, metric) else "")
    ours = [c for g in groups if (c := _curve(summary, how, (path, lines), g, metric, at, colour)).x]
    ours += [] if how.d90 is None or metric != how.metrics[0] else _goals(summary, min(xs), max(xs))
    published = {k: _published(how, rows, path, metric, at) for k, rows in how.published.items()}
    panels += _panels(table_layout.known(summary, "model"), label, ours, published, colour) if ours else []
  return plots.lines(panels, _title(path), how.log, named)


def _title(path: str) -> str:
  return path.rpartition(".")[2].replace("_", " ").capitalize()


def _curve(summary, how, paths, group, metric, at, colour) -> plots.Curve:
  """The members of one line."""
  (path, lines) = paths
  unit = 100 if table_layout.is_share(summary, metric) else 1
  found = collections.defaultdict(list)
  for m in summary["members"]:
    score = table_layout.score(m, metric)
    if score is not None and (not lines or table_layout.value(summary, m, lines) == group):
      found[at.get(table_layout.value(summary, m, path))].append(unit * score)
  name = how.label(lines, group) if lines else ""
  level = not found.keys() - {None}
  if level:
    found = dict.fromkeys((min(at.values()), max(at.values())), found.get(None, []))
  xs = sorted(x for x in found if x is not None and found[x])
  return plots.Curve(
    label=name or "ours",
    x=xs,
    y=[statistics.fmean(found[x]) for x in xs],
    sd=[statistics.stdev(found[x]) if len(found[x]) > 1 else 0 for x in xs],
    dots=[(x, y) for x in xs for y in found[x] if len(found[x]) > 1 and not level],
    colour=colour[name],
    dashed=level,
  )


def _published(how, rows, path, metric, at) -> dict[str, list[tuple[float, float]]]:
  """{label of a line: its points} of a source; empty unless rows or columns are the x axis."""
  if path not in (how.rows, how.columns):
    return {}
  places = {how.label(path, x): i for x, i in at.items()}
  numbers = all(x == i for x, i in at.items())  # then what we have not run has its place too
  place = lambda label: places.get(label, table_layout.number(label) if numbers else None)
  found = collections.defaultdict(list)
  several = len(how.metrics) > 1
  for r, row in rows.items():
    group, _, rest = r.partition(", ") if how.columns and several else ("", "", r)
    for c, x in row.items():
      of = group if how.columns else c
      x = x[0] if isinstance(x, list | tuple) else x
      i = place(c if path == how.columns else rest)
      if i is not None and table_layout.is_number(x) and (not several or of == how.metric_label(metric)):
        found[rest if path == how.columns else c if how.columns else ""].append((i, x))
  return {line: sorted(points) for line, points in found.items()}


def _panels(model, ylabel, ours, published, colour) -> list[plots.Panel]:
  """A panel of our curves and the published ones near them, and one for each source whose curves are far."""
  low, high = (fn(y for c in ours for y in (*c.y, *(y for _, y in c.dots))) for fn in (min, max))
  near, far = [], []
  spare = itertools.cycle([c for c in plots.PALETTE if c not in colour.values()] or [plots.MUTED])
  for source, lines in ((k, lines) for k, lines in published.items() if lines):
    ys = [y for points in lines.values() for _, y in points]
    is_near = max(*ys, high) - min(*ys, low) <= FAR * (high - low)
    for line, points in lines.items():
      name = ", ".join(filter(None, (source, line))) if is_near else line
      shade = colour[line] if line and line in colour else next(spare)
      (near if is_near else far).append((source, plots.Curve(name, *zip(*points, strict=True), shade, dashed=True)))
  own = {k: [c for source, c in far if source == k] for k, _ in far}
  first = plots.Panel(model if own else "", ylabel, [*ours, *(c for _, c in near)])
  return [first, *(plots.Panel(k, ylabel, cs) for k, cs in own.items())]


def reached(summary: Mapping[str, Any]) -> dict[str, Any] | None:
  """Where each line of the plot reaches a share of full finetuning, as the layout's `d90` asks.

  Returns:
    None if the layout does not ask for it, or no such member is finished; else, as JSON,

      share, metric     as in the layout
      full, before      the mean metric of the members without an x, and of the model before training
      lines             {label: the line}, with `smallest` and `largest`, the dimensions tried, and what `intrinsic.d90`
                        gives for that share `of_full`, as in the papers, and `of_gain`, of what full finetuning has
                        gained; these are left out if it has gained nothing
  """
  how = table_layout.of(summary)
  metric = how.metrics[0]
  found = collections.defaultdict(list)
  done = [m for m in summary["members"] if table_layout.score(m, metric) is not None]
  for m in done if how.d90 is not None else ():
    x = table_layout.value(summary, m, how.x)
    line = how.label(how.lines, table_layout.value(summary, m, how.lines)) if how.lines else "ours"
    found[line if table_layout.is_number(x) else None].append((x, table_layout.score(m, metric)))
  if None not in found or len(found) == 1:
    return None
  full = statistics.fmean(y for _, y in found.pop(None))
  before = [x for m in done if table_layout.is_number(x := m["eval"]["before"].get(metric))]
  before = statistics.fmean(before or [0.0])
  sign = -1 if table_layout.LOWER.search(metric) else 1
  out = {"share": how.d90, "metric": metric, "full": full, "before": before, "lines": {}}
  for line, points in found.items():
    xs, ys = zip(*points, strict=True)
    bases = {k: x for k, x in (("of_full", 0.0), ("of_gain", before)) if sign * (full - x) > 0}
    ends = {"smallest": min(xs), "largest": max(xs)}
    out["lines"][line] = ends | {k: intrinsic.d90(xs, ys, full, x, how.d90) for k, x in bases.items()}
  return out


def reached_table(found: Mapping[str, Any], percent: bool = False) -> str:
  """The result of `reached` as a Markdown table; `percent` says that the metric is a share of a whole."""
  rows = []
  for name, line in found["lines"].items():
    say = {
      line["smallest"]: f"≤ {table_layout.text(line['smallest'])}",
      None: f"> {table_layout.text(line['largest'])}",
    }
    ds = [line.get(k, math.nan) for k in ("of_full", "of_gain")]
    rows.append([name, *("-" if d != d else say.get(d) or table_layout.text(round(d)) for d in ds)])
  number = lambda x: f"{100 * x:.1f}%" if percent else table_layout.text(x)
  share, full, before = f"d{100 * found['share']:g}", number(found["full"]), number(found["before"])
  return report.table(
    [found["metric"], f"{share} of full finetuning's {full}", f"{share} of its gain over {before} before"], rows
  )


def _goals(summary: Mapping[str, Any], low: float, high: float) -> list[plots.Curve]:
  """Level lines at the values that `reached` looks for."""
  found = reached(summary)
  if found is None:
    return []
  unit = 100 if table_layout.is_share(summary, found["metric"]) else 1
  share = found["share"]
  goals = (("of_full", "full finetuning", 0.0, plots.MUTED), ("of_gain", "its gain", found["before"], "#c0c0c0"))
  level = lambda y: [unit * y, unit * y]
  return [
    plots.Curve(
      f"{100 * share:g}% of {name}", [low, high], level(base + share * (found["full"] - base)), c, dashed=True
    )
    for k, name, base, c in goals
    if any(k in line for line in found["lines"].values())
  ]


def loss_plot(summary: Mapping[str, Any]) -> bytes | None:
  """A PNG of the smoothed training losses of all members, coloured by column or row; None if there are no losses.

  Where both rows and columns vary there is a panel for each row.
  """
  how = table_layout.of(summary)
  path = how.columns or how.rows
  rows = table_layout.values(summary, how, how.rows) if how.columns and how.rows else [None]
  groups = table_layout.values(summary, how, path)
  numbers = all(map(table_layout.is_number, groups))
  shades = plots.colours(len(groups), ordered=numbers)
  if len(rows) > 2 * plots.PER_ROW:
    rows = [None]
  panels = []
  for r in rows:
    found = []
    for m in summary["members"]:
      if r is not None and table_layout.value(summary, m, how.rows) != r:
        continue
      g = groups.index(table_layout.value(summary, m, path)) if path else 0
      steps, losses = _losses(m)
      if len(steps):
        found.append(plots.Curve(how.label(path, groups[g]) if path else "", steps, losses, shades[g]))
    if found:
      panels.append(plots.Panel("" if r is None else how.label(how.rows, r), "Loss", found))
  if not panels:
    return None
  scale = {how.label(path, g): float(g) for g in groups} if numbers and len(groups) > len(plots.PALETTE) else None
  return plots.traces(panels, "Step", scale, _title(path))


def _losses(member: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
  """(steps, smoothed losses) of a member, up to where they are no longer finite."""
  given = member.get("losses") or {"step": [], "loss": []}
  steps, losses = np.asarray(given["step"], float), np.asarray(given["loss"], float)
  good = np.isfinite(losses)
  n = len(losses) if good.all() else int(np.argmin(good))
  return steps[:n], report.smooth(losses[:n]) if n else losses[:n]
