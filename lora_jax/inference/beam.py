"""Beam search with a key/value cache.

Letters are as in model/transformer.py; W is the number of beams and C the number of candidates in a step. Hypotheses,
scores and the rules for stopping equal those of `transformers`.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from lora_jax.inference import sampling
from lora_jax.model import transformer

NEVER = -1e9  # the score of a hypothesis that does not exist


@struct.dataclass
class Beams:
  """A beam search under way.

  Fields:
    cache: keys and values of B * W rows.
    logits: float32 [B, W, V], after the texts that go on.
    ids: int32 [B, W, S], the texts that go on.
    scores: float32 [B, W], the sums of their log-probabilities.
    parent: int32 [B, W], the row of the cache, among its W, that each of them continues.
    best_ids: int32 [B, W, S], the texts that have ended, best first.
    best_scores: float32 [B, W], their scores with length penalty.
    best_new: int32 [B, W], the number of their tokens after the prompt; 0 while there is no such text.
    start: int32 [B], lengths of the prompts.
    count: int32 [], number of tokens after the prompts.
    open: bool [B], whether a text that goes on may still beat one that has ended.
  """

  cache: dict
  logits: jax.Array
  ids: jax.Array
  scores: jax.Array
  parent: jax.Array
  best_ids: jax.Array
  best_scores: jax.Array
  best_new: jax.Array
  start: jax.Array
  count: jax.Array
  open: jax.Array


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
  """Rows `index` int [B, W] of `x` [B, C, ...]."""
  return jnp.take_along_axis(x, index.reshape(index.shape + (1,) * (x.ndim - 2)), axis=1)


def _extend(s: Beams, end, limit, length_penalty, ngram, early) -> Beams:
  """The search one token later. The model has not run that token yet."""
  B, W, V = s.logits.shape
  S = s.ids.shape[2]
  at = jnp.broadcast_to(s.start[:, None], (B, W)) + s.count
  allowed = sampling.ban_repeats(
    jax.nn.log_softmax(s.logits).reshape(B * W, V), s.ids.reshape(B * W, S), at.reshape(-1), ngram
  ).reshape(B, W, V)
  # Enough candidates for W to go on even if the best ones all end.
  C = max(2, 1 + len(end)) * W
  scores, index = jax.lax.top_k((allowed + s.scores[..., None]).reshape(B, W * V), C)
  parent, token = index // V, (index % V).astype(jnp.int32)
  at = jnp.broadcast_to(at[:, :1], (B, C))
  ids = _take(s.ids, parent).at[jnp.arange(B)[:, None], jnp.arange(C), at].set(token)
  count = s.count + 1
  ended = jnp.isin(token, end) | (count == limit)

  kept_scores, kept = jax.lax.top_k(jnp.where(ended, NEVER, scores), W)

  have_all = (s.best_new > 0).all(-1)
  accepts = s.open & ~have_all if early is True else s.open
  new = ended & (jnp.arange(C) < W) & accepts[:, None]
  final = jnp.where(new, scores / count.astype(jnp.float32) ** length_penalty, NEVER)
  join = lambda a, b: jnp.concatenate([a, b], axis=1)
  best_scores, best = jax.lax.top_k(join(s.best_scores, final), W)
  best_new = _take(join(s.best_new, jnp.where(new, count, 0)), best)

  # The score of the best text that goes on if it ended now, or at the limit if length is rewarded.
  length = jnp.where(length_penalty > 0, limit, count) if early == "never" else count
  hope = kept_scores[:, 0] / length.astype(jnp.float32) ** length_penalty
  worst = jnp.where((best_new > 0).all(-1), best_scores[:, -1], NEVER)
  return s.replace(
    ids=_take(ids, kept),
    scores=kept_scores,
    parent=_take(parent, kept),
    best_ids=_take(join(s.best_ids, ids), best),
    best_scores=best_scores,
    best_new=best_new,
    count=count,
    open=s.open & (hope > worst),
  )


def _forward(config, params, s: Beams) -> Beams:
  """The search after the model has run the last tokens on the cache, reordered by parents."""
  B, W, S = s.ids.shape
  rows = (jnp.arange(B)[:, None] * W + s.parent).reshape(-1)
  # The beams of a row share its source, so the keys and values of cross-attention need no reordering.
  reordered = {k: x if k.startswith("cross") else x[:, rows] for k, x in s.cache["layers"].items()}
  at = jnp.repeat(s.start + s.count - 1, W)[:, None]
  token = jnp.take_along_axis(s.ids.reshape(B * W, S), at, axis=1)
  x, cache = transformer.hidden(config, params, token, positions=at, cache=s.cache | {"layers": reordered})
  return s.replace(cache=cache, logits=transformer.logits(config, params, x).reshape(B, W, -1))


@functools.partial(jax.jit, static_argnames=("config", "beams", "ngram", "early"))
def search_rows(config, params, cache, logits, ids, lengths, *, end, limit, length_penalty, beams, ngram, early):
  """`search` as one compiled program: (ids int32 [B, W, S], new tokens int32 [B, W], scores float32 [B, W])."""
  B, W = len(ids), beams
  every = jnp.repeat(ids[:, None], W, axis=1)
  start = Beams(
    cache={k: jax.tree.map(lambda x: jnp.repeat(x, W, axis=int(k == "layers")), v) for k, v in cache.items()},
    logits=jnp.repeat(logits[:, None], W, axis=1),
    ids=every,
    scores=jnp.full((B, W), NEVER).at[:, 0].set(0.0),  # all rows are the same text, so only one counts
    parent=jnp.zeros((B, W), jnp.int32),
    best_ids=every,
    best_scores=jnp.full((B, W), NEVER),
    best_new=jnp.zeros((B, W), jnp.int32),
    start=lengths,
    count=jnp.int32(0),
    open=jnp.ones(B, bool),
  )
  extend = functools.partial(_extend, end=end, limit=limit, length_penalty=length_penalty, ngram=ngram, early=early)

  def more(s):
    complete = (s.best_new > 0).all() if early is True else False
    return (s.count < limit) & s.open.any() & ~jnp.asarray(complete)

  s = jax.lax.while_loop(more, lambda s: _forward(config, params, extend(s)), start)
  return s.best_ids, s.best_new, s.best_scores


def search(
  config: transformer.Config,
  params: dict,
  cache: dict,
  logits: jax.Array,
  ids: jax.Array,
  lengths: jax.Array,
  *,
  beams: int,
  max_new_tokens: int,
  end: Sequence[int],
  length_penalty: float = 1.0,
  no_repeat_ngram: int = 0,
  early_stopping: bool | str = False,
) -> tuple[np.ndarray, np.ndarray]:
  """The `beams` best continuations of prompts that have been run.

  Args:
    cache: keys and values of the prompts, with S slots, at least `max(lengths) + max_new_tokens`.
    logits: float32 [B, V] after the prompts.
    ids, lengths: the prompts int32 [B, S] and their lengths int32 [B].
    end: tokens that end a text.
    length_penalty: the sum of log-probabilities is divided by the number of new tokens to this power.
    no_repeat_ngram: an n-gram of this size occurs at most once in prompt and continuation; 0 allows repeats.
    early_stopping: True stops once `beams` texts have ended; False once no text that goes on would score more if it
      ended now; "never" once no text that goes on can ever score more.

  Returns:
    ids int32 [B, beams, n], filled up with `end[0]`, and scores float32 [B, beams]; best first. n is the length of the
    longest continuation.
  """
  end = jnp.asarray(end, jnp.int32)
  how = dict(
    end=end,
    limit=jnp.int32(max_new_tokens),
    length_penalty=jnp.float32(length_penalty),
    beams=beams,
    ngram=no_repeat_ngram,
    early=early_stopping,
  )
  ids, new, scores = map(np.asarray, search_rows(config, params, cache, logits, ids, lengths, **how))
  at = np.arange(new.max())
  out = np.take_along_axis(ids, np.asarray(lengths)[:, None, None] + at, axis=2)
  return np.where(at < new[..., None], out, np.asarray(end)[0]), scores
