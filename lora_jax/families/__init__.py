"""Model families: each module maps a Hugging Face config to `transformer.Config` and names to names.

A family module is named by its `model_type` and has

  config(hf: dict) -> transformer.Config
  KEYS            a tuple of `Key`s, used for import and export
  ARCHITECTURES   {head: class name in transformers}, the first being what a config without `architectures` means
  PREFIX          what the names of a model with a head begin with, and those of a bare model lack, such as "model."
  IGNORED         a regular expression of tensors that hold nothing to import
  ALIASES         optional: {class name: head} of further classes; what else they have is left out
  ONE_TABLE       optional: whether embedding and head are one, whatever the config says, unless a file has two
  view            optional: a function from a file's tensors to the same under the names of KEYS
"""

import dataclasses
import importlib
import pkgutil
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any

import einops
import numpy as np

from lora_jax import errors
from lora_jax.families.reading import options, tensor_names
from lora_jax.model import layers, transformer

check = options.check


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


def head(family: ModuleType, hf: Mapping) -> str:
  """Which head a checkpoint has, from `architectures`; UserError for one that is not supported."""
  check(hf)
  named = (hf.get("architectures") or [next(iter(family.ARCHITECTURES.values()))])[0]
  table = {name: k for k, name in family.ARCHITECTURES.items()} | getattr(family, "ALIASES", {})
  return errors.choose(named, table, f"architecture of a {hf['model_type']} model")


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


def check_config(hf: Mapping, handled: Iterable[str], default: Mapping, ignored: Iterable[str]) -> None:
  """Raises UserError listing every key of an HF config that is neither understood nor known to have no effect.

  What is null, false or empty asks for nothing, unless the key is one whose absence means something else.

  Args:
    handled: keys that the family reads.
    default: keys that are understood only at the given value.
    ignored: keys that do not change the forward pass.
  """
  check(hf)
  handled, ignored, default = set(handled), set(ignored), PLAIN | default
  off = lambda x: x is None or x is False or x in ("", [], {})
  fits = lambda x, v: x == v or off(x) and off(v) or x is None and v == 1 and v is not True  # a factor of one is none
  bad = [f"{k}={hf[k]!r} (only {v!r} is supported)" for k, v in default.items() if k in hf and not fits(hf[k], v)]
  unknown = sorted(hf.keys() - handled - default.keys() - ignored)
  bad += [f"{k}={hf[k]!r} (unknown)" for k in unknown if not off(hf[k])]
  if bad:
    raise errors.UserError(f"config.json of a {hf.get('model_type')} model: " + "; ".join(bad))


def require(hf: Mapping, needed: Iterable[str], activation: str) -> None:
  """Raises UserError for keys that a config lacks, and for an unknown activation."""
  missing = [k for k in needed if hf.get(k) is None]
  if missing:
    raise errors.UserError(f"config.json of a {hf.get('model_type')} model lacks {', '.join(missing)}")
  errors.choose(activation, layers.ACTIVATIONS, "activation")


def labels(hf: Mapping) -> int:
  """How many outputs a classifier has."""
  return len(hf.get("id2label") or ()) or hf.get("num_labels") or 2


def windows(hf: Mapping, window: int | None, local: Callable[[int], bool]) -> dict[str, Any]:
  """`window` and `local` of `transformer.Config`; UserError for `layer_types` that are not understood.

  Args:
    window: of local layers; None where there are none.
    local: whether a layer is, for a config without `layer_types`.
  """
  table, n = {"full_attention": False, "sliding_attention": True}, hf.get("num_hidden_layers") or 0
  kinds = hf.get("layer_types")
  flags = [local(i) for i in range(n)] if kinds is None else [errors.choose(k, table, "layer type") for k in kinds]
  if len(flags) != n:
    raise errors.UserError(f"config.json has {len(flags)} layer_types for {n} layers")
  return {"window": window, "local": tuple(flags)} if window and any(flags) else {"window": None, "local": ()}


def rope(hf: Mapping, given: Mapping | None = None, theta: float = 10_000.0, part: float = 1.0) -> dict[str, Any]:
  """`rope_theta` and `rope_scaling` of `transformer.Config`; UserError for what is not understood.

  From `rope_theta` and `rope_scaling`, or from the newer `rope_parameters`; `given` replaces those. `part` of a head
  is rotated.
  """
  given = (hf.get("rope_parameters") or hf.get("rope_scaling") or {}) if given is None else given
  given = {k: v for k, v in given.items() if v is not None and (k, v) != ("partial_rotary_factor", 1)}
  kind = given.get("rope_type", given.get("type", "default"))  # `type` is the older spelling
  if not isinstance(kind, str):
    raise errors.UserError(
      f"config.json of a {hf.get('model_type')} model: type of rotation is {kind!r:.60}, no string"
    )
  kind = "longrope" if kind == "su" else kind
  heads, width = hf.get("num_attention_heads"), hf.get("hidden_size")
  head_dim = hf.get("head_dim") or (width // heads if heads and width else 0)
  options.check_rope(hf, kind, given, int(head_dim * part) // 2)
  theta = float(given.get("rope_theta") or hf.get("rope_theta") or theta)
  given = {k: v for k, v in given.items() if k not in ("rope_theta", "rope_type", "type", "finetuned")}
  if kind == "default":
    return {"rope_theta": theta, "rope_scaling": None}
  if kind in ("longrope", "yarn"):
    length = hf.get("max_position_embeddings", 2048)
    original = given.get("original_max_position_embeddings") or hf.get("original_max_position_embeddings") or length
    given |= {"original_max_position_embeddings": original, "factor": given.get("factor") or length / original}
  scaling = {"rope_type": kind} | {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
  try:
    layers.rope_frequencies(2, theta, {k: v[:1] if isinstance(v, tuple) else v for k, v in scaling.items()})
  except KeyError as e:
    raise errors.UserError(f"rope scaling {kind!r} needs {e}; it has {given}") from None
  return {"rope_theta": theta, "rope_scaling": tuple(sorted(scaling.items()))}


def rope_part(hf: Mapping, given: dict, absent: float = 1.0) -> float:
  """What part of a head is rotated, taken out of a rotation's dict; UserError unless it is in (0, 1]."""
  part = given.pop("partial_rotary_factor", None) or hf.get("partial_rotary_factor") or absent
  if not options.is_positive(part) or part > 1:
    raise errors.UserError(f"config.json of a {hf.get('model_type')} model rotates {part!r:.60} of a head, not 0 to 1")
  return part


# Keys of any config.json that are understood only at this value.
PLAIN = {
  "is_decoder": False,
  "is_causal": True,
  "is_encoder_decoder": False,
  "add_cross_attention": False,
  "cross_attention_hidden_size": None,
  "tie_encoder_decoder": False,
  "pruned_heads": {},
}
# Keys of any config.json that say how a model was saved, trained, served or sampled from, not what it computes.
BOOKKEEPING = frozenset(
  (
    "_name_or_path architectures attention_dropout bos_token_id eos_token_id pad_token_id dtype torch_dtype "
    "initializer_range model_type transformers_version transformers.js_config use_cache name_or_path "
    "is_llama_config rope_interleaved unsloth_version unsloth_fixed auto_map id2label label2id num_labels "
    "problem_type classifier_dropout _attn_implementation _attn_implementation_autoset gradient_checkpointing "
    "output_attentions output_hidden_states output_past return_dict task_specific_params sep_token_id cls_token_id "
    "mask_token_id unk_token_id eos_token_ids decoder_start_token_id finetuning_task torchscript prefix _num_labels "
    "custom_pipelines tokenizer_class max_sequence_length model_max_length chunk_size_feed_forward use_bfloat16 "
    "tf_legacy_loss _commit_hash attn_implementation "
    "do_sample num_beams max_length min_length max_new_tokens min_new_tokens top_k top_p typical_p temperature "
    "repetition_penalty length_penalty num_return_sequences early_stopping no_repeat_ngram_size num_beam_groups "
    "encoder_no_repeat_ngram_size diversity_penalty bad_words_ids output_scores return_dict_in_generate "
    "forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens "
    "begin_suppress_tokens"
  ).split()
)
