"""Modules of the pretrained model in an adapter of the `peft` library: modules saved whole, and copies of the base.

PEFT computes with the plain name of a module that the config saves whole, such as `lm_head.weight`. There may also be
`lm_head.modules_to_save.weight`, which is a copy, and `lm_head.original_module.weight`, which is the weight before
training. PEFT also stores the pretrained embedding and head on request (`save_embedding_layers`), and by default if the
vocabulary was resized. They are under the plain name of a module that is not saved whole, or below its wrapper.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax import errors, families, tree, weights
from lora_jax.formats.pretrained import Model
from lora_jax.model import transformer

EMBED, HEAD = "embed/kernel", "head/kernel"
BASE = ("base_layer", "token_adapter.base_layer", "original_module")  # wrappers that may hold a pretrained tensor

UNTIE = (
  "; load the adapter on the base untied, in transformers: model.config.tie_word_embeddings = False, then "
  "head = model.get_output_embeddings(), head.weight = torch.nn.Parameter(head.weight.clone()) and "
  "model.save_pretrained(DIRECTORY); or train it with ensure_weight_tying=True"
)


def uses(key: families.Key) -> tuple[str, ...]:
  """Returns the modules that use a leaf; for the embedding, those that look rows up and a tied head."""
  return (*key.lookups, *filter(None, [key.head])) if key.path == EMBED else (key.module,)


def renamed(model: Model, config: Mapping, left: dict[str, np.ndarray]) -> tuple[Mapping, dict[str, np.ndarray]]:
  """Returns an adapter's config and tensors with today's module names of transformers, and one name per leaf."""
  old = {k.hf.rpartition(".")[0]: k.module for k in model.family.KEYS if k.torch}
  for before, now in old.items():
    left = {re.sub(rf"^{re.escape(before)}\.", f"{now}.", k): x for k, x in left.items()}
  names = {k.path: k.hf for k in model.torch_keys}
  second = {k.torch or k.hf for k in model.keys if names[k.path] in left} - set(names.values())
  config = config | {
    k: [old.get(m, m) for m in config[k]]
    for k in ("target_modules", "modules_to_save")
    if isinstance(config.get(k), list)
  }
  return config, {k: x for k, x in left.items() if k not in second}


def check_rows(keys: Sequence[families.Key], params: Any, left: Mapping[str, np.ndarray]) -> None:
  """Raises UserError if an adapter was trained with another vocabulary size."""
  for key in (k for k in keys if k.path in (EMBED, HEAD)):
    rows = params["embed"]["kernel"].shape[0] if key.path == EMBED else params["head"]["kernel"].shape[1]
    for m in {*uses(key), key.module}:
      axes = dict.fromkeys((f"{m}.{part}weight" for part in ("", "modules_to_save.", *(f"{b}." for b in BASE))), 0)
      axes |= {f"{m}.lora_embedding_A": 1, f"{m}.lora_B.weight": 0}
      for name, axis in axes.items():
        if (x := left.get(name)) is not None and x.ndim == 2 and x.shape[axis] != rows:
          n = x.shape[axis]
          raise errors.UserError(
            f"the adapter is of a vocabulary of {n} rows ({name} is {x.shape}), this model has {rows}; load it on the "
            f"base that it was trained on, which transformers makes by: model.resize_token_embeddings({n}) and "
            "model.save_pretrained(DIRECTORY)"
          )


def drop_copies(keys: Sequence[families.Key], config: Mapping, left: dict[str, np.ndarray], wrong: list[str]) -> None:
  """Removes from `left` the copies of tensors, and the tensors that modules saved whole have replaced."""
  tables = {f"{m}.weight" for k in keys if k.path in (EMBED, HEAD) for m in uses(k)}
  for k in list(left):
    module, _, name = k.partition(".modules_to_save.")
    # PEFT keeps the adapter's name in the copies that it stores because of their biases.
    plain = next((p for p in (f"{module}.{name}", f"{module}.{name.partition('.')[2]}") if name and p in left), None)
    if plain:
      wrong += [] if np.array_equal(left[k], left[plain]) else [f"{k} and {plain} differ, which are one tensor in PEFT"]
      del left[k]
    module, _, name = k.partition(".original_module.")
    if name and f"{module}.{name}" not in tables and is_saved(config, module):
      del left[k]


def read_tables(
  params: Any, keys: Sequence[families.Key], config: Mapping, left: dict[str, np.ndarray], wrong: list[str]
) -> tuple[Any, set[str]]:
  """Returns (`params` with the adapter's embedding and head, names of the tensors that are saved whole).

  PEFT has a table for each use, whereas this model has one leaf for all uses.
  """
  flat, taken = tree.flatten(params, is_leaf=weights.is_node), set()
  for key in (k for k in keys if k.path in (EMBED, HEAD)):
    names, w = uses(key), flat[key.path]
    every = list(dict.fromkeys((*names, key.module)))
    saved = [m for m in every if is_saved(config, m)]
    saved = every if saved and config.get("ensure_weight_tying") else saved
    places = [*(f"{m}.weight" for m in every if m not in saved), *(f"{m}.{b}.weight" for m in every for b in BASE)]
    bases, whole = ({k: left.pop(k) for k in ks if k in left} for ks in (places, [f"{m}.weight" for m in saved]))
    expected = key.hf_shape(w.shape)
    if bad := [f"{k} is {x.shape}, expected {expected}" for k, x in (bases | whole).items() if x.shape != expected]:
      wrong += bad
      continue
    for k, x in bases.items():
      if not np.array_equal(x, table := next(iter(bases.values()))):
        wrong.append(f"{k} and {next(iter(bases))} differ, which are one table in this model")
      elif (
        x is table and not weights.is_node(w) and not _is_table(key, x, w)
      ):  # a packed table differs only by rounding
        w = jnp.asarray(key.from_hf(x, w.shape)).astype(w.dtype)
    idle = [k for k in whole if k.removesuffix(".weight") not in names]
    wrong += [
      f"{k} is saved whole, which has no effect in PEFT: it computes with {' and '.join(names)}"
      for k in idle
      if not _is_table(key, whole[k], w)
    ]
    if used := [k for k in whole if k not in idle]:
      w = _one(key, [f"{m}.weight" for m in names], whole, used, w, wrong)
    taken |= whole.keys()
    flat[key.path] = w
  return tree.map_named(lambda k, _: flat[k], params, is_leaf=weights.is_node), taken


def _is_table(key: families.Key, x: np.ndarray, w: weights.Weight) -> bool:
  """Returns whether an adapter's tensor, in the dtype of the model's table, is equal to that table."""
  return not weights.is_node(w) and np.array_equal(jnp.asarray(key.from_hf(x, w.shape)).astype(w.dtype), w)


def _one(key, names, whole, used, w, wrong) -> Any:
  """Returns the table that an adapter saves whole under the names `used`, out of the names of all its uses.

  The uses that are not saved keep the pretrained table.
  """
  first, rest = used[0], [k for k in names if k not in used]
  if other := [k for k in used if not np.array_equal(whole[k], whole[first])]:
    said, pair = f"{first} and {other[0]} differ, which are one table in this model", (first, other[0])
  elif rest and not _is_table(key, whole[first], w):
    said = (
      f"{first} is saved without {rest[0]}: PEFT then keeps the pretrained table there, but they are one table here"
    )
    pair = (first, rest[0])
  else:
    return jnp.asarray(key.from_hf(whole[first], w.shape))
  wrong.append(said + (UNTIE if key.head and f"{key.head}.weight" in pair else ""))
  return w


def read_whole(
  params: Any, keys: Sequence[families.Key], config: Mapping, left: dict[str, np.ndarray], wrong: list[str]
) -> tuple[Any, set[str]]:
  """Returns (`params` with the other modules that an adapter saves whole, the names of their tensors)."""
  flat = tree.flatten(params, is_leaf=weights.is_node)
  found: dict[str, tuple] = {}
  for key in (k for k in keys if k.path not in (EMBED, HEAD)):
    for index in np.ndindex(flat[key.path].shape[: key.hf.count("{}")]):
      if is_saved(config, key.module.format(*index)) and (name := key.hf.format(*index)) in left:
        found.setdefault(key.path, (key, {}))[1][name] = left.pop(name)

  def leaf(k, x):
    if k not in found:
      return x
    key, tensors = found[k]
    stack = x.shape[: key.hf.count("{}")]
    shape = x.shape[len(stack) :]
    expected = key.hf_shape(shape)
    if bad := [f"{n} is {t.shape}, expected {expected}" for n, t in tensors.items() if t.shape != expected]:
      wrong.extend(bad)
      return x
    names = {index: key.hf.format(*index) for index in np.ndindex(stack)}
    rows = [
      key.from_hf(tensors[n], shape) if n in tensors else np.asarray(weights.dense(weights.at(x, i)))
      for i, n in names.items()
    ]
    return jnp.asarray(np.stack(rows).reshape(x.shape))

  whole = tree.map_named(leaf, params, is_leaf=weights.is_node)
  return whole, {name for _, tensors in found.values() for name in tensors}


def write_beneath(
  params: Any, keys: Sequence[families.Key], tensors: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
  """Returns {PEFT name: table} for adapted tables that differ from the pretrained model's.

  Args:
    keys: the rows of the leaves that have changed beneath adapters.
    tensors: the tensors of the adapter.

  Raises:
    UserError: another weight has changed, which PEFT cannot store.
  """
  flat, made = tree.flatten(params, is_leaf=weights.is_node), {}
  for key in keys:
    adapted = lambda m, part: any(k.startswith(f"{m}.{part}") for k in tensors)
    places = [f"{m}.base_layer" for m in uses(key) if adapted(m, "lora_") or adapted(m, "trainable_tokens_")]
    places += [f"{m}.token_adapter.base_layer" for m in uses(key) if adapted(m, "token_adapter.")]
    w = weights.base(flat[key.path])
    if key.path not in (EMBED, HEAD) or not places or weights.is_node(w):
      raise errors.UserError(
        f"{key.hf} differs from the pretrained model's beneath an adapter; PEFT has no place for it"
      )
    made |= {f"{place}.weight": key.to_hf(np.asarray(w, np.float32)) for place in places}
  return made


def is_saved(config: Mapping, module: str) -> bool:
  """Returns whether PEFT saves a module whole: its name, or a parent's, ends with one of `modules_to_save`."""
  above = (module[:i] for i, c in enumerate(f"{module}.") if c == ".")
  return any(m.endswith(tuple(config.get("modules_to_save") or ())) for m in above)


def absent(
  params: Any, keys: Sequence[families.Key], method: ModuleType, config: Mapping, tensors: Collection[str]
) -> list[str]:
  """Returns an error for each list of modules that the config names but the adapter lacks; PEFT ignores those."""
  flat, norms = tree.flatten(params, is_leaf=weights.is_node), method.TYPE == "LN_TUNING"
  present = {k[:i] for k in tensors for i, c in enumerate(k) if c == "."}
  bare, incomplete, unknown = [], [], list(config.get("modules_to_save") or ())
  for key in keys:
    is_table = key.path in (EMBED, HEAD)
    for index in np.ndindex(flat[key.path].shape[: key.hf.count("{}")]):
      modules = dict.fromkeys((*uses(key), key.module)) if is_table else [key.module.format(*index)]
      saved = [m for m in modules if is_saved(config, m)]
      names = [f"{m}.weight" if is_table else key.hf.format(*index) for m in saved]
      incomplete += [k for k in names if k not in tensors]
      unknown = [] if names else unknown  # PEFT lists all names that a head may have
      if (norms or is_table or transformer.in_axes(key.path)) and "/moe/" not in key.path:
        modules = [m for m in (uses(key) if is_table else modules) if m not in saved]
        bare += [m for m in modules if m not in present and is_target(config, m)]
  said = {"target_modules": sorted(set(bare)), "modules_to_save": incomplete or unknown}
  return [f"{k} of the config without tensors: {', '.join(v)}" for k, v in said.items() if v]


def is_target(config: Mapping, module: str) -> bool:
  """Returns whether PEFT adapts a linear layer of this name."""

  def ends(names):
    return re.fullmatch(names, module) if isinstance(names, str) else any(f".{module}".endswith(f".{n}") for n in names)

  targets, layers = config.get("target_modules") or (), config.get("layers_to_transform")
  if str(targets).lower() == "all-linear" or not ends(targets) or ends(config.get("exclude_modules") or ()):
    return False
  if isinstance(targets, str) or module in targets or layers in (None, []):
    return True
  patterns = config.get("layers_pattern") or "[^.]*"
  found = (re.match(rf".*\.{p}\.(\d+)\.", module) for p in ([patterns] if isinstance(patterns, str) else patterns))
  layer = next((int(m[1]) for m in found if m), None)
  return layer in (layers if isinstance(layers, list) else [layers])
