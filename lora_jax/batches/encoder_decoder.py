"""Texts to batches for an encoder-decoder: the prompt is encoded, and the response is what the decoder writes.

A training batch is a dict of numpy arrays:

  inputs          int32 [B, S]    the prompt as the tokenizer's post-processor frames it, such as a </s>
  input_segments  int32 [B, S]    1, and 0 at padding
  tokens          int32 [B, T]    the decoder's input: its start token, then the response
  targets         int32 [B, T]    the response, then the token that ends it where that is learned
  weights         float32 [B, T]  1, and 0 at padding
  positions, segment_ids          as in batches/causal.py

Prompts are not predicted, so that no `prompt_loss_weight` applies.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from lora_jax import errors, tasks
from lora_jax.batches import causal, classification, encoding
from lora_jax.model import prompts
from lora_jax.values import Count

LEAST = 8  # tokens that responses are padded to: those of a classification are few


def texts(tokenizer: Any, formatted: tasks.Formatted | tasks.Chat, response: str | None = None) -> tuple[str, str]:
  """What is encoded and what is written, the response or another in its place.

  Of a conversation the last message is the response, the others are the prompt.
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
) -> tuple[list[causal.Batch], int]:
  """All examples as rows of a batch without their padding, and how many prompts and responses were too long.

  Both lose their end, the prompt as with `truncation=True` in transformers: what frames it stays. With `eos` the token
  that ends a text follows a response that has none at its end. `soft` tokens are put into the prompt.
  """
  asked, responses = zip(*(texts(tokenizer, f) for f in formatted), strict=True)
  sources, truncated = classification.encode(tokenizer, [(p,) for p in asked], seq_len, soft)
  encoded, end, ends, notes = [], tokenizer.eos_id, tokenizer.end_ids, encoding.Notes()
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
) -> causal.TrainIterator:
  """Batches for ever; order, shares and state as in `data.train_iterator`.

  Args:
    start: the token that the decoder begins with.
    seq_len, target_len: the longest prompt and response, each padded to buckets of its own; None is `seq_len`.
    pack, share_rows: False; UserError otherwise.
    eos: learn to end the response; None: where it is free text, as in `data.train_iterator`. T5's paper (Raffel et al.
      2020, https://arxiv.org/abs/1910.10683) learns it after labels too: True.
  """
  for k in (k for k, v in {"pack": pack, "share_rows": share_rows}.items() if v):
    raise errors.UserError(f"config.data.{k}=True: the texts of an encoder-decoder are not packed; set it to False")
  target_len = seq_len if target_len is None else target_len
  if target_len < 1:
    raise errors.UserError(f"config.data.target_len={target_len} must be at least 1")
  share = causal.rows_of(task, examples, batch_size, seq_len, process_index, process_count)
  formatted = [task.format(example) for example in examples]
  encoded, truncated = encode_all(tokenizer, formatted, seq_len, target_len, start, causal.learns_end(task, eos), soft)
  fit = functools.partial(_fit, target_len=target_len)
  return causal.iterate(encoded, truncated, tokenizer, batch_size, seq_len, share, seed, fit=fit)


def _fit(examples: Sequence[causal.Batch], share: slice, seq_len: int, pad_id: int, target_len: int) -> causal.Batch:
  """`data.fit` of the prompts and of the responses."""
  sources = causal.fit([{"tokens": e["inputs"]} for e in examples], share, seq_len, pad_id)
  responses = [{k: v for k, v in e.items() if k != "inputs"} for e in examples]
  batch = causal.fit(responses, share, target_len, pad_id, LEAST)
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
) -> list[causal.Batch]:
  """Prompts to encode, framed and cut as in training, and labels, which are texts of their own.

  Otherwise as in `data.eval_batches`.
  """
  formatted, labels = [task.format(example) for example in examples], task.labels or ()
  asked = [(encoding.prompt(tokenizer, f),) for f in formatted]
  written = iter(tokenizer.encode_batch([texts(tokenizer, f, label)[1] for f in formatted for label in labels]))
  answer = functools.partial(encoding.without_end, tokenizer)
  ends = tokenizer.end_ids
  answers = [[answer(next(written), ends if isinstance(f, tasks.Chat) else ()) for _ in labels] for f in formatted]
  rows = [{"tokens": e["tokens"]} for e in classification.encode(tokenizer, asked, seq_len, soft)[0]]
  batches = causal.longest_first(rows, tokenizer, batch_size, seq_len, same_length)
  return causal.with_labels(batches, answers, causal.padding_id(tokenizer))
