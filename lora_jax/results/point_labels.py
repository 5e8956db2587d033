"""Names beside the points of a plot, where they cover neither each other nor a point.

(adjustText covers points where they are as crowded as in the comparison of methods.)
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

RINGS, ANGLES = 9, 24  # of the places around a point
TURNS = 20


def write(axes: Any, points: Sequence[tuple[float, float, str, str]], size: float = 7.5) -> None:
  """Writes the names of points (x, y, name, colour); a line leads to the point if its name is not right beside it.

  Call it last: places are found in pixels, so the axes and the layout must not change afterwards.
  """
  axes.figure.draw_without_rendering()
  pixel = axes.figure.dpi / 72  # of a typographic point
  at = axes.transData.transform([p[:2] for p in points]).reshape(-1, 2)
  texts = [axes.text(0, 0, name, color=colour, fontsize=size, transform=None) for _, _, name, colour in points]
  half = np.array([(t.get_window_extent().width, 1.1 * size * pixel) for t in texts]).reshape(-1, 2) / 2
  found = places(at, half + (pixel, 0), 4 * pixel, axes.bbox.extents)
  for point, place, box, text in zip(at, found, half, texts, strict=True):
    text.set(position=place, ha="center", va="center", in_layout=False)
    end = _end(point, place, box)
    if np.hypot(*(end - point)) > 6 * pixel:
      line = axes.transData.inverted().transform([point, end]).T
      axes.plot(*line, color=text.get_color(), linewidth=0.6, alpha=0.6, zorder=1, scalex=False, scaley=False)


def places(at: np.ndarray, half: np.ndarray, gap: float, frame: Sequence[float]) -> np.ndarray:
  """The centres [N, 2] of boxes beside points; the same points always give the same ones.

  Each box in turn moves to where it costs least given the others, until none moves.

  Args:
    at: the points [N, 2].
    half: half the width and height of each box [N, 2].
    gap: between a point and a box that is right beside it.
    frame: left, bottom, right and top of the area that the boxes stay in.
  """
  angles = np.arange(ANGLES) * 2 * np.pi / ANGLES
  ways = np.stack([np.cos(angles), np.sin(angles)], -1)
  rings = np.arange(RINGS)[:, None, None]
  reach = half[:, None, None] + gap * (1 + 1.5 * rings)
  options = (at[:, None, None] + ways * reach).reshape(len(at), RINGS * ANGLES, 2)
  distance = (rings[..., 0] + 0.3 * (1 - ways[:, 0]) ** 2).ravel()  # at the right reads best
  low, high = np.reshape(frame, (2, 2))
  chosen = np.zeros(len(at), int)
  for turn in range(TURNS):
    before = chosen.copy()
    for i, (point, mine, box) in enumerate(zip(at, options, half, strict=True)):
      rest = np.arange(len(at)) != i
      placed = rest if turn else np.arange(len(at)) < i
      others, boxes = options[placed, chosen[placed]], half[placed]
      ends = _end(point, mine, box)
      line = np.linspace(point, ends, 16)  # [16, options, 2]
      cost = distance + 100 * ((mine - box < low) | (mine + box > high)).any(-1)
      cost += 30 * _within(mine, others, box + boxes).sum(-1)
      cost += 30 * _within(mine, at, box + 0.6 * gap).sum(-1)
      cost += _within(mine, at[rest], box + 1.6 * gap).sum(-1)  # points whose name it could be taken for
      cost += 10 * _within(line, others, boxes).any(0).sum(-1)
      cost += 5 * _within(line, at[rest], 0.8 * gap).any(0).sum(-1)
      cost += 5 * _cross(point, ends[:, None], at[placed], _end(at[placed], others, boxes)).sum(-1)
      chosen[i] = np.argmin(cost)
    if (chosen == before).all():
      break
  return options[np.arange(len(at)), chosen]


def _end(point: np.ndarray, centre: np.ndarray, half: np.ndarray) -> np.ndarray:
  """The place in a box that is nearest to a point."""
  return np.clip(point, centre - half, centre + half)


def _within(x: np.ndarray, centres: np.ndarray, half: np.ndarray | float) -> np.ndarray:
  """[..., N]: whether points x [..., 2] are in boxes around centres [N, 2]."""
  return (np.abs(x[..., None, :] - centres) < half).all(-1)


def _cross(a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray) -> np.ndarray:
  """Whether the line from a to b crosses that from c to d."""
  side = lambda p, q, r: (q - p)[..., 0] * (r - p)[..., 1] - (q - p)[..., 1] * (r - p)[..., 0]
  return (side(a, b, c) * side(a, b, d) < 0) & (side(c, d, a) * side(c, d, b) < 0)
