"""What is committed of runs is what their configs ask for, and what the code makes of their summaries today."""

import importlib
import json
import pathlib
import re

import pytest

from lora_jax.results import plots, point_labels
from lora_jax.runs import sweep, variants

ROOT = pathlib.Path(__file__).parents[1] / "experiments" / "results"
NAMES = sorted(p.name for p in ROOT.iterdir() if p.is_dir())
COMMAND = re.compile(r"^python -m experiments\.run --config configs/(\w+)\.py(?::(\S+))?$", re.MULTILINE)


def read(name, file):
  return json.loads((ROOT / name / file).read_text())


@pytest.mark.parametrize("name", NAMES)
def test_configs_are_those_of_the_commands(name):
  config, argument = COMMAND.search((ROOT / name / "report.md").read_text()).groups()
  found = importlib.import_module(f"configs.{config}").get_config(*filter(None, [argument])).to_dict()
  kept = read(name, "config.json")
  resolved = lambda c: {n: c.to_dict() for n, (_, c) in variants.members(c).items()}
  assert _plain(resolved(found)) == _plain(resolved(kept))
  assert _plain(found.get("table")) == _plain(kept.get("table"))


def _plain(x):
  """As JSON has it, where no pattern is None."""
  return json.loads(json.dumps(x).replace("{}", "null"))


@pytest.mark.parametrize("name", NAMES)
def test_reports_and_tables_are_made_of_the_summaries(name, tmp_path, monkeypatch):
  """All but what the plots look like, as their bytes are those of a version of matplotlib."""
  monkeypatch.setattr(plots, "png", lambda figure: b"")
  monkeypatch.setattr(point_labels, "write", lambda axes, points: None)
  command = COMMAND.search((ROOT / name / "report.md").read_text())[0]
  sweep.write_report(tmp_path, read(name, "summary.json"), command)
  made = {p.relative_to(tmp_path): p for p in tmp_path.rglob("*.*")}
  kept = {p.relative_to(ROOT / name) for p in (ROOT / name).rglob("*.*")}
  assert made.keys() == kept - {pathlib.Path("config.json"), pathlib.Path("summary.json")}
  for file, path in made.items():
    assert file.suffix == ".png" or path.read_text() == (ROOT / name / file).read_text(), file
