"""Soft prompts: learned vectors among the tokens of a text, and learned keys and values before it.

A soft token is a negative id: -1 - i stands for row i of the table that `params["prompt"]()` gives. It takes a position
like any token, so that packing, caches, generation and placement on devices know nothing of it. What makes the table is
the method's: `params["prompt"]` also has a `length` and one of `PLACEMENTS` as its `placement`.

`params["prefix"]()` gives {"attn": {"k", "v"}}, keys and values [L, P, K, H] that every token sees before the text,
whose positions begin at P then; `length` is P. In an encoder-decoder there may be others under "cross", which are seen
before those of the encoder's states, and a prefix of the encoder in `params["encoder"]`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lora_jax import errors, weights

# Before everything, after the token that begins a text (before it where there is none), or between the prompt and the
# response, which for a classifier and an encoder is the end.
PLACEMENTS = ("prefix", "after_bos", "suffix")


@dataclasses.dataclass(frozen=True)
class Soft:
  """Where how many soft tokens go."""

  length: int
  placement: str = "prefix"

  @property
  def ids(self) -> np.ndarray:
    """The ids of the soft tokens, int32 [P]."""
    return -1 - np.arange(self.length, dtype=np.int32)

  def at(self, n: int, begins: bool) -> int:
    """The index in a prompt of `n` tokens that the soft ones go before; `begins`: its first token begins a text."""
    return {"prefix": 0, "after_bos": int(begins), "suffix": n}[self.placement]


def of(params: Any) -> Soft | None:
  """The soft tokens that a tree asks for; None if it has no soft prompt."""
  prompt = params.get("prompt")
  return None if prompt is None else Soft(prompt.length, prompt.placement)


def prefix_length(params: Any) -> int:
  """How many positions keys and values before the text take."""
  return params["prefix"].length if "prefix" in params else 0


def room(soft: Soft | None, seq_len: int, least: int = 1) -> int:
  """How many of `seq_len` tokens are left for the text; UserError if they are fewer than `least`."""
  left = seq_len - (soft.length if soft else 0)
  if soft and left < least:
    raise errors.UserError(f"seq_len={seq_len} has no room for text beside {soft.length} soft tokens")
  return left


def insert(soft: Soft | None, ids: Sequence[int], begins: bool) -> np.ndarray:
  """A prompt's ids int32 [n] with the soft tokens among them; see `Soft.at`."""
  ids = np.array(ids, np.int32)
  return np.insert(ids, soft.at(len(ids), begins), soft.ids) if soft else ids


def bake(params: Any) -> Any:
  """The tree with a table, and keys and values, in place of the networks that compute them."""
  bake = lambda w: w.bake() if isinstance(w, weights.Added) else w
  return jax.tree.map(bake, params, is_leaf=weights.is_node)


def unscaled(params: Any, embed_scale: float | None) -> Any:
  """The tree with the soft prompt that enters the layers, not one that `embed_scale` multiplies before."""
  prompt = params.get("prompt")
  if prompt is None or not prompt.scaled:
    return params
  return params | {"prompt": prompt.replace(table=prompt.table * (embed_scale or 1), scaled=False)}


def without(params: Any) -> Any:
  """The tree without its soft prompt, to run tokens among which there are no soft ones."""
  return {k: v for k, v in params.items() if k != "prompt"}


def insert_batch(params: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
  """An unpacked batch, of any module of batches/, with the soft tokens that `params` asks for.

  Batches that those modules make for a tree with a soft prompt have them already; this is for others. A first token
  counts as one that begins a text. UserError for the placement "suffix": a batch does not tell where prompts end.
  """
  soft, batch = of(params), dict(batch)
  if soft is None:
    return batch
  if soft.placement == "suffix":
    raise errors.UserError("soft tokens between prompt and response are inserted by the data pipeline alone")
  name = "inputs" if "inputs" in batch else "tokens"
  segments = "input_segments" if "inputs" in batch else "segment_ids"
  rows, n = np.shape(batch[name])
  at = soft.at(n, True)

  def put(k, values, index=at):
    if k in batch:
      batch[k] = np.insert(batch[k], [index] * soft.length, values, axis=1)

  put(name, soft.ids)
  put(segments, 1)
  if name == "tokens":
    put("token_types", 0)
    if "positions" in batch:
      real = batch[segments] > 0 if segments in batch else np.ones((rows, 1), bool)
      batch["positions"] = np.arange(n + soft.length, dtype=np.int32) * real
    # The token before them now precedes a soft one, and the last soft one what that token preceded.
    put("targets", 0, max(at - 1, 0))
    if np.ndim(batch.get("weights", 0)) == 2:
      put("weights", 0, max(at - 1, 0))
    if at == 0 and "targets" in batch:
      batch["targets"][:, soft.length - 1] = batch["tokens"][:, soft.length]
  if "lengths" in batch:
    batch["lengths"] = batch["lengths"] + np.int32(soft.length)
  return batch
