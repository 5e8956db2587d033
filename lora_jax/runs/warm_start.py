"""Training that starts from an adapter: of another task, as LoRA on MRPC, RTE and STS-B starts from MNLI's.

Hu et al. 2021, https://arxiv.org/abs/2106.09685, section 5.1. What the adapter holds takes the place of initial
values; the classifier too, unless it has another number of outputs: then all of it is new.
"""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import errors, models, tree
from lora_jax.formats import adapter, hf, peft
from lora_jax.model import transformer
from lora_jax.weights import fused

FIXED = ("scale", "rank")  # leaves that the config decides rather than training or chance


def find(directory: str | os.PathLike) -> pathlib.Path:
  """The local directory of an adapter to start from; UserError if it is not there, or not yet."""
  path = peft.resolve(directory)
  if not (path / "adapter_config.json").is_file():
    raise errors.UserError(
      f"config.train.init_from={os.fspath(directory)!r}: no adapter_config.json there; an adapter is what a run leaves "
      "in WORKDIR/adapter, and a whole model is loaded by config.model.name"
    )
  return path


def start(model: models.Model, params: Any, mask: Any, directory: str | os.PathLike) -> Any:
  """`params` that compute what the adapter does, but for a head of another shape.

  Args:
    model: the pretrained model, which is left as it is.
    params, mask: what a method made of it, and what of that is trained.
    directory: of an adapter, in PEFT's format or ours, or `hf:org/name[@revision]`.

  Returns:
    The tree of `params`. What it trains and the adapter lacks, such as further matrices, keeps its initial values.

  Raises:
    UserError: no adapter, one of another base, method, rank or scale, or one that holds more than `params` train.
  """
  where = f"config.train.init_from={os.fspath(directory)!r}"
  path = find(directory)
  given, ours, trained = _given(model, path), tree.flatten(params), tree.flatten(mask)
  head = {k for k in model.head_leaves if k in given}
  if any(k not in ours or ours[k].shape != given[k].shape for k in head):
    given = {k: x for k, x in given.items() if k not in head}
    head = set()
  wrong = _misfits(given, ours, trained, model)
  if not wrong and not any(trained[k] for k in given.keys() - head):
    wrong = ["it holds nothing that is trained here"]
  if wrong:
    more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    raise errors.UserError(
      f"{where} does not fit: {'; '.join(wrong[:3])}{more}. config.method must be that of the adapter, with its rank "
      "and alpha and at least its targets"
    )
  return tree.map_named(lambda k, x: given[k].astype(x.dtype) if k in given else x, params)


def _given(model: models.Model, path: os.PathLike) -> dict[str, jax.Array]:
  """{name: leaf} of what an adapter has that the pretrained model has not, or has with other values."""
  model = dataclasses.replace(model, params=_with_outputs(model, path))
  loaded = adapter.load(model, path)
  kept = set(tree.names(fused.like(model.params, loaded))) - fused.altered(loaded, model.params)
  return {k: x for k, x in tree.flatten(loaded).items() if fused.plain(k) not in kept}


def _with_outputs(model: models.Model, path: os.PathLike) -> Any:
  """The model's parameters with a head of as many outputs as the adapter has one for."""
  tensors = hf.Tensors([path / "adapter_model.safetensors"])
  own = "classifier/kernel" in tensors.names()
  n = tensors.shape("classifier/kernel")[-1] if own else peft.head(path).get("n_labels")
  if n is None or model.config.head != "classification":
    return model.params
  shapes = tree.flatten(transformer.shapes(dataclasses.replace(model.config, n_labels=n)))
  fits = lambda k, x: k not in model.head_leaves or x.shape == shapes[k].shape
  return tree.map_named(lambda k, x: x if fits(k, x) else jnp.zeros(shapes[k].shape, x.dtype), model.params)


def _misfits(given: Mapping, ours: Mapping, trained: Mapping, model: models.Model) -> list[str]:
  """What an adapter's leaves have no place for."""
  pretrained, found = set(tree.names(model.params)), []
  for k, x in given.items():
    if k not in ours or (fused.whole(fused.plain(k)) in pretrained and not trained[k]):
      found.append(f"it has {k}, which is not trained here")
    elif ours[k].shape != x.shape:
      found.append(f"{k} is {x.shape}, here {ours[k].shape}")
    elif k.rpartition("/")[2] in FIXED and not trained[k] and not np.allclose(x, ours[k], rtol=1e-5):
      found.append(f"{k} is {np.unique(x).tolist()}, here {np.unique(ours[k]).tolist()}")
  return found
