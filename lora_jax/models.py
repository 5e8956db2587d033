"""Pretrained models by name: `load` finds the files and builds the tree, `save` writes it back.

A name is resolved as a local directory or file, then an installed package that ships weights, then the Hugging Face
hub.
"""

import concurrent.futures
import dataclasses
import functools
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any, Literal

import einops
import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import (
  errors,
  families,
  memory,
  sharding as sharding_lib,
  tokenizer as tokenizer_lib,
  tree,
  values,
  weights,
)
from lora_jax.formats import checkpoint, gguf, hf, sources
from lora_jax.formats.pretrained import Model
from lora_jax.model import transformer
from lora_jax.values import Count, Name

apply = transformer.apply
DTYPES = ("bfloat16", "float32", "float16")
OWN = "lora_jax.json"  # the `transformer.Config` of a directory whose weights are our tree


def load(
  name: Name,
  dtype: Literal[DTYPES] | None = "bfloat16",
  sharding: Callable[[str, tuple[int, ...]], jax.sharding.Sharding | None] = lambda path, shape: None,
  head: Literal["lm", "mlm", "classification", "none"] | None = None,
  n_labels: Count | None = None,
  quantise: Callable[[str, jax.Array], Any] | None = None,
  **choices: Any,
) -> Model:
  """Loads a model.

  Args:
    name: a directory with config.json and safetensors, a .gguf file, a name of `sources.PACKAGES`, or
      `hf:org/name[@revision]`.
    dtype: of matrices and activations: "bfloat16", "float32" or "float16"; None is what the file has, which is
      float32 for GGUF.
    sharding: from a leaf's name and shape to where it lives; None is the default device.
    head: "lm", "mlm", "classification" or "none"; the checkpoint's own if None. A classifier that the checkpoint
      lacks starts at random, from its leaves' names alone.
    n_labels: outputs of a classifier; as many as the checkpoint has labels if None.
    quantise: from a leaf's name and the matrix of one layer, or of one expert of it, [*in, *out], to a `weights.Packed`
      of that, or to the matrix itself. It runs while a tensor is on its way: no stack of layers is ever dense.
    **choices: further fields of `transformer.Config`, such as `scan` or `remat`.

  Raises:
    UserError: if nothing is found, or the files are not what they should be.
  """
  given = {"name": os.fspath(name), "dtype": dtype, "head": head, "n_labels": n_labels, **choices}
  values.resolve(FIELDS, given, "config.model")
  path = sources.find(name)
  generation = {}
  if path.is_dir():
    hf_config, tensors = (hf.read_json(path / "config.json"), None) if (path / OWN).exists() else hf.open(path)
    tok = tokenizer_lib.from_directory(path) if (path / "tokenizer.json").exists() else None
    if (path / "generation_config.json").exists():
      generation = hf.read_json(path / "generation_config.json")
  else:
    tensors = gguf.open(path)
    hf_config, tok = tensors.config, tokenizer_lib.from_gguf(tensors.metadata, str(path))
  if "model_type" not in hf_config:
    raise errors.UserError(f"{path}: config.json has no model_type")
  with errors.parsing(f"{path}: config.json"):
    family = families.get(hf_config["model_type"])
    if head is not None:
      name = errors.choose(head, family.ARCHITECTURES, f"head of a {hf_config['model_type']} model")
      hf_config = hf_config | {"architectures": [name]}
    config = family.config(hf_config)
  if tensors is None:
    config, params = _restore(path, sharding)
    if (head or config.head, n_labels or config.n_labels) != (config.head, config.n_labels):
      raise errors.UserError(f"{path} was saved with the head {config.head!r}; convert it to 'hf' to change that")
    config, fresh = dataclasses.replace(config, dtype=dtype or config.dtype, **choices), ()
    params = jax.tree.map(lambda x, s: x.astype(s.dtype), params, transformer.shapes(config))
  else:
    dtype = dtype or _stored_dtype(tensors)
    config = dataclasses.replace(config, dtype=dtype, n_labels=n_labels or config.n_labels, **choices)
    config, params, fresh = _build(config, family, tensors, sharding, str(path), head is not None, quantise)
  return Model(name, config, params, tok, hf_config, str(path), fresh, generation)


# What a config may say of a model.
FIELDS = values.fields(load, without=("sharding", "quantise")) | values.fields(
  transformer.Config, only=transformer.RUNTIME
)


# Leaves that depend on the head: a checkpoint may have those of another head, or lack those of a new one.
HEADS = ("head/", "pooler/", "classifier/")
NEW = ("pooler/", "classifier/")
PIECE_BYTES = 2**25  # of a tensor that is on its way to the device
READERS = 4  # leaves that are read, decoded and compiled for at a time


def _build(
  config, family, tensors, sharding, where, new_head, quantise
) -> tuple[transformer.Config, dict, tuple[str, ...]]:
  """The parameter tree from a tensor source; refuses missing, unused and misshapen tensors, all in one message."""
  tensors = family.view(tensors) if hasattr(family, "view") else tensors
  bare = bool(family.PREFIX) and not any(n.startswith(family.PREFIX) for n in tensors.names())
  with errors.located(where):
    config, tensors = families.unify(family, config, tensors, bare)
  have = {n for n in tensors.names() if not re.search(family.IGNORED, n)}
  table = families.keys(family, config, bare)
  if config.head == "none" and not any(k.hf in have for k in table if k.path.startswith("pooler/")):
    config = dataclasses.replace(config, pooler="")
  want = tree.flatten(transformer.shapes(config))
  rows = {k.path: (k, _tensors(k, want[k.path].shape)) for k in table if k.path in want}
  fresh = [p for p, (_, r) in rows.items() if new_head and p.startswith(NEW) and not have & {n for _, n in r}]
  expected = {
    n: k.hf_shape(want[p].shape[k.hf.count("{}") :]) for p, (k, r) in rows.items() if p not in fresh for _, n in r
  }
  heads = [dataclasses.replace(config, head=h) for h in family.ARCHITECTURES]
  other = {k.hf for c in heads for k in families.keys(family, c, bare) if k.path.startswith(HEADS)}
  unused = have - expected.keys() - other
  unmapped = sorted(want.keys() - rows.keys())
  wrong = [
    f"{n} has shape {tensors.shape(n)}, but the config asks for {s}"
    for n, s in expected.items()
    if n in have and tensors.shape(n) != s
  ]
  problems = {"missing tensors": sorted(expected.keys() - have), "unexpected tensors": sorted(unused), "": wrong}
  problems["leaves without a name in the family's table"] = unmapped
  if said := [f"{k} {v}".strip() for k, v in problems.items() if v]:
    raise errors.UserError(f"{where} does not fit its config: " + "; ".join(said))

  memory.check({f"{p}, which {where} lacks": memory.size(want[p]) for p in fresh}, jax.device_count())
  device = jax.config.jax_default_device  # a `with` of it is this thread's alone

  def leaf(path):
    with jax.default_device(device):
      return read(path)

  def read(path):
    key, names = rows[path]
    place = sharding(path, want[path].shape)
    if path in fresh:
      x = transformer.init_leaf(config, jax.random.key(0), path, want[path])
      return x if place is None else sharding_lib.put_leaf(x, place)
    stack = key.hf.count("{}")
    one = jax.ShapeDtypeStruct(want[path].shape[stack:], want[path].dtype)
    packed = one if quantise is None else jax.eval_shape(functools.partial(quantise, path), one)
    is_packed = isinstance(packed, weights.Weight)
    places = _places(packed, want[path].shape[:stack], place)
    zeros = lambda s, where: jnp.zeros((*want[path].shape[:stack], *s.shape), s.dtype, device=where)
    buffer = jax.tree.map(zeros, packed, places)
    sizes = tuple(key.sizes(one.shape).items())
    write = _writer(key.pattern, sizes, str(one.dtype), places, quantise if is_packed else None, path)
    for index, n in names:
      x = tensors.read(n)
      for start, piece in [((*index, *[0] * key.ndim), x)] if is_packed else _pieces(key, x, index):
        buffer, finite = write(buffer, piece, start)
        if not finite:  # and waits, so that only one of the leaf is on the way
          raise errors.UserError(f"{where}: {n} has values that are not finite, as {config.dtype}")
    return buffer

  # Processes have to place leaves in the same order.
  with concurrent.futures.ThreadPoolExecutor(READERS if jax.process_count() == 1 else 1) as pool:
    leaves = dict(zip(want, pool.map(leaf, want), strict=True))
  return config, tree.unflatten(transformer.shapes(config), leaves), tuple(fresh)


def _stored_dtype(tensors: Any) -> str:
  """The dtype of the first matrix of a file, float32 if it is none of ours."""
  if isinstance(tensors, gguf.Checkpoint):
    return "float32"
  found = next((str(tensors.read(n).dtype) for n in tensors.names() if len(tensors.shape(n)) > 1), "float32")
  return found if found in DTYPES else "float32"


def _restore(path: pathlib.Path, sharding) -> tuple[transformer.Config, dict]:
  """The config and the tree of a directory that `save(form="orbax")` wrote."""
  given = hf.read_json(path / OWN)
  config = transformer.Config(**values.keywords(transformer.Config, given, str(path / OWN)))
  place = lambda k, s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding(k, s.shape))
  if not (path / "params" / "0").is_dir():
    raise errors.UserError(f"{path} has {OWN} but no params/0")
  with checkpoint.Checkpoints(path / "params", writes=False) as saved:
    return config, saved.restore(0, tree.map_named(place, transformer.shapes(config)))[0]


def _tensors(key: families.Key, shape: tuple[int, ...]) -> list[tuple[tuple[int, ...], str]]:
  """Index in our leaf and name of each tensor that a row stands for."""
  return [(index, key.hf.format(*index)) for index in np.ndindex(shape[: key.hf.count("{}")])]


def _pieces(key: families.Key, x: np.ndarray, index: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
  """(where it begins in our leaf, rows of a tensor) in pieces of about PIECE_BYTES if its rows are an axis of ours."""
  left, right = (side.split() for side in key.pattern.split("->"))
  step = max(1, len(x) * PIECE_BYTES // max(1, x.nbytes)) if x.ndim else 1
  if x.nbytes <= PIECE_BYTES or left[0] not in right:
    yield (*index, *[0] * key.ndim), x
    return
  for i in range(0, len(x), step):
    yield (*index, *(i if a == left[0] else 0 for a in right)), x[i : i + step]


def _places(one: Any, stack: tuple[int, ...], place: jax.sharding.Sharding | None) -> Any:
  """Where each tensor of a stack of weights like `one` is, `place` being that of the dense stack."""
  if not isinstance(one, weights.Weight) or not isinstance(place, jax.sharding.NamedSharding):
    return jax.tree.map(lambda _: place, one)
  stacked = jax.tree.map(lambda s: jax.ShapeDtypeStruct((*stack, *s.shape), s.dtype), one)
  fit = lambda s, spec: sharding_lib.fit(place.mesh, spec, s.shape)
  return jax.tree.map(fit, stacked, weights.place(stacked, place.spec))


@functools.cache
def _writer(pattern: str, sizes: tuple, dtype: str, place: Any, quantise: Callable | None, path: str) -> Callable:
  """A function that puts a tensor of a file, in our axes, in its place of a stacked leaf, on the device.

  The host holds one tensor of the leaf at a time, and the device no second copy of it. With `quantise` the leaf is a
  packed weight. The function also says whether all values are finite.
  """

  def write(buffer, x, start):
    x = einops.rearrange(x, pattern, **dict(sizes)).astype(dtype)

    def put(buffer, x):
      at = (*start, *[0] * buffer.ndim)[: buffer.ndim]
      return jax.lax.dynamic_update_slice(buffer, x.reshape((1,) * (buffer.ndim - x.ndim) + x.shape), at)

    return jax.tree.map(put, buffer, x if quantise is None else quantise(path, x)), jnp.isfinite(x).all()

  return jax.jit(write, donate_argnums=0, out_shardings=(place, None))


def export(model: Model) -> Iterator[tuple[str, np.ndarray]]:
  """(Hugging Face name, array in `config.dtype`) for every tensor, adapters merged."""
  flat = tree.flatten(weights.merge(model.params))
  dtype = jnp.dtype(model.config.dtype)
  for key in model.keys:
    x = flat[key.path]
    for index, name in _tensors(key, x.shape):
      yield name, key.to_hf(np.asarray(x[index]).astype(dtype))


def save(model: Model, directory: str | os.PathLike, form: str = "hf") -> None:
  """Writes a directory that `load` reads: config.json, the weights, generation_config.json and the tokenizer.

  config.json is the one that the model came with, with the architecture as `model.config` has it now.

  Args:
    form: of the weights, adapters merged. "hf" is safetensors as transformers loads them; "orbax" is our own tree,
      which is read without transposing and by each process only what it holds.

  Raises:
    UserError: naming the fields of `model.config` and the leaves that config.json has no place for.
  """
  errors.choose(form, dict.fromkeys(("hf", "orbax")), "form of weights")
  known = tree.flatten(transformer.shapes(model.config))
  if more := sorted(k for k in tree.names(weights.strip(model.params), is_leaf=weights.is_node) if k not in known):
    raise errors.UserError(f"config.json of {model.name} has no place for {', '.join(more)}; save the adapter instead")
  config = model.family.hf_config(model.config, model.hf_config)
  config = {k: v for k, v in config.items() if k != "dtype"} | {"torch_dtype": model.config.dtype}
  directory = pathlib.Path(directory)
  if form == "hf":
    hf.save(directory, config, export(model))
  else:
    with checkpoint.Checkpoints(directory / "params") as saved:
      saved.save(0, weights.merge(model.params))
    hf.write_json(directory / OWN, dataclasses.asdict(model.config))
    hf.write_json(directory / "config.json", config)
  names = ("decoder_start_token_id", "bos_token_id", "eos_token_id", "pad_token_id")
  tokens = {k: config[k] for k in names if config.get(k) is not None}
  generation = model.generation or tokens
  if model.config.head == "lm" and generation:
    hf.write_json(directory / "generation_config.json", generation)
  if model.tokenizer is not None:
    model.tokenizer.save(directory)
