"""Text to batches: encoding, padding to buckets, packing or sharing rows, and an iterator whose state is saved.

A training batch is a dict of numpy arrays [B, T]:

  tokens       int32    input tokens
  targets      int32    the token after each
  weights      float32  what the prediction of the target counts: `prompt_loss_weight` in a prompt, 1 in a response and,
                        where that is learned, at the token that ends it; 0 at padding
  positions    int32    0, 1, ... in each example
  segment_ids  int32    1, 2, ... by example in a row, 0 at padding

Soft tokens (model/prompts.py) are negative; the weight of predicting one is 0, and its target is 0 too.
A target is always of the same example as its token, so that no loss crosses examples in a packed row.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from lora_jax import errors, tasks
from lora_jax.batches import encoding
from lora_jax.model import prompts
from lora_jax.values import Count

Batch = dict[str, np.ndarray]


def buckets(seq_len: int, least: int = 32) -> list[int]:
  """Lengths that batches are padded to: 8, 12, 16, 24, 32, 48, ... from `least` on, and `seq_len` itself."""
  steps = [n for k in range(3, 31) for n in (2**k, 3 * 2 ** (k - 1)) if n >= least]
  return [n for n in steps if n < seq_len] + [seq_len]


def bucket(length: int, seq_len: int, least: int = 32) -> int:
  """The smallest bucket of `length` tokens or more."""
  return next(n for n in buckets(seq_len, least) if n >= length)


def encode(
  tokenizer: Any,
  formatted: tasks.Formatted | tasks.Chat,
  seq_len: int,
  prompt_loss_weight: float = 0.1,
  eos: bool = True,
) -> Batch:
  """One example: `tokens`, `targets` int32 [n] and `weights` float32 [n], n <= seq_len. See `encode_all`.

  Of a conversation whose earlier turns the chat template rewrites it is the last answer's.
  """
  return encode_all(tokenizer, [formatted], seq_len, prompt_loss_weight, eos)[0][-1]


def encode_all(
  tokenizer: Any,
  formatted: Sequence[tasks.Formatted | tasks.Chat],
  seq_len: int,
  prompt_loss_weight: float = 0.1,
  eos: bool = True,
  soft: prompts.Soft | None = None,
) -> tuple[list[Batch], int]:
  """All examples as `encode` gives one, and how many were too long.

  Of a long example the left of the prompt is cut, and of the response only what exceeds `seq_len` by itself. With
  `eos` the token that ends a text follows a response that has none at its end. `soft` tokens are put into the prompt,
  and never cut. A conversation whose earlier turns the chat template rewrites is several examples; see
  `encoding.pieces`.
  """
  end, ends, most = tokenizer.eos_id, tokenizer.end_ids, prompts.room(soft, seq_len) + 1
  notes, encoded, truncated = encoding.Notes(), [], 0
  for text in encoding.encode(tokenizer, formatted, notes):
    ids, weights = text.ids, np.where(np.isnan(text.weights), np.float32(prompt_loss_weight), text.weights)
    if eos and end is not None and not np.isin(ids[-1:], ends).any():
      ids, weights = np.append(ids, np.int32(end)), np.append(weights, np.float32(text.weight))
    truncated += len(ids) > most
    kept = _kept(text.prompt, len(ids), most, text.first)
    prompt = int((kept < text.prompt).sum())
    encoded.append(row(ids[kept], weights[kept], soft, prompt, ids[:1].tolist() == [tokenizer.bos_id]))
  notes.say()
  return encoded, truncated


def row(ids: np.ndarray, weights: np.ndarray, soft: prompts.Soft | None, prompt: int, begins: bool) -> Batch:
  """`tokens`, `targets` and `weights` of ids [n] and what each of them counts as a target.

  Soft tokens go into the first `prompt` ids; `begins`: the first of those begins a text.
  """
  if soft:
    at = soft.at(prompt, begins)
    ids, weights = np.insert(ids, at, soft.ids), np.insert(weights, at, np.zeros(soft.length, np.float32))
  return {"tokens": ids[:-1], "targets": np.maximum(ids[1:], 0), "weights": weights[1:]}


def _kept(prompt: int, n: int, length: int, first: int) -> np.ndarray:
  """Indices of what is kept of `n` tokens, `length` at most.

  That is the left of the response, and before it the right of the `prompt` tokens with the `first` of them.
  """
  if n <= length:
    return np.arange(n)
  room = min(max(length - (n - prompt), 1), prompt)
  first = min(first, room)
  return np.r_[:first, prompt - (room - first) : prompt, prompt : prompt + length - room]


def pad(examples: Sequence[Batch], length: int, pad_id: int) -> Batch:
  """A batch with one example a row: arrays [n] of the examples are padded, scalars stacked, positions added."""
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
  """The examples `share` of a batch in rows that they share, the longest first, each in the first row with room.

  `rows` are what most batches need; one that needs more gets twice as many, in all processes.
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
      place = r, slice(start, start + len(e["tokens"]))
      for k, x in e.items():
        batch[k][place] = x
      batch["positions"][place], batch["segment_ids"][place] = np.arange(len(e["tokens"])), i + 1
      start = place[1].stop
  return batch


def _first_fit(examples: Sequence[Batch], seq_len: int) -> list[list[Batch]]:
  """Examples by row."""
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


def _usual_rows(encoded: Sequence[Batch], batch_size: int, seq_len: int, multiple: int) -> int:
  """Rows, a multiple of `multiple`, that hold any of 100 batches drawn at random."""
  rng = np.random.default_rng(0)
  drawn = [rng.choice(len(encoded), min(batch_size, len(encoded)), replace=False) for _ in range(100)]
  most = max(len(_first_fit([encoded[i] for i in indices], seq_len)) for indices in drawn)
  return -(-most // multiple) * multiple


@dataclasses.dataclass
class TrainIterator:
  """Infinite training batches.

  Fields:
    order: the grain iterator of a seed.
    seed: of this one.
    examples: how many examples an epoch has.
    truncated: how many of them were too long.
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
    """Where the iterator is: a dict of ints that JSON can hold."""
    return self._source.get_state()

  def set_state(self, state: dict) -> None:
    """Goes to where `get_state` was called; the batches that follow are the same bit for bit."""
    self._source.set_state(state)


def train_iterator(
  task: tasks.Task,
  examples: Sequence[dict],
  tokenizer: Any,
  *,
  batch_size: Count,
  seq_len: Count,
  pack: bool = False,
  share_rows: bool = False,
  eos: bool | None = None,
  prompt_loss_weight: float = 0.1,
  seed: int = 0,
  process_index: int = 0,
  process_count: int = 1,
  multiple: int = 1,
  soft: prompts.Soft | None = None,
) -> TrainIterator:
  """Batches of `task`'s examples for ever, in a new order each epoch that depends on the seed alone.

  Args:
    examples: what `task.load` gave; encoded once, here.
    batch_size: examples of the global batch, or with `pack` its rows.
    seq_len: longest row. Unpacked batches are padded to the smallest bucket that holds their longest example.
    pack: put as many examples in a row of `seq_len` as fit, first fit.
    share_rows: put the `batch_size` examples in as few rows of `seq_len` as hold them. Loss and gradient are those of
      the padded batch, with less padding and one shape for nearly all batches.
    eos: learn to end the response; None: where it is free text, but not where it is one of the task's labels. Those are
      scored by their likelihood, and the token after them would be half of the loss. The end that a chat template
      writes is part of an answer, and is learned in any case.
    process_index, process_count: this process gets its consecutive share of the rows of each global batch. All
      processes have to pass the same examples and seed.
    multiple: of which this process's rows are one where examples share them.
    soft: the soft tokens of the model, `prompts.of(params)`.
  """
  share = rows_of(task, examples, batch_size, seq_len, process_index, process_count)
  formatted = [task.format(e) for e in examples]
  encoded, truncated = encode_all(tokenizer, formatted, seq_len, prompt_loss_weight, learns_end(task, eos), soft)
  if pack and share_rows:
    raise errors.UserError("config.data: pack fills rows, share_rows puts whole batches in them; set one of the two")
  how = {"pack": pack}
  if share_rows:
    rows = _usual_rows(encoded, batch_size // process_count, seq_len, multiple)
    how = {"fit": functools.partial(compact, rows=rows)}
  return iterate(encoded, truncated, tokenizer, batch_size, seq_len, share, seed, **how)


def iterate(
  encoded: Sequence[Batch],
  truncated: int,
  tokenizer: Any,
  batch_size: int,
  seq_len: int,
  share: slice,
  seed: int,
  **how: Any,
) -> TrainIterator:
  """The iterator over encoded examples, `truncated` of which were too long; `how` as in `endless`."""
  _check(encoded, tokenizer)
  order = functools.partial(endless, encoded, padding_id(tokenizer), batch_size, seq_len, share, **how)
  return TrainIterator(order, seed, len(encoded), truncated)


def _check(encoded: Sequence[Batch], tokenizer: Any) -> None:
  """UserError for a token of encoded examples that the model does not have: what frames a text may be one."""
  tokenizer.check(e[k] for e in encoded for k in ("inputs", "tokens", "targets") if k in e)


def learns_end(task: tasks.Task, eos: bool | None) -> bool:
  """Whether the token that ends a text is learned, see `train_iterator`."""
  return not task.labels if eos is None else eos


def rows_of(
  task: tasks.Task, examples: Sequence[dict], batch_size: int, seq_len: int, process_index: int, process_count: int
) -> slice:
  """A process's rows of each global batch; UserError for sizes that do not go together."""
  if batch_size < 1 or seq_len < 1:
    raise errors.UserError(f"config.data: batch_size={batch_size} and seq_len={seq_len} must be at least 1")
  if batch_size % process_count:
    raise errors.UserError(
      f"config.data.batch_size={batch_size} is no multiple of the number of processes, {process_count}"
    )
  if not len(examples):
    raise errors.UserError(f"task {task.name!r} has no examples to train on")
  rows = batch_size // process_count
  return slice(process_index * rows, (process_index + 1) * rows)


def endless(
  encoded: Sequence[Batch],
  pad_id: int,
  batch_size: Count,
  seq_len: Count,
  share: slice,
  seed: int,
  pack: bool = False,
  fit: Callable[..., Batch] = fit,
) -> Iterator[Batch]:
  """grain's iterator over the `share` of each global batch of encoded examples, which `fit` pads."""
  import grain

  # All is in memory: reading in this thread beats handing over to others.
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
    # grain's cost is by feature, so the three arrays go as one; the weights by their bits.
    return {"x": np.stack([e["tokens"], e["targets"], e["weights"].view(np.int32)], axis=-1)}

  def unstack(rows):
    x, positions, segment_ids = (
      np.stack([r[f"x{k}"] for r in rows[share]]) for k in ("", "_positions", "_segment_ids")
    )
    tokens, targets = (np.where(segment_ids > 0, x[..., i], np.int32(pad_id)) for i in (0, 1))
    batch = {"tokens": tokens, "targets": targets, "weights": x[..., 2].copy().view(np.float32)}
    return batch | {"positions": positions, "segment_ids": segment_ids}

  rows = experimental.FirstFitPackIterDataset(
    order.map(stack).to_iter_dataset(options),
    length_struct={"x": seq_len},
    num_packing_bins=batch_size,
    shuffle_bins=False,
  )
  return rows.batch(batch_size, drop_remainder=True, batch_fn=unstack)


def eval_batches(
  task: tasks.Task,
  examples: Sequence[dict],
  tokenizer: Any,
  *,
  batch_size: Count,
  seq_len: Count,
  same_length: bool = False,
  soft: prompts.Soft | None = None,
) -> list[Batch]:
  """Prompts to continue, longest first so that batches need little padding.

  Each batch has `tokens` int32 [B, T], right-padded to a power of two or `seq_len` (of a longer prompt the left is
  cut), `lengths` int32 [B] and `index` int32 [B], which example a row is. Rows that fill up the last batch have
  index -1 and length 1. With `same_length` all batches have one T, the bucket of the longest. `labels` int32 [B, C, U]
  and `label_lengths` int32 [B, C] are the task's labels after each prompt, see `encoding.questions`.
  """
  most, formatted = prompts.room(soft, seq_len), [task.format(example) for example in examples]
  asked, firsts, answers = encoding.questions(tokenizer, formatted, task.labels or ())
  rows = []
  for ids, first in zip(asked, firsts, strict=True):
    kept = np.array(ids, np.int32)[_kept(len(ids), len(ids), most, first)]
    rows.append({"tokens": prompts.insert(soft, kept, ids[:1] == [tokenizer.bos_id])})
  batches = longest_first(rows, tokenizer, batch_size, seq_len, same_length)
  return with_labels(batches, answers, padding_id(tokenizer))


def with_labels(batches: Iterable[Batch], answers: Sequence[Sequence[Sequence[int]]], pad_id: int) -> list[Batch]:
  """What of the batches of `longest_first` an evaluation needs, and the `labels` of each row.

  Args:
    answers: ids of the labels of each example; all batches have the U of the longest.
  """
  lengths = np.array([[len(ids) for ids in labels] for labels in answers], np.int32).reshape(len(answers), -1)
  labels = np.full((*lengths.shape, lengths.max(initial=1)), pad_id, np.int32)
  labels[np.arange(labels.shape[-1]) < lengths[..., None]] = [i for example in answers for ids in example for i in ids]
  names = ("tokens", "lengths", "index")
  return [
    {k: batch[k] for k in names} | {"labels": labels[batch["index"]], "label_lengths": lengths[batch["index"]]}
    for batch in batches
  ]


def longest_first(
  encoded: Sequence[Batch], tokenizer: Any, batch_size: int, seq_len: int, same_length: bool = False
) -> Iterator[Batch]:
  """Batches of encoded examples as `eval_batches` says; rows that fill up the last one are zeros."""
  _check(encoded, tokenizer)
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


def padding_id(tokenizer: Any) -> int:
  """What rows are filled up with. Any token of the model does, since padding is never attended to or learned."""
  known = (i for i in (tokenizer.pad_id, tokenizer.eos_id) if i is not None)
  return next((i for i in known if tokenizer.rows is None or i < tokenizer.rows), 0)
