"""Adapters in the format of the Hugging Face `peft` library, without torch.

A directory holds adapter_config.json and adapter_model.safetensors, whose keys are `base_model.model.` + the module's
Hugging Face name + a suffix. Their contents depend on the method. The module here with a method's name is its form,
which defines

  TYPE                                                        the `peft_type`
  to_peft(params, keys, trained) -> (config, tensors) or None
  from_peft(params, keys, config, left, wrong) -> params
  HOLDS             optional: what the method adds to the tree beside weights, see `weights.added`
  SHARED            optional: tensors of the whole model, not of a module
  FLAG              optional: the config option that identifies this form if several have the same type
  MODULES_TO_SAVE   optional: False if the type does not support them
  beside(form, other) -> form, from_beside(params, keys, config, left, wrong) -> (params, config)
                    optional: for a method that PEFT also supports as a part of LoRA

Each function that reads an adapter removes the tensors that it knows from `left` and appends their errors to `wrong`.
`load` raises one error that lists them together with the tensors that remain in `left`.
"""

import importlib
import numbers
import os
import pathlib
import pkgutil
import re
from collections.abc import Collection, Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from lora_jax import errors, families, methods, tree, weights
from lora_jax.formats import hf, hub
from lora_jax.formats.peft import biases, options, saved_modules, tables, tokens
from lora_jax.formats.pretrained import Model
from lora_jax.model import prompts, transformer
from lora_jax.weights import fused

TOP = "base_model."  # the prefix of SHARED tensors, and of modules saved with soft prompts
PREFIX = f"{TOP}model."
PROMPTS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")  # their single tensor, PROMPT, has no prefix
PROMPT = "prompt_embeddings"
# The config fields of these types in PEFT 0.21; a type ignores the fields that it does not use.
OPTIONS = frozenset(
  """
  alora_invocation_tokens alpha alpha_pattern arrow_config auto_mapping base_model_name_or_path beta1 beta2 bias
  corda_config d_initial decompose_both decompose_factor deltaT encoder_dropout encoder_hidden_size encoder_num_layers
  encoder_reparameterization_type ensure_weight_tying eva_config exclude_modules fan_in_fan_out feedforward_modules
  inference_mode init_ia3_weights init_lora_weights init_r init_weights kasa_config layer_replication layers_pattern
  layers_to_transform loftq_config lora_alpha lora_bias lora_dropout lora_ga_config megatron_config megatron_core
  module_dropout modules_to_save monteclora_config num_attention_heads num_layers num_transformer_submodules
  num_virtual_tokens orth_reg_weight peft_type peft_version prefix_projection projection_prng_key prompt_tuning_init
  prompt_tuning_init_text qalora_group_size r rank_dropout rank_dropout_scale rank_pattern revision runtime_config
  save_projection target_modules target_parameters target_r task_type tfinal tinit token_dim token_indices
  tokenizer_kwargs tokenizer_name_or_path total_step trainable_token_indices use_bdlora use_dora use_effective_conv2d
  use_qalora use_rslora velora_config vera_dropout
  """.split()
)


MISTIED = "PEFT also uses the trained rows of the embedding in the head, as config.json ties them; they differ here"


class NoForm(errors.UserError):
  """PEFT's format cannot express what was trained."""


def forms() -> dict[str, ModuleType]:
  """Returns {method: the module here that is its form}."""
  return {name: form for name in methods.names() if (form := _form(name))}


def form_of(method: ModuleType) -> ModuleType | None:
  """Returns the form of a method, by its `PEFT` or its own name; None if it has no form."""
  return _form(getattr(method, "PEFT", methods.name_of(method)))


def _form(name: str) -> ModuleType | None:
  here = {m.name for m in pkgutil.iter_modules(__path__)} & set(methods.names())
  return importlib.import_module(f"{__name__}.{name}") if name in here else None


def _of_config(config: Mapping, where: str) -> ModuleType:
  """Returns the form of an adapter's config; among several of one type, the form whose option `FLAG` is set."""
  types: dict[str, list[ModuleType]] = {}
  for form in forms().values():
    types.setdefault(form.TYPE, []).append(form)
  found = errors.choose(str(config.get("peft_type")), types, where)
  flag = lambda form: getattr(form, "FLAG", None)
  return next((f for f in found if flag(f) and config.get(flag(f))), next(f for f in found if not flag(f)))


def save(
  model: Model,
  params: Any,
  directory: str | os.PathLike,
  trained: Collection[str] = (),
  method: methods.Method | None = None,
  steps: int = 0,
) -> None:
  """Writes the adapter in `params` as a directory that `peft.PeftModel.from_pretrained` loads.

  Leaves of the pretrained model become `modules_to_save` if they were trained, differ from `model.params`, or are
  missing from the model's files.

  Args:
    trained: names of trained leaves.
    method: the method that was trained; None to infer it from the tree.
    steps: number of training steps, 0 if unknown.

  Raises:
    NoForm: PEFT's format cannot express what was trained.
  """
  given = [] if method is None else [m for m, _ in methods.parts(method)]
  if odd := [methods.name_of(m) for m in given if form_of(m) is None and not getattr(m, "WHOLE", False)]:
    raise NoForm(f"PEFT has no form for the method {odd[0]!r}")
  tried = list(forms().values()) if method is None else [f for m in given if (f := form_of(m))]
  if some := [k for k in trained if fused.whole(k) != k]:
    raise NoForm(f"PEFT has no place for {some[0]} without the rest of {fused.whole(some[0])}")
  altered = {fused.whole(k) for k in fused.altered(params, model.params)}
  beneath = {
    k for k, w in tree.flatten(params, is_leaf=weights.is_node).items() if k in altered and weights.base(w) is not w
  }
  trained = {*trained, *model.fresh, *altered} - beneath
  keys, params = model.torch_keys, prompts.unscaled(params, model.config.embed_scale)
  try:
    found = [(form, made) for form in tried if (made := form.to_peft(params, keys, trained))]
  except errors.UserError as e:
    raise NoForm(str(e)) from None
  if any(form is tokens for form, _ in found) and _mistied(model):
    raise NoForm(MISTIED)
  found = _joined([f for f in found if not getattr(f[0], "WHOLE", False)] or found)
  if len(found) != 1:
    raise NoForm(f"the parameters hold {len(found)} kinds of adapters with a PEFT form; expected one")
  module, (config, tensors) = found[0]
  added = weights.added(params)
  if more := added - set(getattr(module, "HOLDS", ())):
    raise NoForm(f"PEFT's {module.TYPE} has no place for {', '.join(sorted(more))}")
  # A method stores some leaves itself, for instance biases and norms.
  written = {re.sub(r"\.(base_layer|ln_tuning_layers)\.", ".", k) for k in tensors}
  rest = {key.path for key in keys if key.hf.format(*[0] * key.hf.count("{}")) not in written} & set(trained)
  whole = _modules(keys, rest)
  saved = {key.module for key in whole}
  if inner := [k for k in keys if k not in whole and any(k.module.startswith(f"{m}.") for m in saved)]:
    raise NoForm(f"PEFT saves only whole modules, and what is trained contains {inner[0].module}, which is not trained")
  if whole and not getattr(module, "MODULES_TO_SAVE", True):
    raise NoForm(f"PEFT's {module.TYPE} has no place for modules that are trained whole")
  tensors = tensors | _whole(whole, tree.flatten(params, is_leaf=weights.is_node))
  if table := next((key for key in whole if key.path == tables.EMBED and key.head), None):
    if module.TYPE != "LORA" or not tables.can_tie(keys):
      raise NoForm(f"PEFT's {module.TYPE} does not update {table.head} when the table tied to it is trained")
    config["ensure_weight_tying"] = True
    tensors[f"{table.head}.weight"] = tensors[f"{table.module}.weight"]
  try:
    tensors |= saved_modules.write_beneath(params, [key for key in keys if key.path in beneath], tensors)
  except errors.UserError as e:
    raise NoForm(str(e)) from None
  tensors = {_prefix(module, k) + k: x for k, x in tensors.items()}
  modules = _suffixes({m for key in whole for m in _holders(key)}, {m for key in keys for m in _holders(key)}) or None
  config = {
    "task_type": _task_type(model.config),
    **({"modules_to_save": modules} if getattr(module, "MODULES_TO_SAVE", True) else {}),
    "base_model_name_or_path": model.hub_name,
    "revision": model.revision,
    "inference_mode": True,
    **config,
    **({"total_step": steps} if steps and "total_step" in config else {}),
  }
  write(pathlib.Path(directory), config, {k: np.ascontiguousarray(x) for k, x in tensors.items()})


def _mistied(model: Model) -> bool:
  """Returns whether PEFT ties embedding and head, as config.json says, although the model has two tables."""
  has_two = not model.config.tied and model.config.head in ("lm", "mlm")
  return has_two and (getattr(model.family, "ONE_TABLE", False) or model.family.config(model.hf_config).tied)


def _joined(forms: list) -> list:
  """Returns the forms with LoRA and a method that PEFT supports as a part of it joined into one."""
  parts = [f for f in forms if hasattr(f[0], "beside")]
  rest = [f for f in forms if f not in parts]
  if len(parts) != 1 or len(rest) != 1 or rest[0][1][0]["peft_type"] != "LORA":
    return forms
  (part, form), (module, other) = parts[0], rest[0]
  return [(module, part.beside(form, other))]


def write(directory: pathlib.Path, config: Mapping, tensors: Mapping[str, np.ndarray]) -> None:
  """Writes the two files of an adapter.

  The old config is removed first and the new one is written last, so a killed writer does not leave a mixture.
  """
  directory.mkdir(parents=True, exist_ok=True)
  (directory / "adapter_config.json").unlink(missing_ok=True)
  hf.save_tensors(directory / ".tensors.tmp", dict(tensors))
  os.replace(directory / ".tensors.tmp", directory / "adapter_model.safetensors")
  hf.write_json(directory / "adapter_config.json", dict(config))


def _prefix(module: ModuleType, name: str) -> str:
  if module.TYPE in PROMPTS:
    return "" if name == PROMPT else TOP
  return TOP if name in getattr(module, "SHARED", ()) else PREFIX


def _modules(keys: Sequence[families.Key], trained: Collection[str]) -> list[families.Key]:
  """Returns the rows of all modules that have a trained leaf, since PEFT saves whole modules."""
  modules = {key.module for key in keys if key.path in trained}
  return [key for key in keys if key.module in modules]


def _suffixes(modules: Collection[str], every: Collection[str]) -> list[str]:
  """Returns the shortest ends of module names that do not also match other modules, which PEFT would save as well."""

  def shortest(module):
    parts = module.rpartition("{}.")[2].split(".")
    ends = (".".join(parts[i:]) for i in reversed(range(len(parts))))
    return next((e for e in ends if not any(m.endswith(e) for m in every if m not in modules)), module)

  return sorted({shortest(m) for m in modules})


def _holders(key: families.Key) -> tuple[str, ...]:
  """Returns the modules that PEFT has to save for a tensor to take effect; for a table, those that look rows up."""
  return key.lookups if key.path == tables.EMBED else (key.module,)


def _whole(rows: Sequence[families.Key], flat: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Returns {Hugging Face name: tensor} for rows of the name table."""
  tensors = {}
  for key in rows:
    if key.path not in flat or weights.is_node(flat[key.path]):
      raise NoForm(f"{key.hf} is both adapted and trained whole, which PEFT's format cannot express")
    x = np.asarray(flat[key.path], np.float32)
    stack = x.shape[: key.hf.count("{}")]
    part = key.hf.rpartition(".")[2]
    tensors |= {f"{m}.{part}".format(*i): key.to_hf(x[i]) for m in _holders(key) for i in np.ndindex(stack)}
  return tensors


def _task_type(config: transformer.Config) -> str:
  if config.encoder_layers:
    return "SEQ_2_SEQ_LM"
  return {"lm": "CAUSAL_LM", "classification": "SEQ_CLS"}.get(config.head, "FEATURE_EXTRACTION")


def resolve(name: str | os.PathLike) -> pathlib.Path:
  """Returns the local directory of an adapter; downloads it if the name is `hf:org/name[@revision]`."""
  path, name = pathlib.Path(name), os.fspath(name)
  fetched = name.startswith("hf:") and not path.exists()
  return hub.download_adapter(name.removeprefix("hf:")) if fetched else path


def head(directory: str | os.PathLike) -> dict[str, Any]:
  """Returns arguments of `models.load` for the model of an adapter: its head and number of labels if it classifies."""
  directory = resolve(directory)
  if hf.read_json(directory / "adapter_config.json").get("task_type") != "SEQ_CLS":
    return {}
  table = [key for family in map(families.get, families.names()) for key in family.KEYS]
  classifiers = {p + key.hf for key in table if key.path == "classifier/kernel" for p in (PREFIX, TOP)}
  source = hf.Tensors([directory / "adapter_model.safetensors"])
  n_labels = next((source.shape(k)[0] for k in source.names() if k in classifiers and source.shape(k)), None)
  return {"head": "classification", "n_labels": n_labels}


def _unknown(config: Mapping) -> list[str]:
  """Returns errors for unknown options of a later PEFT that are set.

  Numbers are ignored, since they configure features that have an option of their own.
  """
  asks = lambda x: x and (x is True or not isinstance(x, numbers.Number))
  return [f"option {k}={v!r:.100} is not known" for k, v in config.items() if k not in OPTIONS and asks(v)]


def load(model: Model, directory: str | os.PathLike) -> Any:
  """Returns the parameters of `model` with the adapter of a PEFT directory, which is not merged.

  Args:
    directory: a path, or `hf:org/name[@revision]`.

  Raises:
    UserError: a file is missing or damaged, the adapter's kind or one of its features is not supported, or a tensor
      does not belong to this model. One message lists every mismatch.
  """
  directory = resolve(directory)
  with errors.parsing(f"the adapter {directory} is damaged or of an unknown kind"):
    return _load(model, directory)


def _load(model: Model, directory: pathlib.Path) -> Any:
  config = hf.read_json(directory / "adapter_config.json")
  flat = tree.flatten(model.params, is_leaf=weights.is_node)
  modules = {k.module.format(*i) for k in model.keys for i in np.ndindex(flat[k.path].shape[: k.hf.count("{}")])}
  source = hf.Tensors([directory / "adapter_model.safetensors"])
  longest = max((n for k in source.names() for n in source.shape(k)), default=0)
  options.check(directory / "adapter_config.json", config, sorted(modules), longest)
  method = _of_config(config, f"peft_type in {directory / 'adapter_config.json'}:")
  soft = method.TYPE in PROMPTS
  prefix, bare = (TOP, {PROMPT}) if soft else (PREFIX, set())
  top = {TOP + k for k in getattr(method, "SHARED", ())}
  known = [k for k in source.names() if k.startswith(prefix) or k in top | bare]
  foreign = sorted(set(source.names()) - set(known))
  wrong = [f"keys without the prefix {prefix!r}: {foreign}"] if foreign else []
  wrong += [] if set(source.names()) - top else ["the adapter holds no tensors"]
  wrong += _unknown(config)
  left = {k.removeprefix(TOP if k in top else prefix): source.read(k) for k in known}
  wrong += hf.not_finite(left)
  config, left = saved_modules.renamed(model, config, left)
  if (method is tokens or config.get("trainable_token_indices")) and _mistied(model):
    wrong.append(MISTIED)
  keys = model.torch_keys
  with errors.located(directory):
    saved_modules.check_rows(keys, model.params, left)
  saved_modules.drop_copies(keys, config, left, wrong)
  wrong += saved_modules.absent(model.params, keys, method, config, left)
  with errors.listed(wrong):
    params, tables = saved_modules.read_tables(model.params, keys, config, left, wrong)
    params, whole = saved_modules.read_whole(params, keys, config, left, wrong)
    params = biases.read(params, keys, config, left, wrong, tables | whole)
    if config.get("trainable_token_indices") and method.TYPE == "LORA":
      params, config = tokens.from_beside(params, keys, config, left, wrong)
    params = method.from_peft(params, keys, config, left, wrong)
    wrong += [f"tensors with no place in this model: {sorted(left)}"] if left else []
  if wrong:
    raise errors.UserError(f"{directory}: {'; '.join(wrong)}")
  return params
