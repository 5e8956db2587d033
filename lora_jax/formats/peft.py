"""Adapters in the format of the Hugging Face `peft` library, without torch.

A directory holds adapter_config.json and adapter_model.safetensors, whose keys are `base_model.model.` + the module's
Hugging Face name + a suffix. What stands in them is each method's own: a method module that has a PEFT form defines
`PEFT_TYPE`, `to_peft(params, keys) -> (config, tensors) or None` and
`from_peft(params, keys, config, tensors) -> params`.
"""

import math
import numbers
import os
import pathlib
import re
import sys
from collections.abc import Collection, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax import errors, families, methods, models, transformer, tree, weights
from lora_jax.formats import hf, hub

PREFIX = "base_model.model."
METHODS = {m.PEFT_TYPE: m for m in map(methods.get, methods.names()) if hasattr(m, "PEFT_TYPE")}


def save(model: models.Model, params: Any, directory: str | os.PathLike, trained: Collection[str] = ()) -> None:
  """Writes the adapter in `params` as a directory that `peft.PeftModel.from_pretrained` loads.

  Args:
    trained: names of leaves that were trained whole, such as a classifier's; they become `modules_to_save`.

  Raises:
    UserError: `params` holds no adapter that has a PEFT form.
  """
  directory = pathlib.Path(directory)
  forms = [form for m in METHODS.values() if (form := m.to_peft(params, model.keys))]
  if len(forms) != 1:
    raise errors.UserError(f"the parameters hold {len(forms)} kinds of adapters with a PEFT form; one can be saved")
  config, tensors = forms[0]
  flat = tree.flatten(params, is_leaf=weights.is_node)
  whole = [key for key in model.keys if key.path in trained]
  tensors |= {key.hf: key.to_hf(np.asarray(flat[key.path], np.float32)) for key in whole}
  prefix = model.family.PREFIX
  config = {
    "task_type": _task_type(model.config),
    "modules_to_save": sorted({key.hf.removeprefix(prefix).split(".")[0] for key in whole}) or None,
    "base_model_name_or_path": model.hub_name,
    "revision": model.revision,
    "inference_mode": True,
    **config,
  }
  directory.mkdir(parents=True, exist_ok=True)
  # The config, which makes a directory an adapter, goes first and comes last: a killed writer leaves no mixture.
  (directory / "adapter_config.json").unlink(missing_ok=True)
  tensors = {PREFIX + k: np.ascontiguousarray(x) for k, x in tensors.items()}
  hf.save_tensors(directory / ".tensors.tmp", tensors)
  os.replace(directory / ".tensors.tmp", directory / "adapter_model.safetensors")
  hf.write_json(directory / "adapter_config.json", config)


def _task_type(config: transformer.Config) -> str:
  if config.encoder_layers:
    return "SEQ_2_SEQ_LM"
  return {"lm": "CAUSAL_LM", "classification": "SEQ_CLS"}.get(config.head, "FEATURE_EXTRACTION")


def _replace(params: Any, whole: Mapping[str, tuple[families.Key, np.ndarray]]) -> Any:
  """`params` with whole leaves of an adapter in place of the base's; UserError for a wrong shape."""

  def leaf(k, x):
    if k not in whole:
      return x
    key, tensor = whole[k]
    if tensor.shape != key.hf_shape(x.shape):
      raise errors.UserError(f"{key.hf} is {tensor.shape}, expected {key.hf_shape(x.shape)}")
    return jnp.asarray(key.from_hf(tensor, x.shape))

  return tree.map_named(leaf, params)


def resolve(name: str | os.PathLike) -> pathlib.Path:
  """The local directory of an adapter; downloads if the name is `hf:org/name[@revision]`."""
  path, name = pathlib.Path(name), os.fspath(name)
  fetched = name.startswith("hf:") and not path.exists()
  return hub.download_adapter(name.removeprefix("hf:")) if fetched else path


def head(directory: str | os.PathLike) -> dict[str, Any]:
  """Arguments of `models.load` for the model that an adapter is of: a classifier of as many labels as it holds."""
  directory = resolve(directory)
  if hf.read_json(directory / "adapter_config.json").get("task_type") != "SEQ_CLS":
    return {}
  table = [key for family in map(families.get, families.names()) for key in family.KEYS]
  classifiers = {PREFIX + key.hf for key in table if key.path == "classifier/kernel"}
  source = hf.Tensors([directory / "adapter_model.safetensors"])
  n_labels = next((source.shape(k)[0] for k in source.names() if k in classifiers and source.shape(k)), None)
  return {"head": "classification", "n_labels": n_labels}


def _check(where: pathlib.Path, config: Mapping) -> None:
  """Raises UserError listing the numbers and patterns of an adapter's config that are of a wrong type."""

  def number(x, kind=numbers.Real, least=-math.inf):
    return isinstance(x, kind) and not isinstance(x, bool) and abs(x) <= sys.float_info.max and x >= least

  def patterns(x, fits):
    return isinstance(x, Mapping) and all(_is_regex(k) and fits(v) for k, v in x.items())

  rank = lambda x: number(x, numbers.Integral, 1)
  rules = {
    "r": ("a positive whole number", rank),
    "lora_alpha": ("a number", number),
    "lora_dropout": ("a number in [0, 1)", lambda x: number(x, least=0) and x < 1),
    "rank_pattern": ("an object of regular expressions and positive whole numbers", lambda x: patterns(x, rank)),
    "alpha_pattern": ("an object of regular expressions and numbers", lambda x: patterns(x, number)),
    "use_rslora": ("true or false", lambda x: isinstance(x, bool)),
    "modules_to_save": ("a list of names", lambda x: isinstance(x, list) and all(isinstance(k, str) for k in x)),
  }
  optional = ("lora_dropout", "rank_pattern", "alpha_pattern", "modules_to_save")  # may be null
  bad = [
    f"{k} is {config[k]!r:.100}, expected {what}"
    for k, (what, fits) in rules.items()
    if k in config and not (fits(config[k]) or config[k] is None and k in optional)
  ]
  if bad:
    raise errors.UserError(f"{where}: {'; '.join(bad)}")


def _is_regex(x: str) -> bool:
  try:
    return bool(re.compile(f"(.*\\.)?({x})$"))
  except re.error:
    return False


def load(model: models.Model, directory: str | os.PathLike) -> Any:
  """The parameters of `model` with the adapter of a PEFT directory on them, nothing trained or merged.

  Args:
    directory: or `hf:org/name[@revision]`.

  Raises:
    UserError: a file is missing or damaged, the adapter is of a kind or has a feature that is not supported, or a
      tensor does not belong to this model. All misfits are listed.
  """
  directory = resolve(directory)
  config = hf.read_json(directory / "adapter_config.json")
  _check(directory / "adapter_config.json", config)
  method = errors.choose(str(config.get("peft_type")), METHODS, f"peft_type in {directory / 'adapter_config.json'}:")
  source = hf.Tensors([directory / "adapter_model.safetensors"])
  foreign = [k for k in source.names() if not k.startswith(PREFIX)]
  if foreign:
    raise errors.UserError(f"{directory}: keys without the prefix {PREFIX!r}: {foreign[:5]}")
  tensors = {k.removeprefix(PREFIX): source.read(k) for k in source.names()}
  saved = config.get("modules_to_save") or []
  whole = {
    key.path: (key, tensors.pop(key.hf)) for key in model.keys if saved and "{}" not in key.hf and key.hf in tensors
  }
  config = {k: v for k, v in config.items() if k != "modules_to_save" or not whole}
  try:
    params = _replace(model.params, whole)
    return method.from_peft(params, model.keys, config, tensors)
  except errors.UserError as e:
    raise errors.UserError(f"{directory}: {e}") from None
