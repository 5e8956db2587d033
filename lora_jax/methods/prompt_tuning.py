"""Prompt tuning: learned embeddings before the text (Lester et al. 2021, https://arxiv.org/abs/2104.08691, section 2).

The model reads [P; X] instead of X, and only P is trained. The task's template is kept: see model/prompts.py.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from lora_jax import errors, tree, weights
from lora_jax.model import prompts
from lora_jax.values import Count, Size

KIND = "soft prompts"
OPTIM = {"name": "adafactor", "learning_rate": 0.3, "schedule": "constant", "warmup": 0.0}  # the paper's section 3.2
STARTS = "the text begins with vectors that the model has not seen"
MERGES = False
INITS = ("random", "vocab", "text", "labels")


@struct.dataclass
class Prompt(weights.Added):
  """A table of embeddings.

  Fields:
    table: float32 [P, D].
    placement: one of `prompts.PLACEMENTS`.
    scaled: whether the model multiplies the table by its `embed_scale`, as it does with rows of its own embedding.
  """

  table: jax.Array
  placement: str = struct.field(pytree_node=False, default="prefix")
  scaled: bool = struct.field(pytree_node=False, default=False)

  def __call__(self) -> jax.Array:
    """Returns the table, float32 [P, D]."""
    return self.table

  @property
  def length(self) -> int:
    """P, the number of soft tokens."""
    return self.table.shape[-2]


def init(
  key: jax.Array,
  params: Any,
  *,
  length: Count = 20,
  init: Literal[INITS] = "random",
  text: str | Sequence[Size] | None = None,
  labels: Sequence[Sequence[Size]] | None = None,
  top: Count = 5000,
  placement: Literal[prompts.PLACEMENTS] = "prefix",
) -> tuple[Any, Any]:
  """Adds a `Prompt`.

  Args:
    length: P.
    init: "random" is uniform in +-0.5; "vocab" draws from the first `top` rows of the embedding, which belong to the
      most common tokens in many vocabularies; "text" takes the rows of a text's tokens, repeated or cut to P as in
      PEFT, but without special tokens; "labels" takes for each label the mean of its tokens' rows, and "vocab" for the
      rest.
    top: how many rows of the embedding `init="vocab"` draws from.
    text, labels: token ids; `prepare` makes them from a text and from the task's labels.
    placement: "prefix" (before everything, as in PEFT), "after_bos" (after the token that begins a text) or "suffix"
      (between prompt and response; for a classifier, at the end).

  Returns:
    (params, mask): True at `prompt/table`, float32.
  """
  check(params, length, placement)
  errors.choose(init, dict.fromkeys(INITS), "config.method.init")
  kernel, key = params["embed"]["kernel"], tree.fold(key, "prompt")
  rows = lambda ids: weights.take(kernel, jnp.asarray(ids, jnp.int32)).astype(jnp.float32)
  V, D = kernel.shape
  if init == "random":
    table = jax.random.uniform(key, (length, D), minval=-0.5, maxval=0.5)
  elif init == "text":
    table = rows(np.resize(_ids([text], "text", V)[0], length))
  else:
    if not isinstance(top, int) or top < 1:
      raise errors.UserError(f"config.method.top={top!r} must be a whole number, at least 1")
    n = min(top, V)
    table = rows(jax.random.choice(key, n, (length,), replace=length > n))
    if init == "labels":
      means = jnp.stack([rows(ids).mean(0) for ids in _ids(labels, "labels", V)])[:length]
      table = table.at[: len(means)].set(means)
  return add(params, Prompt(table, placement, init != "random"))


def check(params: Any, length: int, placement: str) -> None:
  """Raises UserError for an invalid length or placement, or if the model already has a soft prompt."""
  errors.choose(placement, dict.fromkeys(prompts.PLACEMENTS), "config.method.placement")
  if not isinstance(length, int) or length < 1:
    raise errors.UserError(f"config.method.length={length!r} must be a whole number, at least 1")
  if "prompt" in params:
    raise errors.UserError("config.method: one soft prompt can be trained, not two")


def add(params: Any, prompt: Any) -> tuple[Any, Any]:
  """Returns (params, mask) with a soft prompt; all of its leaves are trained."""
  params = params | {"prompt": prompt}
  return params, tree.map_named(lambda k, _: k.startswith("prompt/"), params)


def _ids(texts: Any, name: str, vocabulary: int) -> list[list[int]]:
  """Returns texts of token ids as lists; raises UserError if they are missing, empty or not ids of the vocabulary."""
  given = [np.asarray(x) for x in texts or ()]
  if not given or any(x.ndim != 1 or not x.size or x.dtype.kind not in "iu" for x in given):
    raise errors.UserError(f"config.method.init={name!r} needs {name}: {_NEEDS[name]}")
  if any(x.min() < 0 or x.max() >= vocabulary for x in given):
    raise errors.UserError(f"config.method.{name} has ids beyond the {vocabulary} tokens of the model")
  return [x.tolist() for x in given]


_NEEDS = {
  "text": "a config.method.text that is not empty and a model with a tokenizer, or config.method.text as ids",
  "labels": "a task with labels and a model with a tokenizer, or config.method.labels as ids",
}


def prepare(kw: Mapping[str, Any], tokenizer: Any = None, labels: Sequence[str] = ()) -> dict[str, Any]:
  """Returns the keywords with `text` as ids, and for init="labels" the task's labels as ids."""
  kw = dict(kw)
  if tokenizer is not None and isinstance(kw.get("text"), str):
    kw["text"] = tokenizer.encode(kw["text"])
  if tokenizer is not None and kw.get("init") == "labels" and kw.get("labels") is None and labels:
    kw["labels"] = tokenizer.encode_batch(list(labels))
  return kw
