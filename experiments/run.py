"""Runs an experiment: `python -m experiments.run --config configs/x.py[:arg] [--workdir DIR] [--config.key=value]`."""

import os
import pathlib
import shlex
import sys

from absl import app, flags
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Config file, with `:arg` for what it takes.", lock_config=True
)
WORKDIR = flags.DEFINE_string("workdir", None, "Where the run is written; runs/<config> by default.")
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Join the other processes of a cluster (SLURM, TPU pod, MPI).")
flags.mark_flag_as_required("config")


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected argument {argv[1]!r}; settings are written --config.section.key=value")
  import jax
  from absl import logging

  from lora_jax import errors, experiment, sweep

  logging.set_verbosity(logging.WARNING)

  if DISTRIBUTED.value:
    jax.distributed.initialize()
  file = flags.FLAGS["config"].config_filename
  workdir = WORKDIR.value or os.path.join("runs", pathlib.Path(file.partition(":")[0]).stem)
  try:
    config = CONFIG.value.to_dict()
    run = sweep.run if "sweep" in config else experiment.run
    run(config, workdir, shlex.join(["python", "-m", "experiments.run", *sys.argv[1:]]))
  except errors.UserError as e:
    sys.exit(f"error: {e}")
  except KeyboardInterrupt:
    sys.exit(f"interrupted; the same command goes on from the last checkpoint in {workdir}")


def parse(argv: list[str]) -> list[str]:
  """Reads the flags; a config file or key that does not exist ends in one message."""
  try:
    rest = app.parse_flags_with_usage(argv)
    CONFIG.value.to_dict()  # raises what was wrong with the file
    return rest
  except OSError as e:
    sys.exit(f"error: {' '.join(str(e).split())}")
  except (KeyError, AttributeError) as e:  # ml_collections', one in the other
    while e.args and isinstance(e.args[0], Exception):
      e = e.args[0]
    sys.exit(f"error: config has no key {' '.join(str(e.args[0]).split())}")


if __name__ == "__main__":
  app.run(main, flags_parser=parse)
