"""Runs an experiment: `python -m experiments.run --config configs/x.py[:arg] [--workdir DIR] [--config.key=value ...]`.

`--config.sweep.product.method.rank="(1, 4, 16)"` makes a sweep of any config, or changes one; see
runs/variants.py. `--help` lists every key that a config may have.
"""

import contextlib
import os
import pathlib
import shlex
import threading
from collections.abc import Mapping, Sequence

from lora_jax import errors, values
from lora_jax.runs import command_line


def parser() -> command_line.Parser:
  """The flags beside `--config.KEY=VALUE`."""
  found = command_line.Parser("python -m experiments.run", "Runs an experiment.")
  found.add_argument("--config", required=True, metavar="FILE[:ARG]", help="config file, and what it takes")
  found.value("--workdir", values.Name, None, "where the run is written; runs/<config> by default")
  found.add_argument(
    "--distributed", action="store_true", help="join the other processes of a cluster (SLURM, TPU, MPI)"
  )
  share = "run the I-th of N shares of a sweep's members; a SLURM array's own numbers by default"
  found.value("--shard", values.Name, None, share)
  return found


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command line."""
  command_line.run(run, argv, "interrupted; the same command goes on from what is there")


def run(argv: Sequence[str]) -> None:
  """What `main` runs; it raises where `main` ends in a message."""
  if {"--help", "-h"} & set(argv):
    from lora_jax.runs import config_keys

    print(f"{parser().format_help()}\n{config_keys.text()}")
    return
  rest, changes = split_changes(argv)
  flags = parser().parse_args(rest)
  import jax
  from absl import logging

  logging.set_verbosity(logging.FATAL)  # orbax logs a traceback in each thread for errors that it also raises
  if flags.distributed:
    jax.distributed.initialize()
  threading.Thread(target=start_device, daemon=True).start()

  from lora_jax.runs import config_file, experiment, sweep

  config = config_file.change(config_file.load(flags.config), changes, flags.config)
  workdir = flags.workdir or os.path.join("runs", pathlib.Path(flags.config.partition(":")[0]).stem)
  command = shlex.join(["python", "-m", "experiments.run", *argv])
  try:
    if "sweep" in config:
      members = sweep.run(config, workdir, command, shard=shard(flags.shard))["members"]
      if members and all("error" in m for m in members):
        raise errors.UserError(f"no member ended well; {members[0]['name']}: {members[0]['error']}")
    elif flags.shard:
      raise errors.UserError("--shard is for a config with a sweep")
    else:
      experiment.run(config, workdir, command)
  except Exception as e:
    if not errors.is_full(e):
      raise
    text = f"no space left to write {workdir}; with more, the same command goes on from what is there"
    raise errors.UserError(text) from e


def split_changes(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
  """(argv without the flags `--config.KEYS=TEXT` or `--config.KEYS TEXT`, {KEYS: TEXT})."""
  rest = []
  found = {}
  it = iter(argv)
  for arg in it:
    name, equals, text = arg.partition("=")
    if not name.lstrip("-").startswith("config.") or not name.startswith("-"):
      rest.append(arg)
      continue
    if not equals:
      text = next(it, None)
      if text is None:
        raise errors.UserError(f"{arg} needs a value: {arg}=VALUE")
    found[name.lstrip("-").removeprefix("config.")] = text
  return rest, found


def start_device() -> None:
  """Starts the accelerator, which takes seconds, while modules are imported; errors are raised again at its use."""
  import jax

  with contextlib.suppress(RuntimeError):
    jax.devices()


def shard(text: str | None) -> tuple[int, int]:
  """(i, n) of --shard, or of the SLURM array that this process is a task of, or (0, 1)."""
  if not text:
    return array_task(os.environ)
  index, slash, count = text.partition("/")
  if not slash or None in (numbers := [number(index), number(count)]):
    raise errors.UserError(f"--shard={text[:100]}: expected i/n, such as 0/4")
  return tuple(numbers)


def number(text: str) -> int | None:
  """The whole number that a text of digits stands for, or None."""
  return int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else None


def array_task(environment: Mapping[str, str]) -> tuple[int, int]:
  """(i, n) of a task of a SLURM array, or (0, 1)."""
  found = {k: environment.get(f"SLURM_ARRAY_TASK_{k}") for k in ("ID", "MIN", "COUNT")}
  if not all(found.values()):
    return 0, 1
  found["MAX"] = environment.get("SLURM_ARRAY_TASK_MAX") or found["ID"]
  if wrong := {f"SLURM_ARRAY_TASK_{k}": v[:100] for k, v in found.items() if number(v) is None}:
    raise errors.UserError(f"these variables should be whole numbers: {wrong}")
  task, first, count, last = (number(found[k]) for k in ("ID", "MIN", "COUNT", "MAX"))
  last = max(task, last)
  if last - first >= count:  # with --array=0,2,5 or 0-6:2 the shares between would never run
    raise errors.UserError(
      f"the {count} tasks of this SLURM array have ids from {first} to {last}; give it consecutive ids, such as "
      f"--array=0-{count - 1}, or each task its own --shard i/{count}"
    )
  return task - first, count


if __name__ == "__main__":
  main()
