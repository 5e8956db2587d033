"""Sweeps: members are runs of their own over one base, and their comparison."""

import copy
import math

import jax
import numpy as np
import pytest

from lora_jax import compare, errors, evaluate, experiment, models, sharding, sweep, tasks
from tests.test_experiment import compiled, config, files  # noqa: F401, fixtures

pytestmark = pytest.mark.filterwarnings("ignore:The default value of")


@pytest.fixture(scope="module")
def swept(config):  # noqa: F811
  c = copy.deepcopy(config)
  c["train"] |= {"steps": 3, "checkpoint_every": 3}
  c["sweep"] = {
    "lora": {"method": {"name": "lora", "rank": 2}},
    "full": {"method": {"name": "full"}, "optim": {"learning_rate": 1e-3}},
    "diverges": {"method": {"name": "lora"}, "optim": {"learning_rate": 1e38, "clip_norm": 0.0, "warmup": 0.0}},
  }
  return c


@pytest.fixture(scope="module")
def done(swept, tmp_path_factory):
  directory = tmp_path_factory.mktemp("sweep")
  return directory, sweep.run(swept, directory, "command")


def test_members_are_their_own_runs(swept, done, tmp_path):
  directory, summary = done
  assert [m["name"] for m in summary["members"]] == ["lora", "full", "diverges"]
  for m in summary["members"][:2]:
    alone = experiment.run(sweep.members(swept)[m["name"]], tmp_path / m["name"])
    for k in ("loss_first", "loss_last"):
      assert m["train"][k] == alone["train"][k]
    assert m["eval"] == alone["eval"]
    assert m["trainable_params"] == alone["trainable_params"]
    assert m["saved_bytes"] > 0 and m["step_memory_bytes"] > 0


def test_the_base_is_left_as_it_is(swept, tmp_path):
  """Full finetuning of float32 weights donates what it trains; the model that it was given must outlive that."""
  c = sweep.members(swept)["full"]
  mesh = sharding.make_mesh(1)
  model = experiment.load(c, tasks.get(**c["task"]), mesh)
  before = jax.tree.map(np.array, model.params)
  experiment.run(c, tmp_path, model=model)
  jax.tree.map(np.testing.assert_array_equal, model.params, before)


def test_a_member_that_diverges_is_reported(done):
  directory, summary = done
  assert "not finite" in summary["members"][2]["error"]
  assert "**diverges** failed" in (directory / "report.md").read_text()


def test_report_and_plots(done):
  directory, summary = done
  text = (directory / "report.md").read_text()
  assert text.count("\n| lora |") == 1 and text.count("\n| full |") == 1
  for name in ("tradeoff", "costs"):
    assert (directory / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
  assert "lora" in compare.text_table(summary["members"])
  assert compare.rows(summary["members"])[0]["trainable_params"] == summary["members"][0]["trainable_params"]


def test_finished_members_are_not_run_again(swept, done, tmp_path, monkeypatch):
  import shutil

  directory, summary = done
  shutil.copytree(directory, tmp_path / "s")
  (tmp_path / "s" / "summary.json").unlink()
  shutil.rmtree(tmp_path / "s" / "members" / "full")
  ran, build = [], experiment.build
  monkeypatch.setattr(experiment, "build", lambda c, m: ran.append(c["method"]["name"]) or build(c, m))
  again = sweep.run({**swept, "sweep": {k: swept["sweep"][k] for k in swept["sweep"]}}, tmp_path / "s")
  assert ran == ["full", "lora"]  # and the one that diverged
  assert again["members"][1]["train"]["loss_last"] == summary["members"][1]["train"]["loss_last"]


@pytest.mark.parametrize(
  "members, message",
  [
    ({}, "overrides"),
    ({"a": 3}, r"sweep\.a"),
    ({"a/b": {}}, "name is letters"),
    ({"a": {"methd": {}}}, "did you mean 'method'"),
    ({"a": {"method": {"name": "lora", "ranks": 2}}}, r"sweep\.a.*ranks.*'rank'"),
    ({"a": {"model": {"name": "other"}}}, "share"),
  ],
)
def test_bad_sweeps_are_refused(swept, tmp_path, members, message):
  with pytest.raises(errors.UserError, match=message):
    sweep.run({**swept, "sweep": members}, tmp_path / "s")
  assert not (tmp_path / "s").exists()


def test_text_loss(files):  # noqa: F811
  """The mean over all tokens of all texts, whatever the batches."""
  model = models.load(str(files / "model"), dtype="float32")
  texts = ["abc def", "a", "some longer text of many bytes"]
  total = n = 0.0
  for ids in map(model.tokenizer.encode, texts):
    if len(ids) < 2:
      continue
    logp = jax.nn.log_softmax(models.apply(model.config, model.params, np.array([ids[:-1]])))[0]
    total -= float(np.take_along_axis(np.array(logp), np.array(ids[1:])[:, None], 1).sum())
    n += len(ids) - 1
  for batch_size in (1, 2):
    (got,) = evaluate.text_loss(model.config, evaluate.one(model.params), model.tokenizer, texts, batch_size=batch_size)
    assert math.isclose(got, total / n, rel_tol=1e-5)
