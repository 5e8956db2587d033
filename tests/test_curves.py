"""Plots of a sweep, and the dimension at which a curve reaches what full finetuning does."""

import numpy as np
import pytest

from lora_jax.methods import intrinsic
from lora_jax.results import curves, plots, tables
from tests.summaries import DIMENSIONS, REACHED, SEEDS, by_rank, dimensions, fails, member, rows, several, summary


@pytest.fixture
def swept():
  return by_rank()


def shown(monkeypatch):
  """What the plots are drawn from."""
  seen = []
  monkeypatch.setattr(plots, "lines", lambda *args: seen.append(args))
  monkeypatch.setattr(plots, "traces", lambda *args: seen.append(args))
  return seen


def test_metric_plot_shows_means_bands_and_single_runs(swept, monkeypatch):
  seen = shown(monkeypatch)
  curves.metric_plot(fails(swept, "q-4-1"))
  ((panels, xlabel, log, names),) = seen
  assert (xlabel, log, names) == ("Rank", True, [])
  first = panels[0].curves[0]
  table = tables.pivot(fails(swept, "q-4-1")).rows[0].cells
  assert first.label == "$W_q$" and first.x == [1, 4, 64]
  np.testing.assert_allclose(first.y, [table[c].mean for c in ("1", "4", "64")])
  np.testing.assert_allclose(first.sd, [table[c].sd for c in ("1", "4", "64")])
  assert len(first.dots) == 8
  far = panels[1]  # nine points above ours: next to them, not in one panel
  assert far.title == "MNLI, GPT-3 175B" and all(c.dashed for c in far.curves)
  assert list(far.curves[0].x) == [1, 2, 4, 64] and list(far.curves[0].y) == [90.7, 90.9, 91.1, 90.7]
  assert far.curves[0].colour == first.colour


def test_published_lines_that_are_not_ours_have_colours_of_their_own(swept, monkeypatch):
  seen = shown(monkeypatch)
  swept["table"]["published"] = {"them": {k: {"1": 90.0, "64": 91.0} for k in ("$W_q$", "Wk", "Wo")}}
  curves.metric_plot(swept)
  ours, theirs = (p.curves for p in seen[0][0])
  assert theirs[0].colour == ours[0].colour and len({c.colour for c in (*ours, *theirs)}) == 4


def test_what_only_the_paper_has_run_is_at_its_own_place(swept, monkeypatch):
  seen = shown(monkeypatch)
  swept["table"]["published"] = {"them": {"$W_q$": {"1": 50.0, "4": 55.0, "10k": 60.0, "2M": 62.0, "all": 63.0}}}
  curves.metric_plot(swept)
  assert list(seen[0][0][1].curves[0].x) == [1, 4, 10_000, 2_000_000]


def test_ticks_have_room_for_their_labels():
  log, plain = (plots._apart([157_000, 158_000, 462_000, 135_000_000], place) for place in (np.log, float))
  assert log == [157_000, 462_000, 135_000_000] and plain == [157_000, 135_000_000]
  assert plots._apart([], float) == [] and plots._apart([3], float) == [3]


def test_near_published_curves_share_the_panel(swept, monkeypatch):
  seen = shown(monkeypatch)
  swept["table"]["published"] = {"them": {"$W_q$": {"1": 81.5, "64": 82.5}}}
  curves.metric_plot(swept)
  (panel,) = seen[0][0]
  assert [(c.label, c.dashed) for c in panel.curves] == [("$W_q$", False), ("Wq & Wv", False), ("them, $W_q$", True)]


def test_metric_plot_against_parameters_and_names(swept, monkeypatch):
  seen = shown(monkeypatch)
  swept["table"] |= {"x": "trainable_params"}
  curves.metric_plot(fails(swept, *(f"q-1-{s}" for s in SEEDS)))
  assert [list(c.x) for c in seen[0][0][0].curves] == [[400_000, 6_400_000], [200_000, 800_000, 12_800_000]]
  swept["table"] |= {"x": "method.targets", "lines": "method.rank"}
  curves.metric_plot(swept)
  panels, _, _, names = seen[1]
  assert names == ["$W_q$", "Wq & Wv"] and [c.label for c in panels[0].curves[:3]] == ["1", "4", "64"]


def test_each_metric_has_a_panel(monkeypatch):
  seen = shown(monkeypatch)
  published = {"GPT-2 M": {"1": {"nist": 8.52}, "2": {"nist": 8.53, "METEOR": 48.0}}}
  curves.metric_plot(several(rows="method.rank", published=published))
  panels = seen[0][0]
  assert [p.ylabel for p in panels] == ["BLEU", "Nist", "METEOR, %", "Val loss"]
  assert [len(p.curves) for p in panels] == [1, 2, 2, 1]
  assert (panels[1].curves[1].x, panels[1].curves[1].y) == ((1, 2), (8.52, 8.53))


def test_loss_plot_shows_all_members(swept, monkeypatch):
  seen = shown(monkeypatch)
  swept["members"][0]["losses"]["loss"][9:] = [None] * 21
  del swept["members"][1]["losses"]
  curves.loss_plot(swept)
  ((panels, _, scale, title),) = seen
  assert [p.title for p in panels] == ["$W_q$", "Wq & Wv"] and [len(p.curves) for p in panels] == [8, 9]
  assert len(panels[0].curves[0].x) == 9 and scale is None and title == "Rank"
  assert len({c.colour for c in panels[1].curves}) == 3


def test_many_numbers_have_a_colour_bar(monkeypatch):
  seen = shown(monkeypatch)
  members = [member(f"{i}", {"optim": {"learning_rate": 1e-4 * 1.5**i}}, {"accuracy": 0.5}) for i in range(12)]
  curves.loss_plot(summary(members, {"rows": "optim.learning_rate"}))
  assert len(seen[0][2]) == 12


@pytest.mark.slow
def test_all_kinds_of_plots_can_be_drawn(swept):
  swept["table"] |= {"x": "method.targets"}
  swept["members"][0]["losses"]["loss"] = [10.0**-i for i in range(30)]
  draw = lambda s: (curves.metric_plot(s), curves.loss_plot(s))
  members = [member(f"{i}", {"optim": {"learning_rate": 1e-4 * 1.5**i}}, {"accuracy": 0.5}) for i in range(12)]
  rates = summary(members, {"rows": "optim.learning_rate", "log": True})
  for png in (*draw(swept), *draw(rates), *draw(several(rows="method.rank")), *draw(swept | {"table": None})):
    assert png.startswith(b"\x89PNG")


def test_the_dimension_that_reaches_a_share_of_full_finetuning():
  given = dimensions()
  found = curves.reached(given)
  assert (found["share"], found["metric"], found["full"], found["before"]) == (0.9, "accuracy", pytest.approx(0.9), 0.5)
  for line, ys in zip(("SAID", "DID"), REACHED.values(), strict=True):
    got = found["lines"][line]
    assert (got["smallest"], got["largest"]) == (10, 1000)
    for k, base in (("of_full", 0.0), ("of_gain", 0.5)):
      want = intrinsic.d90(DIMENSIONS, ys, 0.9, base)
      assert got[k] == (want if want is None else pytest.approx(want))
  assert found["lines"]["DID"]["of_full"] is None and 100 < found["lines"]["SAID"]["of_full"] < 200
  table = rows(curves.reached_table(found))
  assert list(table)[0] == "accuracy" and table["accuracy"] == [
    "d90 of full finetuning's 0.9",
    "d90 of its gain over 0.5 before",
  ]
  assert table["SAID"] == [f"{found['lines']['SAID'][k]:.0f}" for k in ("of_full", "of_gain")]
  assert table["DID"] == ["> 1000", "> 1000"]
  assert "full finetuning's 90.0%" in curves.reached_table(found, percent=True)
  easy = curves.reached(dimensions(d90=0.6))
  assert rows(curves.reached_table(easy))["SAID"][0] == "≤ 10"
  assert curves.reached(fails(given, "full-0", "full-1")) is None and curves.reached(dimensions(d90=None)) is None


def test_there_is_no_share_of_what_full_finetuning_has_not_gained(monkeypatch):
  """Of a loss 90% says nothing, what it falls by does; and nothing is gained where it is worse than before."""
  loss = dimensions("val_loss", -1)
  for m in loss["members"]:
    m["eval"]["after"]["val_loss"] += 2
    m["eval"]["before"]["val_loss"] = 1.5
  found = curves.reached(loss)
  assert "of_full" not in found["lines"]["SAID"] and found["lines"]["SAID"]["of_gain"] > 100
  for m in loss["members"]:
    m["eval"]["before"]["val_loss"] = 1.0
  assert rows(curves.reached_table(curves.reached(loss)))["SAID"] == ["-", "-"]
  seen = shown(monkeypatch)
  curves.metric_plot(loss)
  assert [c.label for c in seen[0][0][0].curves] == ["SAID", "DID", "full"]


def test_members_without_a_dimension_are_a_level_line(monkeypatch):
  seen = shown(monkeypatch)
  given = dimensions()
  assert tables.pivot(given).columns == ("10", "100", "1000", "all")
  assert rows(tables.markdown(tables.pivot(given)))["full"] == ["-", "-", "-", "90.0 ± 1.4"]
  curves.metric_plot(given)
  ((panels, xlabel, log, names),) = seen
  assert (xlabel, log, names) == ("Dimension", True, [])
  said, did, full, *goals = panels[0].curves
  assert (
    (said.label, did.label, full.label) == ("SAID", "DID", "full") and said.x == [10, 100, 1000] and not said.dashed
  )
  assert full.x == [10, 1000] and full.dashed and full.y == pytest.approx([90, 90]) and not full.dots
  assert [(c.label, *c.y) for c in goals] == [
    ("90% of full finetuning", pytest.approx(81), pytest.approx(81)),
    ("90% of its gain", pytest.approx(86), pytest.approx(86)),
  ]


@pytest.mark.parametrize(
  "x, text",
  [(18_874_368, "18.9M"), (36_864, "36.9k"), (4096, "4096"), (0.5, "0.5"), (2e-4, "2e-4"), (0, "0"), (7e9, "7B")],
)
def test_short_numbers(x, text):
  assert plots.short(x) == text
