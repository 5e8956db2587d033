"""Several runs that differ in parts of their config (runs/variants.py), and what they say together.

Members that a population can hold train as one program (runs/group.py), the others one after the other over the
same base model; each leaves a directory `workdir/members/<member>`. The same call again goes on with what is not
finished. Hosts take shards of the members, in one directory that all see or each in its own; runs/outcome.py puts
their results together.
"""

import concurrent.futures
import dataclasses
import functools
import gc
import itertools
import json
import numbers
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
from jax.experimental import multihost_utils

from lora_jax import errors, files, memory, models, progress, tasks
from lora_jax.formats import hf
from lora_jax.inference import evaluate, members as members_lib
from lora_jax.results import table_layout
from lora_jax.runs import (
  build,
  config as config_lib,
  experiment,
  group as group_lib,
  needs,
  outcome,
  scores,
  variants,
  warm_start,
  workdir as workdir_lib,
)
from lora_jax.runs.config import Config
from lora_jax.training import metrics, objectives

TRIED = 16  # examples that show which metrics a task has


@dataclasses.dataclass(frozen=True)
class Call:
  """What the groups of one call share.

  Fields:
    configs: of all members by name.
    command: for the reports.
    memory_gib: how much of a device a group may take; 0 is what there is.
    tick: writes how long the call has taken.
  """

  configs: Mapping[str, Config]
  workdir: pathlib.Path
  mesh: jax.sharding.Mesh
  command: str
  memory_gib: float
  tick: Callable[[], None]


def groups(configs: Mapping[str, Config], most: int = 0) -> list[list[str]]:
  """Names of members that train together, each group of at most `most` (0: any number).

  In order, but groups over one pretrained model come one after the other, and last those that start from adapters,
  which other members may leave.
  """
  found: dict[tuple, dict[str, list[str]]] = {}
  for name, c in configs.items():
    found.setdefault(_base(c), {}).setdefault(group_lib.key(c), []).append(name)
  order = sorted(found, key=lambda base: base[0])
  every = [names for base in order for names in found[base].values()]
  return [part for names in every for part in cut(names, -(-len(names) // most) if most else 1)]


def _base(config: Config) -> tuple[bool, str]:
  """(whether a member starts from an adapter, its pretrained model as text); a classifier's model has a head."""
  classifies = objectives.make(**config.objective).head == "classification"
  outputs = tasks.get(**config.task).n_outputs if classifies else 0
  return bool(config.train.init_from), json.dumps([dataclasses.asdict(config.model), outputs], sort_keys=True)


def cut(names: Sequence[str], n: int) -> list[list[str]]:
  """`names` in n parts of sizes that differ by one at most."""
  ends = [round(len(names) * i / n) for i in range(n + 1)]
  return [list(names[a:b]) for a, b in zip(ends, ends[1:], strict=False) if b > a]


def shard_of(configs: Mapping[str, Config], index: int, count: int) -> list[str]:
  """The members that shard `index` of `count` takes: whole groups, or where those are too few a share of each."""
  if not 0 <= index < count:
    raise errors.UserError(f"--shard {index}/{count}: expected i/n with 0 <= i < n")
  found = groups(configs)
  shares = found[index::count] if len(found) >= count else [names[index::count] for names in found]
  return [name for names in shares for name in names]


def run(config: Mapping, workdir: str | os.PathLike, command: str = "", shard: tuple[int, int] = (0, 1)) -> dict:
  """Runs the members that have not run yet; returns and writes summary.json, report.md and plots/ of all.

  A member whose loss is not finite is reported, and the others go on; one that starts from an adapter which is not
  there yet is left to a later call.

  Args:
    shard: (i, n): run the i-th of n shares; the summary then is of what is there.
  """
  workdir = workdir_lib.check(workdir)
  files.WRITER = f".{shard[0]}-of-{shard[1]}" if shard[1] > 1 else ""
  tick = _clock(workdir / "seconds" / f"{shard[0]}-of-{shard[1]}.json")
  found = variants.members(config)
  configs = {name: c for name, (_, c) in found.items()}
  options = variants.options(config["sweep"])
  mine = shard_of(configs, *shard)
  if config.get("table"):
    parts = {k: v for k, v in config.items() if k not in config_lib.SWEEP}
    rows = [{"name": n, "overrides": o} for n, (o, _) in found.items()]
    table_layout.of({"config": parts, "table": config["table"], "members": rows})  # a wrong layout fails now
  if _finished(config, found, workdir):
    progress.say(f"{workdir} is complete: see {workdir / 'report.md'}, or give another --workdir")
    return hf.read_json(workdir / "summary.json")
  mesh = build.make_mesh(next(iter(configs.values())))
  plan = _plan({n: configs[n] for n in mine}, workdir, options["max_members"])
  # While the data are prepared and found to be right; processes have to place arrays in one order.
  ahead = plan and jax.process_count() == 1 and not all(configs[n].train.init_from for n in plan[0])
  loading = scores.BACKGROUND.submit(_load, configs[plan[0][0]], mesh) if ahead else None
  for c in {group_lib.key(configs[n]): configs[n] for n in mine}.values():
    build.check(c)
  _check_metrics(config.get("table") or {}, configs, mine)
  if jax.process_index() == 0:
    metrics.write_json(workdir / "config.json", config)
  progress.say(_told(plan, len(configs), shard))
  call = Call(configs, workdir, mesh, command, options["memory_gib"], tick)
  try:
    for _, part in itertools.groupby(plan, lambda names: _base(configs[names[0]])):
      _over_one_model(call, list(part), loading)
      loading = None
  finally:
    tick()
  multihost_utils.sync_global_devices("finish")
  _clear(mine, workdir)  # those too that an earlier call was killed before
  return _finish(config, found, workdir, command)


def _check_metrics(table: Mapping, configs: Mapping[str, Config], mine: Sequence[str]) -> None:
  """Raises UserError for a metric of the table that no member will have, where that can be known before training.

  Args:
    mine: members whose data are here. If other members are scored in another way, their metrics are not known.
  """
  scored = {n: _scored(c) for n, c in configs.items()}
  here = {scored[n]: configs[n] for n in mine}
  names = [_metric_names(c) for c in here.values()] if here.keys() == set(scored.values()) else [None]
  if None not in names:
    table_layout.check_metrics(table, itertools.chain(*names))


def _scored(config: Config) -> str:
  """What the metrics of a member depend on: members that have the same share the scores before training."""
  return json.dumps([config.task, config.objective["name"], dataclasses.asdict(config.eval)], sort_keys=True)


def _metric_names(config: Config) -> list[str] | None:
  """The metrics that a member will have; None where they are not known."""
  task = tasks.get(**config.task)
  new = config.eval.max_new_tokens
  writes = objectives.make(**config.objective).head != "classification"
  generates = writes and bool(not task.labels if new is None else new)
  examples = task.load("test")
  found = evaluate.metric_names(task, [examples[i] for i in range(min(len(examples), TRIED))], generates)
  return None if found is None else [*found, *(["general_loss"] if config.eval.general else [])]


def _finished(config: Mapping, found: Mapping, workdir: pathlib.Path) -> bool:
  """Whether `workdir` holds this sweep complete; UserError if it holds anything else than members of this one."""
  theirs = config_lib.started(workdir)
  if theirs is None:
    return False
  if "sweep" not in theirs:
    raise errors.UserError(f"{workdir} holds a single run; give another --workdir")
  try:
    members = variants.members(theirs)
  except errors.UserError as e:
    raise errors.UserError(f"{workdir / 'config.json'}: {e}") from None
  resolved = lambda found: {name: c.to_dict() for name, (_, c) in found.items()}
  table = lambda config: {"table": json.loads(metrics.dumps(config.get("table") or {}))}
  config_lib.differ(resolved(members) | table(theirs), resolved(found) | table(config), workdir)
  return (workdir / "summary.json").exists()


def _clock(path: pathlib.Path) -> Callable[[], None]:
  """A function that writes to `path` the seconds since now, added to the seconds of earlier calls."""
  started = time.perf_counter()
  earlier = hf.read_json(path, seconds=numbers.Real)["seconds"] if path.exists() else 0.0

  def tick():
    if jax.process_index() == 0:
      metrics.write_json(path, {"seconds": earlier + time.perf_counter() - started})

  return tick


def _plan(configs: Mapping[str, Config], workdir: pathlib.Path, most: int) -> list[list[str]]:
  """The groups of what is not finished: as they were where an earlier call has begun, whose checkpoints go on."""
  left = {n for n in configs if not group_lib.finished(workdir / "members" / n)}
  known = [_members(p) for p in sorted(workdir.glob("groups/*/members.json"))]
  begun = [names for names in known if left & set(names) and configs.keys() >= set(names)]
  new = left.difference(*begun)
  order = [n for names in groups(configs) for n in names]
  return sorted([*begun, *groups({n: configs[n] for n in configs if n in new}, most)], key=lambda g: order.index(g[0]))


def _members(path: pathlib.Path) -> list[str]:
  """The names of a group's members."""
  names = hf.read_json(path, members=list)["members"]
  if not all(isinstance(n, str) for n in names):
    raise errors.UserError(f"{path}: members should be names, not {names!r:.60}")
  return names


def _told(plan: Sequence[Sequence[str]], n: int, shard: tuple[int, int]) -> str:
  """The grouping, for people."""
  share = "" if shard[1] == 1 else f", shard {shard[0]} of {shard[1]}"
  lines = [f"{sum(map(len, plan))} of {n} members in {len(plan)} groups{share}; each group is one program"]
  for i, names in enumerate(plan):
    shown = ", ".join(names[:6]) + (f", ... ({len(names)} members)" if len(names) > 6 else "")
    lines.append(f"  group {i + 1}: {shown}")
  return "\n".join(lines)


def _load(config: Config, mesh: jax.sharding.Mesh) -> Any:
  """The pretrained model of a member."""
  return build.load(config, tasks.get(**config.task), mesh)


def _over_one_model(call: Call, plan: list[list[str]], loading: concurrent.futures.Future | None) -> None:
  """Runs groups that share a pretrained model.

  The model is the result of `loading`. Without that, it is loaded if any of the groups can run.
  """
  model = None
  known = {}
  done = lambda name: group_lib.finished(call.workdir / "members" / name)
  while plan:
    multihost_utils.sync_global_devices("members")  # all see what process 0 has written
    names = [n for n in plan.pop(0) if done(n) or not _waits(n, call.configs[n])]
    if all(map(done, names)):
      continue
    first = call.configs[names[0]]
    task = tasks.get(**first.task)
    model = model or (loading.result() if loading else _load(first, call.mesh))
    scored = _scored(first)
    if scored not in known:
      known[scored] = _pretrained(first, model, task, call.mesh)
    if len(names) == 1:
      _alone(call, names[0], model, known[scored])
    else:
      plan = _together(call, names, task, model, known[scored]) + plan
    call.tick()


def _waits(name: str, config: Config) -> bool:
  """Whether the adapter that a member starts from is not there, which is said: it may be another's to leave."""
  try:
    if config.train.init_from:
      warm_start.find(config.train.init_from)
  except errors.UserError as e:
    progress.say(f"{name}: {e}; it is left to a later call")
    return True
  return False


def _pretrained(config: Config, model: Any, task: tasks.Task, mesh: jax.sharding.Mesh) -> Callable[[], scores.Scores]:
  """A function that gives the scores of a model that is not trained; what it runs is compiled meanwhile."""
  subject = scores.Subject(config, model, task, members_lib.one(model.params), mesh)
  compiling = scores.compile_ahead(subject, "test")

  @functools.cache
  def found() -> scores.Scores:
    concurrent.futures.wait([compiling])
    with jax.set_mesh(mesh):
      (one,) = scores.find(subject, "before", "test")
    progress.say(scores.said("before", one))
    return one

  return found


def _alone(call: Call, name: str, model: models.Model, before: Callable[[], scores.Scores]) -> None:
  """Runs a member that is a group of its own."""
  progress.say(f"member {name}")
  directory = call.workdir / "members" / name
  try:
    experiment.run(call.configs[name], directory, model=model, before=before)
  except errors.UserError as e:
    _failed(name, directory, e)


def _failed(name: str, directory: pathlib.Path, error: errors.UserError) -> None:
  """What went wrong is the result of the member that it happened to."""
  progress.say(f"{name}: {error}")
  if jax.process_index() == 0 and not group_lib.finished(directory):
    metrics.write_json(directory / "summary.json", {"error": str(error), "group": group_lib.identity([name])})


def _together(
  call: Call,
  names: Sequence[str],
  task: tasks.Task,
  model: models.Model,
  before: Callable[[], scores.Scores],
) -> list[list[str]]:
  """Runs a group, or returns the smaller groups that it has to be cut into."""
  directory = call.workdir / "groups" / group_lib.identity(names)
  try:
    return _fitting(call, names, directory, task, model, before)
  except jax.errors.JaxRuntimeError as e:
    if not errors.is_out_of_memory(e) or any(directory.glob("checkpoints/[0-9]*")):
      raise
  gc.collect()  # what the group had on the device
  if jax.process_index() == 0:
    shutil.rmtree(directory, ignore_errors=True)
  parts = cut(names, 2)
  progress.say(f"they do not fit: cut into 2 groups of {max(map(len, parts))} or fewer")
  return parts


def _fitting(call: Call, names: Sequence[str], directory: pathlib.Path, task, model, before) -> list[list[str]]:
  """`_together` where what a program needs is known before it runs."""
  configs = {n: call.configs[n] for n in names}
  progress.say(f"{len(names)} members train together")
  try:
    limit = int(call.memory_gib * 2**30) or memory.available()
    least = needs.least_memory(configs[names[0]], task, model, len(names))
    need = sum(least.values()) // call.mesh.size
    if limit is None or need <= limit:
      built = group_lib.build(configs, task, call.mesh, model)
      need = 0 if group_lib.fits(built, limit) else built.stepper.memory_bytes
  except errors.UserError:  # it may be the fault of one member, which is found when that one is alone
    return cut(names, 2)
  if limit is not None and need > limit:
    parts = cut(names, min(-(-need // limit), len(names)))
    there = f"{need / memory.GIB:.2f} GiB of {limit / memory.GIB:.2f}"
    progress.say(f"they need {there}: cut into {len(parts)} groups of {max(map(len, parts))} or fewer")
    return parts
  if jax.process_index() == 0:
    metrics.write_json(directory / "members.json", {"members": names})
  group_lib.run(built, call.workdir, directory / "checkpoints", before, call.command)
  multihost_utils.sync_global_devices("written")  # no process reads its checkpoints any more
  _clear(names, call.workdir)
  return []


def _clear(names: Collection[str], workdir: pathlib.Path) -> None:
  """Deletes the checkpoints of groups of these members all of which have their results."""
  for path in workdir.glob("groups/*/members.json") if jax.process_index() == 0 else ():
    members = _members(path)
    if set(members) <= set(names) and all(group_lib.finished(workdir / "members" / n) for n in members):
      shutil.rmtree(path.parent / "checkpoints", ignore_errors=True)


def _finish(config: Mapping, found: Mapping, workdir: pathlib.Path, command: str) -> dict:
  """Writes the summary and the report of what is there; the summary's final name only when all is."""
  overrides = {name: changed for name, (changed, _) in found.items()}
  out = outcome.summary(config, overrides, [workdir], command)
  missing = len(out["missing"])
  if jax.process_index() == 0:
    outcome.write_report(workdir, out)
    if not missing:
      metrics.write_json(workdir / "summary.json", out)
  if missing:
    again = "the same command runs those that it can, python -m experiments.report joins directories"
    progress.say(f"{missing} of {len(found)} members are not here; {again}")
  progress.say(outcome.text_table(out))
  return out
