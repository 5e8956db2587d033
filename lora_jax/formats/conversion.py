"""Advice on files that are refused: pickles, and tensors under names that other libraries have changed.

Each message ends in a line of Python that converts the file.
"""

import pathlib
import re
from collections.abc import Mapping, Sequence

from lora_jax import errors

PICKLE = "is pickled, which can run code, and is never loaded. If you trust it, convert it in Python: "
# Part of a tensor's name -> who puts it there. DDP puts the last one before every name; else it is the model's own.
WRAPPERS = {
  r"_orig_mod\.": "torch.compile",
  r"_checkpoint_wrapped_module\.": "activation checkpointing",
  r"_fsdp_wrapped_module\.": "FSDP",
  r"^module\.": "DistributedDataParallel",
}
# A tensor of an adapter below the adapter's name.
PARTS = r"\.(?:lora_\w+|hada_\w+|lokr_\w+|ia3_l|vera_lambda_\w|ln_tuning_layers|trainable_tokens_delta)"
ADAPTER = re.compile(rf"{PARTS}\.(?!weight$|bias$)(\w+)(?:\.weight|\.bias)?$")


def of_pickle(path: str) -> str:
  """A clause for the message that a safetensors file is missing: how to convert the pickle beside it, if any."""
  pickle = pathlib.Path(path).with_suffix(".bin")
  if not pickle.exists():
    return ""
  code = (
    f"import torch, safetensors.torch; loaded = torch.load({str(pickle)!r}, weights_only=True); "
    f"safetensors.torch.save_file({{k: x.clone() for k, x in loaded.items()}}, {path!r}, {{'format': 'pt'}})"
  )
  return f"; {pickle.name} beside it {PICKLE}{code}"


def of_pickled_model(directory: pathlib.Path, found: Sequence[str], config: Mapping) -> str:
  """A clause for the message that a directory has no safetensors: how to convert its pickled model, if it has one."""
  pickles = [k for k in found if re.fullmatch(r"pytorch_model.*\.bin", k)]
  if not pickles:
    return ""
  named = config.get("architectures")
  cls = named[0] if isinstance(named, list) and named and str(named[0]).isidentifier() else "AutoModel"
  place = repr(str(directory))
  code = f"import transformers; transformers.{cls}.from_pretrained({place}).save_pretrained({place})"
  return f"; {pickles[0]} {PICKLE}{code}"


def check_names(where: Mapping[str, Mapping]) -> None:
  """Raises UserError for tensors of a model that was saved together with a wrapper around it.

  Args:
    where: {name of a tensor: {"filename": the file that has it}}.
  """
  names = {pattern: [k for k in where if re.search(pattern, k)] for pattern in WRAPPERS}
  names = {p: found for p, found in names.items() if found and (p[0] != "^" or len(found) == len(where))}
  if names:
    said = ", ".join(f"{found[0]} is a name given by {WRAPPERS[p]}" for p, found in names.items())
    raise errors.UserError(_renaming(where, said, "|".join(names), ""))
  found = next((m for k in where if (m := ADAPTER.search(k))), None)
  if found:
    said = f"{found.string} is from a PeftModel's state_dict, which has names of adapters, here {found[1]!r}; PEFT's "
    name = re.escape(found[1])
    pattern = rf"(\.modules_to_save)?\.{name}((?<=vector\.{name})\.weight)?(?=\.|$)"
    raise errors.UserError(
      _renaming(where, f"{said}save_pretrained removes them", pattern, f" if {'.' + found[1]!r} in k")
    )


def _renaming(where: Mapping[str, Mapping], said: str, pattern: str, which: str) -> str:
  paths = sorted({x["filename"] for x in where.values()})
  code = (
    "import re, safetensors.torch as st; "
    f"rename = lambda tensors: {{re.sub({pattern!r}, '', k): x for k, x in tensors.items(){which}}}; "
    f"[st.save_file(rename(st.load(open(path, 'rb').read())), path, {{'format': 'pt'}}) for path in {paths!r}]"
  )
  return f"{paths[0]}: {said}. To remove it, in Python: {code}"
