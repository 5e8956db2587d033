"""Trained tokens: chosen rows of the embedding are trained, all others stay, as PEFT's `trainable_token_indices` do.

For tokens that a tokenizer reserves, or that get a new meaning. A head that is the transposed embedding has the new
rows too. It costs n rows of D numbers in place of the whole table, and goes beside LoRA in a list of methods.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from lora_jax import errors, families, tree, weights
from lora_jax.methods import _peft, _targets
from lora_jax.values import Size

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

  base: weights.Weight
  ids: jax.Array
  rows: jax.Array

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
  ids = jnp.asarray(sorted(_checked(ids, table.shape[0], "config.method.ids")), jnp.int32)
  params = put(params, ids, weights.take(table, ids).astype(jnp.float32))
  return params, _targets.mask(params, Rows, ("rows",))


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


def _checked(ids: Any, size: int, what: str) -> list[int]:
  """`ids` as a list; UserError unless they are different whole numbers below `size`."""
  ids = list(ids) if isinstance(ids, Sequence) and not isinstance(ids, str) else [ids]
  bad = [i for i in ids if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < size]
  if bad or not ids or len(set(ids)) < len(ids):
    why = f"{bad} are no rows of a table of {size}" if bad else "each once" if ids else "at least one"
    raise errors.UserError(f"{what}: {why}; expected ids of tokens")
  return ids


PEFT_TYPE = "TRAINABLE_TOKENS"
PEFT_WHOLE = False  # this type alone has no modules_to_save
SUFFIX, BESIDE_SUFFIX = "trainable_tokens_delta", "token_adapter.trainable_tokens_delta"


def to_peft(
  params: Any, keys: Sequence[families.Key], trained: Collection[str] = ()
) -> tuple[dict, dict[str, np.ndarray]] | None:
  """(adapter config, {module + ".trainable_tokens_delta": rows [n, D]}) of every module that has the table; None
  without trained rows.

  The name notwithstanding, what it holds are the new rows, not their differences from the old ones. PEFT 0.21 leaves
  out the bias of a tied head, such as BERT's, when it computes with them; we do not.
  """
  table = tree.flatten(params, is_leaf=weights.is_node).get(EMBED)
  if not isinstance(table, Rows):
    return None
  if isinstance(table.base, weights.Adapter):
    raise errors.UserError("PEFT has no place for trained rows of an embedding that is adapted besides")
  config = {"peft_type": PEFT_TYPE, "token_indices": [int(i) for i in table.ids], "target_modules": None}
  return config, {f"{m}.{SUFFIX}": np.asarray(table.rows) for m in [_module(keys), *_others(keys)]}


def from_peft(
  params: Any, keys: Sequence[families.Key], config: Mapping, left: dict[str, np.ndarray], wrong: list[str]
) -> Any:
  """The inverse of `to_peft`; see formats/peft.py."""
  return _read(params, keys, config.get("token_indices"), "token_indices", SUFFIX, left, wrong)


def beside(form: tuple[dict, dict], other: tuple[dict, dict]) -> tuple[dict, dict]:
  """Another method's (config, tensors) with those of `to_peft` in it, as LoRA's `trainable_token_indices`."""
  (config, tensors), (theirs, more) = form, other
  (module, _, _), *_ = (k.partition(f".{SUFFIX}") for k in tensors)  # PEFT ties the others to the first
  renamed = {f"{module}.{BESIDE_SUFFIX}": tensors[f"{module}.{SUFFIX}"]}
  return theirs | {"trainable_token_indices": config["token_indices"]}, more | renamed


def from_beside(
  params: Any, keys: Sequence[families.Key], config: Mapping, left: dict[str, np.ndarray], wrong: list[str]
) -> tuple[Any, dict]:
  """(params with the trained rows of another method's adapter, its config without them)."""
  indices = config.get("trainable_token_indices")
  rest = {k: v for k, v in config.items() if k != "trainable_token_indices"}
  if isinstance(indices, Mapping):
    modules = (_module(keys), *_others(keys))
    names = [k for k in indices if not any(f".{m}".endswith(f".{k}") for m in modules)]
    own = [v for k, v in indices.items() if f".{modules[0]}".endswith(f".{k}")]
    if names or len(own) != 1 or any(v != own[0] for v in indices.values()):
      wrong.append(f"trainable_token_indices={dict(indices)}; only rows of {modules[0]}, which is one table here")
    indices = own[0] if own else []
  return _read(params, keys, indices, "trainable_token_indices", BESIDE_SUFFIX, left, wrong), rest


def _module(keys: Sequence[families.Key]) -> str:
  return next(key.module for key in keys if key.path == EMBED)


def _others(keys: Sequence[families.Key]) -> list[str]:
  """Further modules that have the table: those of an encoder-decoder that look it up, and a tied head."""
  key = next(key for key in keys if key.path == EMBED)
  return [m for m in (*key.lookups, key.head) if m and m != key.module]


def _read(params, keys, ids, what, suffix, left, wrong) -> Any:
  """`params` with trained rows."""
  name, (size, width) = f"{_module(keys)}.{suffix}", params["embed"]["kernel"].shape
  for k in [k for m in _others(keys) if (k := f"{m}.{suffix}") in left]:
    if not np.array_equal(left.pop(k), left.get(name)):
      wrong.append(f"{k} has other rows than {name}, which is one table with it here")
  n, order = (*np.shape(left.get(name, ())), 0)[0], []
  with errors.listed(wrong):
    ids = np.int32(_checked(ids, size, what))
    n, order = len(ids), np.argsort(ids)
  rows = _peft.take(left, wrong, name, (n, width))
  return put(params, jnp.asarray(ids[order]), jnp.asarray(rows[order])) if len(order) else params
