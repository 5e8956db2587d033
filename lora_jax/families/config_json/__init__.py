"""Conversion between Hugging Face's config.json and our `Config`, in both directions.

A family's `ConfigJson` holds a table of `Option`s and the values that all its models share. An option reads some keys
into some fields and writes them back. A config that would not be read back the same is refused.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from lora_jax import errors
from lora_jax.families.config_json import known
from lora_jax.families.config_json.option import Option
from lora_jax.families.reading import options as rules
from lora_jax.model import architecture, layers


@dataclasses.dataclass(frozen=True)
class ConfigJson:
  """The config.json of a family.

  Fields:
    model_type: the `model_type` of its models.
    architectures: {head: class name in transformers}; the first is the default of a file without `architectures`.
    options: the table. An option may read what earlier options have written.
    absent: the defaults of transformers for keys that a file leaves out.
    fixed: fields with one value in the whole family that differs from the default of `Config`.
    default: keys that are supported only at the given value.
    ignored: keys that do not change the forward pass, beyond `known.BOOKKEEPING`.
    aliases: {class name: head} of further classes, whose other tensors are ignored.
    by_tensors: fields that the tensors of a file decide, whatever its config.json says.
  """

  model_type: str
  architectures: Mapping[str, str]
  options: tuple[Option, ...]
  absent: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  default: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  ignored: tuple[str, ...] = ()
  aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
  by_tensors: tuple[str, ...] = ()

  def but(
    self,
    model_type: str,
    architectures: Mapping[str, str],
    *options: Option,
    ignored: Iterable[str] = (),
    **more: Mapping,
  ) -> "ConfigJson":
    """Returns the table of a family that differs from this one.

    Args:
      options: new options; they replace options for the same fields.
      ignored: further ignored keys.
      more: new or changed items of `absent`, `fixed` and `default`. A field that becomes fixed loses its option.
    """
    new = {f for o in options for f in o.fields} | set(more.get("fixed", ()))
    kept = tuple(o for o in self.options if not new & set(o.fields))
    merged = {k: {**getattr(self, k), **more.get(k, {})} for k in ("absent", "fixed", "default")}
    return dataclasses.replace(
      self,
      model_type=model_type,
      architectures=architectures,
      options=(*kept, *options),
      ignored=(*self.ignored, *ignored),
      aliases=more.get("aliases", {}),
      **merged,
    )

  def config(self, hf: Mapping) -> architecture.Config:
    """Returns the `Config` of a config.json; raises one UserError that lists everything that is not supported."""
    handled = {k for o in self.options for k in o.keys}
    known.check(hf, handled, self.default, self.ignored)
    self._require(hf, self.options)
    fields = dict(self.fixed)
    for option in self._all():
      fields |= option.read({**self.absent, **hf})
    errors.choose(fields["activation"], layers.ACTIVATIONS, "activation")
    return architecture.Config(**fields)

  def hf_config(self, config: architecture.Config, original: Mapping | None = None) -> dict[str, Any]:
    """Returns the config.json of a `Config`, without the dtype.

    Args:
      original: a config.json of the family to start from. An option that already has the right value keeps its
        spelling, and keys that do not describe the architecture are kept.

    Raises:
      UserError: the family cannot express some fields; the message names all of them.
    """
    hf = dict(original or {}) | {"model_type": self.model_type} | self._class(config)
    for option in self._all():
      if original is None or not self._says(option, hf, config):
        hf = {k: v for k, v in hf.items() if k not in option.keys} | option.write(config)
    self._check(hf, config)
    return hf

  def _require(self, hf: Mapping, options: Iterable[Option]) -> None:
    if missing := [k for o in options for k in o.needed if {**self.absent, **hf}.get(k) is None]:
      raise errors.UserError(f"config.json of a {hf.get('model_type')} model lacks {', '.join(missing)}")

  def _all(self) -> tuple[Option, ...]:
    return Option(("head",), ("architectures",), self._head, self._class), *self.options

  def _head(self, hf: Mapping) -> dict[str, str]:
    named = (hf.get("architectures") or [next(iter(self.architectures.values()))])[0]
    table = {name: head for head, name in self.architectures.items()} | self.aliases
    return {"head": errors.choose(named, table, f"architecture of a {self.model_type} model")}

  def _class(self, config: architecture.Config) -> dict[str, list[str]]:
    return {"architectures": [self.architectures[config.head]]} if config.head in self.architectures else {}

  def _said(self, option: Option, hf: Mapping) -> dict[str, Any]:
    """Returns an option's fields as a file has them; raises UserError for what is not understood."""
    with errors.parsing("config.json"):  # the values may be any that a Config was given
      rules.check({k: hf[k] for k in ("model_type", *option.keys) if k in hf})
      self._require(hf, (option,))
      return option.read({**self.absent, **hf})

  def _says(self, option: Option, hf: Mapping, config: architecture.Config) -> bool:
    """Returns whether a file and a config agree on an option's fields."""
    try:
      return self._said(option, hf) == option.of(config)
    except errors.UserError:
      return False

  def _check(self, hf: Mapping, config: architecture.Config) -> None:
    """Raises UserError unless a config.json is read as this config."""
    means, lost, reasons = {f.name: f.default for f in dataclasses.fields(config)} | self.fixed, [], []
    for option in self._all():
      try:
        means |= self._said(option, hf)
      except errors.UserError as e:
        lost += option.fields
        reasons.append(f"; {e}")
    given, unsaid = dataclasses.asdict(config), self._unsaid(config)
    wrong = [f"{f}={given[f]!r:.100}" for f in lost]
    wrong += [
      f"{f}={x!r:.100} (only {means[f]!r:.100})"
      for f, x in given.items()
      if f not in {*lost, *unsaid} and x != means[f]
    ]
    if wrong:
      raise errors.UserError(
        f"config.json of a {self.model_type} model cannot express {', '.join(wrong)}{''.join(reasons)}"
      )
    self.config(hf)

  def _unsaid(self, config: architecture.Config) -> set[str]:
    """Returns the fields that config.json does not state: how a model runs, and what its head or tensors decide."""
    unused = {"n_labels"} if config.head != "classification" else set()
    if config.head == "mlm" or config.head == "none" and not config.pooler:  # there are bare models without a pooler
      unused.add("pooler")
    return {*architecture.RUNTIME, "members", "dtype", *self.by_tensors, *unused}
