"""A group of runs as one program: members of a sweep that a population can hold, from their configs to their artifacts.

Each member's directory gets what a run of its own leaves (config.json, metrics.jsonl, TensorBoard events, adapter/,
report.md, summary.json), but for checkpoints, which hold the whole group.
"""

import concurrent.futures
import dataclasses
import functools
import json
import pathlib
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lora_jax import methods, models, sharding, tasks, tree, weights
from lora_jax.formats import checkpoint, hf
from lora_jax.inference import members as members_lib
from lora_jax.model import prompts
from lora_jax.results import report
from lora_jax.runs import build as build_lib, experiment, loop, scores
from lora_jax.runs.config import Config
from lora_jax.training import auxiliary, metrics, objectives, optim, population, train


def key(config: Config) -> str:
  """What the members of a group have in common: everything but what a population takes as arrays."""
  found, parts = config.to_dict(), methods.parts(config.method)
  common = {k: found[k] for k in ("model", "task", "objective", "mesh", "eval")}
  common["data"] = {k: v for k, v in found["data"].items() if k not in ("seed", "train_examples")}
  common["optim"] = {k: v for k, v in found["optim"].items() if k not in (*optim.SCHEDULE, *population.NUMBERS)}
  common["train"] = {k: found["train"][k] for k in ("accumulate", "log_every", "checkpoint_every")}
  same = population.RANKS if config.optim.name in population.SEE_PADDING else ()
  varies = lambda m: {k for k in getattr(m, "VARIES", ()) if k not in same}
  common["method"] = [[m.__name__, {k: v for k, v in kw.items() if k not in varies(m)}] for m, kw in parts]
  if any(hasattr(m, "direction") or hasattr(m, "optimiser") for m, _ in parts):
    common["train"]["steps"] = config.train.steps
  return json.dumps(common, sort_keys=True)


def identity(names: Iterable[str]) -> str:
  """A name for the group of these members, so that it is found again and another one is not taken for it."""
  return f"{zlib.crc32(chr(10).join(names).encode()):08x}"


@dataclasses.dataclass
class Group:
  """Members made real, for runs/loop.py, as `experiment.Experiment` is one run.

  P counts what fills the mesh's population axis too.

  Fields:
    members: {name: Experiment} without state, whose trees have shapes where arrays are the population's.
    trees, hyper, state: of the population, placed on the mesh.
    batches: iterators, of which each member takes one.
  """

  members: dict[str, experiment.Experiment]
  trees: population.Trees
  hyper: population.Hyper
  state: population.State
  stepper: train.Stepper
  batches: list
  between: list
  mesh: jax.sharding.Mesh
  aux: auxiliary.Auxiliary | None = None
  pretrained: None = None  # its scores are known

  @property
  def steps(self) -> int:
    """Of the longest run; not asked of the device, which would have to finish what it does."""
    return max(exp.config.train.steps for exp in self.members.values())

  def next_batch(self) -> dict[str, jax.Array]:
    """[B, ...] for all members or, where their data differ, [K, B, ...]."""
    found = [next(b) for b in self.batches]
    if len(found) == 1:
      return sharding.put_batch(found[0], self.mesh)
    widest = {k: np.max([b[k].shape for b in found], axis=0) for k in found[0]}
    pad = lambda k, x: np.pad(x, [(0, n - m) for n, m in zip(widest[k], x.shape, strict=True)])
    return sharding.put_batch({k: np.stack([pad(k, b[k]) for b in found]) for k in widest}, self.mesh, stack=1)

  def arguments(self, batch: Mapping) -> tuple:
    """What the step takes after the state."""
    return self.hyper, self.trees.own, self.trees.shared, self.aux, batch

  def advance(self) -> dict[str, jax.Array]:
    """Takes a step; its metrics [P], which may still be being computed."""
    self.state, values = self.stepper(self.state, *self.arguments(self.next_batch()))
    return values

  def change(self, step: int) -> None:
    """What methods do to the members that go on after `step`."""
    for period, change in self.between:
      if step % period == 0 and step < self.steps:
        self.state = change(self.hyper, self.state)

  def done(self) -> int:
    """How many steps are done."""
    return int(np.max(self.state.members.step))

  def alive(self) -> np.ndarray:
    """bool [P]: of the members, not what fills the mesh."""
    return np.asarray(self.state.alive)[: len(self.members)]

  def subject(self) -> scores.Subject:
    """What is scored: the members as they are now."""
    first = next(iter(self.members.values()))
    own = self.state.members.params(self.trees.own)
    soft = prompts.of(tree.join(jax.tree.map(lambda x: x[0], own), self.trees.shared))
    model = dataclasses.replace(first.model, config=_architecture(first.model))
    members = members_lib.Members(self.trees.shared, own, soft, self.hyper.steps.size)
    return scores.Subject(first.config, model, first.task, members, self.mesh)

  def save(self, saved: checkpoint.Checkpoints, step: int) -> None:
    """Saves the members without what fills the mesh, so that another mesh can go on."""
    saved.save(step, rows(self.state, len(self.members)), [b.get_state() for b in self.batches])

  def restore(self, saved: checkpoint.Checkpoints, step: int) -> None:
    """Goes to where `save` was called, on this mesh."""
    state, data_state = saved.restore(step, rows(self.state, len(self.members)))
    self.state = placed_like(state, self.state)
    for batches, at in zip(self.batches, data_state, strict=True):
      batches.set_state(at)

  def on_host(self) -> "Group":
    """The group without optimiser states, and what it trained in this process's memory, for `member`."""
    members = sharding.to_host(self.state.members.replace(opt_state=None))
    return dataclasses.replace(self, state=self.state.replace(members=jax.device_get(members)))

  def member(self, i: int) -> experiment.Experiment:
    """Member i as a run of its own, as it is now."""
    exp = list(self.members.values())[i]
    state, like = self.state.members, exp.state
    held = like.held and population.unstack(state.held, i, like.held)
    one = train.State(state.step[i], population.unstack(state.trainable, i, like.trainable), None, held)
    return dataclasses.replace(exp, state=one)


def build(configs: Mapping[str, Config], task: tasks.Task, mesh: jax.sharding.Mesh, model: models.Model) -> Group:
  """The group of {name: config} on a base model, which is left as it is."""
  everyone = list(configs.values())
  everyone += everyone[-1:] * (-len(everyone) % mesh.shape["population"])  # whose results nobody reads
  adapted, base = build_lib.adapt_all(everyone, task, model)
  soft = prompts.of(adapted[0][0])
  sources, which = _sources(everyone)
  with concurrent.futures.ThreadPoolExecutor(1) as pool:  # texts are read while programs compile
    reading = pool.submit(_batches, sources, model, task, soft)
    members = {n: _member(c, task, mesh, model, *a) for (n, c), a in zip(configs.items(), adapted, strict=False)}
    held = None if adapted[0][2] is None else [a[2] for a in adapted]
    trees = population.stack([a[:2] for a in adapted], held)
    aux = build_lib.auxiliary_tree(everyone[0], base, soft, trees.shared, mesh)
    del adapted
    hyper = population.hyper(
      steps=[c.train.steps for c in everyone],
      seeds=[c.train.seed for c in everyone],
      optim=[dataclasses.asdict(c.optim) for c in everyone],
      batches=which,
      dropout=trees.dropout,
    )
    first = everyone[0]
    how = dataclasses.asdict(first.optim) | methods.wrappers(first.method, first.train.steps)
    make_optimiser = functools.partial(population.optimiser, **how)
    placed = functools.partial(sharding.put, place=sharding.stacked(weights.placer(trees.member(), mesh)))
    with jax.set_mesh(mesh):
      state = placed(population.init_state(trees, hyper, make_optimiser))
    batches = reading.result()
  trees = dataclasses.replace(trees, own=placed(trees.own), trainable=None, held=None)
  step = population.make_step(
    build_lib.make_forward(first, _architecture(model), len(everyone)),
    objectives.make(**first.objective),
    make_optimiser,
    shared_batch=len(sources) == 1,
    accumulate=first.train.accumulate,
    penalty=methods.penalty(first.method),
  )
  placement = jax.tree.map(lambda x: x.sharding, state)
  changes = [
    (n, jax.jit(population.between(fn), donate_argnums=1, out_shardings=placement))
    for n, fn in methods.between(everyone[0].method)
  ]
  stepper = train.Stepper(step, state, population.compiler_options())
  group = Group(members, trees, placed(hyper), state, stepper, batches, changes, mesh, aux)
  for exp, k in zip(members.values(), which, strict=False):
    exp.stepper, exp.batches = group.stepper, batches[k]  # for what they say of memory and examples
  return group


def _architecture(model: models.Model) -> Any:
  """The model's config under vmap; jax before 0.11.1 cannot batch cuDNN's attention over some arguments alone."""
  old = tuple(int(x) for x in jax.__version__.split(".")[:3]) < (0, 11, 1)
  return dataclasses.replace(model.config, members=True, **({"attention": "xla"} if old else {}))


def _member(config, task, mesh, model, params, mask, held) -> experiment.Experiment:
  """A member whose trained and held leaves are shapes."""
  trainable, frozen = tree.split(params, mask)
  if held is not None:
    held, frozen = tree.split(frozen, tree.split(held, mask)[1])
  shapes = lambda x: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), x)
  state = train.State(np.int32(0), shapes(trainable), None, held and shapes(held))
  model = dataclasses.replace(model, params=None)
  return experiment.Experiment(config, mesh, model, task, state, frozen, mask, None, None, [])


def _sources(configs: Sequence[Config]) -> tuple[list[Config], list[int]]:
  """(a config for each different order or choice of training data, which of them a member has)."""
  found: dict[tuple, int] = {}
  sources, which = [], []
  for c in configs:
    source = c.data.seed, c.data.train_examples
    if source not in found:
      found[source] = len(sources)
      sources.append(c)
    which.append(found[source])
  return sources, which


def _batches(configs: Sequence[Config], model: models.Model, task: tasks.Task, soft: Any) -> list:
  """Iterators, of which those that take all examples share them: encoding is done once."""
  out, whole = [], None
  for c in configs:
    if c.data.train_examples or whole is None:
      out.append(build_lib.batches(c, model, task, soft))
      whole = whole if c.data.train_examples else out[-1]
    else:
      out.append(whole.reseeded(c.data.seed))
  return out


def run(
  group: Group,
  workdir: pathlib.Path,
  checkpoints: pathlib.Path,
  before: Callable[[], scores.Scores],
  command: str = "",
) -> None:
  """Trains, scores and writes a group, or what is left of it; see `loop.train`.

  Args:
    workdir: holds `members/<name>`.
  """
  directories = [workdir / "members" / name for name in group.members]
  more = {"population": len(group.members), "group": identity(group.members)}
  loop.train(group, directories, checkpoints, before=before, strict=False, command=command, more=more)


def rows(state: population.State, n: int) -> population.State:
  """The first n rows of a state, or all and copies of the last; a number that may not divide over the mesh."""
  if n == state.alive.size:
    return state
  whole = lambda x: jax.NamedSharding(x.sharding.mesh, jax.P(None, *x.sharding.spec[1:]))
  return jax.tree.map(lambda x: jax.device_put(x, whole(x))[np.minimum(np.arange(n), len(x) - 1)], state)


def placed_like(state: population.State, like: population.State) -> population.State:
  """A state with as many rows as another, and placed like it."""
  return jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), rows(state, like.alive.size), like)


def fits(group: Group, limit: int | None) -> bool:
  """Whether the group's step needs no more than `limit` bytes on a device, by the compiler's account.

  The data iterators stay where they are.
  """
  states = [b.get_state() for b in group.batches]
  with jax.set_mesh(group.mesh):
    group.stepper.compile(group.state, *group.arguments(group.next_batch()))
  for b, state in zip(group.batches, states, strict=True):
    b.set_state(state)
  return limit is None or group.stepper.memory_bytes <= limit


def finished(directory: pathlib.Path) -> bool:
  """Whether a member's directory holds its results."""
  return (directory / "summary.json").exists()


def result(directory: pathlib.Path) -> dict[str, Any]:
  """The summary of a finished member, with its loss curve and the size of what it saved."""
  summary = hf.read_json(directory / "summary.json")
  if "error" in summary:
    return summary
  report.check(summary, str(directory / "summary.json"))
  rows = [r for r in metrics.read_metrics(directory / "metrics.jsonl") if "train/loss" in r]
  kept = [p for part in ("adapter", "model") for p in (directory / part).glob("*.safetensors")]
  losses = {"step": [r["step"] for r in rows], "loss": [r["train/loss"] for r in rows]}
  return summary | {"saved_bytes": sum(p.stat().st_size for p in kept), "losses": losses}
