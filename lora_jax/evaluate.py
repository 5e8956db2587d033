"""Scores of a model on a task: label log-likelihoods and greedy generation, from one pass over each prompt."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import data, generate, transformer

Place = Callable[[dict], dict]


@functools.partial(jax.jit, static_argnums=(0, 6, 7))
def score(config, params, tokens, lengths, labels, label_lengths, new: int, eos: int) -> tuple[jax.Array, jax.Array]:
  """Log-likelihood of every label after every prompt, and the greedy continuation.

  Args:
    tokens, lengths: prompts int32 [B, T], right-padded, and [B].
    labels, label_lengths: token ids int32 [C, U] of the answers to compare, right-padded, and [C]; C may be 0.
    new: how many tokens to generate.

  Returns:
    (float32 [B, C] sums over each label's tokens, int32 [B, new]).
  """
  (B, T), (C, U) = tokens.shape, labels.shape
  logits, cache = generate.prefill(config, params, tokens, lengths, T + max(new, U))
  first = jax.nn.log_softmax(logits)[:, labels[:, 0]]

  def rest(label):
    """Log-likelihoods [B, U - 1] of a label's later tokens, which are run over the prompt's cache."""
    ids = jnp.broadcast_to(label[:-1], (B, U - 1))
    x, _ = transformer.hidden(config, params, ids, positions=lengths[:, None] + jnp.arange(U - 1), cache=cache)
    return jnp.take_along_axis(
      jax.nn.log_softmax(transformer.logits(params, x)),
      jnp.broadcast_to(label[1:], (B, U - 1))[..., None],
      axis=-1,
    )[..., 0]

  total = first
  if U > 1 and C:
    later = jnp.stack([rest(label) for label in labels], axis=1)
    total += (later * (jnp.arange(1, U) < label_lengths[:, None])).sum(-1)
  return total, generate.greedy(config, params, cache, logits, lengths, new, eos)


def run(
  config: transformer.Config,
  params: Any,
  tokenizer: Any,
  task: Any,
  examples: Sequence[dict],
  *,
  batch_size: int = 32,
  seq_len: int = 256,
  max_new_tokens: int | None = None,
  place: Place = lambda batch: batch,
  progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, float]:
  """Metrics of a task over `examples`.

  `accuracy` (tasks with labels): how often the right label has the highest log-likelihood, summed over its tokens.
  Others are means of what `task.score` gives for the generated text, such as `exact_match`.

  Args:
    max_new_tokens: length of generations; by default two more than the longest label, or 64 without labels.
    place: puts a batch's arrays on the mesh.
    progress: called with (examples done, all).
  """
  config = dataclasses.replace(config, scan=True)  # each prompt length compiles anew: fast compiling is worth more
  labels, label_lengths = data.label_ids(task, tokenizer)
  new = max_new_tokens or (int(label_lengths.max()) + 2 if len(labels) else 64)
  end, sums, counts, done = generate.end_id(tokenizer), {}, {}, 0
  for batch in data.eval_batches(task, examples, tokenizer, batch_size=batch_size, seq_len=seq_len):
    inputs = place({k: batch[k] for k in ("tokens", "lengths")})
    outputs = score(config, params, inputs["tokens"], inputs["lengths"], labels, label_lengths, new, end)
    for ll, out, index in zip(*map(np.asarray, outputs), batch["index"], strict=True):
      if index < 0:
        continue
      example = examples[int(index)]
      values = dict(task.score(example, tokenizer.decode(generate.until_eos(out, end))))
      if len(labels) and (right := task.label_index(example)) >= 0:
        values["accuracy"] = float(ll.argmax() == right)
      for k, v in values.items():
        sums[k], counts[k] = sums.get(k, 0.0) + v, counts.get(k, 0) + 1
      done += 1
    progress(done, len(examples))
  return {k: sums[k] / counts[k] for k in sorted(sums)}
