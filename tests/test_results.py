"""What is committed of runs: configs are those of the commands, pages have the numbers of the summaries.

Nothing here runs a command again, so nothing here says that a summary's numbers are what a run gives.
"""

import collections
import importlib
import json
import pathlib
import re

import numpy as np
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
def test_the_summaries_are_written_as_they_were_committed(name, tmp_path, monkeypatch):
  """Writing is deterministic and has not changed; whether it writes the right numbers is tested below.

  Plots are left out, as their bytes are those of a version of matplotlib.
  """
  monkeypatch.setattr(plots, "png", lambda figure: b"")
  monkeypatch.setattr(point_labels, "write", lambda axes, points: None)
  command = COMMAND.search((ROOT / name / "report.md").read_text())[0]
  sweep.write_report(tmp_path, read(name, "summary.json"), command)
  made = {p.relative_to(tmp_path): p for p in tmp_path.rglob("*.*")}
  kept = {p.relative_to(ROOT / name) for p in (ROOT / name).rglob("*.*")}
  assert made.keys() == kept - {pathlib.Path("config.json"), pathlib.Path("summary.json")}
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
