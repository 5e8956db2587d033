"""Greedy generation with a key/value cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import models, tokenizer as tokenizer_lib, transformer


def prefill(config, params, tokens: jax.Array, lengths: jax.Array, slots: int) -> tuple[jax.Array, dict]:
  """Runs prompts [B, T], right-padded, of `lengths` [B].

  Returns:
    (float32 logits [B, V] after each prompt's last token, cache of `slots` positions).
  """
  cache = transformer.init_cache(config, tokens.shape[0], slots)
  x, cache = transformer.hidden(config, params, tokens, cache=cache)
  last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)
  return transformer.logits(params, last)[:, 0], cache


def greedy(config, params, cache: dict, logits: jax.Array, lengths: jax.Array, new: int, eos: int) -> jax.Array:
  """Continues prompts by the most likely token, `new` times or until every row has ended.

  Args:
    cache, logits: of `prefill`, whose cache has at least `max(lengths) + new` slots.

  Returns:
    int32 [B, new]; `eos` from a row's end on.
  """
  B = logits.shape[0]

  def step(carry):
    i, logits, cache, done, out = carry
    token = jnp.where(done, eos, logits.argmax(-1)).astype(jnp.int32)
    out = out.at[:, i].set(token)
    x, cache = transformer.hidden(config, params, token[:, None], positions=(lengths + i)[:, None], cache=cache)
    return i + 1, transformer.logits(params, x)[:, 0], cache, done | (token == eos), out

  start = (0, logits, cache, jnp.zeros(B, bool), jnp.full((B, new), eos, jnp.int32))
  return jax.lax.while_loop(lambda c: (c[0] < new) & ~c[3].all(), step, start)[-1]


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def _generate(config, params, tokens, lengths, new, eos):
  logits, cache = prefill(config, params, tokens, lengths, tokens.shape[1] + new)
  return greedy(config, params, cache, logits, lengths, new, eos)


def until_eos(ids: np.ndarray, eos: int) -> list[int]:
  """The tokens before the first `eos`."""
  ids = list(map(int, ids))
  return ids[: ids.index(eos)] if eos in ids else ids


def end_id(tokenizer: tokenizer_lib.Tokenizer) -> int:
  """The token that ends a text; -1, which no model predicts, where there is none."""
  return -1 if tokenizer.eos_id is None else tokenizer.eos_id


def generate(model: models.Model, prompts: list[str], max_new_tokens: int = 32) -> list[str]:
  """The greedy continuation of each prompt, without special tokens; all run as one batch."""
  tok = model.tokenizer
  ids = [tok.encode(p, add_special_tokens=True) for p in prompts]
  lengths = np.array([len(i) for i in ids], np.int32)
  tokens = np.zeros((len(ids), lengths.max()), np.int32)
  for row, i in zip(tokens, ids, strict=True):
    row[: len(i)] = i
  end = end_id(tok)
  out = _generate(model.config, model.params, tokens, lengths, max_new_tokens, end)
  return [tok.decode(until_eos(row, end)) for row in np.asarray(out)]
