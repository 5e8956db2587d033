"""The config of a run: nested dicts that a file and the command line give, resolved once into typed values.

What each section takes follows from the signatures of the functions that its values are passed to; those hold the
defaults and what is valid too, see values.py. `resolve` fills in and checks everything; beyond it no default is chosen.
"""

import dataclasses
import inspect
import pathlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from lora_jax import batches as batches_lib, errors, methods, models, sharding, tasks, values
from lora_jax.formats import hf
from lora_jax.inference import evaluate
from lora_jax.training import objectives, optim
from lora_jax.values import Count, Field, Seed, Size

SWEEP = ("sweep", "table")  # sections of a sweep alone


def train(
  *,
  steps: Count,
  seed: Seed = 0,
  accumulate: Count = 1,
  log_every: Count = 10,
  checkpoint_every: Count = 100,
  init_from: str = "",
) -> None:
  """How long and from what a run trains.

  Args:
    steps: optimiser steps.
    seed: of initial values, dropout and the order of the data.
    accumulate: micro-batches that a batch is split into.
    log_every: steps between lines of metrics.jsonl.
    checkpoint_every: steps between checkpoints; the last step has one too.
    init_from: the directory of an adapter, or `hf:org/name`, whose values training starts from; see runs/warm_start.py.
  """


def evaluation(*, examples: Count = 500, every: Size = 0, general: str = "", general_examples: Count = 200) -> None:
  """What is scored, and when: the pretrained and the trained model on the test split, and on the way on validation.

  Args:
    examples: of each split, at most.
    every: steps between scores of the validation split; 0 is never.
    general: a task whose test texts show what a language model forgets: `general_loss` is its loss on them.
    general_examples: how many of them.
  """


def examples(*, train_examples: Size = 0, seed: Seed | None = None) -> None:
  """Which examples are trained on.

  Args:
    train_examples: so many, chosen at random; 0 is all.
    seed: of their choice and order; None is that of `train`.
  """


# What a run gives the iterators of batches itself, or an objective does.
GIVEN = ("task", "examples", "tokenizer", "start", "prompt_loss_weight", "seed", "process_index", "process_count")
GIVEN += ("multiple", "soft")
PARTS = {
  "model": (models.FIELDS,),
  "data": (
    *(values.fields(kind.train_iterator, without=GIVEN) for kind in batches_lib.kinds()),
    values.fields(examples),
  ),
  "optim": (values.fields(optim.make, without=("steps", "direction", "wrap")),),
  "train": (values.fields(train),),
  "mesh": (values.fields(sharding.make_mesh),),
  "eval": (
    values.fields(evaluation),
    values.fields(evaluate.answers, only=("batch_size", "seq_len", "same_length", "max_new_tokens")),
    values.fields(evaluate.Search),
  ),
}
FIELDS: dict[str, dict[str, Field]] = {
  k: {n: f for part in parts for n, f in part.items()} for k, parts in PARTS.items()
}


def _section(name: str) -> type:
  """A frozen dataclass with the keys of a section."""
  return dataclasses.make_dataclass(name.title(), [(k, f.hint) for k, f in FIELDS[name].items()], frozen=True)


Model, Data, Optim, Train, Mesh, Eval = map(_section, FIELDS)


@dataclasses.dataclass(frozen=True)
class Config:
  """A resolved config: every key of every section has its value.

  Fields:
    method: one or several, {"name": ..., keywords}.
    task, objective: {"name": ..., keywords}.
  """

  model: Model
  method: tuple[Mapping[str, Any], ...]
  task: Mapping[str, Any]
  objective: Mapping[str, Any]
  data: Data
  optim: Optim
  train: Train
  mesh: Mesh
  eval: Eval

  def to_dict(self) -> dict[str, Any]:
    """Nested dicts that `resolve` makes this config of again, and that JSON can hold."""
    found = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
    found = {k: {n: getattr(v, n) for n in FIELDS[k]} if k in FIELDS else v for k, v in found.items()}
    return found | {"method": self.method[0] if len(self.method) == 1 else self.method}


SECTIONS = tuple(f.name for f in dataclasses.fields(Config))


def resolve(config: Mapping | Config, known: dict | None = None) -> Config:
  """The typed config; UserError lists every section, key and value that is wrong, before anything is loaded.

  Args:
    known: sections that have been resolved, which members of a sweep have in common; more are added.
  """
  if isinstance(config, Config):
    return config
  if not isinstance(config, Mapping):
    raise errors.UserError(f"a config is a mapping of sections, not {values.shown(config)}")
  wrong = [f"unknown section config.{k}; {errors.nearest(k, SECTIONS)}" for k in config if k not in SECTIONS]
  if missing := [k for k in ("model", "method", "task", "data", "train") if k not in config]:
    wrong.append(f"config has no section {' or '.join(missing)}")
  found = {}
  for k in SECTIONS:
    with errors.listed(wrong):
      if k not in missing:
        found[k] = _known(k, config.get(k, {}), {} if known is None else known)
  if wrong:
    raise errors.UserError("; ".join(wrong))
  if found["eval"].general:
    tasks.get(found["eval"].general)
  if found["data"].seed is None:
    found["data"] = dataclasses.replace(found["data"], seed=found["train"].seed)
  return Config(**found)


def _known(name: str, given: Any, known: dict) -> Any:
  """A section's resolved value, found in `known` or put there."""
  key = name, repr(given)
  if key not in known:
    known[key] = section(name, given)
  return known[key]


def section(name: str, given: Any) -> Any:
  """A section's resolved value."""
  where = f"config.{name}"
  if name in FIELDS:
    return globals()[name.title()](**values.resolve(FIELDS[name], given, where))
  if name == "method":
    return methods.resolve(given)
  if not isinstance(given, Mapping):
    raise errors.UserError(f"{where} is a section with keys, not {values.shown(given)}")
  if name == "objective":
    given = {"name": objectives.DEFAULT} | dict(given)
  if not given.get("name"):
    raise errors.UserError(f"{where} needs a name")
  if not isinstance(given["name"], str):
    raise errors.UserError(f"{where}.name is {values.shown(given['name'])}, expected a name")
  named, own = given["name"], {k: v for k, v in given.items() if k != "name"}
  return {"name": named, **values.resolve(named_fields(name, named), own, where)}


def named_fields(name: str, of: Any) -> dict[str, Field]:
  """What the section `name` takes besides the name `of`: a task, an objective or a method."""
  if name == "task":
    return tasks.fields(of)
  if name == "method":
    return methods.fields(of)
  return objectives.fields(of)


def for_batches(config: Config, kind: ModuleType) -> dict[str, Any]:
  """The keywords of `kind.train_iterator` that the config sets; UserError for one that it sets in vain."""
  own, found = inspect.signature(kind.train_iterator).parameters, {}
  for k, v in dataclasses.asdict(config.data).items():
    if k in own:
      found[k] = v
    elif k not in values.fields(examples) and v != FIELDS["data"][k].default:
      what = kind.__name__.rpartition(".")[2]
      raise errors.UserError(
        f"config.data.{k}={v!r} is nothing that batches of this model take ({what}.py); leave it out"
      )
  return found


def finished(config: Config, workdir: pathlib.Path) -> bool:
  """Whether `workdir` holds this run complete; UserError if it holds anything else than a run of this config."""
  found = started(workdir)
  if found is not None:
    differ(of_directory(workdir, found).to_dict(), config.to_dict(), workdir)
  return found is not None and (workdir / "summary.json").exists()


def of_directory(workdir: pathlib.Path, found: Mapping) -> Config:
  """The resolved config that a run left."""
  try:
    return resolve(found)
  except errors.UserError as e:
    raise errors.UserError(f"{workdir / 'config.json'}: {e}") from None


def started(workdir: pathlib.Path) -> dict | None:
  """config.json of the run or sweep in `workdir`, None where there is none; UserError for other things."""
  if not workdir.exists() or all(p.suffix == ".tmp" for p in workdir.iterdir()):  # what is being written, or never was
    return None
  if not (workdir / "config.json").exists():
    raise errors.UserError(f"{workdir} is not empty and holds no run (no config.json); give another --workdir")
  return hf.read_json(workdir / "config.json")


def differ(theirs: Mapping, ours: Mapping, workdir: pathlib.Path) -> None:
  """Raises UserError where nested dicts differ: the config of `workdir`, and another."""
  theirs, ours = _leaves(theirs), _leaves(ours)
  if keys := [k for k in sorted(theirs.keys() | ours.keys()) if theirs.get(k) != ours.get(k)]:
    shown = "; ".join(f"{k} was {values.shown(theirs.get(k))}, now {values.shown(ours.get(k))}" for k in keys[:5])
    raise errors.UserError(f"{workdir} belongs to another config ({shown}); give another --workdir")


def _leaves(config: Mapping, prefix: str = "") -> dict[str, Any]:
  """{"section.key": value} of a nested config."""
  out = {}
  for k, v in config.items():
    out |= _leaves(v, f"{prefix}{k}.") if isinstance(v, Mapping) and v else {f"{prefix}{k}": v}
  return out
