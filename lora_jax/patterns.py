"""Checks regular expressions that come with a file: whether they are valid, and whether they search in bounded time.

Python's `re` backtracks without a limit, and nothing in the same process can interrupt it.
"""

import itertools
import json
import re
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from lora_jax import errors

SECONDS = 10  # limit for all searches together
TRY = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for i, pattern in enumerate(patterns):
  print(i, flush=True)
  search = re.compile(pattern).search
  for name in names:
    search(name)
"""


def check(patterns: Collection[str], names: Collection[str], where: str, form: str = "{}") -> None:
  """Raises UserError for a pattern that is not a regex or takes too long to search the names.

  Patterns that may take long are tried in a process of their own, which can be killed.

  Args:
    where: the beginning of the message.
    form: the regex that is searched with, in which `{}` stands for a pattern.
  """
  whole = {p: form.replace("{}", p) for p in patterns}
  for p, regex in whole.items():
    try:
      re.compile(regex)
    except (re.error, RecursionError, OverflowError) as e:
      raise errors.UserError(f"{where}: {p!r:.200} is not a regular expression: {errors.line(e)}") from e
  if not (doubtful := [p for p in whole if _may_take_long(p)]):
    return
  given = json.dumps([[whole[p] for p in doubtful], [*names]]).encode()
  try:
    subprocess.run([sys.executable, "-I", "-S", "-c", TRY], input=given, capture_output=True, timeout=SECONDS)
  except subprocess.TimeoutExpired as e:
    p = doubtful[int((e.stdout or b"0").split()[-1])]
    raise errors.UserError(
      f"{where}: the regular expression {p!r:.200} takes more than {SECONDS} seconds to search"
    ) from None


def texts(x: Any) -> Iterator[str]:
  """Yields all strings in a value, including keys: any of them may be a regex."""
  if isinstance(x, Mapping | list | tuple):
    for v in itertools.chain(x, x.values()) if isinstance(x, Mapping) else x:
      yield from texts(v)
  elif isinstance(x, str):
    yield x


def is_regex(text: str) -> bool:
  """Whether a text is a valid regular expression; many texts that are not meant as one are valid too."""
  try:
    re.compile(text)
  except (re.error, RecursionError, OverflowError):
    return False
  return True


def _may_take_long(pattern: str) -> bool:
  """Whether a regex has more than one place where a search can continue in several ways."""
  repeats = len(re.findall(r"[*+?{]", pattern))
  groups = pattern.count("(")
  return repeats > 1 or groups > 1 or bool(re.search(r"\)[*+?{]|\\\d", pattern))
