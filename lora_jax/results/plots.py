"""Figures as PNG bytes, in one style, drawn from plain numbers."""

import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

PALETTE = ("#08519c", "#d94801", "#238b45", "#6a51a3", "#a50f15", "#00838f", "#b8860b", "#525252")
MUTED = "#8c8c8c"
PER_ROW = 3  # panels of a figure side by side
MOST_LABELS = 30  # of a legend; a longer one says nothing


@dataclasses.dataclass(frozen=True)
class Curve:
  """A line of a panel.

  Fields:
    label: its entry in the legend, one for all curves that share it; "" for no entry.
    x, y: its points; numbers, y may be nan.
    sd: half the height of the band around it; 0 or nan for no band.
    dots: (x, y) of single runs.
    dashed: whether it is a reference rather than a result.
  """

  label: str
  x: Sequence[float]
  y: Sequence[float]
  colour: str = PALETTE[0]
  sd: Sequence[float] = ()
  dots: Sequence[tuple[float, float]] = ()
  dashed: bool = False


@dataclasses.dataclass(frozen=True)
class Panel:
  """Axes with a title and a label of the y axis."""

  title: str
  ylabel: str
  curves: Sequence[Curve]


def figure(size: tuple[float, float]) -> Any:
  """An empty figure of (width, height) in inches."""
  from matplotlib.figure import Figure

  return Figure(figsize=size, dpi=160, layout="constrained")


def png(figure: Any) -> bytes:
  """The figure as a file."""
  out = io.BytesIO()
  figure.savefig(out, format="png")
  return out.getvalue()


def tidy(axes: Any) -> None:
  """Draws a faint grid behind the data, and removes the frame at the top and the right."""
  axes.grid(color="#e6e6e6", linewidth=0.8)
  axes.set_axisbelow(True)
  axes.spines[["top", "right"]].set_visible(False)


def colours(n: int, ordered: bool = False) -> list[str]:
  """n colours: distinct ones or, if `ordered` or if there are too many, a scale from dark to light."""
  if not ordered and n <= len(PALETTE):
    return list(PALETTE[:n])
  from matplotlib.colors import to_hex

  return [to_hex(c) for c in _shades()(np.linspace(0, 1, max(n, 2))[:n])]


def _shades() -> Any:
  """A colour map from dark to light, without the yellow that is hard to see on white."""
  from matplotlib import colormaps
  from matplotlib.colors import ListedColormap

  return ListedColormap(colormaps["viridis"](np.linspace(0, 0.88, 256)))


def short(x: float) -> str:
  """A number for an axis or a heading: 18.9M, 37k, 4096, 16, 0.5, 2e-4."""
  for least, unit, letter in ((1e9, 1e9, "B"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
    if abs(x) >= least:
      return f"{x / unit:.3g}{letter}"
  if not 0 < abs(x) < 0.01:
    return f"{x:g}"
  digits, exponent = f"{x:.2e}".split("e")
  return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"


def _grid(n: int, size: tuple[float, float], **kw: Any) -> tuple[Any, list[Any]]:
  """(figure, n axes) in rows of at most `PER_ROW`."""
  wide = min(n, PER_ROW)
  high = -(-n // wide)
  out = figure((size[0] * wide + 0.6, size[1] * high + 0.6))
  axes = out.subplots(high, wide, squeeze=False, **kw).ravel().tolist()
  for spare in axes[n:]:
    spare.set_axis_off()
  return out, axes[:n]


def _legend(figure: Any, axes: Sequence[Any], title: str = "") -> None:
  """One legend above all panels, each label once."""
  found = {}
  for ax in axes:
    for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
      found.setdefault(label, handle)
  if 1 < len(found) <= MOST_LABELS:
    fit = int(14 * figure.get_figwidth() / (6 + max(map(len, found))))  # letters of this size in an inch
    columns = min(len(found), max(fit, 1))
    figure.legend(
      found.values(),
      found,
      loc="outside upper center",
      ncols=columns,
      frameon=False,
      fontsize=8,
      title=title or None,
      title_fontsize=8,
    )


def lines(panels: Sequence[Panel], xlabel: str, log: bool = False, names: Sequence[str] = ()) -> bytes:
  """A PNG of results against the value that was varied: means with bands of deviation, single runs as faint dots.

  Args:
    log: whether the x axis is logarithmic, if all x are above zero.
    names: labels of x = 0, 1, ..., if the values have no order; curves are then points with error bars.
  """
  size = (max(4.4, 0.7 * len(names)), 3.6) if len(panels) > 1 else (max(6.0, 0.9 * len(names)), 4.0)
  out, axes = _grid(len(panels), size)
  for ax, panel in zip(axes, panels, strict=True):
    for i, c in enumerate(panel.curves):
      _bars(ax, c, 0.5 * ((i + 0.5) / len(panel.curves) - 0.5)) if names else _band(ax, c)
    ax.set_title(panel.title, loc="left", fontsize=10)
    ax.set(xlabel=xlabel, ylabel=panel.ylabel)
    tidy(ax)
    if names:
      tilt = dict(rotation=30, ha="right", rotation_mode="anchor") if max(map(len, names)) > 8 else {}
      ax.set_xticks(range(len(names)), names, **tilt)
      ax.set_xlim(-0.5, len(names) - 0.5)
    else:
      _ticks(ax, sorted({x for c in panel.curves for x in c.x}), log)
  _legend(out, axes)
  return png(out)


def _band(ax, c):
  if len(c.sd):
    low, high = (np.add(c.y, sign * np.nan_to_num(c.sd)) for sign in (-1, 1))
    ax.fill_between(c.x, low, high, color=c.colour, alpha=0.15, linewidth=0)
  ax.plot(*zip(*c.dots, strict=True) if c.dots else ((), ()), "o", color=c.colour, markersize=3.5, alpha=0.35, mew=0)
  style = dict(linestyle="--", linewidth=1.4, marker="o", markersize=3, mfc="white") if c.dashed else dict(marker="o")
  ax.plot(c.x, c.y, color=c.colour, label=c.label, **({"linewidth": 2, "markersize": 5} | style))


def _bars(ax, c, shift):
  at = np.add(c.x, shift)
  if c.dots:
    x, y = zip(*c.dots, strict=True)
    ax.plot(np.add(x, shift), y, "o", color=c.colour, markersize=3.5, alpha=0.35, mew=0)
  bars = np.nan_to_num(c.sd) if len(c.sd) else None
  face = "white" if c.dashed else c.colour
  shape = "D" if c.dashed else "o"
  ax.errorbar(
    at, c.y, bars, fmt=shape, color=c.colour, mfc=face, label=c.label, markersize=6, capsize=3, elinewidth=1.2
  )


def _apart(xs, place):
  """The sorted `xs` that have room for a label: each is a twentieth of the axis or more from the one before."""
  kept = xs[:1]
  for x in xs[1:]:
    if 20 * (place(x) - place(kept[-1])) >= place(xs[-1]) - place(xs[0]):
      kept.append(x)
  return kept


def _ticks(ax, xs, log):
  from matplotlib.ticker import FuncFormatter, NullLocator

  if log and xs and xs[0] > 0:
    ax.set_xscale("log", base=2 if all(math.log2(x).is_integer() for x in xs) else 10)
  if len(xs) <= 10 and (log or len(xs) <= 6):
    ax.set_xticks(_apart(xs, math.log if ax.get_xscale() == "log" else float))
  ax.xaxis.set_minor_locator(NullLocator())
  ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short(x)))


def traces(panels: Sequence[Panel], xlabel: str, scale: Mapping[str, float] | None = None, title: str = "") -> bytes:
  """A PNG of many thin lines, such as the losses of all members of a sweep.

  Args:
    scale: {label: number} of all curves, for a colour bar in place of the legend; it sets the colours of the curves.
    title: of the legend or the colour bar.
  """
  from matplotlib.colors import LogNorm, Normalize, to_hex
  from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

  out, axes = _grid(len(panels), (4.6, 3.6) if len(panels) > 1 else (7.0, 4.0), sharey=True)
  if scale:
    low, high = min(scale.values()), max(scale.values())
    norm = (LogNorm if low > 0 and high / low > 20 else Normalize)(low, high)
  for ax, panel in zip(axes, panels, strict=True):
    for c in panel.curves:
      colour = to_hex(_shades()(norm(scale[c.label]))) if scale else c.colour
      ax.plot(c.x, c.y, color=colour, linewidth=1, alpha=0.85, label=None if scale else c.label)
    ax.set_title(panel.title, loc="left", fontsize=10)
    ax.set(xlabel=xlabel, ylabel=panel.ylabel)
    tidy(ax)
    ax.label_outer()
    ax.margins(x=0.01)
  lows, highs = zip(*((min(c.y), max(c.y)) for p in panels for c in p.curves if len(c.y)), strict=True)
  if min(lows) > 0 and max(highs) > 5 * min(lows):
    for ax in axes:
      ax.set_yscale("log")
      ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
      ax.yaxis.set_minor_locator(NullLocator())
      ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: short(y)))
  if scale:
    from matplotlib.cm import ScalarMappable

    bar = out.colorbar(ScalarMappable(norm, _shades()), ax=axes, label=title, shrink=0.9)
    bar.set_ticks(sorted(scale.values()) if len(scale) <= 12 else np.quantile([*scale.values()], np.linspace(0, 1, 7)))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda x, _: short(x)))
    bar.ax.minorticks_off()
    bar.outline.set_visible(False)
  else:
    _legend(out, axes, title)
  return png(out)


def heatmaps(
  images: Sequence[tuple[str, Any]], xlabels: Sequence[str], ylabels: Sequence[str], columns: int, label: str
) -> bytes:
  """A PNG of matrices of numbers in [0, 1], with one colour bar; nan is left grey.

  Args:
    images: (title, matrix [i, j]), i from the top; both are counted from 1.
    xlabels, ylabels: of each image.
    columns: how many images are side by side.
    label: of the colour bar.
  """
  from matplotlib import colormaps
  from matplotlib.ticker import MaxNLocator

  rows = -(-len(images) // columns)
  out = figure((2.6 * columns + 1.2, 2.4 * rows + 0.3))
  axes = out.subplots(rows, columns, squeeze=False).ravel().tolist()
  for ax in axes[len(images) :]:
    ax.set_axis_off()
  shades = colormaps["magma"].with_extremes(bad="#d9d9d9")
  for ax, (title, matrix), xlabel, ylabel in zip(axes, images, xlabels, ylabels, strict=False):
    matrix = np.asarray(matrix, float)
    extent = (0.5, matrix.shape[1] + 0.5, matrix.shape[0] + 0.5, 0.5)
    shown = ax.imshow(matrix, cmap=shades, vmin=0, vmax=1, aspect="auto", extent=extent, interpolation="nearest")
    ax.set_title(title, fontsize=9)
    ax.set_xlabel(xlabel, fontsize=8)
    ax.set_ylabel(ylabel, fontsize=8)
    ax.tick_params(labelsize=7)
    for axis in (ax.xaxis, ax.yaxis):
      axis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
  bar = out.colorbar(shown, ax=axes, shrink=0.85 if rows == 1 else 0.6, label=label)
  bar.outline.set_visible(False)
  return png(out)
