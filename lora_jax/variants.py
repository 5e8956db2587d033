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

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lora_jax import config as config_lib, errors

NAMED = ("method", "task", "objective")  # sections whose keys are those of what they name
PARTS = ("list", "zip", "product", "random")  # the first changes slowest

Overrides = dict[str, dict[str, Any]]


def settings(*, max_members: int = 0, memory_gib: float = 0.0) -> dict:
  """How many members are trained at once: at most `max_members`, and as fit in `memory_gib`; 0 is what there is."""
  if max_members < 0 or memory_gib < 0:
    raise errors.UserError("config.sweep: max_members and memory_gib are at least 0")
  return dict(locals())


def members(config: Mapping) -> dict[str, tuple[Overrides, dict]]:
  """{member: (its overrides, its whole config)} in order.

  Raises:
    UserError: the sweep is none, or a member's config is wrong.
  """
  sweep, base = config["sweep"], {k: v for k, v in config.items() if k not in config_lib.SWEEP}
  if not isinstance(sweep, Mapping) or not any(sweep.get(k) for k in PARTS):
    raise errors.UserError(f"config.sweep needs overrides in one of {', '.join(PARTS)}, not {sweep!r:.100}")
  parts = {"list": _list, "zip": _zip, "product": _product, "random": _random}
  options = {k: v for k, v in sweep.items() if k not in PARTS}
  errors.check_keywords(settings, options, "config.sweep")
  settings(**options)
  found = {}
  for combination in itertools.product(*(list(parts[k](sweep[k])) for k in PARTS if sweep.get(k))):
    name, overrides = "-".join(n for n, _ in combination), {}
    for _, change in combination:
      overrides = _merge(overrides, change)
    if name in found:
      raise errors.UserError(f"config.sweep has {name} twice")
    whole = _merge(base, overrides)
    try:
      config_lib.check(whole)
    except errors.UserError as e:
      raise errors.UserError(f"config.sweep, member {name}: {e}") from None
    if whole["mesh"] != base["mesh"]:
      raise errors.UserError(f"config.sweep, member {name}: mesh; members share the mesh")
    found[name] = (overrides, whole)
  return found


def _merge(config: Mapping, overrides: Overrides) -> dict:
  """`config` with overrides in its sections."""
  out = dict(config)
  for section, change in overrides.items():
    whole = section in NAMED and not (isinstance(change, Mapping) and "name" not in change)
    old = out.get(section, {})
    if not whole and not isinstance(old, Mapping):
      raise errors.UserError(f"config.sweep: config.{section} is a list; override it as a whole")
    out[section] = change if whole else dict(old) | dict(change)
  return out


def _axes(part: Mapping, where: str) -> list[tuple[str, str | None, Sequence]]:
  """(section, key or None, values) of each thing that varies."""
  axes = []
  for section, keys in part.items():
    _check_section(section, where)
    pairs = keys.items() if isinstance(keys, Mapping) else [(None, keys)]
    for key, values in pairs:
      if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        place = f"{where}.{section}" + (f".{key}" if key else "")
        raise errors.UserError(f"{place} is a sequence of values, not {values!r:.100}")
      axes.append((section, key, values))
  return axes


def _check_section(section: str, where: str) -> None:
  errors.choose(section, dict.fromkeys(config_lib.SECTIONS), f"section {where}.")


def _change(axes: Sequence[tuple[str, str | None, Any]], values: Sequence) -> tuple[str, Overrides]:
  """(name, overrides) of one value for each axis."""
  overrides, names = {}, []
  for (section, key, _), value in zip(axes, values, strict=True):
    overrides = _merge(overrides, {section: value if key is None else {key: value}})
    names.append(_name(value) if key is None else f"{key}_{_name(value)}")
  return "-".join(names), overrides


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
  for values in itertools.product(*(values for *_, values in axes)):
    yield _change(axes, values)


def _zip(part: Mapping) -> Iterator[tuple[str, Overrides]]:
  axes = _axes(part, "config.sweep.zip")
  if len({len(values) for *_, values in axes}) > 1:
    lengths = ", ".join(f"{section}.{key}: {len(values)}" for section, key, values in axes)
    raise errors.UserError(f"config.sweep.zip: sequences of one length are needed, not {lengths}")
  for values in zip(*(values for *_, values in axes), strict=True):
    yield _change(axes, values)


def _list(part: Mapping) -> Iterator[tuple[str, Overrides]]:
  for name, overrides in part.items():
    if not re.fullmatch(r"[\w+-][\w.+-]*", name):
      raise errors.UserError(f"config.sweep.list: a member's name is letters, digits, '_', '-', '+', not {name!r}")
    if not isinstance(overrides, Mapping):
      raise errors.UserError(f"config.sweep.list.{name} is {{section: overrides}}, not {overrides!r:.100}")
    for section in overrides:
      _check_section(section, f"config.sweep.list.{name}")
    yield name, dict(overrides)


def _random(part: Mapping) -> Iterator[tuple[str, Overrides]]:
  """Samples; those of a key do not depend on what other keys there are."""
  n, seed = part.get("n", 8), part.get("seed", 0)
  kinds = {
    "uniform": lambda rng, a: rng.uniform(*a, n),
    "log_uniform": lambda rng, a: np.exp(rng.uniform(*np.log(a), n)),
    "choice": lambda rng, a: [a[i] for i in rng.integers(0, len(a), n)],
  }
  drawn = []
  for section, keys in part.items():
    if section in ("n", "seed"):
      continue
    _check_section(section, "config.sweep.random")
    for key, how in keys.items():
      where = f"config.sweep.random.{section}.{key}"
      if not isinstance(how, Mapping) or len(how) != 1:
        raise errors.UserError(f"{where} is {{'uniform', 'log_uniform' or 'choice': values}}, not {how!r:.100}")
      ((kind, values),) = how.items()
      errors.choose(kind, kinds, f"kind of {where}")
      if kind != "choice" and (len(values) != 2 or values[0] > values[1] or (kind == "log_uniform" and values[0] <= 0)):
        raise errors.UserError(f"{where}.{kind} is (low, high), not {values!r:.100}")
      rng = np.random.default_rng([seed, *f"{section}.{key}".encode()])
      found = kinds[kind](rng, values)
      drawn.append((section, key, [x.item() if hasattr(x, "item") else x for x in found]))
  for i, values in enumerate(zip(*(v for *_, v in drawn), strict=True)):
    yield f"sample_{i}", _change(drawn, values)[1]
