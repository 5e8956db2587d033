"""Texts to batches for an encoder-decoder: the encoder reads the prompt, and the decoder writes the response.

A training batch is a dict of numpy arrays:

  inputs          int32 [B, S]    the prompt as the tokenizer's post-processor frames it, such as a </s>
  input_segments  int32 [B, S]    1, and 0 at padding
  tokens          int32 [B, T]    the decoder's input: its start token, then the response
  targets         int32 [B, T]    the response, then the token that ends it if that is learned
  weights         float32 [B, T]  1, and 0 at padding
  positions, segment_ids          as in batches/rows.py

Prompts are not predicted, so `prompt_loss_weight` does not apply.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from lora_jax import errors, tasks
from lora_jax.batches import causal, classification, encoding, iterator, rows
from lora_jax.model import prompts
from lora_jax.values import Count

LEAST = 8  # the smallest bucket of responses: labels have few tokens


def texts(tokenizer: Any, formatted: tasks.Formatted | tasks.Chat, response: str | None = None) -> tuple[str, str]:
  """The text that the encoder reads and the text that the decoder writes: the example's own response, or `response`.

  In a conversation the last message is the response, and the others are the prompt.
  """
  asked, whole = encoding.prompt(tokenizer, formatted), encoding.answered(tokenizer, formatted, response)
  return asked, whole[encoding.common(asked, whole) :]


def encode_all(
  tokenizer: Any,
  formatted: Sequence[tasks.Formatted | tasks.Chat],
  seq_len: int,
  target_len: int,
  start: int,
  eos: bool = True,
  soft: prompts.Soft | None = None,
) -> tuple[list[rows.Batch], int]:
  """All examples as rows of a batch without padding, and how many prompts and responses were too long.

  Both lose their end. The prompt keeps its special tokens, as with `truncation=True` in transformers.

  Args:
    start: the token that the decoder begins with.
    eos: append the token that ends a text to responses that do not end with one.
    soft: soft tokens to put into each prompt.
  """
  asked, responses = zip(*(texts(tokenizer, f) for f in formatted), strict=True)
  sources, truncated = classification.encode(tokenizer, [(p,) for p in asked], seq_len, soft)
  end, ends = tokenizer.eos_id, tokenizer.end_ids
  notes = encoding.Notes()
  encoded = []
  for f, source, ids in zip(formatted, sources, tokenizer.encode_batch(responses), strict=True):
    if not f.weight:
      raise errors.UserError("an encoder-decoder learns the last message of a conversation alone, and one has weight 0")
    if isinstance(f, tasks.Chat):
      encoding.note_unread(tokenizer, f, notes)
      ids = ids[: encoding.turn_end(tokenizer, ids, ends)]
    if eos and end is not None and (not ids or ids[-1] not in ends):
      ids = [*ids, end]
    truncated += len(ids) > target_len
    targets = np.array(ids[:target_len], np.int32)
    tokens = np.array([start, *targets[:-1]], np.int32)[: len(targets)]
    weights = np.full(len(targets), f.weight, np.float32)
    encoded.append({"inputs": source["tokens"], "tokens": tokens, "targets": targets, "weights": weights})
  notes.say()
  return encoded, truncated


def train_iterator(
  task: tasks.Task,
  examples: Sequence[dict],
  tokenizer: Any,
  *,
  start: int,
  batch_size: Count,
  seq_len: Count,
  target_len: Count | None = None,
  pack: bool = False,
  share_rows: bool = False,
  eos: bool | None = None,
  seed: int = 0,
  process_index: int = 0,
  process_count: int = 1,
  soft: prompts.Soft | None = None,
) -> iterator.TrainIterator:
  """Batches without end. Order, shares and state are as in `causal.train_iterator`.

  Args:
    start: the token that the decoder begins with.
    seq_len, target_len: the longest prompt and response, each padded to its own buckets. A `target_len` of None is
      `seq_len`.
    pack, share_rows: must be False.
    eos: learn to end the response. None does so for free text, as in `causal.train_iterator`. True does so after labels
      too, as in T5's paper (Raffel et al. 2020, https://arxiv.org/abs/1910.10683).
  """
  for k in (k for k, v in {"pack": pack, "share_rows": share_rows}.items() if v):
    raise errors.UserError(f"config.data.{k}=True: the texts of an encoder-decoder are not packed; set it to False")
  target_len = seq_len if target_len is None else target_len
  if target_len < 1:
    raise errors.UserError(f"config.data.target_len={target_len} must be at least 1")
  share = iterator.rows_of(task, examples, batch_size, seq_len, process_index, process_count)
  formatted = [task.format(example) for example in examples]
  encoded, truncated = encode_all(tokenizer, formatted, seq_len, target_len, start, causal.learns_end(task, eos), soft)
  fit = functools.partial(_fit, target_len=target_len)
  sizes = dict(batch_size=batch_size, seq_len=seq_len, share=share)
  return iterator.iterate(encoded, truncated, tokenizer, **sizes, seed=seed, fit=fit)


def _fit(examples: Sequence[rows.Batch], share: slice, seq_len: int, pad_id: int, target_len: int) -> rows.Batch:
  """`rows.fit` of the prompts and of the responses."""
  sources = rows.fit([{"tokens": e["inputs"]} for e in examples], share, seq_len, pad_id)
  responses = [{k: v for k, v in e.items() if k != "inputs"} for e in examples]
  batch = rows.fit(responses, share, target_len, pad_id, LEAST)
  return batch | {"inputs": sources["tokens"], "input_segments": sources["segment_ids"]}


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
  """Batches as of `causal.eval_batches`, of prompts that are framed and cut as in training.

  Labels are encoded apart from the prompts.
  """
  formatted = [task.format(example) for example in examples]
  labels = task.labels or ()
  asked = [(encoding.prompt(tokenizer, f),) for f in formatted]
  written = iter(tokenizer.encode_batch([texts(tokenizer, f, label)[1] for f in formatted for label in labels]))
  answer = functools.partial(encoding.without_end, tokenizer)
  ends = tokenizer.end_ids
  answers = [[answer(next(written), ends if isinstance(f, tasks.Chat) else ()) for _ in labels] for f in formatted]
  encoded = [{"tokens": e["tokens"]} for e in classification.encode(tokenizer, asked, seq_len, soft)[0]]
  batches = rows.longest_first(encoded, tokenizer, batch_size, seq_len, same_length)
  return rows.with_labels(batches, answers, rows.padding_id(tokenizer))
