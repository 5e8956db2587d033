"""The endless iterator over training batches, whose state can be saved."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from lora_jax import errors, tasks
from lora_jax.batches import rows
from lora_jax.batches.rows import Batch
from lora_jax.values import Count


@dataclasses.dataclass
class TrainIterator:
  """Training batches without end.

  Fields:
    order: maps a seed to grain's iterator over the batches.
    seed: the seed of this iterator.
    examples: number of examples in an epoch.
    truncated: how many of them were too long and were cut.
  """

  order: Callable[[int], Any]
  seed: int
  examples: int
  truncated: int

  def __post_init__(self):
    self._source = self.order(self.seed)

  def __iter__(self) -> Iterator[Batch]:
    return self

  def __next__(self) -> Batch:
    return next(self._source)

  def reseeded(self, seed: int) -> "TrainIterator":
    """An iterator over the same examples, from its beginning, in the order of another seed."""
    return dataclasses.replace(self, seed=seed)

  def get_state(self) -> dict:
    """The position of the iterator: a dict of ints that JSON can hold."""
    return self._source.get_state()

  def set_state(self, state: dict) -> None:
    """Returns to the position that `get_state` gave. The batches that follow are the same bit for bit."""
    self._source.set_state(state)


def iterate(
  encoded: Sequence[Batch],
  truncated: int,
  tokenizer: Any,
  *,
  batch_size: int,
  seq_len: int,
  share: slice,
  seed: int,
  **how: Any,
) -> TrainIterator:
  """The iterator over encoded examples.

  Args:
    truncated: how many of the examples were too long.
    share: this process's rows of each global batch, see `rows_of`.
    **how: `pack` or `fit` of `endless`.
  """
  rows.check(encoded, tokenizer)
  order = functools.partial(endless, encoded, rows.padding_id(tokenizer), batch_size, seq_len, share, **how)
  return TrainIterator(order, seed, len(encoded), truncated)


def rows_of(
  task: tasks.Task, examples: Sequence[dict], batch_size: int, seq_len: int, process_index: int, process_count: int
) -> slice:
  """This process's rows of each global batch.

  Raises:
    UserError: a size is below 1, the processes do not divide the batch, or there are no examples.
  """
  if batch_size < 1 or seq_len < 1:
    raise errors.UserError(f"config.data: batch_size={batch_size} and seq_len={seq_len} must be at least 1")
  if batch_size % process_count:
    raise errors.UserError(
      f"config.data.batch_size={batch_size} is not a multiple of the number of processes, {process_count}"
    )
  if not len(examples):
    raise errors.UserError(f"task {task.name!r} has no examples to train on")
  n = batch_size // process_count
  return slice(process_index * n, (process_index + 1) * n)


def endless(
  encoded: Sequence[Batch],
  pad_id: int,
  batch_size: Count,
  seq_len: Count,
  share: slice,
  seed: int,
  *,
  pack: bool = False,
  fit: Callable[..., Batch] = rows.fit,
) -> Iterator[Batch]:
  """grain's iterator over this process's `share` of each global batch, in the order of a seed.

  Args:
    pack: fill rows of `seq_len` with examples, first fit; `batch_size` counts rows.
    fit: makes a batch of `batch_size` examples, where they are not packed; see `rows.fit`.
  """
  import grain

  # Everything is in memory, so reading in this thread is faster than handing over to others.
  options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
  order = grain.MapDataset.source(encoded).seed(seed).shuffle().repeat()
  if pack:
    return iter(_packed(order, options, batch_size, seq_len, pad_id, share))
  stack = functools.partial(fit, share=share, seq_len=seq_len, pad_id=pad_id)
  return iter(order.batch(batch_size, drop_remainder=True, batch_fn=stack).to_iter_dataset(options))


def _packed(order: Any, options: Any, batch_size: int, seq_len: int, pad_id: int, share: slice) -> Any:
  """Examples packed first fit, `batch_size` rows at a time."""
  from grain import experimental

  def stack(e):
    # grain's cost grows with the number of features, so the three arrays go as one; the weights by their bits.
    return {"x": np.stack([e["tokens"], e["targets"], e["weights"].view(np.int32)], axis=-1)}

  def unstack(packed):
    x, positions, segment_ids = (
      np.stack([r[f"x{k}"] for r in packed[share]]) for k in ("", "_positions", "_segment_ids")
    )
    tokens, targets = (np.where(segment_ids > 0, x[..., i], np.int32(pad_id)) for i in (0, 1))
    batch = {"tokens": tokens, "targets": targets, "weights": x[..., 2].copy().view(np.float32)}
    return batch | {"positions": positions, "segment_ids": segment_ids}

  filled = experimental.FirstFitPackIterDataset(
    order.map(stack).to_iter_dataset(options),
    length_struct={"x": seq_len},
    num_packing_bins=batch_size,
    shuffle_bins=False,
  )
  return filled.batch(batch_size, drop_remainder=True, batch_fn=unstack)
