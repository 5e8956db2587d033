"""The members of a sweep: what `config["sweep"]` makes of the rest of a config.

A sweep is data, so that the command line can change it as any other part of a config
(`--config.sweep.product.train.seed="(0,1,2,3,4)"`), and not code as the sweeps of big_vision are, whose operations
it has otherwise:

  product  {section: {key: values}}   every combination; the last key changes fastest
  zip      {section: {key: values}}   the first values of all keys, then the second, ...
  list     {member: {section: {key: value}}}   overrides, member by member
  random   {"n": 8, "seed": 0, section: {key: {"uniform" or "log_uniform": (low, high)} or {"choice": values}}}

Several of them are combined as a product. In place of a key's values a section may itself be a sequence of sections,
such as methods. Overrides update a section; a method, task or objective that has a name replaces the config's. Members
may differ in anything but the mesh.
"""

import functools
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lora_jax import errors, values
from lora_jax.results import table_layout
from lora_jax.runs import config as config_lib
from lora_jax.runs.config import Config
from lora_jax.values import Count, NonNegative, Seed, Size, shown

PARTS = ("list", "zip", "product", "random")  # the first changes slowest

Overrides = dict[str, dict[str, Any]]


def settings(*, max_members: Size = 0, memory_gib: NonNegative = 0.0) -> None:
  """How many members are trained at once: at most `max_members`, and as fit in `memory_gib`; 0 is what there is."""


def options(sweep: Mapping) -> dict[str, Any]:
  """The keywords of `settings` that a sweep has, or their defaults."""
  return values.keywords(settings, {k: v for k, v in sweep.items() if k not in PARTS}, "config.sweep")


def members(config: Mapping) -> dict[str, tuple[Overrides, Config]]:
  """{member: (its overrides, its resolved config)} in order.

  Raises:
    UserError: the sweep describes no members, or the config of one is wrong.
  """
  base = {k: v for k, v in config.items() if k not in config_lib.SWEEP}
  found = {}
  known = {}
  for name, changed in overrides(config["sweep"]).items():
    whole = _merge(base, changed)
    try:
      found[name] = changed, config_lib.resolve(whole, known)
    except errors.UserError as e:
      raise errors.UserError(f"config.sweep, member {name}: {e}") from None
    if whole.get("mesh") != base.get("mesh"):
      raise errors.UserError(f"config.sweep, member {name}: mesh; members share the mesh")
  return found


def overrides(sweep: Mapping) -> dict[str, Overrides]:
  """{member: its overrides} in order, whether or not they suit a config; UserError for a sweep without members."""
  if not isinstance(sweep, Mapping) or not any(sweep.get(k) for k in PARTS):
    raise errors.UserError(f"config.sweep needs overrides in one of {', '.join(PARTS)}, not {shown(sweep)}")
  for k in PARTS:
    _check_mapping(sweep.get(k, {}), f"config.sweep.{k}")
  options(sweep)
  parts = {"list": _list, "zip": _zip, "product": _product, "random": _random}
  found = {}
  for combination in itertools.product(*(list(parts[k](sweep[k])) for k in PARTS if sweep.get(k))):
    name = "-".join(n for n, _ in combination)
    if name in found:
      raise errors.UserError(f"config.sweep has {name} twice")
    found[name] = functools.reduce(_merge, (change for _, change in combination), {})
  return found


def _merge(config: Mapping, overrides: Overrides) -> dict:
  """`config` with overrides in its sections."""
  out = dict(config)
  for section, change in overrides.items():
    whole = section in table_layout.NAMED and not (isinstance(change, Mapping) and "name" not in change)
    old = out.get(section, {})
    if not whole and not isinstance(old, Mapping):
      raise errors.UserError(f"config.sweep: config.{section} is a list; override it as a whole")
    if not whole:
      _check_mapping(change, f"config.sweep: what overrides config.{section}")
    out[section] = change if whole else dict(old) | dict(change)
  return out


def _axes(part: Mapping, where: str) -> list[tuple[str, str | None, Sequence]]:
  """(section, key or None, values) of each thing that varies."""
  axes = []
  for section, keys in part.items():
    _check_section(section, where)
    pairs = keys.items() if isinstance(keys, Mapping) else [(None, keys)]
    for key, options in pairs:
      if not isinstance(options, Sequence) or isinstance(options, str) or not options:
        place = f"{where}.{section}" + (f".{key}" if key else "")
        raise errors.UserError(f"{place} is a sequence of values, not {shown(options)}")
      axes.append((section, key, options))
  return axes


def _check_mapping(value: Any, where: str) -> None:
  if not isinstance(value, Mapping):
    raise errors.UserError(f"{where} is a mapping, not {shown(value)}")


def _check_section(section: str, where: str) -> None:
  errors.choose(section, dict.fromkeys(config_lib.SECTIONS), f"section {where}.")


def _change(axes: Sequence[tuple[str, str | None, Any]], chosen: Sequence) -> tuple[str, Overrides]:
  """(name, overrides) of one value for each axis."""
  changed = {}
  names = []
  for (section, key, _), value in zip(axes, chosen, strict=True):
    changed = _merge(changed, {section: value if key is None else {key: value}})
    names.append(_name(value) if key is None else f"{key}_{_name(value)}")
  return "-".join(names), changed


def _name(value: Any) -> str:
  """A value as part of a file name."""
  if isinstance(value, Mapping):
    value = value.get("name", value)
  if isinstance(value, Mapping | Sequence) and not isinstance(value, str):
    value = "+".join(_name(v) for v in (value.items() if isinstance(value, Mapping) else value))
  text = f"{value:g}" if isinstance(value, float) else str(value)
  return re.sub(r"[^\w.+-]+", "+", text).strip(".+")[:60]


def _product(part: Mapping) -> Iterator[tuple[str, Overrides]]:
  axes = _axes(part, "config.sweep.product")
  for chosen in itertools.product(*(options for *_, options in axes)):
    yield _change(axes, chosen)


def _zip(part: Mapping) -> Iterator[tuple[str, Overrides]]:
  axes = _axes(part, "config.sweep.zip")
  if len({len(options) for *_, options in axes}) > 1:
    lengths = ", ".join(f"{section}.{key}: {len(options)}" for section, key, options in axes)
    raise errors.UserError(f"config.sweep.zip: sequences of one length are needed, not {lengths}")
  for chosen in zip(*(options for *_, options in axes), strict=True):
    yield _change(axes, chosen)


def _list(part: Mapping) -> Iterator[tuple[str, Overrides]]:
  for name, overrides in part.items():
    if not isinstance(name, str) or not re.fullmatch(r"[\w+-][\w.+-]*", name):
      raise errors.UserError(f"config.sweep.list: a member's name is letters, digits, '_', '-', '+', not {name!r}")
    _check_mapping(overrides, f"config.sweep.list.{name}")
    for section in overrides:
      _check_section(section, f"config.sweep.list.{name}")
    yield name, dict(overrides)


def draws(*, n: Count = 8, seed: Seed = 0) -> None:
  """How many samples `random` draws, and from which seed."""


KINDS = {
  "uniform": lambda rng, n, low, high: rng.uniform(low, high, n),
  "log_uniform": lambda rng, n, low, high: np.exp(rng.uniform(np.log(low), np.log(high), n)),
  "choice": lambda rng, n, *options: [options[i] for i in rng.integers(0, len(options), n)],
}


def _random(part: Mapping) -> Iterator[tuple[str, Overrides]]:
  """Samples; the values of a key do not depend on which other keys there are."""
  drawn = []
  own = ("n", "seed")
  how = values.keywords(draws, {k: v for k, v in part.items() if k in own}, "config.sweep.random")
  for section, keys in part.items():
    if section in own:
      continue
    _check_section(section, "config.sweep.random")
    _check_mapping(keys, f"config.sweep.random.{section}")
    for key, options in keys.items():
      kind, arguments = _distribution(options, f"config.sweep.random.{section}.{key}")
      rng = np.random.default_rng([how["seed"], *f"{section}.{key}".encode()])
      found = KINDS[kind](rng, how["n"], *arguments)
      drawn.append((section, key, [x.item() if hasattr(x, "item") else x for x in found]))
  if not drawn:
    raise errors.UserError("config.sweep.random names no keys to draw values for")
  for i, chosen in enumerate(zip(*(v for *_, v in drawn), strict=True)):
    yield f"sample_{i}", _change(drawn, chosen)[1]


def _distribution(given: Any, where: str) -> tuple[str, Sequence]:
  """(kind, its arguments) of a key's random values."""
  if not isinstance(given, Mapping) or len(given) != 1:
    raise errors.UserError(f"{where} is {{'uniform', 'log_uniform' or 'choice': values}}, not {shown(given)}")
  ((kind, options),) = given.items()
  errors.choose(kind, KINDS, f"kind of {where}")
  if not isinstance(options, Sequence) or isinstance(options, str) or not options:
    raise errors.UserError(f"{where}.{kind} is a sequence of values, not {shown(options)}")
  if kind == "choice":
    return kind, options
  options = [values.check(float, x, f"{where}.{kind}") for x in options]
  if len(options) != 2 or options[0] > options[1] or (kind == "log_uniform" and options[0] <= 0):
    raise errors.UserError(f"{where}.{kind} is (low, high), not {shown(options)}")
  return kind, options
