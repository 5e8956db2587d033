"""A sweep as the table of a paper: seeds as mean and deviation, published rows below ours, in Markdown and LaTeX.

Everything comes from the summary of the sweep; table_layout.py says how a config describes the table.
"""

import collections
import dataclasses
import decimal
import itertools
import pathlib
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lora_jax import files
from lora_jax.results import curves, plots, report, subspace, table_layout

SUBSPACES = "Similarity compares the directions of inputs (a) and of outputs (b). Amplification is ‖ΔW‖ / ‖UᵀWVᵀ‖."


@dataclasses.dataclass(frozen=True)
class Cell:
  """Runs that differ in nothing that the table shows.

  Fields:
    mean, sd: of their metric, in percent if it is a share. sd divides by n - 1, and is None for fewer than two runs.
      Both are None if no run finished.
    n, failed: how many runs have a value, and how many do not; both are 0 in a published cell.
    text: what is published in place of a number.
    digits: decimals of mean and sd as published.
  """

  metric: str
  mean: float | None = None
  sd: float | None = None
  n: int = 0
  failed: int = 0
  text: str = ""
  digits: tuple[int, int] = (0, 0)


@dataclasses.dataclass(frozen=True)
class Row:
  """A label, and cells by the label of their column."""

  label: str
  cells: Mapping[str, Cell]


@dataclasses.dataclass(frozen=True)
class Table:
  """What is printed.

  Fields:
    paper: as in the layout.
    ours: the model whose results `rows` are.
    corner: what varies over rows and columns.
    columns: their labels.
    rows: our results.
    published: {source: its rows}.
    metrics: {name: label}.
    shares: the metrics that are in percent.
    by_row: whether the cells of a row can be compared, rather than the cells of a column.
    n: how many runs most cells have.
    failed: how many runs lack a value somewhere.
  """

  paper: str
  ours: str
  corner: str
  columns: tuple[str, ...]
  rows: tuple[Row, ...]
  published: Mapping[str, tuple[Row, ...]]
  metrics: Mapping[str, str]
  shares: frozenset[str]
  by_row: bool
  n: int
  failed: int

  def digits(self, metric: str) -> int:
    """Decimals of our numbers: one for shares and large numbers, more for small ones."""
    rows = (*self.rows, *itertools.chain(*self.published.values()))
    found = [abs(c.mean) for r in rows for c in r.cells.values() if c.metric == metric and c.mean is not None]
    most = max(found, default=0)
    return 1 if metric in self.shares or most >= 10 else 2 if most >= 1 else 3


def pivot(summary: Mapping[str, Any]) -> Table:
  """The table of a sweep; UserError for a layout that is wrong."""
  how = table_layout.of(summary)
  shares = frozenset(k for k in how.metrics if table_layout.is_share(summary, k))
  axes = how.rows, how.columns
  runs = collections.defaultdict(list)
  for m in summary["members"]:
    runs[tuple(how.label(path, table_layout.value(summary, m, path)) if path else "" for path in axes)].append(m)
  named = lambda path: dict.fromkeys(
    how.label(path, v) if path else "" for v in table_layout.values(summary, how, path)
  )
  labels = tuple(map(named, axes))
  likely = {r: _metrics(how, r, [m for c in labels[1] for m in runs[r, c]]) for r in labels[0]}
  cells: dict[str, dict[str, Cell]] = {}
  columns = []
  failed = set()
  for k, r, c in itertools.product(how.metrics, *labels):
    row, column = how.row(k, r), c if how.columns else how.metric_label(k)
    columns.append(column)
    found = cells.setdefault(row, {})
    members = [m for m in runs[r, c] if (k in likely[r] if "error" in m else table_layout.has(m, k))]
    if members:
      found[column] = _cell(members, k, 100 if k in shares else 1)
    failed |= {m["name"] for m in members if table_layout.score(m, k) is None}
  published = {}
  for source, rows in how.published.items():
    parsed = _published(how, rows)
    published[source] = tuple(Row(r, parsed[r]) for r in dict.fromkeys([*cells, *parsed]) if r in parsed)
  columns = [*columns, *(c for rows in published.values() for r in rows for c in r.cells)]
  columns = _in_order(columns, how.column_labels if how.columns else ())
  counts = collections.Counter(c.n for row in cells.values() for c in row.values() if c.n)
  return Table(
    paper=how.paper,
    ours=str(table_layout.known(summary, "model")),
    corner=" / ".join(path.rpartition(".")[2].replace("_", " ") for path in axes if path),
    columns=columns,
    rows=tuple(Row(r, row) for r, row in cells.items() if row),
    published=published,
    metrics={k: how.metric_label(k) for k in how.metrics},
    shares=shares,
    by_row=bool(how.columns) and len(columns) > 1,
    n=counts.most_common(1)[0][0] if counts else 0,
    failed=len(failed),
  )


def _metrics(how: table_layout.Layout, row: str, members: Sequence[Mapping[str, Any]]) -> set[str]:
  """The metrics that a failed member of a row would have: as its other members, else as published, else all."""
  found = {k for k in how.metrics if any(table_layout.has(m, k) for m in members if "error" not in m)}
  published = {k for k in how.metrics if any(how.row(k, row) in rows for rows in how.published.values())}
  return found or published or set(how.metrics)


def _in_order(labels: Iterable[str], given: Any) -> tuple[str, ...]:
  """Each label once: in numeric order if all are numbers, else in the order of labels `given` as pairs."""
  found = list(dict.fromkeys(labels))
  order = table_layout.order(given)
  numbers = [table_layout.number(c) for c in found]
  found.sort(key=lambda c: order.get(c, len(order)) if None in numbers else table_layout.number(c))
  return tuple(found)


def _cell(members: Sequence[Mapping[str, Any]], metric: str, unit: int) -> Cell:
  found = [unit * s for m in members if (s := table_layout.score(m, metric)) is not None]
  sd = statistics.stdev(found) if len(found) > 1 else None
  return Cell(metric, statistics.fmean(found) if found else None, sd, len(found), len(members) - len(found))


def _published(how: table_layout.Layout, rows: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Cell]]:
  """The cells of a source by row and column."""
  names = {how.metric_label(k): k for k in how.metrics}
  cells = {}
  longest = collections.Counter()  # by metric: a zero at the end is lost in a float, but other means have that digit
  for r, row in rows.items():
    for c, x in row.items():
      metric = names.get(r.partition(", ")[0] if how.columns else c, how.metrics[0])
      cells[r, c] = cell = _parsed(x, metric)
      longest[metric] = max(longest[metric], cell.digits[0])
  padded = lambda x: dataclasses.replace(x, digits=(longest[x.metric], x.digits[1]))
  return {r: {c: padded(cells[r, c]) for c in row} for r, row in rows.items()}


def _parsed(x: Any, metric: str) -> Cell:
  if isinstance(x, str):
    return Cell(metric, text=x)
  numbers = x if isinstance(x, list | tuple) else (x, None)
  digits = tuple(0 if n is None else max(0, -decimal.Decimal(str(n)).as_tuple().exponent) for n in numbers)
  return Cell(metric, *(None if n is None else float(n) for n in numbers), digits=digits)


def shown(table: Table, cell: Cell | None) -> tuple[str, str, str]:
  """(mean or text, deviation, remark) of a cell, as text; "" for what it lacks."""
  if cell is None:
    return "-", "", ""
  if cell.mean is None:
    return (cell.text, "", "") if cell.text else ("failed", "", f"0 of {cell.failed}")
  remark = f"{cell.n} of {cell.n + cell.failed}" if cell.failed else ""
  remark = remark or (f"n = {cell.n}" if cell.n not in (0, table.n) else "")
  if table_layout.SIZES.search(cell.metric):
    return plots.short(cell.mean), "", remark
  least = table.digits(cell.metric)  # 91.0 may have been given as 91
  mean, sd = (
    "" if x is None else f"{x:.{max(n, least)}f}" for x, n in zip((cell.mean, cell.sd), cell.digits, strict=True)
  )
  return mean, sd, remark


def best(table: Table, rows: Sequence[Row]) -> set[tuple[str, str]]:
  """(row label, column label) of the best cells of each row, or of each column if those can be compared.

  Cells that are printed like the best are best too. If all are printed alike, none is.
  """
  lines: dict[tuple, dict] = collections.defaultdict(dict)
  for r, (c, cell) in [(row, item) for row in rows for item in row.cells.items()]:
    if cell.mean is not None and not table_layout.SIZES.search(cell.metric):
      sign = -1 if table_layout.LOWER.search(cell.metric) else 1
      lines[cell.metric, r.label if table.by_row else c][r.label, c] = sign * float(shown(table, cell)[0])
  contests = [line for line in lines.values() if len(set(line.values())) > 1]
  return {place for line in contests for place, x in line.items() if x == max(line.values())}


def caption(table: Table) -> str:
  """A sentence that explains the numbers."""
  scores = {k: name for k, name in table.metrics.items() if not table_layout.SIZES.search(k)}
  units = [f"{name} in %" if k in table.shares else name for k, name in scores.items()]
  runs = f"; mean ± standard deviation of {table.n} runs" if table.n > 1 else ""
  line = "row" if table.by_row else "column"
  lost = f"; {table.failed} runs failed" if table.failed > 1 else "; one run failed" if table.failed else ""
  text = f"{', '.join(units)}{runs}{lost}; best of each {line} in bold."
  return text[0].upper() + text[1:]


def _sections(table: Table) -> list[tuple[str, list[tuple[Row, str]]]]:
  """(heading or "", (row, its label)) of ours and of each source; a source of one row without a label is the row."""
  sections = [(table.ours or "ours", table.rows), *table.published.items()]
  if len(sections) == 1:
    return [("", [(r, r.label or sections[0][0]) for r in table.rows])]
  bare = all(len(rows) == 1 and not rows[0].label for _, rows in sections)
  return [("" if bare else name, [(r, name if bare else r.label) for r in rows]) for name, rows in sections]


def markdown(table: Table) -> str:
  """The table in Markdown, which also reads well as plain text."""
  lines = []
  for heading, rows in _sections(table):
    if heading:
      lines.append([f"*{heading}*", *[""] * len(table.columns)])
    top = best(table, [r for r, _ in rows])
    for r, name in rows:
      cells = []
      for c in table.columns:
        mean, sd, remark = shown(table, r.cells.get(c))
        mean = f"**{mean}**" if (r.label, c) in top else mean
        cells.append(mean + (f" ± {sd}" if sd else "") + (f" ({remark})" if remark else ""))
      lines.append([name, *cells])
  return report.table([table.corner, *table.columns], lines)


def escape(text: str) -> str:
  """Text for LaTeX."""
  special = {c: f"\\{c}" for c in "&%$#_{}"} | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}"}
  special |= {"[": "{[}", "^": r"\textasciicircum{}", "±": r"$\pm$", "\n": " "}
  special |= {"<": r"\textless{}", ">": r"\textgreater{}"}
  return "".join(special.get(c, c) for c in text)


def latex(table: Table) -> str:
  """A LaTeX document with the table, which uses booktabs; its `table` environment fits into another document."""
  lines = []
  for i, (heading, rows) in enumerate(_sections(table)):
    if i:
      lines.append(r"\midrule")
    if heading:
      lines.append(rf"\multicolumn{{{len(table.columns) + 1}}}{{l}}{{\emph{{{escape(heading)}}}}} \\")
    top = best(table, [r for r, _ in rows])
    for r, name in rows:
      cells = []
      for c in table.columns:
        mean, sd, remark = shown(table, r.cells.get(c))
        mean = {"-": "--"}.get(mean) or escape(mean)
        mean = rf"\textbf{{{mean}}}" if (r.label, c) in top else mean
        cells.append(mean + (rf"$_{{\pm {sd}}}$" if sd else "") + (f" ({escape(remark)})" if remark else ""))
      lines.append(" & ".join([escape(name), *cells]) + r" \\")
  title = " ".join(filter(None, (table.paper and f"{table.paper}.", caption(table))))
  return "\n".join(
    [
      r"\documentclass{article}",
      r"\usepackage[T1]{fontenc}",
      r"\usepackage[margin=2cm]{geometry}",
      r"\usepackage{booktabs}",
      *(r"\begin{document}", r"\begin{table}", r"\centering"),
      rf"\caption{{{escape(title)}}}",
      rf"\begin{{tabular}}{{l{'r' * len(table.columns)}}}",
      r"\toprule",
      " & ".join(map(escape, (table.corner, *table.columns))) + r" \\",
      r"\midrule",
      *lines,
      r"\bottomrule",
      *(r"\end{tabular}", r"\end{table}", r"\end{document}", ""),
    ]
  )


def write(workdir: str | pathlib.Path, summary: Mapping[str, Any], command: str = "") -> None:
  """Writes report.md, table.md, table.tex and plots/ of a sweep into `workdir`."""
  workdir = pathlib.Path(workdir)
  table = pivot(summary)
  members = summary["members"]
  text = markdown(table)
  files.write(workdir / "table.md", f"{text}\n".encode())
  files.write(workdir / "table.tex", latex(table).encode())
  tasks = " and ".join(dict.fromkeys(m["task"] for m in members if m.get("task"))) or table_layout.known(
    summary, "task"
  )
  title = ": ".join(filter(None, (table.paper, " on ".join(filter(None, (tasks, table.ours))))))
  parts = [f"# {title or 'Sweep'}", _how(summary), text, caption(table)]
  for name, image in curves.images(summary).items():
    files.write(workdir / "plots" / f"{name}.png", image)
    parts.append(f"![{name}](plots/{name}.png)")
  parts += [*_analyses(summary), *(f"**{m['name']}** failed: {m['error']}" for m in members if "error" in m)]
  parts += report.closing(command, Config=summary.get("config"), Versions=summary.get("versions"))
  files.write(workdir / "report.md", ("\n\n".join(parts) + "\n").encode())


def _analyses(summary: Mapping[str, Any]) -> list[str]:
  """The sections on the analyses that the layout asks for."""
  found = summary.get("analyses") or {}
  parts = []
  result = found.get("subspace") or {}
  if reached := found.get("d90"):
    parts += [
      "## Intrinsic dimension",
      curves.reached_table(reached, table_layout.is_share(summary, reached["metric"])),
    ]
  if "error" in result:
    parts.append(f"**subspace** failed: {result['error']}")
  elif result:
    parts += ["## Subspaces", SUBSPACES, subspace.amplification_table(result)]
  return parts


def _how(summary: Mapping[str, Any]) -> str:
  """A sentence on how the members were run."""
  members = summary["members"]
  groups = summary.get("groups")
  steps = sorted({m["train"]["steps"] for m in members if "train" in m})
  n = groups if isinstance(groups, int) else len(groups or ())
  sizes = [] if isinstance(groups, int) or n < 2 else [str(len(g)) for g in groups]
  sizes = f" of {', '.join(sizes[:1] if len(set(sizes)) == 1 else sizes)}" if sizes else ""
  devices, dtype = (next((m[k] for m in members if m.get(k)), "") for k in ("devices", "dtype"))
  facts = [
    f"{len(members)} runs",
    steps and f"{' to '.join(f'{s:,}' for s in dict.fromkeys((steps[0], steps[-1])))} steps",
    n and ("one program" if n == 1 else f"{n} groups{sizes}, each one program"),
    devices,
    dtype,
    f"{summary['wall_seconds']:,.0f} s in all" if summary.get("wall_seconds") else "",
  ]
  return "; ".join(filter(None, facts)) + "."
