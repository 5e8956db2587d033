"""What the members of a sweep say together: summary.json, and the report with its tables and plots.

All of it is made from what runs have left, in one directory or several: no config is resolved, so that a result stays
what it is whatever today's defaults are.
"""

import numbers
import os
import pathlib
from collections.abc import Mapping, Sequence

import jax

from lora_jax import errors, progress, sharding, tasks
from lora_jax.formats import adapter, hf
from lora_jax.results import comparison, curves, report, subspace, table_layout, tables
from lora_jax.runs import (
  build,
  config as config_lib,
  group as group_lib,
  variants,
  workdir as workdir_lib,
)
from lora_jax.training import metrics


def summary(config: Mapping, found: Mapping[str, Mapping], workdirs: Sequence[pathlib.Path], command: str = "") -> dict:
  """The content of summary.json: the members that are finished in any of the directories, in the sweep's order.

  Args:
    found: {member: its overrides}, see `variants.overrides`.
    workdirs: members without a directory in them are taken from their summary.json.
    command: repeats the sweep, unless a summary.json says what does.
  """
  kept = [_kept(w / "summary.json") for w in workdirs if (w / "summary.json").exists()]
  earlier = {m["name"]: m for s in kept for m in s["members"]}
  rows = []
  for name, overrides in found.items():
    directories = [d for w in workdirs if group_lib.finished(d := w / "members" / name)]
    if directories or name in earlier:
      result = group_lib.result(directories[0]) if directories else earlier[name]
      rows.append({**result, "name": name, "overrides": overrides})
  here = {r["name"] for r in rows}
  parts = {k: v for k, v in config.items() if k != "sweep"}
  table = parts.pop("table", None)
  out = {"config": parts, "table": table, "members": rows, "groups": _programs(rows)}
  out["wall_seconds"] = sum(map(_seconds, workdirs))
  out["missing"] = [n for n in found if n not in here]
  out["command"] = next((s["command"] for s in kept if s.get("command")), command)
  out["analyses"] = _analyses(out, workdirs, kept) if table else {}
  return out | {"versions": next((r["versions"] for r in (*rows, *kept) if "versions" in r), report.versions())}


def _kept(path: pathlib.Path) -> dict:
  """The summary of a sweep that is in a directory."""
  found = hf.read_json(path, members=list, versions=dict)
  for m in found["members"]:
    if not isinstance(m, Mapping) or not isinstance(m.get("name"), str):
      raise errors.UserError(f"{path}: expected members that have names, found {m!r:.60}")
    if "error" not in m:
      report.check(m, f"{path}: {m['name']}")
  return found


def _programs(rows: Sequence[Mapping]) -> list[list[str]]:
  """Names of the members that ran together; a member without a group ran alone."""
  ran: dict[str, list[str]] = {}
  for r in rows:
    ran.setdefault(r.get("group", r["name"]), []).append(r["name"])
  return list(ran.values())


def _analyses(out: Mapping, workdirs: Sequence[pathlib.Path], kept: Sequence[Mapping]) -> dict:
  """What the layout asks for beside the table; subspaces, which take the base model, once all members are there."""
  analyses = {"d90": curves.reached(out)}
  asked = table_layout.of(out).subspace
  if asked is not None and not out["missing"] and jax.process_index() == 0:
    earlier = [x for s in kept if (x := s.get("analyses", {}).get("subspace")) and "error" not in x]
    names = [m["name"] for m in out["members"]]
    analyses["subspace"] = earlier[0] if earlier else _subspaces(asked, names, workdirs)
  return {k: x for k, x in analyses.items() if x is not None}


def _subspaces(asked: Mapping, names: Sequence[str], workdirs: Sequence[pathlib.Path]) -> dict:
  """`subspace.analyse` of the members' adapters; an error is the result of the analysis, as it is of a member."""
  places = {n: d for n in names for w in workdirs if (d := w / "members" / n / "adapter").is_dir()}
  if not places:
    return {"error": "no member has left an adapter here"}
  progress.say(f"analysing the adapters of {len(places)} members")
  try:
    first = next(iter(places.values())).parent
    config = config_lib.of_directory(first, hf.read_json(first / "config.json"))
    model = build.load(config, tasks.get(**config.task), sharding.make_mesh(1))
    members = {n: adapter.load(model, directory) for n, directory in places.items()}
    return subspace.analyse(members, model.params, **asked)
  except errors.UserError as e:
    return {"error": str(e)}


def _seconds(workdir: pathlib.Path) -> float:
  """What all calls and shards in a directory took; of an older one what its summary says."""
  shards = [hf.read_json(p, seconds=numbers.Real)["seconds"] for p in workdir.glob("seconds/*.json")]
  whole = workdir / "summary.json"
  return sum(shards) if shards or not whole.exists() else hf.read_json(whole, wall_seconds=numbers.Real)["wall_seconds"]


def write_report(workdir: pathlib.Path, out: Mapping) -> None:
  """report.md and plots/: the table that the config lays out, or else a comparison of the members."""
  write = tables.write if out["table"] else comparison.write_report
  write(workdir, out, out.get("command", ""))


def text_table(out: Mapping) -> str:
  """The table for a terminal."""
  return tables.markdown(tables.pivot(out)) if out["table"] else comparison.text_table(out["members"])


def join(workdirs: Sequence[str | os.PathLike], out: str | os.PathLike, command: str = "") -> dict:
  """Puts the members of one sweep that several directories hold into `out`: summary.json, report.md and plots/.

  Raises:
    UserError: the directories are of different configs or hold no sweep.
  """
  paths = [pathlib.Path(w) for w in workdirs]
  out = workdir_lib.check(out, "--out")
  configs = []
  for p in paths:
    if not (p / "config.json").exists():
      raise errors.UserError(f"{p} has no config.json: it holds no run")
    configs.append(hf.read_json(p / "config.json"))
    if "sweep" not in configs[-1]:
      raise errors.UserError(f"{p} holds a single run; a report joins the members of a sweep")
    if configs[-1] != configs[0]:
      raise errors.UserError(f"{p} and {paths[0]} are of different configs")
  found = variants.overrides(configs[0]["sweep"])
  damaged = f"the results in {', '.join(map(str, paths))} are damaged"
  with errors.parsing(damaged):
    joined = summary(configs[0], found, paths, command)
  if not joined["members"]:
    raise errors.UserError(f"no member is finished in {', '.join(map(str, paths))}")
  missing = joined["missing"]
  if not missing:
    metrics.write_json(out / "config.json", configs[0])
  # A sweep that goes on in that directory would take the summary for a complete one.
  if not missing or out.resolve() not in [p.resolve() for p in paths]:
    metrics.write_json(out / "summary.json", joined)
  with errors.parsing(damaged):
    write_report(out, joined)
    table = text_table(joined)
  if missing:
    progress.say(f"{len(missing)} of {len(found)} members are missing, such as {missing[0]}")
  progress.say(table)
  return joined
