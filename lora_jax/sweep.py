"""Several runs that differ in parts of their config, and what they say together.

`config["sweep"]` is {member: {section: overrides}}. Members run one after another over one base model, each in
`workdir/members/<member>` as a run of its own; the same call again runs those that have not finished.
"""

import os
import pathlib
import time
from collections.abc import Mapping

import jax

from lora_jax import compare, config as config_lib, errors, evaluate, experiment, metrics, report, sharding, tasks
from lora_jax.formats import hf


def members(config: Mapping) -> dict[str, dict]:
  """{member: its whole config}. An override replaces `method`, and adds to the other sections.

  Raises:
    UserError: a member's name or overrides are none, or its config is wrong.
  """
  sweep, base = config["sweep"], {k: v for k, v in config.items() if k != "sweep"}
  if not isinstance(sweep, Mapping) or not sweep:
    raise errors.UserError(f"config.sweep is {{member: {{section: overrides}}}}, not {sweep!r:.100}")
  found = {}
  for name, overrides in sweep.items():
    if not name.replace("_", "").replace("-", "").replace("+", "").isalnum():
      raise errors.UserError(f"config.sweep: a member's name is letters, digits, _, - and +, not {name!r}")
    if not isinstance(overrides, Mapping):
      raise errors.UserError(f"config.sweep.{name} is {{section: overrides}}, not {overrides!r:.100}")
    for section in overrides:
      errors.choose(section, dict.fromkeys(config_lib.SECTIONS), f"section config.sweep.{name}.")
    merged = {k: v if k == "method" else dict(base[k]) | dict(v) for k, v in overrides.items()}
    found[name] = base | merged
    try:
      config_lib.check(found[name])
    except errors.UserError as e:
      raise errors.UserError(f"config.sweep.{name}: {e}") from None
  shared = ("model", "task", "objective", "mesh")
  if odd := [f"{n}.{k}" for n, c in found.items() for k in shared if c[k] != base[k]]:
    raise errors.UserError(f"config.sweep.{odd[0]}: members share {', '.join(shared)}")
  return found


def run(config: Mapping, workdir: str | os.PathLike, command: str = "") -> dict:
  """Runs the members that have not run yet; returns and writes summary.json, report.md and plots/ of all.

  A member whose loss is not finite is reported, and the others go on.
  """
  workdir, started = pathlib.Path(workdir), time.perf_counter()
  configs = members(config)
  if config_lib.finished(config, workdir):
    metrics.say(f"{workdir} is complete: see {workdir / 'report.md'}, or give another --workdir")
    return hf.read_json(workdir / "summary.json")
  if jax.process_index() == 0:
    metrics.write_json(workdir / "config.json", config)
  base = next(iter(configs.values()))
  mesh, task = sharding.make_mesh(**base["mesh"]), tasks.get(**base["task"])
  model = before = None
  rows = []
  for i, (name, member) in enumerate(configs.items()):
    directory = workdir / "members" / name
    metrics.say(f"member {i + 1} of {len(configs)}: {name}")
    if model is None and not (directory / "summary.json").exists():
      model = experiment.load(base, task, mesh)
      with jax.set_mesh(mesh):
        (before,) = experiment.scores(base, model, task, evaluate.one(model.params), mesh, "before", "test")
    try:
      summary = experiment.run(member, directory, model=model, before=before)
    except errors.UserError as e:
      metrics.say(f"{name}: {e}")
      rows.append({"name": name, "overrides": config["sweep"][name], "error": str(e)})
      continue
    rows.append({"name": name, "overrides": config["sweep"][name], "saved_bytes": _saved_bytes(directory), **summary})
  seconds = time.perf_counter() - started
  out = {"members": rows, "groups": len(rows), "wall_seconds": seconds, "versions": report.versions()}
  if jax.process_index() == 0:
    compare.write_report(workdir, out, command)
    metrics.write_json(workdir / "summary.json", out)
  metrics.say(compare.text_table(rows))
  return out


def _saved_bytes(directory: pathlib.Path) -> int:
  """Size of the adapter, or of the model, that a run left."""
  kept = [p for part in ("adapter", "model") for p in (directory / part).glob("*.safetensors")]
  return sum(p.stat().st_size for p in kept)
