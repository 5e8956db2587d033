"""Continues token ids with a key/value cache: greedily, by sampling, or by beam search (beam.py).

Prompts are run once, right-padded to a bucket. One compiled program then adds tokens. Its shapes depend on the batch
and on the slots of the cache, which are bucketed too; the way tokens are chosen is an input.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from lora_jax import errors, memory
from lora_jax.batches import rows as rows_lib
from lora_jax.inference import beam, sampling as sampling_lib
from lora_jax.model import prompts, transformer

NEVER = (-1,)  # as the tokens that end a text: no model predicts it
MIN_SLOTS = 256  # the smallest cache, so that short prompts of all lengths share one program


@struct.dataclass
class State:
  """A batch of texts under way.

  Fields:
    cache: keys and values, see `transformer.init_cache`.
    logits: float32 [B, V], after the texts.
    ids: int32 [B, S], prompts and continuations.
    start: int32 [B], lengths of the prompts.
    count: int32 [], number of tokens after the prompts.
    done: bool [B], whether a text has ended; the first end id follows it.
  """

  cache: dict
  logits: jax.Array
  ids: jax.Array
  start: jax.Array
  count: jax.Array
  done: jax.Array


def prefill(config, params, tokens: jax.Array, lengths: jax.Array, slots: int) -> tuple[jax.Array, dict]:
  """Logits float32 [B, V] after each prompt's last token, and the cache with `slots` positions.

  Args:
    tokens: prompts int32 [B, T], padded on the right.
    lengths: their lengths int32 [B].
  """
  cache = transformer.init_cache(config, tokens.shape[0], slots, prefix=prompts.prefix_length(params))
  x, cache = transformer.hidden(config, params, tokens, cache=cache, length=lengths.max())
  last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)
  return transformer.logits(config, params, last)[:, 0], cache


@functools.partial(jax.jit, static_argnames=("config", "slots", "start"))
def run_prompts(config, params, tokens: jax.Array, lengths: jax.Array, *, slots: int, start: int | None) -> tuple:
  """Logits float32 [B, V], cache, ids int32 [B, slots] and lengths int32 [B] after prompts as in `prefill`.

  An encoder-decoder encodes the prompts, and its texts begin with the token `start`.
  """
  B, T = tokens.shape
  if config.encoder_layers:
    seen = jnp.arange(T) < lengths[:, None]
    encoded = transformer.encode(config, params, tokens, seen.astype(jnp.int32))
    cache = transformer.init_cache(config, B, slots, T, prompts.prefix_length(params))
    tokens, lengths = jnp.full((B, 1), start, jnp.int32), jnp.ones(B, jnp.int32)
    x, cache = transformer.hidden(config, params, tokens, cache=cache, encoded=encoded, seen=seen)
    logits = transformer.logits(config, params, x)[:, 0]
  else:
    logits, cache = prefill(config, params, tokens, lengths, slots)
  return logits, cache, jnp.zeros((B, slots), jnp.int32).at[:, : tokens.shape[1]].set(tokens), lengths


def _finite(ran: tuple) -> tuple:
  """The result of `run_prompts`; UserError if its logits are NaN, since every token is then as likely as any other."""
  if (wrong := np.asarray(jnp.isnan(ran[0]).any(1))).any():
    raise errors.UserError(
      f"the model gives NaN after prompt {int(wrong.argmax())}: its weights hold NaN or inf, or need another dtype"
    )
  return ran


def append(state: State, sampling: sampling_lib.Sampling | None, end: jax.Array, ngram: int = 0) -> State:
  """The state with one more token. The model has not run that token yet."""
  at = state.start + state.count
  logits = sampling_lib.ban_repeats(state.logits, state.ids, at, ngram)
  token = jnp.where(state.done, end[0], sampling_lib.choose(logits, sampling, state.count))
  return state.replace(
    ids=state.ids.at[jnp.arange(len(at)), at].set(token),
    count=state.count + 1,
    done=state.done | jnp.isin(token, end),
  )


def advance(config, params, state: State, sampling: sampling_lib.Sampling | None, end, limit, ngram: int = 0) -> State:
  """The state after `limit` tokens, or once every text has ended."""

  def step(s):
    s = append(s, sampling, end, ngram)
    at = (s.start + s.count - 1)[:, None]
    token = jnp.take_along_axis(s.ids, at, axis=1)
    x, cache = transformer.hidden(config, params, token, positions=at, cache=s.cache)
    return s.replace(cache=cache, logits=transformer.logits(config, params, x)[:, 0])

  return jax.lax.while_loop(lambda s: (s.count < limit) & ~s.done.all(), step, state)


_advance = jax.jit(advance, static_argnames=("config", "ngram"), donate_argnames="state")


def _begin(logits: jax.Array, cache: dict, ids: jax.Array, lengths: jax.Array) -> State:
  return State(cache, logits, ids, lengths, jnp.int32(0), jnp.zeros(len(ids), bool))


def greedy(
  config, params, cache: dict, logits: jax.Array, lengths: jax.Array, new: int, end: Sequence[int]
) -> jax.Array:
  """The most likely continuations of prompts, int32 [B, new], with `end[0]` after a row's end.

  Args:
    cache, logits: the results of `prefill`; the cache has at least `max(lengths) + new` slots.
    lengths: lengths of the prompts, int32 [B].
    new: how many tokens to add, unless every row ends earlier.
    end: tokens that end a text.
  """
  end = jnp.asarray(end, jnp.int32)
  ids = jnp.zeros((len(lengths), cache["layers"]["k"].shape[2]), jnp.int32)
  state = advance(config, params, _begin(logits, cache, ids, lengths), None, end, new)
  out = jnp.take_along_axis(state.ids, lengths[:, None] + jnp.arange(new), axis=1)
  return jnp.where(jnp.arange(new) < state.count, out, end[0])


def align(tokens: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Prompts padded on the right, int32 [B, T], and their lengths int32 [B].

  Args:
    tokens: prompts [B, T], padded on either side.
    mask: [B, T], True at real tokens.
  """
  tokens, mask = np.asarray(tokens, np.int32), np.asarray(mask, bool)
  real_first = np.argsort(~mask, axis=1, kind="stable")
  return np.take_along_axis(tokens, real_first, axis=1), mask.sum(1, dtype=np.int32)


def _fit(config, tokens, mask, new: int, prefix: int = 0, beams: int = 1) -> tuple[np.ndarray, np.ndarray, int]:
  """Prompts padded on the right to a bucket, their lengths, and the number of slots that they and `new` tokens need.

  Raises:
    UserError: a prompt is empty or too long for the model, or keys and values do not fit on all devices together.
  """
  tokens, lengths = align(tokens, np.ones(np.shape(tokens), bool) if mask is None else mask)
  if lengths.min() < 1:
    raise errors.UserError("a prompt has no tokens")
  longest = int(lengths.max())
  most = config.max_seq_len - prefix if config.position == "learned" else 1 << 30
  need = new + (1 if config.encoder_layers else longest)
  rows = len(tokens) * beams
  memory.check(
    {f"the keys and values of {rows:,} texts of {need:,} tokens": memory.cache(config, rows, need)}, jax.device_count()
  )
  if max(need, longest) > most:
    raise errors.UserError(
      f"a prompt of {longest} tokens and {new} new ones exceed the {most} positions of the model; "
      "shorten the prompt or lower max_new_tokens"
    )
  width = rows_lib.bucket(longest, most)
  tokens = np.pad(tokens[:, :width], [(0, 0), (0, max(0, width - tokens.shape[1]))])
  return tokens, lengths, rows_lib.bucket(max(need, min(MIN_SLOTS, most)), most)


def check(
  max_new_tokens: int = 1,
  temperature: float = 0.0,
  top_k: int = 0,
  top_p: float = 1.0,
  no_repeat_ngram: int = 0,
  beams: int = 1,
  early_stopping: bool | str = False,
) -> None:
  """Raises UserError for settings that are out of range or contradict each other."""
  named = dict(max_new_tokens=max_new_tokens, top_k=top_k, no_repeat_ngram=no_repeat_ngram, beams=beams)
  least = dict(max_new_tokens=1, top_k=0, no_repeat_ngram=0, beams=1)
  wrong = [f"{k}={v} must be at least {least[k]}" for k, v in named.items() if v < least[k]]
  if not 0 <= temperature < float("inf"):
    wrong.append(f"temperature={temperature} must be at least 0")
  if not 0 <= top_p <= 1:
    wrong.append(f"top_p={top_p} must be between 0 and 1")
  if beams > 1 and temperature:
    wrong.append("beam search takes the most likely texts: set temperature=0 or beams=1")
  if early_stopping not in (True, False, "never"):
    wrong.append(f"early_stopping={early_stopping!r} must be True, False or 'never'")
  if wrong:
    raise errors.UserError("; ".join(wrong))


def continuations(
  config: transformer.Config,
  params: dict,
  tokens: np.ndarray,
  mask: np.ndarray | None = None,
  *,
  max_new_tokens: int,
  end: Sequence[int] = NEVER,
  temperature: float = 0.0,
  top_k: int = 0,
  top_p: float = 1.0,
  no_repeat_ngram: int = 0,
  seed: int = 0,
  start: int | None = None,
  every: int | None = None,
  ended: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Iterator[np.ndarray]:
  """Yields all new tokens so far, int32 [B, n], after each `every` tokens and at the end.

  Args:
    tokens, mask: prompts [B, T], padded on either side. The mask is True at real tokens; None means all are real.
    end: tokens that end a text. The first of them fills up a text that has ended.
    temperature, top_k, top_p: see `sampling.Sampling`.
    no_repeat_ngram: an n-gram of this size occurs at most once in prompt and continuation; 0 allows repeats.
    seed: a row's tokens depend on the seed and the row's prompt, not on the other rows.
    start: the first token of an encoder-decoder's text.
    every: None gives the tokens only at the end.
    ended: maps the new tokens to bool [B], further rows to end.
  """
  check(max_new_tokens, temperature, top_k, top_p, no_repeat_ngram)
  params = prompts.bake(params)
  tokens, lengths, slots = _fit(config, tokens, mask, max_new_tokens, prompts.prefix_length(params))
  keys = sampling_lib.keys(seed, [row[:n] for row, n in zip(tokens, lengths, strict=True)])
  sampling = sampling_lib.Sampling(
    np.float32(temperature), np.int32(min(top_k, config.vocab_size)), np.float32(top_p), keys
  )
  end = np.asarray(end, np.int32)
  state = _begin(*_finite(run_prompts(config, params, tokens, lengths, slots=slots, start=start)))
  params = prompts.without(params)
  offsets = np.array(state.start)[:, None]
  every = every or max_new_tokens
  for limit in (*range(every, max_new_tokens, every), max_new_tokens):
    state = _advance(config, params, state, sampling, end, np.int32(limit), ngram=no_repeat_ngram)
    new = np.take_along_axis(np.asarray(state.ids), offsets + np.arange(int(state.count)), axis=1)
    yield new
    if ended is not None:
      state = state.replace(done=state.done | ended(new))
    if state.done.all():
      return


def beam_search(
  config: transformer.Config,
  params: dict,
  tokens: np.ndarray,
  mask: np.ndarray | None = None,
  *,
  beams: int,
  max_new_tokens: int,
  end: Sequence[int] = NEVER,
  start: int | None = None,
  **how: Any,
) -> tuple[np.ndarray, np.ndarray]:
  """The `beams` best continuations of each prompt, int32 [B, beams, n], and their scores float32 [B, beams].

  Args:
    tokens, mask, end, start: as in `continuations`.
    **how: `length_penalty`, `no_repeat_ngram` and `early_stopping`, see `beam.search`.
  """
  rest = {k: how[k] for k in ("no_repeat_ngram", "early_stopping") if k in how}
  check(max_new_tokens, beams=beams, **rest)
  params = prompts.bake(params)
  tokens, lengths, slots = _fit(config, tokens, mask, max_new_tokens, prompts.prefix_length(params), beams)
  logits, cache, ids, lengths = _finite(run_prompts(config, params, tokens, lengths, slots=slots, start=start))
  how |= dict(beams=beams, max_new_tokens=max_new_tokens, end=end)
  return beam.search(config, prompts.without(params), cache, logits, ids, lengths, **how)
