"""Texts to batches for a model with a head: classification and regression of a sentence or a pair of sentences.

A batch is a dict of numpy arrays:

  tokens       int32 [B, T]    as the tokenizer's post-processor frames them, such as [CLS] a [SEP] b [SEP]
  token_types  int32 [B, T]    0 or 1: which text a token belongs to, where the tokenizer tells
  positions    int32 [B, T]    0, 1, ..., and 0 at padding
  segment_ids  int32 [B, T]    1, and 0 at padding
  lengths      int32 [B]       tokens of a row; a decoder classifies a row by its last token
  labels       int32 [B]       indices of labels; float32 in a regression
  weights      float32 [B]     1; in evaluation 0 for rows without a label and for rows that fill up the last batch
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lora_jax import errors, tasks
from lora_jax.batches import iterator, rows
from lora_jax.model import prompts
from lora_jax.values import Count


def encode(
  tokenizer: Any, texts: Sequence[tuple[str, ...]], seq_len: int, soft: prompts.Soft | None = None
) -> tuple[list[rows.Batch], int]:
  """`tokens` and `token_types` int32 [n] of each text or pair of texts, n <= seq_len, and how many were too long.

  Of a long pair the end of the longer text is cut first, as with `truncation=True` in transformers. An empty text
  without special tokens around it becomes one token of padding.

  Args:
    soft: soft tokens to put into the text. They have the type of the token before them, or 0.

  Raises:
    UserError: the special tokens alone fill `seq_len`.
  """
  seq_len = prompts.room(soft, seq_len)
  flat = iter(tokenizer.encode_batch([t for x in texts for t in x]))
  frames = {n: _frame(tokenizer, n, seq_len) for n in {len(x) for x in texts}}
  encoded, truncated = [], 0
  for x in texts:
    parts = [next(flat) for _ in x]
    frame = frames[len(x)]
    kept = _longest_first(parts, seq_len - sum(of is None for _, _, of in frame))
    pieces = [([special] if of is None else kept[of], kind) for special, kind, of in frame]
    ids = [i for piece, _ in pieces for i in piece] or [rows.padding_id(tokenizer)]
    kinds = [kind for piece, kind in pieces for _ in piece] or [0]
    framed = frame[0][2] is None
    if soft:
      at = soft.at(len(ids), framed)
      kinds[at:at] = [kinds[at - 1] if at else 0] * soft.length
    tokens = prompts.insert(soft, ids, framed)
    encoded.append({"tokens": tokens, "token_types": np.array(kinds, np.int32)})
    truncated += kept is not parts
  return encoded, truncated


def _frame(tokenizer: Any, n: int, seq_len: int) -> list[tuple[int, int, int | None]]:
  """What `n` texts are framed by, in order.

  An entry is (id, token type, None) for a special token, and (any id, token type, which text) for a text.
  """
  probe = tokenizer.backend.encode(*["a"] * n)
  tokens = list(zip(probe.ids, probe.type_ids, probe.sequence_ids, strict=True))
  frame = [
    token
    for before, token in zip([(0, 0, None), *tokens], tokens, strict=False)
    if token[2] is None or before[2] != token[2]
  ]
  if len(frame) - n >= seq_len:
    raise errors.UserError(f"seq_len={seq_len} has no room for text beside {len(frame) - n} special tokens")
  return frame


def _longest_first(parts: list[list[int]], room: int) -> list[list[int]]:
  """One or two texts cut to `room` tokens: first the longer text, then both to half of the room."""
  if sum(map(len, parts)) <= room:
    return parts
  if len(parts) == 1:
    return [parts[0][:room]]
  a, b = parts
  short = min(len(a), len(b), room // 2)
  n = short if len(a) <= len(b) else room - short
  return [a[:n], b[: room - n]]


def encode_all(
  task: tasks.Task, examples: Sequence[dict], tokenizer: Any, seq_len: int, soft: prompts.Soft | None = None
) -> tuple[list[rows.Batch], int]:
  """All examples as rows of a batch without padding, and how many were too long."""
  if not task.n_outputs:
    raise errors.UserError(f"task {task.name!r} has neither labels nor numbers for a head to learn")
  encoded, truncated = encode(tokenizer, [task.texts(example) for example in examples], seq_len, soft)
  dtype = np.int32 if task.labels else np.float32
  for example, row in zip(examples, encoded, strict=True):
    target = task.target(example)
    row |= {"lengths": np.int32(len(row["tokens"])), "labels": dtype(target)}
    row["weights"] = np.float32(not task.labels or target >= 0)
  return encoded, truncated


def train_iterator(
  task: tasks.Task,
  examples: Sequence[dict],
  tokenizer: Any,
  *,
  batch_size: Count,
  seq_len: Count,
  seed: int = 0,
  process_index: int = 0,
  process_count: int = 1,
  soft: prompts.Soft | None = None,
) -> iterator.TrainIterator:
  """Batches without end, padded to buckets. Order, shares and state are as in `causal.train_iterator`."""
  share = iterator.rows_of(task, examples, batch_size, seq_len, process_index, process_count)
  encoded, truncated = encode_all(task, examples, tokenizer, seq_len, soft)
  for example, row in zip(examples, encoded, strict=True):
    if not row["weights"]:
      raise errors.UserError(f"task {task.name!r}: {str(example)[:80]} has none of the labels {task.labels}")
  sizes = dict(batch_size=batch_size, seq_len=seq_len, share=share)
  return iterator.iterate(encoded, truncated, tokenizer, **sizes, seed=seed)


def eval_batches(
  task: tasks.Task,
  examples: Sequence[dict],
  tokenizer: Any,
  *,
  batch_size: Count,
  seq_len: Count,
  same_length: bool = False,
  soft: prompts.Soft | None = None,
) -> list[rows.Batch]:
  """Every example once, the longest first, with `index` int32 [B] as in `rows.longest_first`."""
  encoded, _ = encode_all(task, examples, tokenizer, seq_len, soft)
  return list(rows.longest_first(encoded, tokenizer, batch_size, seq_len, same_length))
