"""Model families: each module says, both ways, what a Hugging Face model is in terms of ours.

A family module is named by its `model_type` and has

  config(hf: dict) -> transformer.Config
  hf_config(config: transformer.Config, original: dict | None = None) -> dict
                  its inverse; both are methods of one table, see config_json/
  KEYS            a tuple of `Key`s, used for import and export
  ARCHITECTURES   {head: class name in transformers}, the first being what a config without `architectures` means
  PREFIX          what the names of a model with a head begin with, and those of a bare model lack, such as "model."
  IGNORED         a regular expression of tensors that hold nothing to import
  ONE_TABLE       optional: whether embedding and head are one, whatever the config says, unless a file has two
  view            optional: a function from a file's tensors to the same under the names of KEYS
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
      head size, `c` is 2 where it is gate and up, 3 where it is q, k and v.
    only: (field, value) of the configs that the row is for, such as ("head", "none"); () is all.
    also: further names of the tensor, one with it in transformers: a file may have any of them.
    torch: its name in transformers' module, if that is another than a file's.
    head: of an embedding, the torch module of the head that is tied to it; `keys` puts it in.
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
    """Axes of our leaf for one layer."""
    return len(re.findall(r"\([^)]*\)|\w+", self.pattern.split("->")[1]))

  @property
  def module(self) -> str:
    """Name of the torch module that has the tensor."""
    return (self.torch or self.hf).rpartition(".")[0]

  @property
  def lookups(self) -> tuple[str, ...]:
    """Names of the torch modules that look up rows of an embedding: T5 has the table in a module that does not."""
    return tuple(k.rpartition(".")[0] for k in self.also) or (self.module,)

  @property
  def transposed(self) -> bool:
    """Whether their matrix is [in, out], as in GPT-2's Conv1D, rather than [out, in]."""
    left, (inner, _) = self._axes[0], self._axes[1]
    return set(left[0].strip("()").split()) == set(_letters(inner))

  def low_rank(self) -> tuple[str, str]:
    """einops patterns from factors [r, in] and [out, r] of their matrix to [*in, r] and [r, *out] of ours."""
    left, (inner, outer) = self._axes
    theirs_in, theirs_out = left if self.transposed else left[::-1]
    return f"r {theirs_in} -> {' '.join(inner)} r", f"{theirs_out} r -> r {' '.join(outer)}"

  def sizes(self, shape: Sequence[int]) -> dict[str, int]:
    """The axis lengths that einops needs to know, given our shape of one layer."""
    right = re.findall(r"\([^)]*\)|\w+", self.pattern.split("->")[1])
    grouped = _letters(re.findall(r"\([^)]*\)", self.pattern))
    known = {a: n for a, n in zip(right, shape, strict=True) if a in grouped}
    return known | ({"c": 2 if "mlp" in self.path else 3} if "(c " in self.pattern else {})

  def to_hf(self, x: np.ndarray) -> np.ndarray:
    """One layer's array in the axes of Hugging Face's tensor."""
    return einops.rearrange(x, self.reverse, **self.sizes(x.shape))

  def from_hf(self, x: Any, shape: Sequence[int]) -> Any:
    """Their tensor in our axes, given our shape of one layer."""
    return einops.rearrange(x, self.pattern, **self.sizes(shape))

  def hf_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
    """Shape of their tensor, given our shape of one layer."""
    return self.to_hf(np.broadcast_to(np.int8(0), shape)).shape

  @property
  def _axes(self) -> tuple[list[str], tuple[list[str], list[str]]]:
    left, right = (re.findall(r"\([^)]*\)|\w+", side) for side in self.pattern.split("->"))
    n = transformer.in_axes(self.path)
    return left, (right[:n], right[n:])


def _letters(groups: Sequence[str]) -> list[str]:
  return " ".join(groups).replace("(", "").replace(")", "").split()


def names() -> list[str]:
  """Names of all families."""
  return [m.name for m in pkgutil.iter_modules(__path__) if not m.ispkg]


def get(model_type: str) -> ModuleType:
  """The module of a family by the `model_type` of its Hugging Face config."""
  if not isinstance(model_type, str):
    raise errors.UserError(f"config.json: model_type is {model_type!r}, expected a string; known: {', '.join(names())}")
  if model_type == "gemma3":
    raise errors.UserError("gemma3 is text and images; only checkpoints of the text model are read, gemma3_text")
  return importlib.import_module(f"{__name__}.{errors.choose(model_type, {k: k for k in names()}, 'model family')}")


def keys(family: ModuleType, config: transformer.Config, bare: bool) -> tuple[Key, ...]:
  """The family's table for a config; `bare` is for a checkpoint whose names lack the prefix."""
  strip = lambda name: name.removeprefix(family.PREFIX) if bare else name
  rows = [k for k in family.KEYS if not k.only or getattr(config, k.only[0]) == k.only[1]]
  is_tied = config.tied and config.head in ("lm", "mlm")
  head = next(k.module for k in rows if k.path == "head/kernel") if is_tied else ""
  more = lambda k: {"also": tuple(map(strip, k.also)), "head": head if k.path == "embed/kernel" else ""}
  return tuple(dataclasses.replace(k, hf=strip(k.hf), **more(k)) for k in rows)


def unify(
  family: ModuleType, config: transformer.Config, tensors: Any, bare: bool
) -> tuple[transformer.Config, tensor_names.View]:
  """The config, tied or not as a file is, and the file's tensors with one name each, that of the family's table.

  A writer that drops shared tensors keeps any of their names. Of embedding and head, which a config ties, a file may
  have both all the same: two tables if they differ.

  Raises:
    UserError: two names of another tensor stand for different ones.
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
  """The rows of a matrix and its bias, whose axes are those of the output."""
  kernel = Key(f"{path}/kernel", f"{hf}.weight", pattern, only)
  left, (_, outer) = kernel._axes
  theirs = left[1 if kernel.transposed else 0]
  return kernel, Key(f"{path}/bias", f"{hf}.bias", f"{theirs} -> {' '.join(outer)}", only)


def norm(path: str, hf: str) -> tuple[Key, Key]:
  """The rows of a norm."""
  return Key(f"{path}/scale", f"{hf}.weight", "d -> d"), Key(f"{path}/bias", f"{hf}.bias", "d -> d")
