"""Options of config.json: fields of a `Config`, the keys that state them, and the conversion in both directions."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from lora_jax import errors
from lora_jax.model import architecture


@dataclasses.dataclass(frozen=True)
class Option:
  """Fields of a `Config` and keys of config.json that determine each other.

  Fields:
    fields: fields of the Config.
    keys: all keys that state these fields, in any spelling; () if the fields follow from keys of other options.
    read: function from a config.json, with the family's values for absent keys, to {field: value}.
    write: function from a Config to {key: value}; the others of `keys` are left out of the file.
    needed: keys that a file must have.
  """

  fields: tuple[str, ...]
  keys: tuple[str, ...]
  read: Callable[[Mapping], dict[str, Any]]
  write: Callable[[architecture.Config], dict[str, Any]]
  needed: tuple[str, ...] = ()

  def of(self, config: architecture.Config) -> dict[str, Any]:
    """Returns {field: value} of a config."""
    return {f: getattr(config, f) for f in self.fields}


def number(field: str, key: str, *unread: str) -> Option:
  """Returns an option for a required number; `unread` are older names that are not read, but removed on a change."""
  return Option((field,), (key, *unread), lambda hf: {field: hf.get(key)}, lambda c: {key: getattr(c, field)}, (key,))


def inverse_root(field: str, key: str) -> Option:
  """Returns an option for one over the square root of a required number, which transformers needs to be whole."""

  def write(c):
    x = getattr(c, field)
    return {key: max(1, round(x**-2)) if x else None}

  return Option((field,), (key,), lambda hf: {field: hf[key] ** -0.5}, write, (key,))


def optional(field: str, key: str, *also: str, null: Any = None) -> Option:
  """Returns an option for a value that may be null; keys of `also` are read if those before are absent or null."""

  def read(hf):
    return {field: next((hf[k] for k in (key, *also) if hf.get(k) is not None), null)}

  return Option((field,), (key, *also), read, lambda c: {key: getattr(c, field)})


def flag(field: str, key: str, yes: Any = True, no: Any = False) -> Option:
  """Returns an option for a choice between two values; null means false."""
  return Option(
    (field,), (key,), lambda hf: {field: yes if hf.get(key) else no}, lambda c: {key: getattr(c, field) == yes}
  )


def derived(field: str, of: Callable[[Mapping], Any]) -> Option:
  """Returns an option for a field that follows from the keys of other options."""
  return Option((field,), (), lambda hf: {field: of(hf)}, lambda c: {})


def equal_heads(width: str, heads: str) -> tuple[Option, Option]:
  """Returns options for equally many key, value and query heads, which divide the width; from the keys for both."""
  return derived("n_kv_heads", lambda hf: hf[heads]), derived("head_dim", lambda hf: hf[width] // hf[heads])


def fallback(field: str, key: str, of: Callable[[Mapping], Any]) -> Option:
  """Returns an option for a number that follows from keys of other options if its own key is absent or null."""
  return Option((field,), (key,), lambda hf: {field: hf.get(key) or of(hf)}, lambda c: {key: getattr(c, field)})


def switched(field: str, switch: str, key: str) -> Option:
  """Returns an option for a value that applies only if the key `switch` is true."""

  def write(c):
    x = getattr(c, field)
    return {switch: x is not None} | ({} if x is None else {key: x})

  return Option((field,), (switch, key), lambda hf: {field: hf.get(key) if hf.get(switch) else None}, write)


def _labels(hf):
  return {"n_labels": len(hf.get("id2label") or ()) or hf.get("num_labels") or 2}


def _label_names(c):
  names = {} if c.n_labels == 2 else {str(i): f"LABEL_{i}" for i in range(c.n_labels)}  # no names mean two labels
  return {"id2label": names, "label2id": {v: int(k) for k, v in names.items()}} if names else {}


LABELS = Option(("n_labels",), ("id2label", "label2id", "num_labels", "_num_labels"), _labels, _label_names)

KINDS = {"full_attention": False, "sliding_attention": True}


def windows(
  keys: tuple[str, ...],
  window: Callable[[Mapping], int | None],
  local: Callable[[Mapping, int], bool],
  switch: str = "",
) -> Option:
  """Returns the option for `window` and `local`: which layers see only a window, by `layer_types` or by a rule.

  Args:
    keys: keys that the rule reads.
    window: function from a config.json to the window of local layers, or None if there are none.
    local: function from a config.json without `layer_types` and a layer's index to whether the layer is local.
    switch: a key that is true if there are windows.
  """

  def read(hf):
    n, kinds, size = hf["num_hidden_layers"], hf.get("layer_types"), window(hf)
    flags = (
      [local(hf, i) for i in range(n)] if kinds is None else [errors.choose(k, KINDS, "layer type") for k in kinds]
    )
    if len(flags) != n:
      raise errors.UserError(f"config.json has {len(flags)} layer_types for {n} layers")
    return {"window": size, "local": tuple(flags)} if size and any(flags) else {"window": None, "local": ()}

  def write(c):
    flags = c.local or (c.window is not None,) * c.n_layers
    kinds = ["sliding_attention" if x else "full_attention" for x in flags]
    size = {} if c.window is None else {"sliding_window": c.window}
    return {"layer_types": kinds} | size | ({switch: c.window is not None} if switch else {})

  given = ("sliding_window", "layer_types", *keys, *filter(None, [switch]))
  return Option(("window", "local"), given, read, write)
