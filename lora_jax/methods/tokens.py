"""Trained tokens: chosen rows of the embedding are trained, and the others are frozen (`trainable_token_indices` in
PEFT).

This suits tokens that a tokenizer reserves or that get a new meaning. A tied head uses the trained rows as well. The
method trains n rows of D numbers rather than the whole table, and it combines with LoRA in a list of methods.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from lora_jax import errors, weights
from lora_jax.methods import targeting
from lora_jax.values import Size

KIND = "whole weights"
EMBED = "embed/kernel"
DEFAULT = 4  # rows from the end of the table


@struct.dataclass
class Rows(weights.Adapter):
  """An embedding table with trained rows at some ids.

  Fields:
    base: the table [V, D], an array or a node.
    ids: int32 [n], increasing.
    rows: float32 [n, D].
  """

  base: Any
  ids: jax.Array
  rows: jax.Array

  TRAINABLE = ("rows",)

  def take(self, ids: jax.Array) -> jax.Array:
    """Returns rows `ids` of the table."""
    y = weights.take(self.base, ids)
    at = jnp.clip(jnp.searchsorted(self.ids, ids), 0, self.ids.size - 1)
    return jnp.where((self.ids[at] == ids)[..., None], self.rows[at].astype(y.dtype), y)

  def dot(self, spec: str, x: jax.Array, dtype: Any = None) -> jax.Array:
    """Returns the product with the transposed table, `BTD,VD->BTV`, for a tied head."""
    y = weights.dot(spec, x, self.base, dtype)
    w, out = spec.replace(" ", "").split(",")[1].split("->")
    at = (slice(None),) * out.index(w[0])
    return y.at[(*at, self.ids)].set(weights.dot(spec, x, self.rows, dtype).astype(y.dtype))

  def dense(self) -> jax.Array:
    """Returns the table with the trained rows, in the dtype of the base."""
    w = jnp.asarray(weights.dense(self.base))
    return w.at[self.ids].set(self.rows.astype(w.dtype))


def init(
  key: jax.Array, params: Any, *, ids: Sequence[Size] | None = None, tokens: str | Sequence[str] | None = None
) -> tuple[Any, Any]:
  """Trains rows of the embedding, starting from their pretrained values.

  Args:
    ids: ids of the tokens; by default the last few of the table, which many tokenizers leave unused.
    tokens: the tokens as texts; `prepare` turns them into ids.

  Returns:
    (params, mask): True at `embed/kernel/rows`, float32.
  """
  del key
  if tokens is not None:
    raise errors.UserError(f"config.method.tokens={tokens!r} needs a tokenizer, and there is none; give ids")
  table = params["embed"]["kernel"]
  ids = range(max(table.shape[0] - DEFAULT, 0), table.shape[0]) if ids is None else ids
  ids = jnp.asarray(sorted(checked(ids, table.shape[0], "config.method.ids")), jnp.int32)
  params = put(params, ids, weights.take(table, ids).astype(jnp.float32))
  return params, targeting.mask(params, Rows, ("rows",))


def put(params: Any, ids: jax.Array, rows: jax.Array) -> Any:
  """Returns the tree with `rows` at `ids` of the embedding."""
  return params | {"embed": params["embed"] | {"kernel": Rows(params["embed"]["kernel"], ids, rows)}}


def prepare(kw: Mapping[str, Any], tokenizer: Any = None, labels: Sequence[str] = ()) -> dict[str, Any]:
  """Returns the keywords with `tokens` as `ids`; raises UserError for a text that is not exactly one token."""
  del labels
  kw = dict(kw)
  if tokenizer is None or kw.get("tokens") is None:
    return kw
  texts = kw.pop("tokens")
  texts = [texts] if isinstance(texts, str) else list(texts)
  each = tokenizer.encode_batch(texts)
  if bad := [f"{t!r} is {len(ids)} tokens" for t, ids in zip(texts, each, strict=True) if len(ids) != 1]:
    raise errors.UserError(f"config.method.tokens: {', '.join(bad)}; each must be one")
  return kw | {"ids": sorted({*(kw.get("ids") or ()), *(ids[0] for ids in each)})}


def checked(ids: Any, size: int, what: str) -> list[int]:
  """Returns `ids` as a list; raises UserError unless they are distinct whole numbers below `size`."""
  ids = list(ids) if isinstance(ids, Sequence) and not isinstance(ids, str) else [ids]
  bad = [i for i in ids if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < size]
  if bad or not ids or len(set(ids)) < len(ids):
    why = f"not {bad}" if bad else "each only once" if ids else "at least one"
    raise errors.UserError(f"{what}: expected ids of tokens from 0 to {size - 1}, {why}")
  return ids
