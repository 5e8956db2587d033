"""Names of tensors: views of parts of a file's tensors, and tensors that have several names."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lora_jax import errors

PIECE_BYTES = 2**24  # of two tensors that are compared


@dataclasses.dataclass(frozen=True)
class View:
  """Parts of a file's tensors under names of their own.

  Fields:
    tensors: the source.
    parts: {name: (name in the source, index)}.
  """

  tensors: Any
  parts: Mapping[str, tuple[str, tuple]]

  def names(self) -> list[str]:
    """Returns all names."""
    return list(self.parts)

  def shape(self, k: str) -> tuple[int, ...]:
    """Returns the shape of a part without reading it."""
    source, index = self.parts[k]
    return np.broadcast_to(np.int8(0), self.tensors.shape(source))[index].shape

  def read(self, k: str) -> np.ndarray:
    """Returns the part in its stored dtype."""
    source, index = self.parts[k]
    return self.tensors.read(source)[index]


def same(tensors: Any, a: str, b: str) -> bool:
  """Returns whether two tensors of a file are equal; stops reading at the first difference."""
  if tensors.shape(a) != tensors.shape(b):
    return False
  x, y = (np.atleast_1d(tensors.read(k)) for k in (a, b))
  step = max(1, len(x) * PIECE_BYTES // max(1, x.nbytes))
  return all(np.array_equal(x[i : i + step], y[i : i + step]) for i in range(0, len(x), step))


def unify(tensors: Any, names: Mapping[str, Sequence[str]]) -> View:
  """Returns the tensors of a file under one name each.

  Args:
    names: {the one name: all names that a file may use for the tensor}.

  Raises:
    UserError: the file has two of a tensor's names, with different values.
  """
  have, found = set(tensors.names()), {}
  for name, every in names.items():
    first, *more = [k for k in dict.fromkeys(every) if k in have] or [None]
    if differing := [k for k in more if not same(tensors, first, k)]:
      raise errors.UserError(
        f"{first} {tensors.shape(first)} and {differing[0]} {tensors.shape(differing[0])} differ; the model has one "
        "tensor for both"
      )
    found |= {name: (first, ())} if first else {}
  merged = {k for every in names.values() for k in every}
  return View(tensors, {k: (k, ()) for k in tensors.names() if k not in merged} | found)
