"""Every key that a config may have, with its default and what it means: for `--help` and docs/config.md.

All of it is read off the code: keys, defaults and types are those of signatures, meanings those of docstrings.
"""

import importlib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator

from lora_jax import methods, models, sharding, tasks, values
from lora_jax.batches import causal, encoder_decoder
from lora_jax.inference import evaluate
from lora_jax.model import architecture
from lora_jax.runs import config
from lora_jax.training import objectives, optim

# Where the meaning of a section's keys is written.
SOURCES = {
  "model": (models.load, architecture.Config),
  "data": (causal.train_iterator, encoder_decoder.train_iterator, config.examples),
  "optim": (optim.make_schedule, optim.transformation),
  "train": (config.train,),
  "mesh": (sharding.make_mesh,),
  "eval": (config.evaluation, evaluate.answers, evaluate.Search),
}
WIDTH = 120


def meanings(*sources: Callable) -> dict[str, str]:
  """{keyword: what it means}: entries "a, b: text" under Args or Fields, of the first docstring that has one."""
  found: dict[str, str] = {}
  for source in sources:
    block = re.search(r"^(?:Args|Fields):\n((?:  .*\n|\n)*)", (inspect.getdoc(source) or "") + "\n", re.MULTILINE)
    entries = re.split(r"\n  (?! )", "\n" + block[1].rstrip()) if block else []
    for entry in entries:
      names, colon, text = entry.strip().partition(":")
      if colon and re.fullmatch(r"\*{0,2}\w+(, \*{0,2}\w+)*", names):
        for name in names.split(", "):
          found.setdefault(name.lstrip("*"), " ".join(text.split()))
  return found


def sections() -> Iterator[tuple[str, str, dict[str, values.Field], dict[str, str]]]:
  """(section, what selects its keys or "", keys, meanings) of all that a config may hold."""
  for name in config.SECTIONS:
    if name in config.FIELDS:
      yield name, "", config.FIELDS[name], meanings(*SOURCES[name])
      continue
    for of in {"method": methods.names(), "task": tasks.names(), "objective": objectives.names()}[name]:
      yield name, of, config.named_fields(name, of), meanings(*_sources(name, of))


def _sources(section: str, of: str) -> list[Callable]:
  if section == "objective":
    return list(objectives.functions(of).values())
  module = importlib.import_module(f"lora_jax.{section}s.{of}")
  if section == "task":
    return [fn for k in tasks.FUNCTIONS if (fn := getattr(module, k, None)) is not None]
  sources = [module.init]
  while hasattr(sources[-1], "inherits"):
    sources.append(sources[-1].inherits)
  return sources


def default(field: values.Field) -> str:
  """The default as it is written."""
  return "required" if field.default is values.REQUIRED else repr(field.default)


def text() -> str:
  """All keys, for a terminal."""
  lines = [
    "Keys of a config, each --config.SECTION.KEY=VALUE. Methods, tasks and objectives have keys of their own.",
    "",
  ]
  for section, of, keys, means in sections():
    lines.append(f"{section}" + (f", name={of}" if of else ""))
    for k, f in keys.items():
      line = f"{k}={default(f)} ({values.describe(f.hint)}): {means.get(k, '')}"
      lines += textwrap.wrap(line, WIDTH, initial_indent="  ", subsequent_indent="      ")
    lines.append("")
  return "\n".join(lines)


INTRODUCTION = """# Every key of a config

`python -m lora_jax.runs.config_keys` makes this page of signatures and docstrings; `python -m experiments.run --help`
prints the same. A config file sets a key, or the command line does: `--config.SECTION.KEY=VALUE`. Another name of a
method, task or objective drops the keys of the one before."""


def markdown() -> str:
  """All keys, as a page."""
  parts, seen = [INTRODUCTION], ""
  for section, of, keys, means in sections():
    parts += [f"## {section}"] if section != seen else []
    parts += [f"### {section}.name = {of}"] if of else []
    rows = [[f"`{k}`", f"`{default(f)}`", values.describe(f.hint), means.get(k, "")] for k, f in keys.items()]
    parts.append(_table([["key", "default", "values", "meaning"], ["---"] * 4, *rows]) if rows else "No keys.")
    seen = section
  return "\n\n".join(parts) + "\n"


def _table(rows: list[list[str]]) -> str:
  return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


if __name__ == "__main__":
  print(markdown(), end="")
