"""What the command lines share: how flags are read, and how errors end."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from lora_jax import errors


class Parser(argparse.ArgumentParser):
  """Flags of a command; a mistake in them is a UserError, and none may be shortened."""

  def __init__(self, module: str, description: str):
    super().__init__(f"python -m {module}", description=description, allow_abbrev=False)
    self.add_argument("--traceback", action="store_true", help="show where an error comes from")

  def error(self, message: str) -> None:
    raise errors.UserError(f"{message}; --help lists the flags")


def run(command: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> None:
  """Runs `command(argv)`, by default with this process's; what a user can mend ends in SystemExit with one line."""
  argv = sys.argv[1:] if argv is None else list(argv)
  try:
    command(argv)
  except errors.UserError as e:
    if "--traceback" in argv:
      raise
    sys.exit(f"error: {e}")
  except BrokenPipeError:  # of `| head`
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(1)
  except KeyboardInterrupt:
    sys.exit("interrupted; the same command goes on from what is there")
