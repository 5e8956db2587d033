"""The layout of a sweep's table: the values that vary, their labels, and the metric of each member.

The summary of a sweep has the layout as its `table`, or as its `config["table"]`: a dict of

  paper           where the table is from, such as "Hu et al. 2021, table 6"
  metric          a name in a member's `eval.after` or a field of its summary; or several, which are the columns if
                  `columns` is "", else rows or groups of rows
  rows, columns   what varies: a path such as "method.rank", looked up in a member's overrides and then in the config,
                  or a field of its summary such as "trainable_params"; "" is one row or column
  row_labels, column_labels   {a value as text, or a metric: what the table says}
  published       {source: {row label: {column label: number, [mean, deviation] or text}}}, shares in percent; a source
                  of one row may be {column label: ...}; in a group of rows the label is "metric label, row label"
  x, log          a path: the x axis of the plot, and whether it is logarithmic
  lines           a path, whose values are the lines of the plot
  d90             0.9: the report says at which x, the dimension that is trained, each line reaches this share of full
                  finetuning: of the members without an x. See `curves.reached`
  subspace        keywords of `subspace.analyse`, such as {"matrices": ("q", "v")}: the report has the similarities and
                  amplification factors of what the members have learned

Any of these dicts may be a list of pairs. Pairs may have keys with dots, and keep their order, which ml_collections
does not do for dicts: labels given as pairs order the rows and columns.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lora_jax import errors, values as values_lib
from lora_jax.results import comparison, report, subspace

PLAIN = (*report.NO_PERCENT, "bleu", "nist", "cider")  # metrics that are not shares of a whole, whatever their size
SIZES = re.compile(r"_(params|bytes)$")
LOWER = re.compile(r"(^|_)(loss|perplexity|ter|error|seconds)($|_)")  # metrics where less is better
NAMED = ("method", "task", "objective")  # sections that overrides with a name replace
PATHS = ("rows", "columns", "x", "lines")


@dataclasses.dataclass(frozen=True)
class Layout:
  """The fields that the module describes, with `metrics` and `published` always in the same form."""

  metrics: tuple[str, ...]
  paper: str = ""
  rows: str = ""
  columns: str = ""
  row_labels: Any = ()
  column_labels: Any = ()
  published: Mapping[str, Mapping[str, Mapping[str, Any]]] = dataclasses.field(default_factory=dict)
  x: str = ""
  log: bool = False
  lines: str = ""
  d90: float | None = None
  subspace: Mapping[str, Any] | None = None

  def metric_label(self, metric: str) -> str:
    """What the table calls a metric."""
    labels = dict(self.row_labels) | dict(self.column_labels)
    return labels.get(metric, metric.rpartition(".")[2].replace("_", " "))

  def row(self, metric: str, label: str) -> str:
    """What the table calls a row of a metric: where several have rows of their own, their names come first."""
    group = self.metric_label(metric) if self.columns and len(self.metrics) > 1 else ""
    return ", ".join(filter(None, (group, label)))

  def labels(self, path: str) -> Any:
    """The labels of a path's values."""
    return self.columns == path and self.column_labels or self.rows == path and self.row_labels or ()

  def label(self, path: str, x: Any) -> str:
    """What the table calls a value of a path: its label, however that writes the value, or else the value as text."""
    found = dict(self.labels(path))
    texts = [text(x), str(x)]
    if isinstance(x, tuple):
      texts += [str(list(x)), str(dict(x)) if all(isinstance(p, tuple) and len(p) == 2 for p in x) else ""]
    if is_number(x):
      texts.append(str(float(x)))
    return next((found[t] for t in texts if t in found), texts[0])


# Keys of a table; a metric is one or several.
KEYS = values_lib.fields(Layout, without=("metrics",))
KEYS |= {"metric": values_lib.Field(str | Sequence[str], ""), "published": values_lib.Field(Any, {})}


def of(summary: Mapping[str, Any]) -> Layout:
  """The layout of a sweep; without one its members are the rows.

  It needs only `config`, `table` and the members' `overrides`, so that a layout can be checked before anything runs. If
  `missing` names members, what the layout needs of the members is not checked.

  Raises:
    UserError: an unknown key, a path that no member has, or an analysis that is not possible.
  """
  config = summary.get("config") or {}
  members = summary["members"]
  given = values_lib.resolve(KEYS, summary.get("table") or config.get("table") or {"rows": "name"}, "config.table")
  metric = given.pop("metric") or _main_metric(members)
  sources = _pairs(given.pop("published"), "config.table.published")
  published = {k: _rows(v, f"config.table.published.{k}") for k, v in sources.items()}
  for k in ("row_labels", "column_labels"):
    _pairs(given[k], f"config.table.{k}")
  whole = not summary.get("missing")
  for k in PATHS:
    path = given[k]
    if "." in path and whole and members and all(value(summary, m, path) is None for m in members):
      known = {p for part in (config, *(m["overrides"] for m in members)) for p in _paths(part)}
      raise errors.UserError(f"config.table.{k}={path!r} is in no member; {errors.nearest(path, known)}")
  found = Layout((metric,) if isinstance(metric, str) else tuple(metric), **given)
  _check_analyses(summary, found, members if whole else ())
  names = {k: found.metric_label(k) for k in found.metrics}
  called = lambda entries: {names.get(k, k): v for k, v in entries.items()}
  published = {k: {r: called(row) for r, row in called(rows).items()} for k, rows in published.items()}
  return dataclasses.replace(found, published=published)


def _check_analyses(summary: Mapping[str, Any], how: Layout, members: Sequence[Mapping[str, Any]]) -> None:
  if how.d90 is not None:
    if not is_number(how.d90) or not 0 < how.d90 <= 1:
      raise errors.UserError(f"config.table.d90={how.d90!r} is a share of full finetuning, such as 0.9")
    if members and (not how.x or len({is_number(value(summary, m, how.x)) for m in members}) < 2):
      raise errors.UserError(
        f"config.table.d90 needs members with a dimension, which config.table.x={how.x!r} leads to, and others "
        "without one: full finetuning"
      )
  if how.subspace is not None:
    given = _pairs(how.subspace, "config.table.subspace")
    values_lib.keywords(subspace.analyse, given, "config.table.subspace", ("members", "base"))
    names = dict.fromkeys(m["name"] for m in members)
    for name in [n for pair in given.get("pairs") or () for n in pair] if names else ():
      errors.choose(name, names, "member in config.table.subspace.pairs:")


def check_metrics(table: Mapping[str, Any], known: Iterable[str]) -> None:
  """Raises UserError for a metric that a table asks for and no member can have.

  Args:
    known: names of the metrics of the members' tasks.
  """
  asked = table.get("metric") or ()
  known = list(known)
  whole = [*known, *(f"eval.{when}.{name}" for name in known for when in ("before", "after")), *report.MEASURED]
  for metric in (asked,) if isinstance(asked, str) else asked:
    errors.choose(metric, dict.fromkeys(whole), "metric: config.table.metric is")


def _main_metric(members: Sequence[Mapping[str, Any]]) -> str:
  found = (comparison.main_metric(m["eval"]["after"]) for m in members if "eval" in m and "error" not in m)
  return next(filter(None, found), "score")


def _pairs(given: Any, where: str) -> dict:
  try:
    return dict(given)
  except (TypeError, ValueError) as e:
    raise errors.UserError(f"{where} is a dict or a list of pairs, not {given!r:.100}") from e


def _rows(given: Any, where: str) -> dict[str, dict[str, Any]]:
  """{row label: {column label: value}} of a source."""
  found = _pairs(given, where)
  # [mean, deviation] is a value, a list of pairs is a row.
  is_row = lambda x: (
    isinstance(x, Mapping) or (isinstance(x, list | tuple) and all(isinstance(p, list | tuple) for p in x))
  )
  found = found if any(map(is_row, found.values())) else {"": found}
  return {r: _pairs(v, f"{where}.{r}") for r, v in found.items()}


def _paths(config: Mapping[str, Any], prefix: str = "") -> Iterable[str]:
  for k, v in config.items():
    yield from _paths(v, f"{prefix}{k}.") if isinstance(v, Mapping) else (f"{prefix}{k}",)


def value(summary: Mapping[str, Any], member: Mapping[str, Any], path: str) -> Any:
  """The value of a path for a member, hashable: whole numbers as int, sequences as tuples; None if it has none."""
  section, *steps = path.split(".")
  overrides = member.get("overrides", {})
  found = (summary.get("config") or {}).get(section, member.get(section))
  if section in overrides:
    change = overrides[section]
    update = isinstance(found, Mapping) and isinstance(change, Mapping) and not (section in NAMED and "name" in change)
    found = {**found, **change} if update else change
  for k in steps:
    found = found.get(k) if isinstance(found, Mapping) else None
  return _hashable(found)


def _hashable(x: Any) -> Any:
  if isinstance(x, Mapping):
    return tuple(sorted((str(k), _hashable(v)) for k, v in x.items()))
  if isinstance(x, list | tuple):
    return tuple(map(_hashable, x))
  return int(x) if isinstance(x, float) and x.is_integer() else x


def values(summary: Mapping[str, Any], how: Layout, path: str) -> list[Any]:
  """The values of a path, each once: by labels given as pairs, then numbers, then in the order of the members."""
  if not path:
    return [None]
  found = list(dict.fromkeys(value(summary, m, path) for m in summary["members"]))
  labels = how.labels(path)
  found.sort(key=lambda v: (0, v) if is_number(v) else (1, 0))
  places = order(labels)
  return sorted(found, key=lambda v: places.get(how.label(path, v), len(places)))


def order(labels: Any) -> dict[str, int]:
  """{label: its place} of labels given as pairs; a dict of labels has no order."""
  return {} if isinstance(labels, Mapping) else {name: i for i, (_, name) in enumerate(labels)}


def is_number(x: Any) -> bool:
  """Whether a value has a place on an axis."""
  return isinstance(x, int | float) and not isinstance(x, bool)


def number(label: str) -> float | None:
  """The number that a label stands for, such as 1e-4, 10,000, 392k or 2M, or None."""
  found = re.fullmatch(r"(-?\d+(?:\.\d+)?(?:e-?\d+)?)([kM]?)", label.replace(",", ""))
  return float(found[1]) * {"": 1, "k": 1000, "M": 1_000_000}[found[2]] if found else None


def text(x: Any) -> str:
  """A value in few characters: four digits of a number that is not whole."""
  if isinstance(x, tuple):
    return ",".join(map(text, x))
  if not is_number(x):
    return "-" if x is None else str(x)
  if isinstance(x, int):
    return str(x) if abs(x) < 10_000 else f"{x:,}"
  if 0.01 <= abs(x) < 10_000:
    return f"{x:.4g}"
  digits, exponent = f"{x:.3e}".split("e")
  return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"


def known(summary: Mapping[str, Any], field: str) -> Any:
  """A field of the first member that has it, or else the name in that section of the config."""
  found = next((m[field] for m in summary["members"] if m.get(field)), None)
  return found or (summary.get("config") or {}).get(field, {}).get("name", "")


def has(member: Mapping[str, Any], metric: str) -> bool:
  """Whether a member that has not failed has a metric; the program that computes it may have been missing."""
  return metric in member["eval"]["after"] or value({}, member, metric) is not None


def score(member: Mapping[str, Any], metric: str) -> float | None:
  """A member's metric, if it is a finite number, or None."""
  found = member.get("eval", {}).get("after", {}).get(metric)
  found = value({}, member, metric) if found is None else found
  return found if is_number(found) and math.isfinite(found) and "error" not in member else None


def is_share(summary: Mapping[str, Any], metric: str) -> bool:
  """Whether a metric is a share of a whole, which is shown in percent."""
  found = [s for m in summary["members"] if (s := score(m, metric)) is not None]
  return bool(found) and not any(w in metric for w in PLAIN) and all(0 <= x <= 1 for x in found)
