"""A pretrained model: its shape, its parameters, and what its files call them."""

import dataclasses
from types import ModuleType
from typing import Any

from lora_jax import errors, families, tree, weights
from lora_jax.formats import hub, sources
from lora_jax.model import transformer


@dataclasses.dataclass(frozen=True)
class Model:
  """A pretrained model.

  Fields:
    name: what it was loaded as.
    config: its shape and how it is run.
    params: the tree of model/transformer.py, matrices in `config.dtype`.
    tokenizer: a `tokenizer.Tokenizer`, None for a directory that has none. It knows the rows of the
      embedding and the ends of `generation`.
    hf_config: the Hugging Face config.json that it came with.
    path: the directory or file that it was read from.
    fresh: names of leaves that were not in it and are random, such as a new classifier's.
    generation: generation_config.json, {} where there is none.
  """

  name: str
  config: transformer.Config
  params: dict
  tokenizer: Any
  hf_config: dict
  path: str = ""
  fresh: tuple[str, ...] = ()
  generation: dict = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    if self.tokenizer is not None:
      found = self.generation.get("eos_token_id")
      ends = found if isinstance(found, list) else [] if found is None else [found]
      if not all(type(i) is int and i >= 0 for i in ends):
        raise errors.UserError(f"generation_config.json of {self.name}: eos_token_id={found!r} is no token, or several")
      bound = dataclasses.replace(self.tokenizer, ends=tuple(ends), rows=self.config.vocab_size)
      if bound != self.tokenizer:  # else it has found its ends already
        object.__setattr__(self, "tokenizer", bound)

  @property
  def hub_name(self) -> str:
    """What other libraries find the model by: its name on the Hugging Face hub where it has one, else the path."""
    return sources.hub_name(self.name)

  @property
  def revision(self) -> str | None:
    """The branch, tag or commit that a name on the hub asks for."""
    return hub.NAME.fullmatch(self.name.removeprefix("hf:"))["revision"] if self.name.startswith("hf:") else None

  @property
  def family(self) -> ModuleType:
    """The module of families/ that describes it."""
    return families.get(self.hf_config["model_type"])

  @property
  def keys(self) -> tuple[families.Key, ...]:
    """The family's name table, without rows for leaves that this model lacks."""
    have = set(tree.names(self.params, is_leaf=weights.is_node))
    c = self.config
    return tuple(k for k in families.keys(self.family, c, bare=c.head == "none") if k.path in have)

  @property
  def torch_keys(self) -> tuple[families.Key, ...]:
    """`keys` with the names that tensors have in transformers' modules, and so in an adapter of PEFT's; one a leaf."""
    rows = {k.path: dataclasses.replace(k, hf=k.torch or k.hf) for k in reversed(self.keys)}
    return tuple(reversed(rows.values()))

  @property
  def head_leaves(self) -> tuple[str, ...]:
    """Names of the leaves of a classifier, which any method trains: what no pretrained model has."""
    own = ("classifier", "pre_classifier", "score")
    return tuple(k.path for k in self.keys if k.path in self.fresh or k.hf.split(".")[0] in own)
