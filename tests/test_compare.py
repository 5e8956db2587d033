"""The comparison of methods: their kinds, the same wherever they are named, and the names in its plot."""

import json
import pathlib
import re

import numpy as np
import pytest

from configs import methods as config
from lora_jax import methods, tasks
from lora_jax.results import comparison, point_labels

ROOT = pathlib.Path(__file__).parents[1]
KIND = {name: methods.kind({"name": name}) for name in methods.names()}


def test_kinds_are_those_of_the_methods_files():
  assert comparison.COLOURS.keys() <= set(KIND.values()), "a colour of a kind that no method is of"
  assert len(set(comparison.COLOURS.values())) == len(comparison.COLOURS)
  assert methods.kind([{"name": "ia3"}, {"name": "lora"}]) == "scales and biases"


def test_kinds_without_a_colour_get_one_that_is_left():
  found = comparison.colours([{"kind": k} for k in ("new", "low rank", "newer", "new")])
  assert list(found) == ["low rank", "new", "newer"] and found["low rank"] == comparison.COLOURS["low rank"]
  assert len(set(found.values()) | set(comparison.COLOURS.values())) == len(comparison.COLOURS) + 2


@pytest.mark.parametrize(
  "subset, metric", [("cola", "matthews"), ("stsb", "pearson"), ("mrpc", "accuracy"), ("sst2", "accuracy")]
)
def test_the_main_metric_is_the_first_of_the_task(subset, metric):
  """Also where others of what a run logs come before it in the alphabet."""
  task = tasks.get("glue", subset=subset)
  found = task.metrics([0, 1, 1], [0, 1, 0]) | task.score({"label": 1}, " yes") | {"general_loss": 3.0}
  assert comparison.main_metric(found) == metric
  assert comparison.main_metric({"general_loss": 3.0}) is None


def test_the_readme_has_methods_under_their_kinds():
  """Of the first column of its table, the second's methods; a new method need not be there."""
  table = re.search(r"\| kind \| methods \|\n.*\n((?:\|.*\n)+)", (ROOT / "README.md").read_text())[1]
  rows = [row.strip("| ").split(" | ") for row in table.splitlines()]
  named = {n: kind for kind, text in rows for n in re.findall(r"`(\w+)`", text) if n in KIND}
  assert len(named) > 20 and named == {n: KIND[n] for n in named}


def test_the_config_has_all_methods():
  members = config.get_config().sweep.to_dict()["list"]
  assert sorted(members) == sorted(methods.names()) and {*config.SETTINGS, *config.OPTIM} <= members.keys()
  for name, overrides in members.items():
    assert overrides["method"]["name"] == name and overrides["optim"]["learning_rate"] > 0
  assert members["ia3"]["optim"] == methods.get("ia3").OPTIM, "the rate that the file of the method has"
  assert members["olora"]["optim"] == {"learning_rate": 2e-4}, "that of LoRA where a file has none"


def overlaps(a, half_a, b, half_b):
  return (np.abs(a[:, None] - b) < half_a[:, None] + half_b - 1e-9).all(-1)


@pytest.mark.parametrize("spread", [300.0, 40.0])
def test_names_cover_neither_each_other_nor_points(spread):
  at = 200 + spread * np.random.default_rng(0).uniform(-1, 1, (20, 2))
  at[1] = at[0]  # two points in one place
  half = np.stack([np.linspace(12, 30, 20), np.full(20, 6.0)], -1)
  frame = (-150, -150, 550, 550)
  found = point_labels.places(at, half, 4.0, frame)
  assert not (overlaps(found, half, found, half) & ~np.eye(20, dtype=bool)).any()
  assert not overlaps(found, half, at, np.zeros_like(at)).any()
  assert ((found - half >= -150) & (found + half <= 550)).all()
  np.testing.assert_array_equal(found, point_labels.places(at, half, 4.0, frame))


def test_a_name_alone_is_right_beside_its_point():
  (place,) = point_labels.places(np.array([[50.0, 50.0]]), np.array([[20.0, 5.0]]), 4.0, (0, 0, 200, 100))
  np.testing.assert_allclose(place, (50 + 4 + 20, 50))


def test_plots_of_what_has_no_score_or_nothing_forgotten_can_be_drawn():
  """Committed rows, without what a task may not have; of no row at all there is a plot too."""
  summary = json.loads((ROOT / "experiments/results/methods/summary.json").read_text())
  found = comparison.rows(summary["members"])[:3]
  found = [r | {"forgetting": None, "after": None if i else 0.5} for i, r in enumerate(found)]
  empty = [r | {"after": None, "metric": None} for r in found]
  assert all(comparison.tradeoff(rows).startswith(b"\x89PNG") for rows in (found, empty))
