"""Runs an experiment: `python -m experiments.run --config configs/x.py[:arg] [--workdir DIR] [--config.key=value]`.

`--config.sweep.product.method.rank="(1, 4, 16)"` makes a sweep of any config, or changes one; see variants.py.
"""

import ast
import contextlib
import os
import pathlib
import re
import shlex
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from absl import app, flags
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Config file, with `:arg` for what it takes.", lock_config=True
)
WORKDIR = flags.DEFINE_string("workdir", None, "Where the run is written; runs/<config> by default.")
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Join the other processes of a cluster (SLURM, TPU pod, MPI).")
SHARD = flags.DEFINE_string(
  "shard", "", "i/n: run the i-th of n shares of a sweep's members; a SLURM array's own numbers by default."
)
flags.mark_flag_as_required("config")
SWEEP: dict[str, Any] = {}  # what the command line says of config.sweep, which may name any key of the config


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected argument {argv[1]!r}; settings are written --config.section.key=value")
  import jax
  from absl import logging

  logging.set_verbosity(logging.FATAL)  # what orbax logs as an error, a traceback a thread, it raises too
  if DISTRIBUTED.value:
    jax.distributed.initialize()
  threading.Thread(target=start_device, daemon=True).start()

  from lora_jax import errors, experiment, sweep

  file = flags.FLAGS["config"].config_filename
  workdir = WORKDIR.value or os.path.join("runs", pathlib.Path(file.partition(":")[0]).stem)
  try:
    config = with_sweep(CONFIG.value.to_dict(), SWEEP)
    command = shlex.join(["python", "-m", "experiments.run", *sys.argv[1:]])
    if "sweep" in config:
      sweep.run(config, workdir, command, shard=shard())
    elif SHARD.value:
      raise errors.UserError("--shard is for a config with a sweep")
    else:
      experiment.run(config, workdir, command)
  except errors.UserError as e:
    sys.exit(f"error: {e}")
  except Exception as e:
    if not errors.is_full(e):
      raise
    sys.exit(f"error: no space left to write {workdir}; with more, the same command goes on from what is there")
  except KeyboardInterrupt:
    sys.exit(f"interrupted; the same command goes on from the last checkpoint in {workdir}")


def start_device() -> None:
  """An accelerator takes seconds to start, as do imports; what goes wrong goes wrong again where it is used."""
  import jax

  with contextlib.suppress(RuntimeError):
    jax.devices()


def sweep_flags(argv: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
  """(argv without flags `--config.sweep.KEYS=VALUE`, {KEYS: Python literal}); other text stays a string."""
  rest, found, it = [], {}, iter(argv)
  for arg in it:
    flag = re.fullmatch(r"--?config\.sweep\.([\w.]+)(?:=(.*))?", arg, re.DOTALL)
    if not flag:
      rest.append(arg)
      continue
    text = next(it, "") if flag[2] is None else flag[2]
    try:
      found[flag[1]] = ast.literal_eval(text)
    except (ValueError, SyntaxError):
      found[flag[1]] = text
  return rest, found


def with_sweep(config: dict, changes: Mapping[str, Any]) -> dict:
  """The config with `changes` {"product.train.seed": values} in its sweep."""
  from lora_jax import errors

  for path, value in changes.items():
    at = config.setdefault("sweep", {})
    *sections, key = path.split(".")
    for section in sections:
      at = at.setdefault(section, {})
      if not isinstance(at, dict):
        raise errors.UserError(f"--config.sweep.{path}: {section} has no keys; give it as a whole")
    at[key] = value
  return config


def shard() -> tuple[int, int]:
  """(i, n) of --shard, else of the SLURM array that this is a task of, else (0, 1)."""
  from lora_jax import errors

  if not SHARD.value:
    return array_task()
  index, slash, count = SHARD.value.partition("/")
  if not (slash and index.isdigit() and count.isdigit()):
    raise errors.UserError(f"--shard={SHARD.value}: expected i/n, such as 0/4")
  return int(index), int(count)


def array_task() -> tuple[int, int]:
  """(i, n) of a task of a SLURM array, else (0, 1)."""
  from lora_jax import errors

  found = {k: os.environ.get(f"SLURM_ARRAY_TASK_{k}") for k in ("ID", "MIN", "COUNT")}
  if not all(found.values()):
    return 0, 1
  task, first, count = map(int, found.values())
  last = max(task, int(os.environ.get("SLURM_ARRAY_TASK_MAX") or task))
  if last - first >= count:  # of --array=0,2,5 or 0-6:2 the shares between would never run
    raise errors.UserError(
      f"the {count} tasks of this SLURM array have ids from {first} to {last}; give it consecutive ids, such as "
      f"--array=0-{count - 1}, or each task its own --shard i/{count}"
    )
  return task - first, count


def parse(argv: list[str]) -> list[str]:
  """Reads the flags; a config file or key that does not exist ends in one message."""
  given, (argv, changes) = sys.argv, sweep_flags(argv)
  SWEEP.update(changes)
  try:
    sys.argv = argv  # ml_collections looks for its keys there
    rest = app.parse_flags_with_usage(argv)
    CONFIG.value.to_dict()  # raises what was wrong with the file
    return rest
  except OSError as e:
    sys.exit(f"error: {' '.join(str(e).split())}")
  except (KeyError, AttributeError) as e:  # ml_collections', one in the other
    while e.args and isinstance(e.args[0], Exception):
      e = e.args[0]
    sys.exit(f"error: config has no key {' '.join(str(e.args[0]).split())}")
  finally:
    sys.argv = given


if __name__ == "__main__":
  app.run(main, flags_parser=parse)
