"""`tokens` in the `peft` library's format."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax import errors, families, tree, weights
from lora_jax.formats.peft import layout
from lora_jax.methods import tokens

TYPE = "TRAINABLE_TOKENS"
MODULES_TO_SAVE = False  # PEFT supports them for every other type
SUFFIX, BESIDE_SUFFIX = "trainable_tokens_delta", "token_adapter.trainable_tokens_delta"


def to_peft(
  params: Any, keys: Sequence[families.Key], trained: Collection[str] = ()
) -> tuple[dict, dict[str, np.ndarray]] | None:
  """Returns (config, {module + ".trainable_tokens_delta": rows [n, D]}) for every module that has the table.

  It returns None without trained rows. Despite the name, the tensor holds the new rows, not their differences from the
  old ones. PEFT 0.21 omits the bias of a tied head, such as BERT's, when it computes with them; we do not.
  """
  table = tree.flatten(params, is_leaf=weights.is_node).get(tokens.EMBED)
  if not isinstance(table, tokens.Rows):
    return None
  if isinstance(table.base, weights.Adapter):
    raise errors.UserError("PEFT does not support trained rows of an embedding that is also adapted")
  config = {"peft_type": TYPE, "token_indices": [int(i) for i in table.ids], "target_modules": None}
  return config, {f"{m}.{SUFFIX}": np.asarray(table.rows) for m in [_module(keys), *_others(keys)]}


def from_peft(
  params: Any, keys: Sequence[families.Key], config: Mapping, left: dict[str, np.ndarray], wrong: list[str]
) -> Any:
  """Inverts `to_peft`; see formats/peft."""
  return _read(params, keys, config.get("token_indices"), "token_indices", SUFFIX, left, wrong)


def beside(form: tuple[dict, dict], other: tuple[dict, dict]) -> tuple[dict, dict]:
  """Returns another method's (config, tensors) together with the trained rows, as LoRA's `trainable_token_indices`."""
  (config, tensors), (theirs, more) = form, other
  (module, _, _), *_ = (k.partition(f".{SUFFIX}") for k in tensors)  # PEFT ties the others to the first
  renamed = {f"{module}.{BESIDE_SUFFIX}": tensors[f"{module}.{SUFFIX}"]}
  return theirs | {"trainable_token_indices": config["token_indices"]}, more | renamed


def from_beside(
  params: Any, keys: Sequence[families.Key], config: Mapping, left: dict[str, np.ndarray], wrong: list[str]
) -> tuple[Any, dict]:
  """Returns (params with the trained rows of another method's adapter, its config without their key)."""
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
  return next(key.module for key in keys if key.path == tokens.EMBED)


def _others(keys: Sequence[families.Key]) -> list[str]:
  """Returns the other modules that use the table: those of an encoder-decoder that look rows up, and a tied head."""
  key = next(key for key in keys if key.path == tokens.EMBED)
  return [m for m in (*key.lookups, key.head) if m and m != key.module]


def _read(params, keys, ids, what, suffix, left, wrong) -> Any:
  """Returns `params` with the trained rows of an adapter."""
  name, (size, width) = f"{_module(keys)}.{suffix}", params["embed"]["kernel"].shape
  for k in [k for m in _others(keys) if (k := f"{m}.{suffix}") in left]:
    if not np.array_equal(left.pop(k), left.get(name)):
      wrong.append(f"{k} has other rows than {name}, but these share one table here")
  n, order = (*np.shape(left.get(name, ())), 0)[0], []
  with errors.listed(wrong):
    ids = np.int32(tokens.checked(ids, size, what))
    n, order = len(ids), np.argsort(ids)
  rows = layout.take(left, wrong, name, (n, width))
  return tokens.put(params, jnp.asarray(ids[order]), jnp.asarray(rows[order])) if len(order) else params
