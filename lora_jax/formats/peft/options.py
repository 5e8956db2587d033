"""Types and ranges of the values in an adapter_config.json, by key."""

import math
import numbers
import pathlib
import sys
from collections.abc import Collection, Mapping
from typing import Any

from lora_jax import errors, patterns

SMALL = 64  # ranks up to this are always accepted, since they may be unused defaults
MAY_BE_NULL = frozenset(
  "vera_dropout lora_dropout rank_pattern alpha_pattern modules_to_save num_virtual_tokens total_step "
  "target_modules exclude_modules feedforward_modules layers_to_transform layers_pattern target_parameters "
  "trainable_token_indices token_indices task_type num_transformer_submodules".split()
)


def check(where: pathlib.Path, config: Mapping, modules: Collection[str], longest: int) -> None:
  """Raises UserError that lists values of the wrong type, or for a regex that takes too long.

  Args:
    where: path of the file, for messages.
    modules: the names that the regexes are applied to.
    longest: size of the longest axis of the adapter's tensors, which no rank exceeds.
  """
  bad = [
    f"{k} is {config[k]!r:.100}, expected {what}"
    for k, (what, fits) in _rules(config, max(longest, SMALL)).items()
    if k in config and not (fits(config[k]) or config[k] is None and k in MAY_BE_NULL)
  ]
  if bad:
    raise errors.UserError(f"{where}: {'; '.join(bad)}")
  whole = [config.get(k) for k in ("target_modules", "exclude_modules", "feedforward_modules")]
  layers = config.get("layers_pattern") or ()
  patterns.check([*filter(_text, whole)], modules, str(where), r"\A(?:{})\Z")
  patterns.check([layers] if _text(layers) else layers, modules, str(where), r"\A.*\.{}\.(\d+)\.")
  patterns.check(
    [*(config.get("rank_pattern") or ()), *(config.get("alpha_pattern") or ())], modules, str(where), r"\A(.*\.)?({})$"
  )


def _number(x: Any, kind: type = numbers.Real, least: float = -math.inf) -> bool:
  return isinstance(x, kind) and not isinstance(x, bool) and abs(x) <= sys.float_info.max and x >= least


def _is_list(fits):
  return lambda x: isinstance(x, list) and all(map(fits, x))


def _is_table(fits):
  return lambda x: isinstance(x, Mapping) and all(map(fits, x.values()))


def _text(x: Any) -> bool:
  return isinstance(x, str)


def _rules(config: Mapping, longest: int) -> dict:
  """Returns {key: (what its value should be, a function that checks a value)}."""
  whole = lambda x: _number(x, numbers.Integral, 0)
  positive = lambda x: _number(x, numbers.Integral, 1)
  rank = lambda x: positive(x) and x <= longest
  names, wholes = _is_list(_text), _is_list(whole)
  rules = {
    "r": (f"a whole number from 1 to {longest}, the longest axis of a tensor", rank),
    "lora_alpha": ("a number", _number),
    "lora_dropout": ("a number in [0, 1)", lambda x: _number(x, least=0) and x < 1),
    "rank_pattern": ("an object of regular expressions and positive whole numbers", _is_table(rank)),
    "alpha_pattern": ("an object of regular expressions and numbers", _is_table(_number)),
    "use_rslora": ("true or false", lambda x: isinstance(x, bool)),
    "modules_to_save": ("a list of names", names),
    "peft_type": ("a string", _text),
    "task_type": ("a string", _text),
    "layers_to_transform": ("a whole number or a list of them", lambda x: whole(x) or wholes(x)),
    "target_parameters": ("a list of names", names),
    "token_indices": ("a list of whole numbers", wholes),
    "trainable_token_indices": (
      "a list of whole numbers, or an object of names and such lists",
      lambda x: wholes(x) or _is_table(wholes)(x),
    ),
  }
  several = ("target_modules", "exclude_modules", "feedforward_modules", "layers_pattern")
  rules |= dict.fromkeys(several, ("a regular expression or a list of names", lambda x: _text(x) or names(x)))
  rules |= dict.fromkeys(("init_r", "num_virtual_tokens", "num_transformer_submodules"), rules["r"])
  rules["vera_dropout"] = rules["lora_dropout"]
  if config.get("peft_type") == "LOKR":  # a rank that is too large means a whole matrix
    rules |= {"r": ("a positive whole number", positive), "rank_pattern": ("an object of ranks", _is_table(positive))}
  if config.get("peft_type") == "ADALORA":  # the pattern says which of the ranks are in use
    flags = _is_table(_is_list(lambda v: isinstance(v, bool)))
    rules["rank_pattern"] = ("an object of names and lists of true and false", flags)
    rules |= dict.fromkeys(("target_r", "deltaT", "total_step"), ("a positive whole number", positive))
    rules |= dict.fromkeys(("tinit", "tfinal"), ("a whole number >= 0", whole))
    rules |= dict.fromkeys(("beta1", "beta2"), ("a number in (0, 1)", lambda x: _number(x) and 0 < x < 1))
    rules["orth_reg_weight"] = ("a number >= 0", lambda x: _number(x, least=0))
  return rules
