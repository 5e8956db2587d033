"""Generates text: `generate` continues a batch of prompts, `stream` one prompt, piece by piece as it is written."""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np

from lora_jax import errors, models, tokenizer as tokenizer_lib
from lora_jax.inference import decode
from lora_jax.model import prompts as prompts_lib

STOP_EVERY = 8  # tokens between searches for stop strings


def until_end(ids: np.ndarray, ends: Collection[int]) -> list[int]:
  """The tokens before the first one that ends the text."""
  ids = list(map(int, ids))
  return ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids))]


def start_id(model: models.Model) -> int | None:
  """The first token of an encoder-decoder's text, from generation_config.json or config.json; None for other models."""
  if not model.config.encoder_layers:
    return None
  names = ("decoder_start_token_id", "bos_token_id", "pad_token_id")
  known = [t[k] for k in names for t in (model.generation, model.hf_config) if t.get(k) is not None]
  if not known:
    raise errors.UserError(
      f"config.json of {model.name} must say what begins a text: it has none of {', '.join(names)}"
    )
  start = int(known[0])
  if start >= (rows := model.config.vocab_size):
    raise errors.UserError(f"{model.name} begins a text with token {start}, but the embedding has {rows} rows")
  return start


def complete(tokenizer: tokenizer_lib.Tokenizer, ids: Sequence[int]) -> str:
  """The text of ids, without an incomplete character at its end. With more ids the text only grows."""
  for n in range(len(ids), max(len(ids) - 4, -1), -1):
    if not (text := tokenizer.decode(ids[:n])).endswith("\ufffd"):
      return text
  text = tokenizer.decode(ids)
  return text[:-3] + text[-3:].rstrip("\ufffd")


def before(text: str, stop: Sequence[str]) -> tuple[str, bool]:
  """The text before the stop string that ends first, and whether there is one."""
  found = [(i + len(s), i) for s in stop if (i := text.find(s)) >= 0]
  return (text[: min(found)[1]], True) if found else (text, False)


def _held(text: str, stop: Sequence[str]) -> int:
  """The number of characters at the end that may begin a stop string."""
  return max((n for s in stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)


def _batch(model: models.Model, params: dict, prompts: Sequence[str | Sequence[int]], stop: Sequence[str]) -> dict:
  """The arguments `tokens` (soft ones included), `mask`, `end` and `start` of `decode.continuations`."""
  if model.tokenizer is None:
    raise errors.UserError(f"{model.name} has no tokenizer")
  if model.config.head != "lm" or not model.config.causal:
    raise errors.UserError(f"{model.name} cannot write text: it has the head {model.config.head!r}")
  if isinstance(stop, str) or not all(stop):
    raise errors.UserError(f"stop={stop!r} must be a sequence of strings that are not empty")
  tok = model.tokenizer
  first = tok.bos_id if tok.bos_id is not None else tok.eos_id
  # The tokens that end a text are for an encoder only: a decoder continues the text.
  begin = tok.begin

  def ids(text):
    return tok.encode(text, True) if model.config.encoder_layers else [*begin, *tok.encode(text)]

  rows = [ids(p) if isinstance(p, str) else np.asarray(p).tolist() for p in prompts]
  rows = [row or ([] if first is None else [first]) for row in rows]
  vocabulary = range(model.config.vocab_size)
  for i, row in enumerate(rows):
    if wrong := [t for t in row if t not in vocabulary]:
      raise errors.UserError(f"prompt {i}: {wrong[0]!r} is not a token of {model.name}, which has {len(vocabulary)}")
  rows = [prompts_lib.insert(prompts_lib.of(params), row, row[:1] == [tok.bos_id]) for row in rows]
  mask = np.arange(max(map(len, rows))) < np.array([len(row) for row in rows])[:, None]
  tokens = np.zeros(mask.shape, np.int32)
  tokens[mask] = np.concatenate(rows)
  return dict(tokens=tokens, mask=mask, end=tok.end_ids or decode.NEVER, start=start_id(model))


def generate(
  model: models.Model,
  prompts: Sequence[str | Sequence[int]],
  *,
  max_new_tokens: int = 32,
  temperature: float = 0.0,
  top_k: int = 0,
  top_p: float = 1.0,
  beams: int = 1,
  length_penalty: float = 1.0,
  no_repeat_ngram: int = 0,
  early_stopping: bool | str = False,
  stop: Sequence[str] = (),
  seed: int = 0,
  params: dict | None = None,
) -> list[str]:
  """The continuation of each prompt, without special tokens. All prompts run as one batch.

  Args:
    prompts: texts, or ids that are taken as they are, such as the ids of a chat.
    temperature, top_k, top_p, no_repeat_ngram, seed: as in `decode.continuations`; greedy by default.
    beams, length_penalty, early_stopping: as in `beam.search`, if `beams` is more than one.
    stop: a text ends before the first of these strings.
    params: parameters to use in place of the model's own, such as parameters with an adapter.
  """
  if isinstance(prompts, str) or not all(isinstance(p, str) or np.ndim(p) == 1 for p in prompts):
    raise errors.UserError(f"prompts must be a sequence of texts or of lists of token ids, not {prompts!r:.80}")
  if not len(prompts):
    return []
  decode.check(max_new_tokens, temperature, top_k, top_p, no_repeat_ngram, beams, early_stopping)
  params = model.params if params is None else params
  tok = model.tokenizer
  batch = _batch(model, params, prompts, stop)
  batch |= dict(max_new_tokens=max_new_tokens, no_repeat_ngram=no_repeat_ngram)

  def texts(rows):
    return [before(complete(tok, until_end(row, batch["end"])), stop) for row in rows]

  if beams > 1:
    how = dict(beams=beams, length_penalty=length_penalty, early_stopping=early_stopping)
    rows = decode.beam_search(model.config, params, **batch, **how)[0][:, 0]
  else:
    how = dict(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    if stop:
      how |= dict(every=STOP_EVERY, ended=lambda rows: np.array([hit for _, hit in texts(rows)]))
    *_, rows = decode.continuations(model.config, params, **batch, **how)
  return [text for text, _ in texts(rows)]


def stream(
  model: models.Model,
  prompt: str | Sequence[int],
  *,
  max_new_tokens: int = 32,
  stop: Sequence[str] = (),
  params: dict | None = None,
  progress: Callable[[int], None] = lambda n: None,
  **how: Any,
) -> Iterator[str]:
  """Yields the text that `generate` gives for one prompt, in pieces as it is written.

  A piece ends with a whole character and with nothing that may begin a stop string.

  Args:
    progress: called after each token with the number of tokens so far.
    **how: `temperature`, `top_k`, `top_p`, `no_repeat_ngram`, `seed`.
  """
  params = model.params if params is None else params
  batch = _batch(model, params, [prompt], stop)
  given = text = ""
  for rows in decode.continuations(model.config, params, **batch, max_new_tokens=max_new_tokens, every=1, **how):
    progress(rows.shape[1])
    text, stopped = before(complete(model.tokenizer, until_end(rows[0], batch["end"])), stop)
    known = text if stopped else text[: len(text) - _held(text, stop)]
    if len(known) > len(given) and known.startswith(given):
      yield known[len(given) :]
      given = known
    if stopped:
      return
  if text.startswith(given) and text != given:
    yield text[len(given) :]
