"""Adapters in the format of the Hugging Face `peft` library, without torch.

A directory holds adapter_config.json and adapter_model.safetensors, whose keys are `base_model.model.` + the module's
Hugging Face name + a suffix. What stands in them is each method's own: a method module that has a PEFT form defines
`PEFT_TYPE`, `to_peft(params, keys) -> (config, tensors) or None` and
`from_peft(params, keys, config, tensors) -> params`.
"""

import json
import os
import pathlib
from typing import Any

import numpy as np
import safetensors.numpy

from lora_jax import errors, methods, models
from lora_jax.formats import hf

PREFIX = "base_model.model."
METHODS = {m.PEFT_TYPE: m for m in map(methods.get, methods.names()) if hasattr(m, "PEFT_TYPE")}


def save(model: models.Model, params: Any, directory: str | os.PathLike) -> None:
  """Writes the adapter in `params` as a directory that `peft.PeftModel.from_pretrained` loads.

  Raises:
    UserError: `params` holds no adapter that has a PEFT form.
  """
  directory = pathlib.Path(directory)
  forms = [form for m in METHODS.values() if (form := m.to_peft(params, model.keys))]
  if len(forms) != 1:
    raise errors.UserError(f"the parameters hold {len(forms)} kinds of adapters with a PEFT form; one can be saved")
  config, tensors = forms[0]
  config = {
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": model.hub_name,
    "inference_mode": True,
    **config,
  }
  directory.mkdir(parents=True, exist_ok=True)
  # The config, which makes a directory an adapter, goes first and comes last: a killed writer leaves no mixture.
  (directory / "adapter_config.json").unlink(missing_ok=True)
  tensors = {PREFIX + k: np.ascontiguousarray(x) for k, x in tensors.items()}
  safetensors.numpy.save_file(tensors, directory / ".tensors.tmp", metadata={"format": "pt"})
  os.replace(directory / ".tensors.tmp", directory / "adapter_model.safetensors")
  (directory / ".config.tmp").write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
  os.replace(directory / ".config.tmp", directory / "adapter_config.json")


def load(model: models.Model, directory: str | os.PathLike) -> Any:
  """The parameters of `model` with the adapter of a PEFT directory on them, nothing trained or merged.

  Raises:
    UserError: a file is missing or damaged, the adapter is of a kind or has a feature that is not supported, or a
      tensor does not belong to this model. All misfits are listed.
  """
  directory = pathlib.Path(directory)
  config = hf.read_json(directory / "adapter_config.json")
  method = errors.choose(str(config.get("peft_type")), METHODS, f"peft_type in {directory / 'adapter_config.json'}:")
  source = hf.Tensors([directory / "adapter_model.safetensors"])
  foreign = [k for k in source.names() if not k.startswith(PREFIX)]
  if foreign:
    raise errors.UserError(f"{directory}: keys without the prefix {PREFIX!r}: {foreign[:5]}")
  tensors = {k.removeprefix(PREFIX): source.read(k) for k in source.names()}
  try:
    return method.from_peft(model.params, model.keys, config, tensors)
  except errors.UserError as e:
    raise errors.UserError(f"{directory}: {e}") from None
