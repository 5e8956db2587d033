"""What a run has trained, in a directory of its own: in PEFT's format where that has a place for it, else in ours.

Both have an adapter_config.json and an adapter_model.safetensors. In ours the config holds the methods and their
keywords, from which the tree follows, and the tensors have the names of its leaves: those that were trained, and those
that the methods have added.
"""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import errors, methods, patterns, tree, weights
from lora_jax.formats import hf, peft
from lora_jax.formats.pretrained import Model
from lora_jax.model import transformer
from lora_jax.weights import fused

TYPE = "LORA_JAX"


def save(
  model: Model, params: Any, mask: Any, method: methods.Method, directory: str | os.PathLike, steps: int = 0
) -> None:
  """Writes the adapter in `params` as a directory that `load` reads, with all in which they differ from `model.params`.

  Args:
    mask: which leaves were trained.
    method: what `methods.init` was called with.
    steps: how many the training had, if it is known.
  """
  trained = [k for k, m in tree.flatten(mask).items() if m]
  # Leaves that no model of this config has, such as biases that BitFit adds: transformers would drop them.
  stripped = tree.names(weights.strip(params), is_leaf=weights.is_node)
  added = set(stripped) - set(tree.names(transformer.shapes(model.config)))
  try:
    if not added:
      peft.save(model, params, directory, trained, method, steps)
      return
  except peft.NoForm:
    pass
  flat = tree.flatten(params)
  kept = set(tree.names(fused.like(weights.strip(params), params))) - fused.altered(params, model.params)
  named = {k: x for k, x in flat.items() if k in trained or fused.plain(k) not in kept or fused.whole(k) in added}
  config = {
    "peft_type": TYPE,
    "method": methods.prepare(method),
    "base_model_name_or_path": model.hub_name,
    "revision": model.revision,
  }
  peft.write(pathlib.Path(directory), config, {k: np.asarray(x, order="C") for k, x in named.items()})


def load(model: Model, directory: str | os.PathLike) -> Any:
  """The parameters of `model` with an adapter on them; `directory` may be `hf:org/name[@revision]`.

  Raises:
    UserError: see `peft.load`. All misfits are listed.
  """
  directory = peft.resolve(directory)
  config = hf.read_json(directory / "adapter_config.json")
  if config.get("peft_type") != TYPE:
    return peft.load(model, directory)
  with errors.parsing(f"the adapter {directory} is damaged or of an unknown kind"):
    return _load(model, directory, config)


def _load(model: Model, directory: pathlib.Path, config: Mapping) -> Any:
  tensors = hf.Tensors([directory / "adapter_model.safetensors"])
  if not isinstance(config.get("method"), list):
    raise errors.UserError(f"{directory / 'adapter_config.json'}: 'method' is no list")
  try:
    patterns.check([*patterns.texts(config["method"])], tree.names(model.params), "method")
    methods.resolve(config["method"])
    shapes, mask = _shapes(model, config["method"])
    base = tree.flatten(fused.like(model.params, shapes))
    want = {k: s for k, s in tree.flatten(shapes).items() if fused.plain(k) not in base}
    want |= {k: s for k, s in tree.flatten(shapes).items() if k in tensors.names()}
    _check(want, tensors)
    if bad := hf.not_finite({k: tensors.read(k) for k in want}):
      raise errors.UserError("; ".join(bad))
  except errors.UserError as e:
    raise errors.UserError(f"{directory}: {e}") from None
  leaf = lambda k, s: jnp.asarray(tensors.read(k)).astype(s.dtype) if k in want else base[fused.plain(k)]
  return tree.map_named(leaf, shapes)


def _shapes(model: Model, method: list) -> tuple[Any, Any]:
  """The tree that a method makes, as shapes, and its mask; nothing is computed."""
  static = []

  def run(params):
    params, mask = methods.init(jax.random.key(0), params, method)
    static.append(mask)
    return params

  return jax.eval_shape(run, model.params), static[0]


def _check(want: Mapping, tensors: hf.Tensors) -> None:
  """Raises UserError listing all tensors that are missing, unknown or of another shape."""
  have = set(tensors.names())
  wrong = [
    f"{k} is {tensors.shape(k)}, expected {s.shape}"
    for k, s in want.items()
    if k in have and tensors.shape(k) != s.shape
  ]
  problems = {
    "missing tensors": sorted(want.keys() - have),
    "unexpected tensors": sorted(have - want.keys()),
    "": wrong,
  }
  if said := [f"{k} {v}".strip() for k, v in problems.items() if v]:
    raise errors.UserError("; ".join(said))
