"""Texts to batches for a decoder, which predicts every next token.

A training batch is a dict of numpy arrays [B, T]:

  tokens       int32    input tokens
  targets      int32    the token after each
  weights      float32  weight of each target in the loss: `prompt_loss_weight` in a prompt; 1 in a response and at the
                        token that ends it, if that is learned; 0 at padding
  positions, segment_ids  as in batches/rows.py

Soft tokens (model/prompts.py) are negative. Predicting one has weight 0, and its target is 0 too.
A target always belongs to the same example as its token, so no loss crosses examples in a packed row.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from lora_jax import errors, tasks
from lora_jax.batches import encoding, iterator, rows
from lora_jax.batches.rows import Batch
from lora_jax.model import prompts
from lora_jax.values import Count


def encode(
  tokenizer: Any,
  formatted: tasks.Formatted | tasks.Chat,
  seq_len: int,
  prompt_loss_weight: float = 0.1,
  eos: bool = True,
) -> Batch:
  """One example: `tokens`, `targets` int32 [n] and `weights` float32 [n], n <= seq_len. See `encode_all`.

  Where the chat template rewrites earlier turns of a conversation, this is the example of the last answer.
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
  """Every example as `encode` gives it, and how many were too long.

  A long example loses the left of its prompt. The response loses only what exceeds `seq_len` by itself. A conversation
  whose earlier turns the chat template rewrites becomes several examples; see `encoding.pieces`.

  Args:
    eos: append the token that ends a text to responses that do not end with one.
    soft: soft tokens to put into each prompt; they are never cut.
  """
  end, ends = tokenizer.eos_id, tokenizer.end_ids
  most = prompts.room(soft, seq_len) + 1
  notes = encoding.Notes()
  encoded, truncated = [], 0
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
  """`tokens`, `targets` and `weights` [n - 1] of a text's ids int32 [n] and their weights as targets, float32 [n].

  Args:
    soft: soft tokens to put into the prompt.
    prompt: number of ids that are the prompt.
    begins: whether the first id is the token that begins a text.
  """
  if soft:
    at = soft.at(prompt, begins)
    ids, weights = np.insert(ids, at, soft.ids), np.insert(weights, at, np.zeros(soft.length, np.float32))
  return {"tokens": ids[:-1], "targets": np.maximum(ids[1:], 0), "weights": weights[1:]}


def _kept(prompt: int, n: int, length: int, first: int) -> np.ndarray:
  """Indices of the tokens that stay when `n` tokens are cut to `length`.

  The first `first` tokens stay, then the right of the `prompt` tokens, then the left of the response.
  """
  if n <= length:
    return np.arange(n)
  room = min(max(length - (n - prompt), 1), prompt)
  first = min(first, room)
  return np.r_[:first, prompt - (room - first) : prompt, prompt : prompt + length - room]


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
) -> iterator.TrainIterator:
  """Batches of a task's examples without end. Each epoch has a new order that depends on the seed alone.

  Args:
    examples: what `task.load` gave; they are encoded once, here.
    batch_size: examples in the global batch; with `pack`, its rows.
    seq_len: longest row. Unpacked batches are padded to the smallest bucket that holds their longest example.
    pack: put as many examples in a row of `seq_len` as fit, first fit.
    share_rows: put the `batch_size` examples in as few rows of `seq_len` as hold them. Loss and gradient equal those of
      the padded batch, with less padding and one shape for nearly all batches.
    eos: learn to end the response. None does so for free text, but not for a task with labels: those are scored by
      their likelihood, and the token after them would be half of the loss. The end that a chat template writes is part
      of an answer, and is always learned.
    process_index, process_count: this process gets its consecutive share of the rows of each global batch. All
      processes must pass the same examples and seed.
    multiple: the number of shared rows in this process is a multiple of it.
    soft: the soft tokens of the model, `prompts.of(params)`.
  """
  share = iterator.rows_of(task, examples, batch_size, seq_len, process_index, process_count)
  formatted = [task.format(e) for e in examples]
  encoded, truncated = encode_all(tokenizer, formatted, seq_len, prompt_loss_weight, learns_end(task, eos), soft)
  if pack and share_rows:
    raise errors.UserError("config.data: pack fills rows, share_rows puts whole batches in them; set one of the two")
  how = {"pack": pack}
  if share_rows:
    n = rows.usual_rows(encoded, batch_size // process_count, seq_len, multiple)
    how = {"fit": functools.partial(rows.compact, rows=n)}
  sizes = dict(batch_size=batch_size, seq_len=seq_len, share=share)
  return iterator.iterate(encoded, truncated, tokenizer, **sizes, seed=seed, **how)


def learns_end(task: tasks.Task, eos: bool | None) -> bool:
  """Whether the token that ends a text is learned; see `train_iterator`."""
  return not task.labels if eos is None else eos


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
  """Batches of prompts to continue, with the task's labels.

  Each batch has `tokens` int32 [B, T], `lengths` and `index` as in `rows.longest_first`, and `labels` and
  `label_lengths` as in `rows.with_labels`. A prompt longer than `seq_len` loses its left. The ids of a label are what
  follows the prompt, see `encoding.questions`.

  Args:
    same_length: pad all batches to one T, the bucket of the longest prompt.
  """
  most = prompts.room(soft, seq_len)
  formatted = [task.format(example) for example in examples]
  asked, firsts, answers = encoding.questions(tokenizer, formatted, task.labels or ())
  encoded = []
  for ids, first in zip(asked, firsts, strict=True):
    kept = np.array(ids, np.int32)[_kept(len(ids), len(ids), most, first)]
    encoded.append({"tokens": prompts.insert(soft, kept, ids[:1] == [tokenizer.bos_id])})
  batches = rows.longest_first(encoded, tokenizer, batch_size, seq_len, same_length)
  return rows.with_labels(batches, answers, rows.padding_id(tokenizer))
