"""Scores of models on a task: a head's outputs, or label log-likelihoods and generated texts from one pass.

What is scored are `Members` (members.py): one model, or a population's. An `Evaluation` can be run, or compiled ahead.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import errors, tasks
from lora_jax.batches import causal, classification, encoder_decoder, rows as rows_lib
from lora_jax.inference import beam, decode, generate, members as members_lib
from lora_jax.inference.members import Call, Evaluation, Members
from lora_jax.model import prompts, transformer
from lora_jax.training import train
from lora_jax.training.objectives import likelihood
from lora_jax.values import Count, Size

Place = Callable[[dict], dict]
CHUNK = 2048  # positions of a text whose logits exist at once


@dataclasses.dataclass(frozen=True)
class Search:
  """How texts are generated: greedily by default, else by beam search.

  Fields:
    beams, length_penalty, early_stopping: as in `beam.search`, if `beams` is more than one.
    no_repeat_ngram: no n-gram of this size occurs twice in a generated text, 0 allows all. What is in the prompt counts
      for nothing, as a text may have to say it again; in `generate` it counts.
  """

  beams: Count = 1
  length_penalty: float = 1.0
  no_repeat_ngram: Size = 0
  early_stopping: bool | Literal["never"] = False


@functools.partial(jax.jit, static_argnums=(0, 6, 7, 8, 9))
def score(
  config,
  params,
  tokens,
  lengths,
  labels,
  label_lengths,
  new: int,
  end: tuple[int, ...],
  start: int | None = None,
  search: Search = Search(),
) -> tuple[jax.Array, jax.Array]:
  """Log-likelihood of every label after every prompt, and the continuation.

  Args:
    tokens, lengths: prompts int32 [B, T], right-padded, and [B].
    labels, label_lengths: token ids int32 [B, C, U] of the answers to compare, right-padded, and [B, C]; C may be 0.
    new: how many tokens to generate; none with 0.
    end: tokens that end a text; the first of them follows it.
    start: the first token of an encoder-decoder's text, which is then scored and continued; its prompts are encoded.

  Returns:
    (float32 [B, C] sums over each label's tokens, int32 [B, new]).
  """
  (B, T), (_, C, U), params = tokens.shape, labels.shape, prompts.bake(params)
  slots = (1 if config.encoder_layers else T) + max(new, U)
  logits, cache, ids, lengths = decode.run_prompts(config, params, tokens, lengths, slots=slots, start=start)
  total, params = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., 0], axis=1), prompts.without(params)

  def rest(label):
    """Log-likelihoods [B, U - 1] of the later tokens of a label [B, U], which are run over the prompt's cache."""
    at = lengths[:, None] + jnp.arange(U - 1)
    x, _ = transformer.hidden(config, params, label[:, :-1], positions=at, cache=cache)
    table = jax.nn.log_softmax(transformer.logits(config, params, x))
    return jnp.take_along_axis(table, label[:, 1:, None], axis=-1)[..., 0]

  if U > 1 and C:
    later = jnp.stack([rest(labels[:, c]) for c in range(C)], axis=1)
    total += (later * (jnp.arange(1, U) < label_lengths[..., None])).sum(-1)
  if not new:
    return total, jnp.zeros((B, 0), jnp.int32)
  if search.beams == 1 and not search.no_repeat_ngram:
    return total, decode.greedy(config, params, cache, logits, lengths, new, end)
  return total, _best(config, params, cache, logits, ids, lengths, new, end, search)


def _best(config, params, cache, logits, ids, lengths, new, end, search) -> jax.Array:
  """The best continuations [B, new] of a search; `end[0]` after a row's end."""
  at = jnp.arange(ids.shape[1])
  ids = jnp.where(at < lengths[:, None], -1 - at, 0)  # so that no n-gram is one of the prompt
  how = dict(
    end=jnp.int32(end),
    limit=jnp.int32(new),
    length_penalty=jnp.float32(search.length_penalty),
    beams=search.beams,
    ngram=search.no_repeat_ngram,
    early=search.beams == 1 or search.early_stopping,  # one beam that stops when its text has ended is greedy
  )
  found, counts, _ = beam.search_rows(config, params, cache, logits, ids, lengths, **how)
  out = jnp.take_along_axis(found[:, 0], lengths[:, None] + jnp.arange(new), axis=1)
  return jnp.where(jnp.arange(new) < counts[:, :1], out, end[0])


def run(config: transformer.Config, params: Any, *args: Any, **kw: Any) -> dict[str, float]:
  """What `answers` come to, of one model."""
  return answers(config, members_lib.one(params), *args, **kw).run()[0]


def answers(
  config: transformer.Config,
  members: Members,
  tokenizer: Any,
  task: Any,
  examples: Sequence[dict],
  *,
  batch_size: Count = 32,
  seq_len: Count = 256,
  same_length: bool = False,
  max_new_tokens: Size | None = None,
  start: int | None = None,
  search: Search = Search(),
  place: Place = lambda batch: batch,
  progress: Callable[[int, int], None] = lambda done, total: None,
  written: Callable[[int, list[str]], None] = lambda member, texts: None,
) -> Evaluation:
  """Metrics of a task over `examples`, {name: value} of each member.

  Those of `task.metrics`, such as `accuracy`, take as the prediction the label of the highest log-likelihood, summed
  over its tokens, or in a regression the number in the generated text (nan where there is none). After them come
  what `task.corpus` gives for the generated texts, such as `bleu`, and means of `task.score`, such as `exact_match`.

  Args:
    batch_size: prompts at once.
    seq_len: longest prompt, of which the left is cut, and longest text of a classifier.
    same_length: pad all prompts to the longest, so that one program runs them.
    max_new_tokens: length of generations; None is 64, or 0 where the task has labels, after which a model has not
      learned to end unless `config.data.eos` is True. With 0 labels alone are scored, and nothing is generated.
    start: the first token of an encoder-decoder's text.
    search: how texts are generated.
    place: puts a batch's arrays on the mesh.
    progress: called with (examples done, all).
    written: called with each member and the texts that it has generated, in the order of `examples`.
  """
  config = dataclasses.replace(config, scan=True)  # each prompt length compiles anew: fast compiling is worth more
  new = max_new_tokens
  if new is None:
    new = 0 if task.labels else 64
  if not new and not task.labels:
    raise errors.UserError(f"config.eval.max_new_tokens=0 scores labels alone, and task {task.name!r} has none")
  end = tokenizer.end_ids or decode.NEVER
  texts, predictions = [{} for _ in range(members.n)], [{} for _ in range(members.n)]

  def take(index, found):
    lls, outs = map(np.asarray, found)
    for p in range(members.n):
      for ll, out, i in zip(lls[p], outs[p], index, strict=True):
        if i >= 0:
          text = tokenizer.decode(generate.until_end(out, end)) if new else ""
          texts[p] |= {i: text} if new else {}
          predictions[p][i] = int(ll.argmax()) if task.labels else tasks.number(text)
    progress(len(predictions[0]), len(examples))

  def calls() -> Iterator[Call]:
    kind = encoder_decoder if config.encoder_layers else causal
    how = dict(batch_size=batch_size, seq_len=seq_len, same_length=same_length, soft=members.soft)
    for batch in kind.eval_batches(task, examples, tokenizer, **how):
      inputs = place({k: v for k, v in batch.items() if k != "index"})
      arrays = tuple(inputs[k] for k in ("tokens", "lengths", "labels", "label_lengths"))
      taken = functools.partial(take, batch["index"].tolist())
      yield Call(score, config, arrays, taken, static=(new, end, start, search))

  def result() -> list[dict[str, float]]:
    values = [_metrics(task, examples, p) for p in predictions]
    if not new:
      return values
    ordered = [[found[i] for i in range(len(examples))] for found in texts]
    for member, found in enumerate(ordered):
      written(member, found)
    return [v | _generated(task, examples, t) for v, t in zip(values, ordered, strict=True)]

  return Evaluation(members, calls(), result)


def text_losses(
  config: transformer.Config,
  members: Members,
  tokenizer: Any,
  texts: Sequence[str],
  *,
  batch_size: int = 32,
  seq_len: int = 256,
  same_length: bool = False,
  place: Place = lambda batch: batch,
) -> Evaluation:
  """Mean cross-entropy a token of language models on texts, each cut to `seq_len` tokens, in nats; of each member.

  Soft tokens stand before the text, after the token that begins it where they do not precede that one.
  """
  if config.encoder_layers or not config.causal:
    raise errors.UserError("config.eval.general: only decoders predict the next token of a text")
  config = dataclasses.replace(config, scan=True)
  sums = []

  def calls() -> Iterator[Call]:
    rows = _text_rows(tokenizer, texts, members.soft, seq_len)
    for batch in rows_lib.longest_first(rows, tokenizer, batch_size, seq_len, same_length):
      del batch["lengths"], batch["index"]
      yield Call(_text_loss, config, (place(batch),), sums.append)

  return Evaluation(members, calls(), lambda: [float(x / n) for x, n in np.sum(np.array(sums, float), axis=0)])


def _text_rows(tokenizer: Any, texts: Sequence[str], soft: prompts.Soft | None, seq_len: int) -> list[rows_lib.Batch]:
  """Texts of two tokens or more as rows of a batch."""
  rows = []
  for ids in tokenizer.encode_batch(texts, add_special_tokens=True):
    if len(ids) > 1:
      ids, begins = np.array(ids[: prompts.room(soft, seq_len) + 1], np.int32), ids[0] == tokenizer.bos_id
      counts = np.arange(len(ids)) > 0  # nothing but soft tokens precedes the first
      rows.append(causal.row(ids, counts.astype(np.float32), soft, int(begins), begins))
  return rows


def _text_loss(config, params, batch):
  projection, weights = train.Forward(config).projection(params, batch), batch["weights"]
  loss, _ = likelihood.cross_entropy(projection, batch["targets"], weights, chunk=CHUNK)
  return jnp.stack([loss, weights.sum()])


def outputs(
  config: transformer.Config,
  members: Members,
  tokenizer: Any,
  task: tasks.Task,
  examples: Sequence[dict],
  *,
  batch_size: int = 32,
  seq_len: int = 256,
  same_length: bool = False,
  place: Place = lambda batch: batch,
  progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
  """`task.metrics` of models with a head over `examples`, of each member.

  Args:
    place, progress: as in `answers`.
  """
  predictions = [{} for _ in range(members.n)]

  def take(index, found):
    found = np.asarray(found)
    values = found.argmax(-1) if task.labels else found[..., 0]
    for member, vs in zip(predictions, values, strict=True):
      member |= {i: v.item() for i, v in zip(index, vs, strict=True) if i >= 0}
    progress(len(predictions[0]), len(examples))

  def calls() -> Iterator[Call]:
    how = dict(batch_size=batch_size, seq_len=seq_len, same_length=same_length, soft=members.soft)
    for batch in classification.eval_batches(task, examples, tokenizer, **how):
      index = batch.pop("index").tolist()
      yield Call(predict, config, (place(batch),), functools.partial(take, index))

  return Evaluation(members, calls(), lambda: [_metrics(task, examples, p) for p in predictions])


def predict(config: transformer.Config, params: Any, batch: dict) -> jax.Array:
  """float32 [B, task.n_outputs] of a model with a head for a batch of batches/classification.py."""
  return train.Forward(config).classify(params, batch)


def _generated(task: tasks.Task, examples: Sequence[dict], texts: Sequence[str]) -> dict[str, float]:
  """`task.corpus` and the means of `task.score` of the texts generated for examples."""
  means = {}
  for example, text in zip(examples, texts, strict=True):
    for k, v in task.score(example, text).items():
      means.setdefault(k, []).append(v)
  corpus = task.corpus(texts, examples) if task.corpus else {}
  return corpus | {k: sum(v) / len(v) for k, v in means.items()}


def _metrics(task: tasks.Task, examples: Sequence[dict], predictions: Mapping[int, int | float]) -> dict[str, float]:
  """`task.metrics` of predictions by the example's index; examples whose label is hidden are left out."""
  if not task.n_outputs:
    return {}
  targets = {i: task.target(examples[i]) for i in sorted(predictions)}
  known = [i for i, target in targets.items() if not task.labels or target >= 0]
  return task.metrics([predictions[i] for i in known], [targets[i] for i in known]) if known else {}


def metric_names(task: tasks.Task, examples: Sequence[dict], generates: bool) -> list[str] | None:
  """Names of the metrics that a task gives.

  Args:
    examples: some, whose own responses are scored.
    generates: whether texts are generated and scored.

  Returns:
    None where they are not known: examples may have different scores, and what `task.corpus` gives takes long and
    depends on which programs are installed.
  """
  found = list(task.metrics([0, 1], [0, 1])) if task.n_outputs else []
  if not generates:
    return found
  scores = {tuple(task.score(e, task.format(e).response)) for e in examples}
  return None if task.corpus or len(scores) != 1 else found + list(*scores)
