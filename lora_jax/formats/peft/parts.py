"""LoRA on parts of a fused matrix, converted to LoRA of the whole matrix, which PEFT supports."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lora_jax import weights
from lora_jax.weights import fused


def as_lora(w: Any) -> Any:
  """Returns a `weights.LoRA` of the whole matrix that is equal to LoRA on some parts; returns anything else unchanged.

  Ranks add up: the `a` of the parts are concatenated, and each part's rows of `b` are zero in the outputs of the other
  parts. The arrays are numpy, for files.
  """
  parts = [p if isinstance(p, weights.LoRA) else None for p in w.parts.values()] if isinstance(w, fused.Fused) else []
  nodes = [weights.base(p) is not p for p in w.parts.values()] if parts else []
  if not any(parts) or [p is not None for p in parts] != nodes:
    return w
  widths = [p.shape[weights.AXIS] for p in w.parts.values()]
  first = next(p for p in parts if p is not None)
  stack = first.scale.shape
  made = [block([p and p.layer(i) for p in parts], widths, weights.AXIS) for i in np.ndindex(stack)]
  rank = np.int32([a.shape[-1] for a, _, _ in made])
  a = np.zeros((len(made), *made[0][0].shape[:-1], rank.max()), np.float32)
  b = np.zeros((len(made), rank.max(), *made[0][1].shape[1:]), np.float32)
  for i, (a_, b_, _) in enumerate(made):
    a[i, ..., : rank[i]], b[i, : rank[i]] = a_, b_
  shaped = lambda x: x.reshape(*stack, *x.shape[1:])
  scale = shaped(np.float32([s for _, _, s in made]))
  out = dict(base=w.adapted, a=shaped(a), b=shaped(b), scale=scale, rank=shaped(rank), start=None)
  if any(p is not None and p.bias is not None for p in parts):
    out["bias"] = np.concatenate([_bias(p, first.a.ndim - 1, scale) for p in w.parts.values()], weights.AXIS)
  return first.replace(**out)


def _bias(p: Any, n: int, scale: np.ndarray) -> np.ndarray:
  """Returns a part's bias [*stack, *out] for the scale of the whole; n is the number of axes before the output's."""
  bias = p.bias if isinstance(p, weights.LoRA) else None
  if bias is None:
    return np.zeros((*p.shape[: scale.ndim], *p.shape[n:]), np.float32)
  ratio = np.asarray(p.scale) / np.where(scale == 0, 1, scale)
  return np.asarray(bias) * ratio.reshape(*ratio.shape, *(1,) * (bias.ndim - ratio.ndim))


def block(parts: Sequence[tuple | None], widths: Sequence[int], axis: int) -> tuple[np.ndarray, np.ndarray, float]:
  """Returns (a, b, scale) of a matrix from the factors of its parts.

  Args:
    parts: (a [..., in, R], b [..., R, ..., out, ...], scale) for each part, or None for a part without LoRA.
    widths: size of each part along `axis` of b.
    axis: negative, counted from the end.
  """
  given = [(p, i) for i, p in enumerate(parts) if p is not None]
  scale = next((s for (_, _, s), _ in given if s), 0.0)
  columns, rows = [a for (a, _, _), _ in given], []
  for (_, b, s), i in given:
    pad = [(0, 0)] * b.ndim
    pad[axis] = (sum(widths[:i]), sum(widths[i + 1 :]))
    rows.append(np.pad(b * (s / scale if scale else 0.0), pad))
  return np.concatenate(columns, -1), np.concatenate(rows, columns[0].ndim - 2), scale
