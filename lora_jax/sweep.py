"""Several runs that differ in parts of their config (variants.py), and what they say together.

Members that a population can hold train as one program (group.py), the others one after the other over the same base
model; each leaves a directory `workdir/members/<member>`. The same call again goes on with what is not finished.
Hosts take shards of the members, in one directory that all see or each in its own; `join` puts results together.
"""

import os
import pathlib
import time
import zlib
from collections.abc import Iterable, Mapping, Sequence

import jax

from lora_jax import (
  compare,
  config as config_lib,
  errors,
  evaluate,
  experiment,
  group as group_lib,
  layout,
  metrics,
  report,
  sharding,
  tables,
  variants,
)
from lora_jax.formats import hf


def groups(configs: Mapping[str, Mapping], most: int = 0) -> list[list[str]]:
  """Names of members that train together, each group of at most `most` (0: any number), in order."""
  found: dict[str, list[str]] = {}
  for name, c in configs.items():
    found.setdefault(group_lib.key(c), []).append(name)
  return [part for names in found.values() for part in cut(names, -(-len(names) // most) if most else 1)]


def cut(names: Sequence[str], n: int) -> list[list[str]]:
  """`names` in n parts of sizes that differ by one at most."""
  ends = [round(len(names) * i / n) for i in range(n + 1)]
  return [list(names[a:b]) for a, b in zip(ends, ends[1:], strict=False) if b > a]


def shard_of(configs: Mapping[str, Mapping], index: int, count: int) -> list[str]:
  """The members that shard `index` of `count` takes: of every group a share, so that shards are of one size."""
  if not 0 <= index < count:
    raise errors.UserError(f"--shard {index}/{count}: expected i/n with 0 <= i < n")
  return [name for names in groups(configs) for name in names[index::count]]


def run(config: Mapping, workdir: str | os.PathLike, command: str = "", shard: tuple[int, int] = (0, 1)) -> dict:
  """Runs the members that have not run yet; returns and writes summary.json, report.md and plots/ of all.

  A member whose loss is not finite is reported, and the others go on.

  Args:
    shard: (i, n): run the i-th of n shares; the summary then is of what is there.
  """
  workdir, started = pathlib.Path(workdir), time.perf_counter()
  found = variants.members(config)
  configs = {name: c for name, (_, c) in found.items()}
  options = variants.settings(**{k: v for k, v in config["sweep"].items() if k not in variants.PARTS})
  mine = shard_of(configs, *shard)
  if config.get("table"):
    parts = {k: v for k, v in config.items() if k not in config_lib.SWEEP}
    rows = [{"name": n, "overrides": o} for n, (o, _) in found.items()]
    layout.of({"config": parts, "table": config["table"], "members": rows})  # a wrong layout fails now
  if config_lib.finished(config, workdir):
    metrics.say(f"{workdir} is complete: see {workdir / 'report.md'}, or give another --workdir")
    return hf.read_json(workdir / "summary.json")
  base = next(iter(configs.values()))
  mesh, task = sharding.make_mesh(**base["mesh"]), experiment.check(base)
  if jax.process_index() == 0:
    metrics.write_json(workdir / "config.json", config)
  plan = groups({name: configs[name] for name in mine}, options["max_members"])
  metrics.say(_told(plan, len(configs), shard))
  model = before = None
  while plan:
    names = plan.pop(0)
    if all(group_lib.finished(workdir / "members" / n) for n in names):
      continue
    if model is None:
      model = experiment.load(base, task, mesh)
      with jax.set_mesh(mesh):
        (before,) = experiment.scores(base, model, task, evaluate.one(model.params), mesh, "before", "test")
      metrics.say("before: " + "  ".join(f"{k} {v:.4f}" for k, v in before.items()))
    chosen = {n: configs[n] for n in names}
    if len(names) == 1:
      _alone(names[0], chosen[names[0]], workdir, model, before)
    else:
      plan = _together(chosen, workdir, task, mesh, model, before, command, options["memory_gib"]) + plan
  return _finish(config, found, workdir, command, time.perf_counter() - started)


def _told(plan: Sequence[Sequence[str]], n: int, shard: tuple[int, int]) -> str:
  """The grouping, for people."""
  share = "" if shard[1] == 1 else f", shard {shard[0]} of {shard[1]}"
  lines = [f"{sum(map(len, plan))} of {n} members in {len(plan)} groups{share}; each group is one program"]
  for i, names in enumerate(plan):
    shown = ", ".join(names[:6]) + (f", ... ({len(names)} members)" if len(names) > 6 else "")
    lines.append(f"  group {i + 1}: {shown}")
  return "\n".join(lines)


def _alone(name: str, config: Mapping, workdir: pathlib.Path, model, before) -> None:
  """A member that is a run of its own; what goes wrong is its result."""
  metrics.say(f"member {name}")
  directory = workdir / "members" / name
  try:
    experiment.run(config, directory, model=model, before=before)
  except errors.UserError as e:
    metrics.say(f"{name}: {e}")
    if jax.process_index() == 0:
      metrics.write_json(directory / "summary.json", {"error": str(e)})


def _together(configs, workdir, task, mesh, model, before, command, memory_gib) -> list[list[str]]:
  """Runs a group, or returns the smaller groups that it has to be cut into."""
  names = list(configs)
  metrics.say(f"{len(names)} members train together")
  built = group_lib.build(configs, task, mesh, model)
  limit = int(memory_gib * 2**30) or group_lib.memory_limit(mesh)
  if not group_lib.fits(built, limit):
    parts = cut(names, min(-(-built.step.memory_bytes // limit), len(names)))
    need = f"{built.step.memory_bytes / 2**30:.2f} GiB of {limit / 2**30:.2f}"
    metrics.say(f"they need {need}: cut into {len(parts)} groups of {len(parts[0])} or fewer")
    return parts
  # Named by its members, so that a group is found again and another one is not taken for it.
  checkpoints = workdir / "groups" / f"{zlib.crc32(chr(10).join(names).encode()):08x}" / "checkpoints"
  group_lib.run(built, workdir, checkpoints, before, command)
  return []


def _finish(config: Mapping, found: Mapping, workdir: pathlib.Path, command: str, seconds: float) -> dict:
  """Writes the summary and the report of what is there; the summary's final name only when all is."""
  out = summary(config, found, [workdir], seconds)
  missing = len(found) - len(out["members"])
  if jax.process_index() == 0:
    write_report(workdir, out, command)
    if not missing:
      metrics.write_json(workdir / "summary.json", out)
  if missing:
    metrics.say(f"{missing} of {len(found)} members are not here; python -m experiments.report joins directories")
  metrics.say(text_table(out))
  return out


def summary(config: Mapping, found: Mapping, workdirs: Iterable[pathlib.Path], seconds: float) -> dict:
  """The content of summary.json: the members that are finished in any of the directories, in the sweep's order."""
  rows = []
  for name, (overrides, _) in found.items():
    directories = [d for w in workdirs if group_lib.finished(d := w / "members" / name)]
    if directories:
      rows.append({"name": name, "overrides": overrides, **group_lib.result(directories[0])})
  here = {r["name"] for r in rows}
  plan = groups({n: c for n, (_, c) in found.items() if n in here})
  parts = {k: v for k, v in config.items() if k != "sweep"}
  table = parts.pop("table", None)
  out = {"config": parts, "table": table, "members": rows, "groups": plan, "wall_seconds": seconds}
  return out | {"versions": report.versions()}


def write_report(workdir: pathlib.Path, out: Mapping, command: str = "") -> None:
  """report.md and plots/: the table that the config lays out, else a comparison of the members."""
  (tables.write if out["table"] else compare.write_report)(workdir, out, command)


def text_table(out: Mapping) -> str:
  """The table for a terminal."""
  return tables.markdown(tables.pivot(out)) if out["table"] else compare.text_table(out["members"])


def join(workdirs: Sequence[str | os.PathLike], out: str | os.PathLike, command: str = "") -> dict:
  """Puts the members of one sweep that several directories hold into `out`: summary.json, report.md and plots/.

  Raises:
    UserError: the directories are of different configs or hold no sweep.
  """
  paths = [pathlib.Path(w) for w in workdirs]
  configs = []
  for p in paths:
    if not (p / "config.json").exists():
      raise errors.UserError(f"{p} has no config.json: it holds no run")
    configs.append(hf.read_json(p / "config.json"))
    if "sweep" not in configs[-1]:
      raise errors.UserError(f"{p} holds a single run; a report joins the members of a sweep")
    if configs[-1] != configs[0]:
      raise errors.UserError(f"{p} and {paths[0]} are of different configs")
  found = variants.members(configs[0])
  seconds = [hf.read_json(p / "summary.json")["wall_seconds"] for p in paths if (p / "summary.json").exists()]
  joined = summary(configs[0], found, paths, sum(seconds))
  if not joined["members"]:
    raise errors.UserError(f"no member is finished in {', '.join(map(str, paths))}")
  out = pathlib.Path(out)
  metrics.write_json(out / "summary.json", joined)
  write_report(out, joined, command)
  if missing := [n for n in found if n not in {r["name"] for r in joined["members"]}]:
    metrics.say(f"{len(missing)} of {len(found)} members are missing, such as {missing[0]}")
  metrics.say(text_table(joined))
  return joined
