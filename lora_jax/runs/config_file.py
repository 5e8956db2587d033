"""Config files and what the command line changes in them.

A file is Python with a function `get_config(arg)` that returns an `ml_collections.ConfigDict`, and is named
`path[:arg]`. A change is `section.key=text`: of any key that the code takes, whether the file names it or not.
"""

import importlib.util
import inspect
import os
import pathlib
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from lora_jax import errors, progress, values
from lora_jax.runs import config as config_lib
from lora_jax.training import objectives


def load(name: str) -> dict:
  """The nested dicts of a config file; UserError names the line of whatever goes wrong in it."""
  file, colon, arg = name.partition(":")
  path = pathlib.Path(file).expanduser()
  if not path.is_file():
    raise errors.UserError(f"--config={name}: there is no file {file}")
  function = getattr(_module(path), "get_config", None)
  if not callable(function):
    raise errors.UserError(f"{file} has no function get_config(), which returns the config")
  takes = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.KEYWORD_ONLY]
  if colon and not takes:
    raise errors.UserError(f"{file} takes no argument, and is given {arg!r}")
  if needed := [p.name for p in takes if p.default is p.empty][: not colon]:
    raise errors.UserError(f"{file} needs an argument: --config={file}:{needed[0].upper()}")
  try:
    config = function(arg) if colon else function()
  except (Exception, SystemExit) as e:
    raise _fault(path, e) from e
  if not isinstance(config, ml_collections.ConfigDict | Mapping):
    raise errors.UserError(f"{file}: get_config() returned {values.shown(config)}, not a config")
  try:
    return config.to_dict() if isinstance(config, ml_collections.ConfigDict) else dict(config)
  except Exception as e:  # a reference to a field that has no value
    raise _fault(path, e) from e


def _module(path: pathlib.Path) -> Any:
  spec = importlib.util.spec_from_file_location(path.stem, path)
  if spec is None:
    raise errors.UserError(f"{path} is no Python file")
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
  except (Exception, SystemExit) as e:
    raise _fault(path, e) from e
  return module


def _fault(path: pathlib.Path, error: BaseException) -> errors.UserError:
  """What a config file raises, and at which of its lines."""
  line = error.lineno if isinstance(error, SyntaxError) else None
  for frame in traceback.extract_tb(error.__traceback__):
    if os.path.abspath(frame.filename) == str(path.absolute()):
      line = frame.lineno
  plain = error.msg if isinstance(error, SyntaxError) else error.args[0] if error.args else ""
  what = " ".join(str(plain if isinstance(error, SyntaxError | KeyError) else error).split())
  place = f"{path}:{line}" if line else f"{path}"
  return errors.UserError(f"{place}: {type(error).__name__}: {what}" if what else f"{place}: {type(error).__name__}")


def change(config: Mapping, changes: Mapping[str, str], file: str = "") -> dict:
  """The config with the changes {"section.key": text} of a command line.

  What selects others comes first: whole sections, then names. Where a task, objective or method gets another name the
  keys that `file` gave to the one before go, as they are not its own; which is said.

  Raises:
    UserError: a key that the code does not take, or a value of a wrong type or range.
  """
  config = {k: dict(v) if isinstance(v, Mapping) else v for k, v in config.items()}
  depth = lambda path: (path.count(".") > 0, not path.endswith(".name"))
  for path, text in sorted(changes.items(), key=lambda item: depth(item[0])):
    section, *keys = path.split(".")
    if section in config_lib.SWEEP:
      _put(config, path.split("."), values.literal(text))
    elif section not in config_lib.SECTIONS:
      raise errors.UserError(f"unknown section config.{section}; {errors.nearest(section, config_lib.SECTIONS)}")
    elif not keys:
      config[section] = values.literal(text)
    elif keys == ["name"] and section not in config_lib.FIELDS:
      config[section] = _renamed(config.get(section, {}), section, text, file)
    else:
      _put(config, path.split("."), _value(config, section, keys, text))
  return config


def _renamed(old: Any, section: str, name: str, file: str) -> Any:
  """A section with another name, without the keys that are another's."""
  if not isinstance(old, Mapping):
    return {"name": name}
  if dropped := {k: v for k, v in old.items() if k != "name"} if old.get("name") not in (name, None, "") else {}:
    keys = ", ".join(f"{k}={values.shown(v)}" for k, v in dropped.items())
    progress.say(f"config.{section}.name={name}: what {file or 'the config'} says of {old['name']} is not used: {keys}")
  return {k: v for k, v in old.items() if k not in dropped} | {"name": name}


def _value(config: Mapping, section: str, keys: Sequence[str], text: str) -> Any:
  """What `text` stands for as a value of a key."""
  where, given = f"config.{section}", config.get(section, {})
  if not isinstance(given, Mapping):
    raise errors.UserError(f"{where} is a list; give it as a whole: --{where}='[...]'")
  fields = config_lib.FIELDS.get(section)
  if fields is None:
    fields = config_lib.named_fields(section, given.get("name", objectives.DEFAULT if section == "objective" else ""))
  if keys[0] not in fields:
    raise errors.UserError(f"unknown key {where}.{keys[0]}; {errors.nearest(keys[0], fields)}")
  if len(keys) > 1:  # an entry of a mapping, such as rank_pattern; what it has to be the whole says
    return values.literal(text)
  return values.parse(fields[keys[0]].hint, text, f"{where}.{keys[0]}")


def _put(config: dict, keys: Sequence[str], value: Any) -> None:
  at = config
  for i, k in enumerate(keys[:-1]):
    inner = at.get(k)
    if inner is not None and not isinstance(inner, Mapping):
      raise errors.UserError(f"config.{'.'.join(keys[: i + 1])} has no keys; give it as a whole")
    at[k] = dict(inner or {})
    at = at[k]
  at[keys[-1]] = value
