"""`vera` in the `peft` library's format."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax import errors, families, tree, weights
from lora_jax.formats.peft import layout
from lora_jax.methods import vera
from lora_jax.model import architecture, transformer

TYPE = "VERA"
HOLDS = ("shared",)  # entries of the tree beside kernels
SHARED = ("vera_A", "vera_B")  # tensors of the whole model, not of a module
FIELDS = {"b": "vera_lambda_b", "d": "vera_lambda_d"}


def to_peft(
  params: Any, keys: Sequence[families.Key], trained: Collection[str] = ()
) -> tuple[dict, dict[str, np.ndarray]] | None:
  """Returns (config, tensors by Hugging Face module name) of the VeRA nodes in `params`; None if there are none.

  Each module has `vera_lambda_b` [out] and `vera_lambda_d` [r]; all share `vera_A` [r, max in] and `vera_B`
  [max out, r].
  """
  nodes = layout.nodes(params, keys, vera.VeRA)
  if not nodes:
    return None
  shared = {k: np.asarray(params["shared"]["vera"][k.lower()[-1]]) for k in SHARED}
  tensors, adapted = {}, {}
  for key, node in nodes.items():
    stack = node.scale.ndim
    _check_order(key, node.shape[stack:])
    sizes, pattern = key.sizes(node.shape[stack:]), layout.reverse(key.low_rank()[1])
    d, b = (np.asarray(x).reshape(-1, *x.shape[stack:]) for x in (node.d, node.b))
    for i in np.flatnonzero(np.atleast_1d(node.scale)):
      module = key.module.format(i)
      adapted[module] = d.shape[1]
      tensors[f"{module}.{FIELDS['b']}"] = layout.rearrange(b[i][None], pattern, sizes)[:, 0]
      tensors[f"{module}.{FIELDS['d']}"] = d[i]
  first = next(iter(nodes.values()))
  config = {
    "peft_type": TYPE,
    "r": len(shared["vera_A"]),
    "vera_dropout": first.dropout,
    "target_modules": layout.target_modules(adapted, keys, tree.flatten(params, is_leaf=weights.is_node)),
    "save_projection": True,
    "bias": "none",
    "fan_in_fan_out": any(key.transposed for key in nodes),
  }
  return config, tensors | shared


def _check_order(key: families.Key, shape: Sequence[int]) -> None:
  """Raises UserError if Hugging Face orders inputs or outputs differently, since other rows of B would come first."""
  n = transformer.in_axes(key.path)
  for pattern, axes, r in zip(key.low_rank(), (shape[:n], shape[n:]), (-1, 0), strict=True):
    numbers = np.expand_dims(np.arange(math.prod(axes)).reshape(axes), r)
    if np.any(np.diff(layout.rearrange(numbers, layout.reverse(pattern), key.sizes(shape)).ravel()) < 0):
      raise errors.UserError(f"VeRA in PEFT's form does not fit {key.module}, whose heads are stored in another order")


def from_peft(
  params: Any, keys: Sequence[families.Key], config: Mapping, left: dict[str, np.ndarray], wrong: list[str]
) -> Any:
  """Inverts `to_peft`: returns `params` with VeRA nodes; see formats/peft."""
  rank, flat = config.get("r", 256), tree.flatten(params, is_leaf=weights.is_node)
  a, b = shared = [left.pop(k, None) for k in SHARED]
  if missing := [k for k, x in zip(SHARED, shared, strict=True) if x is None]:
    wrong.append(
      f"no {', '.join(missing)}, which PEFT draws from torch's random numbers; save with save_projection=True"
    )
  elif a.ndim != 2 or b.ndim != 2 or not a.shape[0] == rank == b.shape[1]:
    wrong.append(f"vera_A is {a.shape} and vera_B {b.shape}, expected [r, in] and [out, r] with r={rank}")
    a = b = None
  for key in keys:
    if not transformer.in_axes(key.path) or architecture.stack_axes(key.path) > 1:  # not a matrix, or one of experts
      continue
    modules = [key.module.format(i) for i in range(flat[key.path].shape[0] if "{}" in key.hf else 1)]
    found = [any(f"{m}.{s}" in left for s in FIELDS.values()) for m in modules]
    if not any(found):
      continue
    w = flat[key.path]
    inner, outer = vera.split_axes(key.path, w)
    with errors.listed(wrong):
      _check_order(key, (*inner, *outer))
    if not (a is None or b is None) and (math.prod(inner) > a.shape[1] or math.prod(outer) > len(b)):
      wrong.append(f"vera_A {a.shape} or vera_B {b.shape} is too small for {modules[0]}")
    values = {"d": np.zeros((len(modules), rank), np.float32), "b": np.zeros((len(modules), *outer), np.float32)}
    for i in np.flatnonzero(found):
      for f, s in FIELDS.items():
        view = values[f][i]  # in the order of our axes, as `_check_order` ensures
        view[...] = layout.take(left, wrong, f"{modules[i]}.{s}", (view.size,)).reshape(view.shape)
    stack = slice(None) if "{}" in key.hf else 0
    d, lambda_b, scale = (jnp.asarray(np.float32(x)[stack]) for x in (values["d"], values["b"], found))
    flat[key.path] = vera.VeRA(w, d, lambda_b, scale, dropout=float(config.get("vera_dropout") or 0))
  params = tree.map_named(lambda k, _: flat[k], params, is_leaf=weights.is_node)
  tensors = {k: jnp.asarray(x, jnp.float32) for k, x in zip("ab", shared, strict=True) if x is not None}
  return params | {"shared": params.get("shared", {}) | {"vera": tensors}}
