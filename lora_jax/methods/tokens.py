"""Trained tokens: chosen rows of the embedding are trained, all others stay, as PEFT's `trainable_token_indices` do.

For tokens that a tokenizer reserves, or that get a new meaning. A head that is the transposed embedding has the new
rows too. It costs n rows of D numbers in place of the whole table, and goes beside LoRA in a list of methods.
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
  """An embedding table with other rows at some ids.

  Fields:
    base: the table [V, D], an array or a node.
    ids: int32 [n], rising.
    rows: float32 [n, D].
  """

  base: Any
  ids: jax.Array
  rows: jax.Array

  TRAINABLE = ("rows",)

  def take(self, ids: jax.Array) -> jax.Array:
    """Rows `ids` of the table."""
    y = weights.take(self.base, ids)
    at = jnp.clip(jnp.searchsorted(self.ids, ids), 0, self.ids.size - 1)
    return jnp.where((self.ids[at] == ids)[..., None], self.rows[at].astype(y.dtype), y)

  def dot(self, spec: str, x: jax.Array, dtype: Any = None) -> jax.Array:
    """The product with the transposed table, `BTD,VD->BTV`: a tied head."""
    y = weights.dot(spec, x, self.base, dtype)
    w, out = spec.replace(" ", "").split(",")[1].split("->")
    at = (slice(None),) * out.index(w[0])
    return y.at[(*at, self.ids)].set(weights.dot(spec, x, self.rows, dtype).astype(y.dtype))

  def dense(self) -> jax.Array:
    """The table with the rows in it, in the dtype of the base."""
    w = jnp.asarray(weights.dense(self.base))
    return w.at[self.ids].set(self.rows.astype(w.dtype))


def init(
  key: jax.Array, params: Any, *, ids: Sequence[Size] | None = None, tokens: str | Sequence[str] | None = None
) -> tuple[Any, Any]:
  """Trains rows of the embedding, which start as they are.

  Args:
    ids: of the tokens; by default the last few of the table, which many tokenizers leave unused.
    tokens: the tokens as texts; `prepare` makes ids of them.

  Returns:
    (params, mask): True at `embed/kernel/rows`, float32.
  """
  del key
  if tokens is not None:
    raise errors.UserError(f"config.method.tokens={tokens!r} are texts, and there is no tokenizer; give ids")
  table = params["embed"]["kernel"]
  ids = range(max(table.shape[0] - DEFAULT, 0), table.shape[0]) if ids is None else ids
  ids = jnp.asarray(sorted(checked(ids, table.shape[0], "config.method.ids")), jnp.int32)
  params = put(params, ids, weights.take(table, ids).astype(jnp.float32))
  return params, targeting.mask(params, Rows, ("rows",))


def put(params: Any, ids: jax.Array, rows: jax.Array) -> Any:
  """The tree with `rows` at `ids` of the embedding."""
  return params | {"embed": params["embed"] | {"kernel": Rows(params["embed"]["kernel"], ids, rows)}}


def prepare(kw: Mapping[str, Any], tokenizer: Any = None, labels: Sequence[str] = ()) -> dict[str, Any]:
  """The keywords with `tokens` as `ids`; UserError for a text that is not one token."""
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
  """`ids` as a list; UserError unless they are different whole numbers below `size`."""
  ids = list(ids) if isinstance(ids, Sequence) and not isinstance(ids, str) else [ids]
  bad = [i for i in ids if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < size]
  if bad or not ids or len(set(ids)) < len(ids):
    why = f"{bad} are no rows of a table of {size}" if bad else "each once" if ids else "at least one"
    raise errors.UserError(f"{what}: {why}; expected ids of tokens")
  return ids
