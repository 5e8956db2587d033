"""Tables and reports of a sweep, from the JSON of its summary alone."""

import re
import statistics

import pytest
from hypothesis import given, settings, strategies as st

from lora_jax import errors
from lora_jax.results import curves, table_layout, tables
from tests.summaries import (
  RANKS,
  SEEDS,
  TABLE6,
  TARGETS,
  accuracy,
  by_rank,
  dimensions,
  fails,
  member,
  rows,
  several,
  summary,
)


@pytest.fixture
def swept():
  return by_rank()


def test_cells_are_mean_and_deviation_over_seeds(swept):
  table = tables.pivot(swept)
  assert table.columns == ("1", "2", "4", "64")  # as published, though nothing here has rank 2
  assert [r.label for r in table.rows] == ["$W_q$", "Wq & Wv"]
  assert table.corner == "targets / rank" and table.n == 3
  for row, t in zip(table.rows, TARGETS, strict=True):
    assert set(row.cells) == {"1", "4", "64"}
    for r in RANKS:
      want, cell = [100 * accuracy(t, r, s) for s in SEEDS], row.cells[str(r)]
      assert cell.mean == pytest.approx(statistics.fmean(want))
      assert cell.sd == pytest.approx(statistics.stdev(want))
      assert (cell.n, cell.failed) == (3, 0)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=6), st.randoms())
def test_the_order_of_members_does_not_matter(scores, random):
  members = [member(f"m{i}", {"train": {"seed": i}}, {"accuracy": x}) for i, x in enumerate(scores)]
  members += [
    member(f"n{i}", {"method": {"rank": 2}, "train": {"seed": i}}, {"accuracy": x}) for i, x in enumerate(scores)
  ]
  shuffled = random.sample(members, len(members))
  one, other = (tables.pivot(summary(m, {"columns": "method.rank"})) for m in (members, shuffled))
  assert one.columns == other.columns == ("2", "8")
  for c in one.columns:
    a, b = one.rows[0].cells[c], other.rows[0].cells[c]
    assert a.mean == pytest.approx(b.mean) == pytest.approx(100 * statistics.fmean(scores))
    assert a.n == b.n == len(scores) and (a.sd is None) == (len(scores) == 1)


def test_markdown_is_laid_out_as_the_paper(swept):
  lines = tables.markdown(tables.pivot(swept)).splitlines()
  assert lines[0] == "| targets / rank | 1 | 2 | 4 | 64 |"
  assert lines[2] == "| *tiny* |  |  |  |  |"
  assert lines[3] == "| $W_q$ | 81.0 ± 0.3 | - | 81.4 ± 0.3 | **82.2** ± 0.3 |"
  assert lines[5] == "| *MNLI, GPT-3 175B* |  |  |  |  |"
  assert lines[6] == "| $W_q$ | 90.7 | 90.9 | **91.1** ± 0.1 | 90.7 |"
  assert lines[8] == "| all | 91.2 | - | - | - |"


def test_failed_members_are_counted(swept):
  some = tables.pivot(fails(swept, "q-4-1"))
  cell = some.rows[0].cells["4"]
  assert (cell.n, cell.failed) == (2, 1)
  assert cell.mean == pytest.approx(50 * (accuracy("q", 4, 0) + accuracy("q", 4, 2)))
  assert rows(tables.markdown(some))["*tiny*"] == ["", "", "", ""]
  assert "(2 of 3)" in tables.markdown(some) and "one run failed" in tables.caption(some)
  none = tables.markdown(tables.pivot(fails(swept, "q-4-0", "q-4-1", "q-4-2")))
  assert "| failed (0 of 3) |" in none
  swept["members"][0]["eval"]["after"]["accuracy"] = None  # what JSON has for nan
  assert tables.pivot(swept).rows[0].cells["1"].failed == 1


def test_a_metric_that_was_not_computed_is_no_failure(swept):
  swept["table"] |= {"metric": ["accuracy", "meteor"]}
  swept["members"][0]["eval"]["after"]["meteor"] = 0.4
  text = tables.markdown(tables.pivot(swept))
  assert "| meteor, $W_q$ | 40.0 (n = 1) | - | - | - |" in text and "failed" not in text


METRIC_OF = {"mnli": "accuracy", "cola": "matthews"}


def tasks_apart(*failed, **layout_):
  """Tasks of a metric each as rows, two methods as columns, two seeds."""
  members = [
    member(
      f"{task}-{method}-{seed}",
      {"task": {"name": "glue", "subset": task}, "method": {"name": method}, "train": {"seed": seed}},
      {metric: 0.6 + 0.1 * seed},
    )
    for task, metric in METRIC_OF.items()
    for method in ("lora", "ia3")
    for seed in (0, 1)
  ]
  how = {"metric": ["matthews", "accuracy"], "rows": "task.subset", "columns": "method.name"}
  return fails(summary(members, how | layout_), *failed)


def counted(table):
  """{row: {column: (n, failed)}} of ours."""
  return {r.label: {c: (x.n, x.failed) for c, x in r.cells.items()} for r in table.rows}


def test_a_row_is_of_a_metric_that_its_members_have():
  found = counted(tables.pivot(tasks_apart()))
  assert found == dict.fromkeys(("matthews, cola", "accuracy, mnli"), {"lora": (2, 0), "ia3": (2, 0)})


def test_a_failed_member_counts_where_others_of_its_row_do():
  table = tables.pivot(tasks_apart("cola-ia3-0", "cola-ia3-1", "mnli-lora-1"))
  assert counted(table) == {
    "matthews, cola": {"lora": (2, 0), "ia3": (0, 2)},
    "accuracy, mnli": {"lora": (1, 1), "ia3": (2, 0)},
  }
  assert "3 runs failed" in tables.caption(table)


def test_a_row_that_failed_is_of_the_metrics_that_are_published():
  all_cola = [f"cola-{method}-{seed}" for method in ("lora", "ia3") for seed in (0, 1)]
  failed = {"lora": (0, 2), "ia3": (0, 2)}
  given = tasks_apart(*all_cola, published={"them": {"matthews, cola": {"lora": 63.4}}})
  found = counted(tables.pivot(given))
  assert list(found) == ["matthews, cola", "accuracy, mnli"] and found["matthews, cola"] == failed
  table = tables.pivot(tasks_apart(*all_cola))  # nothing says which
  assert [r for r, cells in counted(table).items() if cells == failed] == ["matthews, cola", "accuracy, cola"]
  assert "4 runs failed" in tables.caption(table)


def test_cells_of_fewer_seeds_say_so(swept):
  swept["members"] = [m for m in swept["members"] if m["name"] not in ("q-4-1", "q-4-2")]
  assert "| 81.5 (n = 1) |" in tables.markdown(tables.pivot(swept))


def test_one_row_is_named_by_its_source():
  members = [member(t, {"method": {"targets": t}}, {"accuracy": x}) for t, x in (("q", 0.7), ("v", 0.8), ("k", 0.8))]
  published = {"WikiSQL": {"q": 70.4, "v": 73.0}, "MNLI": {"": {"q": 91.0, "k": "n/a"}}}
  text = tables.markdown(tables.pivot(summary(members, {"columns": "method.targets", "published": published})))
  assert text.splitlines()[0] == "| targets | q | v | k |"
  found = rows(text)
  assert found["tiny"] == ["70.0", "**80.0**", "**80.0**"]  # both are printed alike
  assert found["WikiSQL"] == ["70.4", "**73.0**", "-"] and found["MNLI"] == ["91.0", "-", "n/a"]


def test_metrics_as_columns():
  """Each has its unit, and is compared with itself: more of a score is better, less of a loss."""
  published = {"GPT-2 M": {"1": {"BLEU": 68.72, "METEOR": [45.65, 0.1], "trainable_params": "0.1M"}}}
  table = tables.pivot(several(rows="method.rank", published=published))
  found = tables.markdown(table).splitlines()
  assert found[0] == "| rank | trainable params | BLEU | nist | METEOR | val loss |"
  assert found[3] == "| 1 | 98.3k | 0.9 | 8.51 | 47.0 | **1.21** |"
  assert found[4] == "| 4 | 393k | 0.9 | **8.54** | **50.0** | 1.24 |"
  assert found[6] == "| 1 | 0.1M | 68.72 | - | 45.65 ± 0.1 | - |"
  assert tables.caption(table) == "BLEU, nist, METEOR in %, val loss; best of each column in bold."


def test_published_numbers_have_the_digits_of_their_source():
  """A zero at the end is lost in a float, but others of the metric have that digit; deviations have their own."""
  sources = {
    "A": {"1": {"bleu": [84.4, 0.02], "nist": 8.8439, "val_loss": 1}, "4": {"bleu": [83.7, 0.1], "nist": 8.85}},
    "B": {"1": {"bleu": 68.2, "nist": 8.62, "METEOR": [46, 0.0]}, "4": {"nist": 8.5}},
  }
  found = tables.markdown(tables.pivot(several(rows="method.rank", published=sources))).replace("*", "").splitlines()
  assert found[6:8] == ["| 1 | - | 84.4 ± 0.02 | 8.8439 | - | 1.00 |", "| 4 | - | 83.7 ± 0.1 | 8.8500 | - | - |"]
  assert found[9:] == ["| 1 | - | 68.2 | 8.62 | 46.0 ± 0.0 | - |", "| 4 | - | - | 8.50 | - | - |"]
  assert found[3] == "| 1 | 98.3k | 0.9 | 8.51 | 47.0 | 1.21 |"  # ours have as many as ever


def test_metrics_as_rows():
  given = several(columns="method.rank", row_labels={"nist": "NIST"}, published={"M": {"NIST": {"1": 8.7, "4": 8.8}}})
  found = rows(tables.markdown(tables.pivot(given)))
  assert found["BLEU"][0] == "0.910" and found["val loss"] == ["**1.21**", "1.24"]
  grouped = tables.pivot(several(rows="method.name", columns="method.rank", row_labels={"lora": "LoRA"}))
  assert [r.label for r in grouped.rows][1:3] == ["BLEU, LoRA", "nist, LoRA"]


def test_values_are_looked_up_as_the_sweep_merges_them():
  """An override of a method that has a name replaces the config's; others update it."""
  given = summary([], {})
  look = lambda overrides, path: table_layout.value(given, {"name": "x", "overrides": overrides}, path)
  assert look({}, "method.rank") == 8 and look({"method": {"alpha": 2}}, "method.rank") == 8
  assert look({"method": {"name": "ia3"}}, "method.rank") is None
  assert look({"method": {"rank": 2}}, "method.rank") == 2
  assert look({"optim": {"learning_rate": 1.0}}, "optim.learning_rate") == 1
  assert look({"method": [{"name": "lora"}]}, "method.rank") is None
  assert look({}, "name") == "x" and look({}, "nothing.at.all") is None
  assert look({"method": {"targets": ["q", ["k"]]}}, "method.targets") == ("q", ("k",))
  hash(look({"method": {"rank_pattern": {"q": 4, "v": [1]}}}, "method"))


@pytest.mark.parametrize("section", ["task", "objective"])
def test_another_task_or_objective_has_none_of_the_keys_of_the_configs(section):
  given = summary([], {}, config={section: {"name": "first", "key": 1}})
  look = lambda change: table_layout.value(given, {"name": "x", "overrides": {section: change}}, f"{section}.key")
  assert look({"key": 2}) == 2 and look({"name": "second"}) is None and look({"name": "second", "key": 3}) == 3


@pytest.mark.parametrize(
  "value, text",
  [(2e-4, "2e-4"), (1.2345678e-5, "1.235e-5"), (0.1, "0.1"), (16.0, "16"), (1024, "1024"), (18_874_368, "18,874,368")]
  + [(None, "-"), (True, "True"), (("q", "v"), "q,v"), ("all-linear", "all-linear"), (0.0, "0")],
)
def test_texts_of_values(value, text):
  how = table_layout.Layout((), rows="x")
  assert how.label("x", table_layout._hashable(value)) == text
  if table_layout.is_number(value):
    assert table_layout.number(text) == pytest.approx(value, rel=1e-3)


@pytest.mark.parametrize("key", ["('q', 'v')", "['q', 'v']", "q,v"])
def test_labels_of_sequences(key):
  assert table_layout.Layout((), rows="x", row_labels={key: "both"}).label("x", ("q", "v")) == "both"


def test_pairs_order_what_dicts_do_not():
  members = [member(t, {"method": {"targets": t}}, {"accuracy": 0.5}) for t in ("q", "v", "k")]
  pairs = [["v", "Wv"], ["k", "Wk"], ["q", "Wq"]]
  order = lambda labels: tables.pivot(summary(members, {"columns": "method.targets", "column_labels": labels})).columns
  assert order(pairs) == ("Wv", "Wk", "Wq") and order(dict(pairs)) == ("Wq", "Wv", "Wk")
  rates = [member(str(x), {"optim": {"learning_rate": x}}, {"accuracy": 0.5}) for x in (0.5, 1e-3, 2e-4)]
  published = [["them", [["r", [["0.5", 80.0], ["1e-3", [81.0, 0.2]]]]]]]
  table = tables.pivot(summary(rates, {"columns": "optim.learning_rate", "published": published}))
  assert table.columns == ("2e-4", "1e-3", "0.5")
  assert {c: x.mean for c, x in table.published["them"][0].cells.items()} == {"0.5": 80.0, "1e-3": 81.0}


def test_without_a_layout_members_are_rows(swept):
  for without in ({"table": None}, {"table": {}}):
    table = tables.pivot(swept | without)
    assert len(table.rows) == 18 and table.columns == ("accuracy",) and table.rows[0].label == "q-1-0"
  table = swept.pop("table")
  swept["config"]["table"] = table
  assert tables.pivot(swept).columns == ("1", "2", "4", "64")


@pytest.mark.parametrize(
  "table, message",
  [
    ({"row": "method.rank"}, "unknown key config.table.row; did you mean 'rows'"),
    ({"rows": "method.rnk"}, r"config\.table\.rows='method\.rnk' is in no member; did you mean 'method\.rank'"),
    ({"published": {"a": 3}}, r"config\.table\.published"),
    ({"published": "MNLI"}, r"config\.table\.published is a dict or a list of pairs"),
    ({"row_labels": ["a"]}, r"config\.table\.row_labels is a dict"),
    (3, r"config\.table is a section with keys, not 3"),
    ({"metric": 3}, r"config\.table\.metric=3: expected text, or a list, each text"),
  ],
)
def test_bad_layouts_are_refused_before_anything_runs(swept, table, message):
  planned = swept | {"table": table, "members": [{"overrides": m["overrides"]} for m in swept["members"]]}
  for either in (swept | {"table": table}, planned):
    with pytest.raises(errors.UserError, match=message):
      table_layout.of(either)
  assert table_layout.of(planned | {"table": TABLE6}).rows == "method.targets"


def test_latex_is_well_formed(swept):
  swept["table"]["row_labels"] |= {"('q',)": "50% of_W {x} ~^\\"}
  text = tables.latex(tables.pivot(fails(swept, "q-4-1")))
  assert text.startswith(r"\documentclass") and text.count(r"\begin{") == text.count(r"\end{") == 3
  body = re.search(r"\\begin\{tabular\}\{(l r*)\}(.*)\\end\{tabular\}".replace(" ", ""), text, re.S)
  assert body[1] == "lrrrr"
  lines = [line for line in body[2].splitlines() if line.endswith(r"\\")]
  for line in lines:
    assert len(re.findall(r"(?<!\\)&", line)) == (0 if "multicolumn" in line else 4)
    plain = re.sub(r"\\[{}]", "", line)
    assert plain.count("{") == plain.count("}") and len(re.findall(r"(?<!\\)\$", line)) % 2 == 0
  assert r"50\% of\_W \{x\} \textasciitilde{}\textasciicircum{}\textbackslash{} & " in text
  assert r"Wq \& Wv & 82.0$_{\pm 0.3}$ & -- & " in text and r"\textbf{83.2}$_{\pm 0.3}$" in text
  assert r"\multicolumn{5}{l}{\emph{MNLI, GPT-3 175B}} \\" in text and "(2 of 3)" in text


def test_report_is_written_from_the_summary(swept, tmp_path):
  command = "python -m experiments.run --config configs/lora_table6.py"
  tables.write(tmp_path, fails(swept, "q-4-1"), command)
  text = (tmp_path / "report.md").read_text()
  for part in (
    "# Hu et al. 2021, table 6: rotten_tomatoes on tiny",
    "18 runs; 30 steps; one program; 12 s in all.",
    tables.markdown(tables.pivot(fails(swept, "q-4-1"))),
    "**q-4-1** failed: step 3: loss nan",
    command,
    '"jax": "0.10.2"',
    '"learning_rate": 0.0002',
  ):
    assert part in text, part
  for name in re.findall(r"!\[\w+\]\((.*?)\)", text):
    assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
  assert {p.name for p in (tmp_path / "plots").iterdir()} == {"metric.png", "loss.png"}
  assert (tmp_path / "table.tex").read_text() == tables.latex(tables.pivot(fails(swept, "q-4-1")))
  assert (tmp_path / "table.md").read_text().startswith("| targets / rank |")


@pytest.mark.parametrize(
  "sizes, text", [((3,), "one program"), ((2, 2), "2 groups of 2, each one program"), ((2, 1), "2 groups of 2, 1, ")]
)
def test_the_report_says_what_ran_together(swept, tmp_path, sizes, text):
  swept["groups"] = [["name"] * n for n in sizes]
  tables.write(tmp_path, swept)
  assert f"; {text}" in (tmp_path / "report.md").read_text()


def test_all_tasks_are_in_the_title(swept, tmp_path):
  swept["members"][-1]["task"] = "bbc_news"
  tables.write(tmp_path, swept)
  assert (tmp_path / "report.md").read_text().startswith(f"# {TABLE6['paper']}: rotten_tomatoes and bbc_news on tiny\n")


def test_report_of_a_sweep_that_failed(swept, tmp_path):
  tables.write(tmp_path, fails(swept, *(m["name"] for m in swept["members"])))
  text = (tmp_path / "report.md").read_text()
  assert "failed (0 of 3)" in text and not (tmp_path / "plots").exists() and "Reproduce" not in text


def test_what_is_there_of_a_sweep_has_a_report(tmp_path):
  """A shard may have no member that full finetuning or a dimension needs, or none at all."""
  given = dimensions()
  for some in ([m for m in given["members"] if "full" in m["name"]], []):
    part = {**given, "members": some, "missing": ["others"], "analyses": {}}
    tables.write(tmp_path, part)
    assert "Intrinsic dimension" not in (tmp_path / "report.md").read_text()
  with pytest.raises(errors.UserError, match="method.layer_scales"):
    table_layout.of({**given, "members": [m for m in given["members"] if "full" in m["name"]]})


def test_analyses_have_a_section(tmp_path):
  given = dimensions()
  tables.write(tmp_path, given | {"analyses": {"d90": curves.reached(given), "subspace": {"error": "no LoRA"}}})
  text = (tmp_path / "report.md").read_text()
  assert f"## Intrinsic dimension\n\n{curves.reached_table(curves.reached(given), percent=True)}\n" in text
  assert "**subspace** failed: no LoRA" in text and "## Subspaces" not in text
