"""Beam search with a key/value cache.

Letters are those of model/transformer.py; W is the number of beams, and C that of candidates a step. Hypotheses,
scores and the rules of stopping are those of `transformers`.
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
    cache: of W rows for each of B.
    logits: float32 [B, W, V] after the texts that go on.
    ids, scores: int32 [B, W, S] and float32 [B, W], texts that go on, and the sums of their log-probabilities.
    parent: int32 [B, W], the row of the cache, within its W, that each of them continues.
    best_ids, best_scores, best_new: texts that have ended, best first, their scores with length penalty, and how many
      tokens they have after the prompt; 0 where there is none yet.
    start: int32 [B], lengths of the prompts.
    count: int32 [], tokens after the prompts.
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
  """Rows `index` [B, W] of `x` [B, C, ...]."""
  return jnp.take_along_axis(x, index.reshape(index.shape + (1,) * (x.ndim - 2)), axis=1)


def _extend(s: Beams, end, limit, length_penalty, ngram, early) -> Beams:
  """The search one token later; the model has not run it yet."""
  (B, W, V), S = s.logits.shape, s.ids.shape[2]
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

  # What the best text that goes on would score if it ended now, or at the limit where length is rewarded.
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
  """Reorders the cache by parents and runs the last tokens."""
  B, W, S = s.ids.shape
  rows = (jnp.arange(B)[:, None] * W + s.parent).reshape(-1)
  # The beams of a row share its source, so that what is attended to across needs no reordering.
  reordered = {k: x if k.startswith("cross") else x[:, rows] for k, x in s.cache["layers"].items()}
  at = jnp.repeat(s.start + s.count - 1, W)[:, None]
  token = jnp.take_along_axis(s.ids.reshape(B * W, S), at, axis=1)
  x, cache = transformer.hidden(config, params, token, positions=at, cache=s.cache | {"layers": reordered})
  return s.replace(cache=cache, logits=transformer.logits(config, params, x).reshape(B, W, -1))


@functools.partial(jax.jit, static_argnames=("config", "beams", "ngram", "early"))
def _search(config, params, cache, logits, ids, lengths, end, limit, length_penalty, *, beams, ngram, early):
  B, W = len(ids), beams
  every = jnp.repeat(ids[:, None], W, axis=1)
  start = Beams(
    cache={k: jax.tree.map(lambda x: jnp.repeat(x, W, axis=int(k == "layers")), v) for k, v in cache.items()},
    logits=jnp.repeat(logits[:, None], W, axis=1),
    ids=every,
    scores=jnp.full((B, W), NEVER).at[:, 0].set(0.0),  # all are the same text: only one counts
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
    cache, logits: after the prompts `ids` int32 [B, S] of `lengths` [B]; the cache has S slots, at least
      `max(lengths) + max_new_tokens`.
    end: tokens that end a text.
    length_penalty: the score is the sum of log-probabilities by the number of new tokens to this power.
    no_repeat_ngram: no n-gram of this size occurs twice in prompt and continuation; 0 allows all.
    early_stopping: True stops when `beams` texts have ended; False when none that goes on would score more if it
      ended now; "never" when none can score more at all.

  Returns:
    (int32 [B, beams, n], filled up with `end[0]`; float32 scores [B, beams]), best first; n is that of the longest.
  """
  end = jnp.asarray(end, jnp.int32)
  limits = jnp.int32(max_new_tokens), jnp.float32(length_penalty)
  how = dict(beams=beams, ngram=no_repeat_ngram, early=early_stopping)
  ids, new, scores = map(np.asarray, _search(config, params, cache, logits, ids, lengths, end, *limits, **how))
  at = np.arange(new.max())
  out = np.take_along_axis(ids, np.asarray(lengths)[:, None, None] + at, axis=2)
  return np.where(at < new[..., None], out, np.asarray(end)[0]), scores
