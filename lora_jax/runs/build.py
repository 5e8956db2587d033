"""What a config asks for, made real: task, mesh, model, method, batches and the forward that trains."""

import dataclasses
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lora_jax import errors, methods, models, sharding, tasks, weights
from lora_jax.batches import iterator
from lora_jax.inference import generate
from lora_jax.model import architecture, prompts
from lora_jax.runs import config as config_lib, warm_start
from lora_jax.runs.config import Config
from lora_jax.training import auxiliary, objectives, train
from lora_jax.weights import fused


def make_mesh(config: Config) -> jax.sharding.Mesh:
  """The mesh of a config."""
  return sharding.make_mesh(**dataclasses.asdict(config.mesh))


def check(config: Mapping | Config) -> tasks.Task:
  """The task of a config, with its data; UserError for whatever can be wrong before the model is loaded."""
  config = config_lib.resolve(config)
  scored, mesh = ("test", "validation") if config.eval.every else ("test",), make_mesh(config)
  rows = sharding.batch_divisor(mesh) * config.train.accumulate
  if config.data.batch_size % rows:
    raise errors.UserError(
      f"config.data.batch_size={config.data.batch_size} is no multiple of {rows} (data * fsdp * accumulate)"
    )
  _check_processes(mesh)
  task = tasks.get(**config.task)
  if objectives.make(**config.objective).head == "classification" and not task.n_outputs:
    how = "; config.task.labels lists them, or is 'all'" if "labels" in config.task else ""
    name = config.objective["name"]
    raise errors.UserError(f"task {task.name!r} has no labels or numbers for config.objective.name={name!r}{how}")
  for split in ("train", *scored):
    task.load(split)  # what is wrong with them is said now, not after training
  return task


def _check_processes(mesh: jax.sharding.Mesh) -> None:
  """Raises UserError where processes would not read rows of their own: each reads its share of a batch."""
  n, rows = jax.process_count(), sharding.batch_divisor(mesh)
  if rows % n:
    raise errors.UserError(f"config.mesh: data * fsdp is {rows}, no multiple of the {n} processes that share the rows")
  if n > 1 and mesh.shape["population"] > 1:
    raise errors.UserError(
      f"config.mesh.population={mesh.shape['population']}: members are spread over the devices of one process; start "
      "processes by themselves, each with its --shard i/n"
    )


def load(config: Config, task: tasks.Task, mesh: jax.sharding.Mesh) -> models.Model:
  """The pretrained model of a config, on the mesh, with the head that its objective trains."""
  head, given = objectives.make(**config.objective).head, dataclasses.asdict(config.model)
  if head == "classification":
    own = {"head": head, "n_labels": task.n_outputs}
    given |= {k: v for k, v in own.items() if given[k] is None}
  model = models.load(**given, sharding=sharding.Placer(mesh))
  if model.config.head != head:
    fit = [name for name in objectives.names() if model.config.head == objectives.get(name).HEAD]
    there = f"; those that do: {', '.join(map(repr, fit))}" if fit else ""
    raise errors.UserError(
      f"config.objective.name={config.objective['name']!r} does not train a model with the head "
      f"{model.config.head!r}, but one with {head!r}{there}"
    )
  if model.tokenizer is None:
    raise errors.UserError(f"model {model.name!r} has no tokenizer.json beside its weights")
  return model


def adapt(config: Config, task: tasks.Task, model: models.Model) -> tuple[Any, Any, Any]:
  """(params, mask of what is trained, mask of the frozen leaves that change between steps or None) of a config."""
  method = methods.prepare(config.method, model.tokenizer, task.labels or ())
  params, mask = methods.init(jax.random.key(config.train.seed), model.params, method)
  for section in ("data", "eval"):
    length, before = getattr(config, section).seq_len, prompts.prefix_length(params)
    if model.config.position == "learned" and before + length > model.config.max_seq_len:
      after = f" after a prefix of {before}" if before else ""
      raise errors.UserError(
        f"config.{section}.seq_len={length}{after} is more than the {model.config.max_seq_len} positions of "
        f"{model.name!r}"
      )
  if model.config.head == "classification":
    params, mask = methods.train_also(params, mask, model.head_leaves)
  if config.train.init_from:
    params = warm_start.start(model, params, mask, config.train.init_from)
  return params, mask, methods.held(method, params)


def adapt_all(configs: Sequence[Config], task: tasks.Task, model: models.Model) -> tuple[list[tuple], models.Model]:
  """(what `adapt` gives of each config, the model): what all of it shares is one array.

  Of a fused matrix methods take the parts, which are arrays of their own. Where others need them too, members or the
  objective's tree, the model has its matrices split first.
  """
  found, base = [], model
  for c in configs:
    found.append(adapt(c, task, base))
    base = dataclasses.replace(base, params=fused.like(base.params, found[-1][0]))
  split = jax.tree.structure(base.params) != jax.tree.structure(model.params)
  if split and (len(configs) > 1 or objectives.make(**configs[0].objective).aux):
    return [adapt(c, task, base) for c in configs], base
  return found, base


def make_forward(config: Config, arch: architecture.Config, members: int = 1) -> train.Forward:
  """The forward of training batches; `members`: how many are trained together."""
  return train.Forward(arch, config.data.pack or config.data.share_rows, members)


def auxiliary_tree(
  config: Config, model: models.Model, soft: prompts.Soft | None, frozen: Any, mesh: jax.sharding.Mesh
) -> auxiliary.Auxiliary | None:
  """What the objective needs beside what is trained, on the mesh, without copies of what `frozen` has.

  Args:
    model: the pretrained model, as `adapt_all` gives it.
    soft: the soft tokens of what is trained.
  """
  objective = objectives.make(**config.objective)
  if objective.aux is None:
    return None
  found = objective.aux(model)
  auxiliary.check_soft(soft, found)
  return auxiliary.beside(sharding.put(found, weights.placer(found, mesh)), frozen)


def batches(
  config: Config, model: models.Model, task: tasks.Task, soft: prompts.Soft | None = None, examples: Any = None
) -> iterator.TrainIterator:
  """Training batches as the model takes them; of the task's examples, or of `examples`."""
  kind, own = objectives.make(**config.objective).batches(model.config, task)
  settings = config_lib.for_batches(config, kind)
  takes = inspect.signature(kind.train_iterator).parameters
  if "start" in takes:
    own["start"] = generate.start_id(model)
  if "multiple" in takes:
    rows = sharding.batch_divisor(make_mesh(config)) * config.train.accumulate
    own["multiple"] = math.lcm(rows, jax.process_count()) // jax.process_count()
  examples = task.load("train") if examples is None else examples
  if config.data.train_examples > len(examples):
    there = f"task {task.name!r} has {len(examples):,} to train on"
    raise errors.UserError(f"config.data.train_examples={config.data.train_examples:,}: {there}")
  if config.data.train_examples:
    examples = sample(examples, config.data.train_examples, config.data.seed)
  return kind.train_iterator(
    task,
    examples,
    model.tokenizer,
    **own,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    soft=soft,
    **settings,
  )


def sample(examples: Any, n: int, seed: int = 0) -> list[dict]:
  """The same `n` examples at every call, in order."""
  indices = np.random.default_rng(seed).permutation(len(examples))[:n]
  return [examples[int(i)] for i in np.sort(indices)]
