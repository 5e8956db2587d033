"""One experiment: a config in, the artifacts of its directory out.

The directory holds config.json, metrics.jsonl, summary.json, report.md, plots/, tensorboard/, checkpoints/ (orbax) and
adapter/ (PEFT) or model/ (Hugging Face), and where texts are generated texts.json. The same call again goes on from the
last checkpoint.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from lora_jax import errors, memory, methods, models, progress, sharding, tasks, tree, weights
from lora_jax.formats import checkpoint, hf
from lora_jax.inference import members as members_lib
from lora_jax.model import prompts
from lora_jax.runs import build as build_lib, config as config_lib, loop, needs, scores, workdir as workdir_lib
from lora_jax.runs.config import Config
from lora_jax.training import auxiliary, objectives, optim, train


@dataclasses.dataclass
class Experiment:
  """A config made real, nothing written yet: a run by itself, for runs/loop.py, or a member of a group.

  Fields:
    model: without parameters, which `state` and `frozen` hold.
    state, frozen, aux: what `stepper` takes, and a batch; of a member of a group the state has shapes, and the group
      has the rest.
    mask: of the whole tree, what is trained.
    batches: training batches.
    between: (period, change of a state) of methods that act between steps.
    pretrained: the model's parameters without what the method adds, until they have been scored.
  """

  config: Config
  mesh: jax.sharding.Mesh
  model: models.Model
  task: tasks.Task
  state: train.State
  frozen: Any
  mask: Any
  stepper: Callable
  batches: Any
  between: list
  aux: auxiliary.Auxiliary | None = None
  pretrained: Any = None

  @property
  def params(self) -> Any:
    """The whole tree, trainable and frozen."""
    return self.state.params(self.frozen)

  @property
  def members(self) -> dict[str, "Experiment"]:
    """Itself, by its method's name."""
    return {methods.title(self.config.method): self}

  @property
  def steps(self) -> int:
    """How many the run has."""
    return self.config.train.steps

  def arguments(self, batch: Mapping) -> tuple:
    """What the step takes after the state."""
    return self.frozen, self.aux, batch

  def next_batch(self) -> dict[str, jax.Array]:
    """The next one, on the mesh."""
    return sharding.put_batch(next(self.batches), self.mesh)

  def advance(self) -> dict[str, jax.Array]:
    """Takes a step; its metrics, which may still be being computed."""
    self.state, values = self.stepper(self.state, *self.arguments(self.next_batch()))
    return values

  def change(self, step: int) -> None:
    """What methods do to the state after `step`, if others follow."""
    for period, change in self.between:
      if step % period == 0 and step < self.steps:
        self.state = change(jax.random.fold_in(jax.random.key(self.config.train.seed), step), self.state)

  def done(self) -> int:
    """How many steps are done."""
    return int(self.state.step)

  def alive(self) -> np.ndarray:
    """bool [1]: a run by itself ends where its loss is not finite."""
    return np.ones(1, bool)

  def subject(self) -> scores.Subject:
    """What is scored."""
    return scores.Subject(self.config, self.model, self.task, members_lib.one(self.params), self.mesh)

  def before(self) -> scores.Scores:
    """The scores of the pretrained model: one number for all methods."""
    subject = dataclasses.replace(self.subject(), members=members_lib.one(self.pretrained))
    (found,) = scores.find(subject, "before", "test")
    return found

  def save(self, saved: checkpoint.Checkpoints, step: int) -> None:
    """Saves the checkpoint of `step`."""
    saved.save(step, self.state, self.batches.get_state())

  def restore(self, saved: checkpoint.Checkpoints, step: int) -> None:
    """Goes to where `save` was called."""
    self.state, data_state = saved.restore(step, self.state)
    self.batches.set_state(data_state)

  def on_host(self) -> "Experiment":
    """Itself: it is exported from where it is."""
    return self

  def member(self, i: int) -> "Experiment":
    """Itself."""
    del i
    return self


def build(config: Mapping | Config, model: models.Model | None = None) -> Experiment:
  """Loads model and data and applies the method; UserError for whatever the config has wrong.

  Args:
    model: what `build.load` gave for this config, to share one base between runs; it is left as it is.
  """
  config = config_lib.resolve(config)
  task, mesh = build_lib.check(config), build_lib.make_mesh(config)
  start = _start(config, task, mesh, model or build_lib.load(config, task, mesh))
  frozen, soft = start.frozen, prompts.of(start.state.params(start.frozen))
  aux = build_lib.auxiliary_tree(config, start.base, soft, frozen, mesh)
  state = train.unshared(start.state, (frozen, aux, start.base.params))
  model = dataclasses.replace(start.base, params=None)
  step = train.make_step(
    build_lib.make_forward(config, model.config),
    objectives.make(**config.objective).loss,
    *start.optimiser,
    seed=config.train.seed,
    accumulate=config.train.accumulate,
    penalty=methods.penalty(config.method),
  )
  batches = build_lib.batches(config, model, task, soft)
  placement = jax.tree.map(lambda x: x.sharding, state)
  compiled = functools.partial(jax.jit, donate_argnums=1, out_shardings=placement)
  return Experiment(
    config=config,
    mesh=mesh,
    model=model,
    task=task,
    state=state,
    frozen=frozen,
    mask=start.mask,
    stepper=train.Stepper(step, state),
    batches=batches,
    between=[(period, compiled(fn)) for period, fn in methods.between(config.method)],
    aux=aux,
    pretrained=start.base.params,
  )


@dataclasses.dataclass
class _Start:
  """What a config trains before its first step.

  Fields:
    base: the pretrained model, whose arrays `frozen` and even the state may have.
    optimiser: and its learning rate.
  """

  base: models.Model
  state: train.State
  frozen: Any
  mask: Any
  optimiser: tuple


def _start(config: Config, task: tasks.Task, mesh: jax.sharding.Mesh, model: models.Model) -> _Start:
  """A model with what a config trains of it, on the mesh."""
  memory.check(needs.least_memory(config, task, model), mesh.size)
  ((params, mask, held),), base = build_lib.adapt_all([config], task, model)
  place = weights.placer(params, mesh)
  trainable, frozen = tree.split(sharding.put(params, place), mask)
  if held is not None:
    held, frozen = tree.split(frozen, tree.split(held, mask)[1])
  how = methods.wrappers(config.method, config.train.steps)
  optimiser = optim.make(steps=config.train.steps, **dataclasses.asdict(config.optim), **how)
  state = sharding.put(train.init_state(trainable, optimiser[0], held), place)
  return _Start(base, state, frozen, mask, optimiser)


def trained(workdir: str | os.PathLike, step: int | None = None) -> models.Model:
  """The model of a run, finished or not, with its adapters, from the checkpoint of `step` (None: the newest)."""
  return restored(workdir, step)[0]


def restored(workdir: str | os.PathLike, step: int | None = None) -> tuple[models.Model, Any, list[dict], int]:
  """(model with its adapters, mask of what was trained, methods as they were applied, steps of the whole training) of
  a run's checkpoint."""
  workdir = pathlib.Path(workdir)
  config = config_lib.of_directory(workdir, hf.read_json(workdir / "config.json"))
  if not (workdir / "checkpoints").is_dir():
    raise errors.UserError(f"{workdir} has no checkpoints")
  task = tasks.get(**config.task)
  mesh = sharding.make_mesh()
  found = _start(config, task, mesh, build_lib.load(config, task, mesh))
  with checkpoint.Checkpoints(workdir / "checkpoints") as saved:
    step = saved.latest_step() if step is None else step
    if step is None:
      raise errors.UserError(f"{workdir} has no checkpoint yet")
    state, _ = saved.restore(step, found.state)
  method = methods.prepare(config.method, found.base.tokenizer, task.labels or ())
  return dataclasses.replace(found.base, params=state.params(found.frozen)), found.mask, method, config.train.steps


def run(
  config: Mapping | Config,
  workdir: str | os.PathLike,
  command: str = "",
  model: models.Model | None = None,
  before: Callable[[], scores.Scores] | None = None,
) -> dict:
  """Runs an experiment in `workdir`, or what is left of it, and returns its summary; `command` is for the report.

  Args:
    model: as in `build`.
    before: gives the scores of the pretrained model, if they are known.

  Raises:
    UserError: bad config, missing data, a directory of another config, or a loss that is not finite.
  """
  config, workdir = config_lib.resolve(config), workdir_lib.check(workdir)
  if config_lib.finished(config, workdir):
    progress.say(f"{workdir} is complete: see {workdir / 'report.md'}, or give another --workdir")
    return hf.read_json(workdir / "summary.json")
  exp = build(config, model)
  (summary,) = loop.train(exp, [workdir], workdir / "checkpoints", before=before, command=command)
  return summary
