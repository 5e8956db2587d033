"""Joins the results of a sweep that several directories hold: `python -m experiments.report DIR... --out DIR`."""

import shlex
import sys

from absl import app, flags

OUT = flags.DEFINE_string("out", None, "Where summary.json, report.md, tables and plots are written; the first DIR.")


def main(argv: list[str]) -> None:
  from lora_jax import errors, sweep

  if len(argv) < 2:
    sys.exit("error: name the directories of a sweep: python -m experiments.report DIR... --out DIR")
  try:
    sweep.join(argv[1:], OUT.value or argv[1], shlex.join(["python", "-m", "experiments.report", *sys.argv[1:]]))
  except errors.UserError as e:
    sys.exit(f"error: {e}")


if __name__ == "__main__":
  app.run(main)
