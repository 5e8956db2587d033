"""Text to batches: encoding, padding to buckets, packing or sharing rows, and an iterator whose state is saved.

A training batch is a dict of numpy arrays [B, T]:

  tokens       int32    input tokens
  targets      int32    the token after each
  weights      float32  what the prediction of the target counts: `prompt_loss_weight` in a prompt, 1 in a response
                        including the token that ends it, 0 at padding
  positions    int32    0, 1, ... in each example
  segment_ids  int32    1, 2, ... by example in a row, 0 at padding

Soft tokens (prompts.py) are negative; the weight of predicting one is 0, and its target is 0 too.
A target is always of the same example as its token, so that no loss crosses examples in a packed row.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from lora_jax import errors, prompts, tasks
from lora_jax.values import Count

Batch = dict[str, np.ndarray]


def buckets(seq_len: int, least: int = 32) -> list[int]:
  """Lengths that batches are padded to: 8, 12, 16, 24, 32, 48, ... from `least` on, and `seq_len` itself."""
  steps = [n for k in range(3, 31) for n in (2**k, 3 * 2 ** (k - 1)) if n >= least]
  return [n for n in steps if n < seq_len] + [seq_len]


def bucket(length: int, seq_len: int, least: int = 32) -> int:
  """The smallest bucket of `length` tokens or more."""
  return next(n for n in buckets(seq_len, least) if n >= length)


def turns(tokenizer: Any, formatted: tasks.Formatted | tasks.Chat) -> list[tuple[str, bool]]:
  """Pieces of text that are tokenised apart, each with whether it is a response; the last one is.

  A conversation is rendered up to each assistant message, so that what precedes a response is the very text that
  the model is given when it has to generate it.
  """
  if isinstance(formatted, tasks.Formatted):
    return [(formatted.prompt, False), (formatted.response, True)]
  messages, done, pieces = list(formatted.messages), "", []
  for i, message in enumerate(messages):
    if message["role"] != "assistant":
      continue
    asked = tokenizer.chat(messages[:i], add_generation_prompt=True)
    answered = tokenizer.chat(messages[: i + 1], add_generation_prompt=False)
    if not (asked.startswith(done) and answered.startswith(asked)):
      raise errors.UserError(
        f"the model's chat template rewrites earlier turns (before messages[{i}], {message['content'][:40]!r}); "
        "give it one assistant message a conversation"
      )
    pieces += [(asked[len(done) :], False), (answered[len(asked) :], True)]
    done = answered
  return pieces


def encode(
  tokenizer: Any,
  formatted: tasks.Formatted | tasks.Chat,
  seq_len: int,
  prompt_loss_weight: float = 0.1,
  eos: bool = True,
) -> Batch:
  """One example: `tokens`, `targets` int32 [n] and `weights` float32 [n], n <= seq_len. See `encode_all`."""
  return encode_all(tokenizer, [formatted], seq_len, prompt_loss_weight, eos)[0][0]


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
  `eos` the token that ends a text follows a response, unless the chat template ends it already. `soft` tokens are put
  into the prompt, and never cut.
  """
  add_bos, end, most = tokenizer.add_bos, tokenizer.eos_id, prompts.room(soft, seq_len) + 1
  encoded, truncated = [], 0
  for prompt, learned, response in _ids(tokenizer, formatted, add_bos):
    if eos and end is not None and response[-1:] != [end]:
      response = [*response, end]
    truncated += len(prompt) + len(response) > most
    kept, response = _cut(prompt, response, most, add_bos)
    ids = np.array([*kept, *response], np.int32)
    weights = np.ones(len(ids), np.float32)
    weights[: len(kept)] = np.where(learned[len(prompt) - len(kept) :], 1, prompt_loss_weight)
    weights[: len(kept[:1])] = prompt_loss_weight  # not that of a token that was cut in favour of the first
    encoded.append(row(ids, weights, soft, len(kept), kept[:1] == [tokenizer.bos_id]))
  return encoded, truncated


def row(ids: np.ndarray, weights: np.ndarray, soft: prompts.Soft | None, prompt: int, begins: bool) -> Batch:
  """`tokens`, `targets` and `weights` of ids [n] and what each of them counts as a target.

  Soft tokens go into the first `prompt` ids; `begins`: the first of those begins a text.
  """
  if soft:
    at = soft.at(prompt, begins)
    ids, weights = np.insert(ids, at, soft.ids), np.insert(weights, at, np.zeros(soft.length, np.float32))
  return {"tokens": ids[:-1], "targets": np.maximum(ids[1:], 0), "weights": weights[1:]}


def _ids(
  tokenizer: Any, formatted: Sequence[tasks.Formatted | tasks.Chat], add_bos: bool
) -> Iterator[tuple[list[int], list[bool], list[int]]]:
  """Ids of what precedes the response, whether each of them is in an earlier response, and ids of the response.

  A response ends with its first end-of-text token; what a template puts after that is no response. An empty prompt
  is a single token, so that all of the response is predicted from something.
  """
  pieces = [turns(tokenizer, f) for f in formatted]
  flat = iter(tokenizer.encode_batch([text for example in pieces for text, _ in example]))
  start = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
  for example in pieces:
    prompt, learned = [], []
    for (_, is_response), ids in zip(example, flat, strict=False):
      n = ids.index(tokenizer.eos_id) + 1 if is_response and tokenizer.eos_id in ids else len(ids)
      prompt += ids
      learned += [is_response] * n + [False] * (len(ids) - n)
    response, cut = ids[:n], len(prompt) - len(ids)
    prompt, learned = prompt[:cut], learned[:cut]
    if (add_bos and prompt[:1] != [tokenizer.bos_id]) or (not prompt and start is not None):
      prompt, learned = [start, *prompt], [False, *learned]
    yield prompt, learned, response


def _cut(prompt: list[int], response: list[int], length: int, keep_first: bool) -> tuple[list[int], list[int]]:
  """The right of the prompt (and its first token) and the left of the response, `length` tokens at most."""
  if len(prompt) + len(response) <= length:
    return prompt, response
  room = max(length - len(response), 1)
  first = prompt[: keep_first and 1]
  kept = first + prompt[len(prompt) - (room - len(first)) :]
  return kept, response[: length - len(kept)]


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
  eos: bool = True,
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
    eos: learn to end the response.
    process_index, process_count: this process gets its consecutive share of the rows of each global batch. All
      processes have to pass the same examples and seed.
    multiple: of which this process's rows are one where examples share them.
    soft: the soft tokens of the model, `prompts.of(params)`.
  """
  share = rows_of(task, examples, batch_size, seq_len, process_index, process_count)
  formatted = [task.format(e) for e in examples]
  encoded, truncated = encode_all(tokenizer, formatted, seq_len, prompt_loss_weight, eos, soft)
  if pack and share_rows:
    raise errors.UserError("config.data: pack fills rows, share_rows puts whole batches in them; set one of the two")
  how = {"pack": pack}
  if share_rows:
    rows = _usual_rows(encoded, batch_size // process_count, seq_len, multiple)
    how = {"fit": functools.partial(compact, rows=rows)}
  order = functools.partial(endless, encoded, padding_id(tokenizer), batch_size, seq_len, share, **how)
  return TrainIterator(order, seed, len(encoded), truncated)


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
  index -1 and length 1. With `same_length` all batches have one T, the bucket of the longest.
  """
  add_bos, most = tokenizer.add_bos, prompts.room(soft, seq_len)
  parts = _ids(tokenizer, [task.format(example) for example in examples], add_bos)
  encoded = [_cut(prompt, [], most, add_bos)[0] for prompt, _, _ in parts]
  encoded = [{"tokens": prompts.insert(soft, ids, ids[:1] == [tokenizer.bos_id])} for ids in encoded]
  batches = longest_first(encoded, padding_id(tokenizer), batch_size, seq_len, same_length)
  return [{k: batch[k] for k in ("tokens", "lengths", "index")} for batch in batches]


def longest_first(
  encoded: Sequence[Batch], pad_id: int, batch_size: int, seq_len: int, same_length: bool = False
) -> Iterator[Batch]:
  """Batches of encoded examples as `eval_batches` says; rows that fill up the last one are zeros."""
  order = sorted(range(len(encoded)), key=lambda i: (-len(encoded[i]["tokens"]), i))
  for start in range(0, len(order), batch_size):
    index = np.full(batch_size, -1, np.int32)
    index[: len(order) - start] = order[start : start + batch_size]
    filler = {k: np.zeros((1,) * v.ndim, v.dtype) for k, v in encoded[0].items()}
    rows = [encoded[i] if i >= 0 else filler for i in index]
    T = min(1 << max(5, (len(rows[0]["tokens"]) - 1).bit_length()), seq_len)
    if same_length:
      T = bucket(len(encoded[order[0]]["tokens"]), seq_len)
    batch = pad(rows, T, pad_id)
    yield batch | {"lengths": batch["segment_ids"].sum(1, dtype=np.int32), "index": index}


def label_ids(task: tasks.Task, tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
  """The task's labels as int32 ids [C, U], right-padded, and their lengths [C]; [0, 1] and [0] without labels."""
  ids = tokenizer.encode_batch(list(task.labels or ()))
  lengths = np.array([len(x) for x in ids], np.int32)
  padded = np.full((len(ids), max(lengths, default=1)), padding_id(tokenizer), np.int32)
  for row, x in enumerate(ids):
    padded[row, : len(x)] = x
  return padded, lengths


def padding_id(tokenizer: Any) -> int:
  """What rows are filled up with. Any token does, since padding is never attended to or learned."""
  return next((i for i in (tokenizer.pad_id, tokenizer.eos_id) if i is not None), 0)
