"""Encoded examples to the rows of a batch: padded to buckets, or several in one row.

An encoded example is a dict of numpy arrays [n] and scalars; `tokens` is among them. A batch is a dict of arrays
[B, T] under the same keys. Two more arrays say where each example lies:

  positions    int32 [B, T]  0, 1, ... in each example
  segment_ids  int32 [B, T]  1, 2, ... by example in a row, 0 at padding
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

Batch = dict[str, np.ndarray]


def buckets(seq_len: int, least: int = 32) -> list[int]:
  """Lengths that batches are padded to: 8, 12, 16, 24, 32, 48, ... from `least` on, and `seq_len` itself."""
  steps = [n for k in range(3, 31) for n in (2**k, 3 * 2 ** (k - 1)) if n >= least]
  return [n for n in steps if n < seq_len] + [seq_len]


def bucket(length: int, seq_len: int, least: int = 32) -> int:
  """The smallest bucket that holds `length` tokens."""
  return next(n for n in buckets(seq_len, least) if n >= length)


def padding_id(tokenizer: Any) -> int:
  """The token that fills up rows. Any token of the model will do, since padding is neither attended to nor learned."""
  known = (i for i in (tokenizer.pad_id, tokenizer.eos_id) if i is not None)
  return next((i for i in known if tokenizer.rows is None or i < tokenizer.rows), 0)


def check(encoded: Sequence[Batch], tokenizer: Any) -> None:
  """Raises UserError for a token beyond the model's embedding: even the tokens that frame a text may be."""
  tokenizer.check(e[k] for e in encoded for k in ("inputs", "tokens", "targets") if k in e)


def pad(examples: Sequence[Batch], length: int, pad_id: int) -> Batch:
  """A batch with one example a row: arrays [n] are padded to `length`, scalars are stacked."""
  real = np.arange(length) < np.array([len(e["tokens"]) for e in examples])[:, None]
  batch = {}
  for k, first in examples[0].items():
    batch[k] = np.full(real.shape[: 1 + first.ndim], pad_id if k in ("tokens", "targets") else 0, first.dtype)
    batch[k][real if first.ndim else ...] = np.hstack([e[k] for e in examples])
  return batch | {"positions": np.arange(length, dtype=np.int32) * real, "segment_ids": real.astype(np.int32)}


def fit(examples: Sequence[Batch], share: slice, seq_len: int, pad_id: int, least: int = 32) -> Batch:
  """The rows `share` of a batch, padded to the bucket that holds its longest example."""
  return pad(examples[share], bucket(max(len(e["tokens"]) for e in examples), seq_len, least), pad_id)


def compact(examples: Sequence[Batch], share: slice, seq_len: int, pad_id: int, rows: int) -> Batch:
  """The examples `share` of a batch in rows that they share: longest first, each in the first row with room.

  Args:
    rows: how many rows most batches need. A batch that needs more gets twice as many, in all processes.
  """
  n = share.stop - share.start
  found = [_first_fit(examples[i : i + n], seq_len) for i in range(0, len(examples), n)]
  while max(map(len, found)) > rows:
    rows *= 2
  batch = {k: np.zeros((rows, seq_len), np.int32) for k in ("positions", "segment_ids")}
  for k, x in examples[0].items():
    batch[k] = np.full((rows, seq_len), pad_id if k in ("tokens", "targets") else 0, x.dtype)
  for r, row in enumerate(found[share.start // n]):
    start = 0
    for i, e in enumerate(row):
      length = len(e["tokens"])
      place = r, slice(start, start + length)
      for k, x in e.items():
        batch[k][place] = x
      batch["positions"][place] = np.arange(length)
      batch["segment_ids"][place] = i + 1
      start += length
  return batch


def usual_rows(encoded: Sequence[Batch], batch_size: int, seq_len: int, multiple: int) -> int:
  """The fewest rows, a multiple of `multiple`, in which `compact` fits each of 100 batches drawn at random."""
  rng = np.random.default_rng(0)
  drawn = [rng.choice(len(encoded), min(batch_size, len(encoded)), replace=False) for _ in range(100)]
  most = max(len(_first_fit([encoded[i] for i in indices], seq_len)) for indices in drawn)
  return -(-most // multiple) * multiple


def _first_fit(examples: Sequence[Batch], seq_len: int) -> list[list[Batch]]:
  """The examples of each row."""
  rows, room = [], []
  for e in sorted(examples, key=lambda e: -len(e["tokens"])):
    n = len(e["tokens"])
    r = next((r for r, left in enumerate(room) if left >= n), len(rows))
    if r == len(rows):
      rows.append([])
      room.append(seq_len)
    rows[r].append(e)
    room[r] -= n
  return rows


def longest_first(
  encoded: Sequence[Batch], tokenizer: Any, batch_size: int, seq_len: int, same_length: bool = False
) -> Iterator[Batch]:
  """Every encoded example once, one a row, the longest first so that batches need little padding.

  Rows are padded to a power of two or `seq_len`. Rows that fill up the last batch are zeros. A batch also has `lengths`
  int32 [B], the tokens of each row, and `index` int32 [B], which example a row holds; it is -1 in rows that fill up.

  Args:
    same_length: pad all batches to one T, the bucket of the longest example.
  """
  check(encoded, tokenizer)
  order = sorted(range(len(encoded)), key=lambda i: (-len(encoded[i]["tokens"]), i))
  for start in range(0, len(order), batch_size):
    index = np.full(batch_size, -1, np.int32)
    index[: len(order) - start] = order[start : start + batch_size]
    filler = {k: np.zeros((1,) * v.ndim, v.dtype) for k, v in encoded[0].items()}
    rows = [encoded[i] if i >= 0 else filler for i in index]
    T = min(1 << max(5, (len(rows[0]["tokens"]) - 1).bit_length()), seq_len)
    if same_length:
      T = bucket(len(encoded[order[0]]["tokens"]), seq_len)
    batch = pad(rows, T, padding_id(tokenizer))
    yield batch | {"lengths": batch["segment_ids"].sum(1, dtype=np.int32), "index": index}


def with_labels(batches: Iterable[Batch], answers: Sequence[Sequence[Sequence[int]]], pad_id: int) -> list[Batch]:
  """The `tokens`, `lengths` and `index` of batches from `longest_first`, and the labels of each row.

  Args:
    answers: token ids of each label of each example.

  Returns:
    batches with `labels` int32 [B, C, U] and `label_lengths` int32 [B, C]; U is the longest label of all examples.
  """
  lengths = np.array([[len(ids) for ids in labels] for labels in answers], np.int32).reshape(len(answers), -1)
  labels = np.full((*lengths.shape, lengths.max(initial=1)), pad_id, np.int32)
  labels[np.arange(labels.shape[-1]) < lengths[..., None]] = [i for example in answers for ids in example for i in ids]
  names = ("tokens", "lengths", "index")
  return [
    {k: batch[k] for k in names} | {"labels": labels[batch["index"]], "label_lengths": lengths[batch["index"]]}
    for batch in batches
  ]
