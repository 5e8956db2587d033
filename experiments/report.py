"""Joins the results of a sweep that several directories hold: `python -m experiments.report DIR... [--out DIR]`."""

import shlex
from collections.abc import Sequence

from lora_jax import values
from lora_jax.runs import command_line


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command line."""
  command_line.run(run, argv)


def run(argv: Sequence[str]) -> None:
  """What `main` runs; it raises where `main` ends in a message."""
  parser = command_line.Parser(
    "python -m experiments.report", "Joins the results of a sweep that several directories hold."
  )
  parser.add_argument(
    "directories", nargs="+", metavar="DIR", help="directories of one sweep, such as one for each shard"
  )
  parser.value("--out", values.Name, None, "where the summary, tables and plots are written; the first DIR")
  flags = parser.parse_args(argv)
  from lora_jax.runs import outcome

  command = shlex.join(["python", "-m", "experiments.report", *argv])
  outcome.join(flags.directories, flags.out or flags.directories[0], command)


if __name__ == "__main__":
  main()
