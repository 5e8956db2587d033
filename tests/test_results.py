"""Committed results: reports, tables and plots are made of their own JSON alone, whatever today's defaults are.

Nothing here runs a command again, so nothing here says that a summary's numbers are what a run gives.
"""

import collections
import importlib
import json
import pathlib
import re

import numpy as np
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


def by_seed(members):
  """The members that differ in nothing but the seed, as lists."""
  found = collections.defaultdict(list)
  for m in members:
    train = {k: v for k, v in m["overrides"].get("train", {}).items() if k != "seed"}
    found[json.dumps(m["overrides"] | {"train": train}, sort_keys=True)].append(m)
  return list(found.values())


def cells(text):
  """What stands in the columns of a page's tables, without the marks of the best."""
  lines = [line.strip("| \n").split(" | ") for line in text.splitlines() if line.startswith("| ")]
  return [[cell.replace("*", "").strip() for cell in line] for line in lines]


def has_seeds(name):
  """Whether a result is a table of accuracies, each the mean over seeds."""
  found = read(name, "summary.json")
  return (found["table"] or {}).get("metric") == "accuracy" and all(len(g) > 1 for g in by_seed(found["members"]))


SEEDS = [name for name in NAMES if has_seeds(name)]
assert len(SEEDS) > 5


@pytest.mark.parametrize("name", SEEDS)
@pytest.mark.parametrize("page", ["report.md", "table.md"])
def test_tables_have_the_means_over_seeds(name, page):
  """Computed here, without the code that writes tables."""
  written = {cell for line in cells((ROOT / name / page).read_text()) for cell in line}
  for group in by_seed(read(name, "summary.json")["members"]):
    scores = [100 * m["eval"]["after"]["accuracy"] for m in group]
    assert f"{np.mean(scores):.1f} ± {np.std(scores, ddof=1):.1f}" in written, group[0]["name"]


def test_the_comparison_has_the_numbers_of_its_members():
  lines = {line[0]: line[1:] for line in cells((ROOT / "methods" / "report.md").read_text())}
  for m in read("methods", "summary.json")["members"]:
    _, accuracy, forgetting, trained, *_ = lines[m["name"].removeprefix("name_")]
    before, after = m["eval"]["before"], m["eval"]["after"]
    assert accuracy == f"{100 * after['accuracy']:.1f}%"
    assert forgetting == f"{after['general_loss'] - before['general_loss']:+.3f}"
    assert trained == f"{m['trainable_params']:,}"


def test_the_readme_has_the_numbers_of_the_results():
  readme = (ROOT.parents[1] / "README.md").read_text()
  listed = re.findall(
    r"^\| \[(\w+)\]\(experiments/results/\1/report.md\).* \| (\d+) \| (\d+) \|$", readme, re.MULTILINE
  )
  assert len(listed) > 5
  for name, members, seconds in listed:
    summary = read(name, "summary.json")
    assert (int(members), int(seconds)) == (len(summary["members"]), round(summary["wall_seconds"])), name
  (ours,) = (line[1:] for line in cells((ROOT / "lora_table5" / "table.md").read_text()) if line[0] == "smollm2-135m")
  assert ours in [line[1:] for line in cells(readme)]
