"""Committed results: reports, tables and plots are made of their own JSON alone, whatever today's defaults are."""

import importlib
import json
import pathlib
import re

import pytest

from lora_jax import families, methods, tasks
from lora_jax.results import plots, point_labels
from lora_jax.runs import config as config_lib, outcome, variants

ROOT = pathlib.Path(__file__).parents[1] / "experiments" / "results"
NAMES = sorted(p.name for p in ROOT.iterdir() if p.is_dir())
COMMAND = re.compile(r"python -m experiments\.run --config configs/(\w+)\.py(?::(\S+))?")


def read(name, file):
  return json.loads((ROOT / name / file).read_text())


@pytest.fixture
def alone(monkeypatch):
  """No config, method or task of today can be asked."""

  def refuse(*args, **kw):
    raise AssertionError("a result asks for more than its own files")

  for module, name in ((config_lib, "resolve"), (methods, "get"), (tasks, "get"), (families, "get")):
    monkeypatch.setattr(module, name, refuse)


@pytest.mark.parametrize("name", NAMES)
def test_the_command_is_of_a_config_that_there_is(name):
  config, argument = COMMAND.fullmatch(read(name, "summary.json")["command"]).groups()
  assert "sweep" in importlib.import_module(f"configs.{config}").get_config(*filter(None, [argument]))


@pytest.mark.parametrize("name", NAMES)
def test_a_summary_is_of_the_config_beside_it(name, alone):
  config, summary = read(name, "config.json"), read(name, "summary.json")
  assert {m["name"]: m["overrides"] for m in summary["members"]} == variants.overrides(config["sweep"])
  assert summary["config"] == {k: v for k, v in config.items() if k not in config_lib.SWEEP}
  assert summary["table"] == config.get("table") and not summary["missing"]


@pytest.fixture
def images(monkeypatch):
  """Empty ones: the bytes of plots are those of a version of matplotlib."""
  monkeypatch.setattr(plots, "png", lambda figure: b"")
  monkeypatch.setattr(point_labels, "write", lambda axes, points: None)


@pytest.mark.parametrize("name", NAMES)
def test_all_is_made_again_from_a_summary_alone(name, tmp_path, alone, images):
  """`python -m experiments.report experiments/results/NAME` leaves it as it is."""
  outcome.join([ROOT / name], tmp_path, "python -m experiments.report")
  made = {p.relative_to(tmp_path): p for p in tmp_path.rglob("*.*")}
  assert made.keys() == {p.relative_to(ROOT / name) for p in (ROOT / name).rglob("*.*")}
  for file, path in made.items():
    assert file.suffix == ".png" or path.read_text() == (ROOT / name / file).read_text(), file
