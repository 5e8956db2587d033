"""A pretrained model: its config, its parameters, and the names that its files give them."""

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
    name: the name that it was loaded by.
    config: its architecture and how it is run.
    params: the tree of model/architecture.py, with matrices in `config.dtype`.
    tokenizer: a `tokenizer.Tokenizer`, or None for a directory without one. It knows the rows of the embedding and the
      end tokens in `generation`.
    hf_config: the Hugging Face config.json that it came with.
    path: the directory or file that it was read from.
    fresh: names of leaves that the files lack and that are random, such as a new classifier.
    generation: contents of generation_config.json, or {}.
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
        raise errors.UserError(
          f"generation_config.json of {self.name}: eos_token_id={found!r} is not a token or a list of tokens"
        )
      bound = dataclasses.replace(self.tokenizer, ends=tuple(ends), rows=self.config.vocab_size)
      if bound != self.tokenizer:  # an equal tokenizer has cached its ends
        object.__setattr__(self, "tokenizer", bound)

  @property
  def hub_name(self) -> str:
    """The name by which other libraries find the model: its name on the Hugging Face hub, else its path."""
    return sources.hub_name(self.name)

  @property
  def revision(self) -> str | None:
    """The branch, tag or commit in a name on the hub, or None."""
    return hub.NAME.fullmatch(self.name.removeprefix("hf:"))["revision"] if self.name.startswith("hf:") else None

  @property
  def family(self) -> ModuleType:
    """The module in families/ that describes the model."""
    return families.get(self.hf_config["model_type"])

  @property
  def keys(self) -> tuple[families.Key, ...]:
    """The family's table of names, without the leaves that this model lacks."""
    have = set(tree.names(self.params, is_leaf=weights.is_node))
    c = self.config
    return tuple(k for k in families.keys(self.family, c, bare=c.head == "none") if k.path in have)

  @property
  def torch_keys(self) -> tuple[families.Key, ...]:
    """`keys`, one for each leaf, with the names of tensors in transformers' modules, which PEFT's adapters use."""
    rows = {k.path: dataclasses.replace(k, hf=k.torch or k.hf) for k in reversed(self.keys)}
    return tuple(reversed(rows.values()))

  @property
  def head_leaves(self) -> tuple[str, ...]:
    """The names of a classifier's leaves, which every method trains, since no pretrained model has them."""
    own = ("classifier", "pre_classifier", "score")
    return tuple(k.path for k in self.keys if k.path in self.fresh or k.hf.split(".")[0] in own)
