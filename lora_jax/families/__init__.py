"""Model families: each module converts between a Hugging Face model and ours, in both directions.

A family module has the name of its `model_type` and defines

  config(hf: dict) -> transformer.Config
  hf_config(config: transformer.Config, original: dict | None = None) -> dict
                  the inverse; both are methods of one table, see config_json/
  KEYS            a tuple of `Key`s, used for import and export
  ARCHITECTURES   {head: class name in transformers}; the first is the default of a config without `architectures`
  PREFIX          prefix of tensor names that only models with a head have, such as "model."
  IGNORED         a regular expression of tensors that are not imported
  ONE_TABLE       optional: True if embedding and head are one table unless a file has two, whatever the config says
  view            optional: a function from a file's tensors to the same tensors under the names of KEYS
"""

import dataclasses
import importlib
import pkgutil
import re
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import einops
import numpy as np

from lora_jax import errors
from lora_jax.families.reading import tensor_names
from lora_jax.model import transformer


@dataclasses.dataclass(frozen=True)
class Key:
  """One row of a family's table.

  Fields:
    path: name of the leaf in our tree; under `layers/` it is stacked and `hf` has a `{}` for the layer.
    hf: name of the tensor in Hugging Face's layout; a second `{}` stands for the expert.
    pattern: einops pattern from their axes to ours for one layer (and expert), such as `(n h) d -> d n h`. `h` is the
      head size; `c` is 2 for gate and up, and 3 for q, k and v.
    only: (field, value) of the configs that the row applies to, such as ("head", "none"); () means all configs.
    also: other names of the same tensor in transformers; a file may have any of them.
    torch: its name in transformers' module, if it differs from the name in files.
    head: for an embedding, the torch module of the head that is tied to it; `keys` fills it in.
  """

  path: str
  hf: str
  pattern: str
  only: tuple[str, Any] | tuple[()] = ()
  also: tuple[str, ...] = ()
  torch: str = ""
  head: str = ""

  @property
  def reverse(self) -> str:
    """The pattern from our axes to theirs."""
    left, right = self.pattern.split("->")
    return f"{right.strip()} -> {left.strip()}"

  @property
  def ndim(self) -> int:
    """Number of axes of our leaf for one layer."""
    return len(re.findall(r"\([^)]*\)|\w+", self.pattern.split("->")[1]))

  @property
  def module(self) -> str:
    """Name of the torch module that has the tensor."""
    return (self.torch or self.hf).rpartition(".")[0]

  @property
  def lookups(self) -> tuple[str, ...]:
    """Names of the torch modules that look up rows of an embedding; in T5 they differ from the table's own module."""
    return tuple(k.rpartition(".")[0] for k in self.also) or (self.module,)

  @property
  def transposed(self) -> bool:
    """Whether their matrix is [in, out], as in GPT-2's Conv1D, rather than [out, in]."""
    left, (inner, _) = self._axes[0], self._axes[1]
    return set(left[0].strip("()").split()) == set(_letters(inner))

  def low_rank(self) -> tuple[str, str]:
    """Returns einops patterns from factors [r, in] and [out, r] of their matrix to [*in, r] and [r, *out] of ours."""
    left, (inner, outer) = self._axes
    theirs_in, theirs_out = left if self.transposed else left[::-1]
    return f"r {theirs_in} -> {' '.join(inner)} r", f"{theirs_out} r -> r {' '.join(outer)}"

  def sizes(self, shape: Sequence[int]) -> dict[str, int]:
    """Returns the axis lengths that einops needs, from our shape of one layer."""
    right = re.findall(r"\([^)]*\)|\w+", self.pattern.split("->")[1])
    grouped = _letters(re.findall(r"\([^)]*\)", self.pattern))
    known = {a: n for a, n in zip(right, shape, strict=True) if a in grouped}
    return known | ({"c": 2 if "mlp" in self.path else 3} if "(c " in self.pattern else {})

  def to_hf(self, x: np.ndarray) -> np.ndarray:
    """Returns one layer's array with the axes of Hugging Face's tensor."""
    return einops.rearrange(x, self.reverse, **self.sizes(x.shape))

  def from_hf(self, x: Any, shape: Sequence[int]) -> Any:
    """Returns their tensor with our axes, from our shape of one layer."""
    return einops.rearrange(x, self.pattern, **self.sizes(shape))

  def hf_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
    """Returns the shape of their tensor, from our shape of one layer."""
    return self.to_hf(np.broadcast_to(np.int8(0), shape)).shape

  @property
  def _axes(self) -> tuple[list[str], tuple[list[str], list[str]]]:
    left, right = (re.findall(r"\([^)]*\)|\w+", side) for side in self.pattern.split("->"))
    n = transformer.in_axes(self.path)
    return left, (right[:n], right[n:])


def _letters(groups: Sequence[str]) -> list[str]:
  return " ".join(groups).replace("(", "").replace(")", "").split()


def names() -> list[str]:
  """Returns the names of all families."""
  return [m.name for m in pkgutil.iter_modules(__path__) if not m.ispkg]


def get(model_type: str) -> ModuleType:
  """Returns the module of a family by the `model_type` of its Hugging Face config."""
  if not isinstance(model_type, str):
    raise errors.UserError(f"config.json: model_type is {model_type!r}, expected a string; known: {', '.join(names())}")
  if model_type == "gemma3":
    raise errors.UserError(
      "gemma3 reads text and images; only checkpoints of the text model, gemma3_text, are supported"
    )
  return importlib.import_module(f"{__name__}.{errors.choose(model_type, {k: k for k in names()}, 'model family')}")


def keys(family: ModuleType, config: transformer.Config, bare: bool) -> tuple[Key, ...]:
  """Returns the family's table for a config; `bare` is for a checkpoint whose names lack the prefix."""
  strip = lambda name: name.removeprefix(family.PREFIX) if bare else name
  rows = [k for k in family.KEYS if not k.only or getattr(config, k.only[0]) == k.only[1]]
  is_tied = config.tied and config.head in ("lm", "mlm")
  head = next(k.module for k in rows if k.path == "head/kernel") if is_tied else ""
  more = lambda k: {"also": tuple(map(strip, k.also)), "head": head if k.path == "embed/kernel" else ""}
  return tuple(dataclasses.replace(k, hf=strip(k.hf), **more(k)) for k in rows)


def unify(
  family: ModuleType, config: transformer.Config, tensors: Any, bare: bool
) -> tuple[transformer.Config, tensor_names.View]:
  """Returns the config, tied if the file is, and the file's tensors under one name each, from the family's table.

  A writer that drops shared tensors may keep any of their names. A file may have both embedding and head although the
  config ties them; if they differ, they are two tables.

  Raises:
    UserError: two names of the same tensor, other than embedding and head, hold different values.
  """
  names = {}
  for k in (k for k in keys(family, config, bare) if "{}" not in k.hf):
    names[k.path] = (k.hf, *names.get(k.path, ()), *k.also, *filter(None, [k.torch]))
  embed, head = names["embed/kernel"], names["head/kernel"]
  have = set(tensors.names())
  first, second = ([k for k in every if k in have] for every in (embed, head))
  if config.tied or getattr(family, "ONE_TABLE", False):
    if first and second and not tensor_names.same(tensors, first[0], second[0]):
      config = dataclasses.replace(config, tied=False)
    else:
      config = dataclasses.replace(config, tied=True)
      names["embed/kernel"] = (*embed, *names.pop("head/kernel"))
  return config, tensor_names.unify(tensors, {every[0]: every for every in names.values()})


def linear(path: str, hf: str, pattern: str, only: tuple = ()) -> tuple[Key, Key]:
  """Returns the rows of a matrix and its bias, which has the axes of the output."""
  kernel = Key(f"{path}/kernel", f"{hf}.weight", pattern, only)
  left, (_, outer) = kernel._axes
  theirs = left[1 if kernel.transposed else 0]
  return kernel, Key(f"{path}/bias", f"{hf}.bias", f"{theirs} -> {' '.join(outer)}", only)


def norm(path: str, hf: str) -> tuple[Key, Key]:
  """Returns the rows of a norm."""
  return Key(f"{path}/scale", f"{hf}.weight", "d -> d"), Key(f"{path}/bias", f"{hf}.bias", "d -> d")
