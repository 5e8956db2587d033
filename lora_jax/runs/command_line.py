"""What the command lines share: how flags are read, and how errors end."""

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from lora_jax import errors, values


class Parser(argparse.ArgumentParser):
  """Flags of a command; a mistake in them is a UserError, and none may be shortened."""

  def __init__(self, command: str, description: str):
    super().__init__(command, description=description, allow_abbrev=False)
    self.add_argument("--traceback", action="store_true", help="show where an error comes from")

  def value(self, flag: str, hint: Any, default: Any, text: str) -> None:
    """Adds a flag with a value that `hint`, an annotation as in values.py, allows; `text` is its help."""
    read = values.check if hint is values.Name else values.parse  # a name with quotes has them
    self.add_argument(flag, type=lambda given: read(hint, given, flag), default=default, help=text)

  def error(self, message: str) -> None:
    unknown = re.match(r"unrecognized arguments: (--[^\s=]+)", message)
    near = errors.nearest(unknown[1], self._option_string_actions) if unknown else ""
    raise errors.UserError(f"{message}; {near if near.startswith('did you mean') else '--help lists the flags'}")


def run(
  command: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None, interrupted: str = "interrupted"
) -> None:
  """Runs `command(argv)`, by default with this process's; what a user can mend ends in SystemExit with one line.

  Args:
    interrupted: what Ctrl-C ends with.
  """
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
  except OSError as e:
    if "--traceback" in argv or e.filename is None:
      raise
    sys.exit(f"error: {errors.line(e)}")
  except Exception as e:  # jax's own type would have to be imported
    if "--traceback" in argv or not errors.is_out_of_memory(e):
      raise
    sys.exit(f"error: there is too little memory: {errors.line(e)}")
  except KeyboardInterrupt:
    sys.exit(interrupted)
