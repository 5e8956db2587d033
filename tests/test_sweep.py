"""Sweeps: members are runs of their own over one base, and their comparison."""

import copy
import dataclasses
import gc
import math
import shutil
import weakref

import jax
import numpy as np
import pytest
import safetensors.numpy

from experiments import run
from lora_jax import errors, methods, models, sharding, tasks, tree
from lora_jax.formats import checkpoint
from lora_jax.inference import evaluate, members
from lora_jax.results import comparison
from lora_jax.runs import artifacts, build, config_file, experiment, group, loop, outcome, scores, sweep, variants
from lora_jax.training import metrics, population, train
from tests import test_warm_start
from tests.test_experiment import compiled, config, files  # noqa: F401, fixtures

pytestmark = pytest.mark.filterwarnings("ignore:The default value of")


@pytest.fixture(scope="module")
def swept(config):  # noqa: F811
  c = copy.deepcopy(config)
  c["train"] |= {"steps": 3, "checkpoint_every": 3}
  c["sweep"] = {
    "list": {
      "lora": {"method": {"name": "lora", "rank": 2}},
      "full": {"method": {"name": "full"}, "optim": {"learning_rate": 1e-3}},
      "other": {"method": {"name": "lora", "rank": 4, "targets": "o"}, "train": {"seed": 5}},
      "diverges": {"method": {"name": "lora"}, "optim": {"learning_rate": 1e38, "clip_norm": 0.0, "warmup": 0.0}},
    }
  }
  return c


@pytest.fixture(scope="module")
def done(swept, tmp_path_factory):
  directory = tmp_path_factory.mktemp("sweep")
  return directory, sweep.run(swept, directory, "command")


@pytest.mark.slow
def test_members_are_their_own_runs(swept, done, tmp_path):
  directory, summary = done
  assert [m["name"] for m in summary["members"]] == ["lora", "full", "other", "diverges"]
  assert summary["groups"] == [["lora", "other", "diverges"], ["full"]]
  for m in summary["members"][:3]:
    alone = experiment.run(variants.members(swept)[m["name"]][1], tmp_path / m["name"])
    for k in ("loss_first", "loss_last"):
      assert m["train"][k] == pytest.approx(alone["train"][k], rel=1e-5)
    assert m["eval"] == {k: pytest.approx(v) for k, v in alone["eval"].items()}
    assert m["trainable_params"] == alone["trainable_params"] and m["total_params"] == alone["total_params"]
    assert m["saved_bytes"] > 0 and m["step_memory_bytes"] > 0
    theirs = directory / "members" / m["name"]
    for name in ("config.json", "metrics.jsonl", "report.md"):
      assert (theirs / name).exists()
    assert metrics.read_texts(theirs / "texts.json") == metrics.read_texts(tmp_path / m["name"] / "texts.json")
    assert all(m[k] == alone[k] for k in ("cut", "train_examples"))
    for a in (tmp_path / m["name"] / "adapter").glob("*.safetensors"):
      x, y = (safetensors.numpy.load_file(d / "adapter" / a.name) for d in (theirs, tmp_path / m["name"]))
      assert x.keys() == y.keys()
      for k in x:
        np.testing.assert_allclose(x[k], y[k], atol=1e-4, err_msg=k)


def test_before_training_is_the_pretrained_model(config, tmp_path, monkeypatch):  # noqa: F811
  """Without what a method adds, such as soft tokens, in a run of its own as in a sweep."""
  find, seen = scores.find, []

  def watched(subject, prefix, split):
    names = tree.names((subject.members.own, subject.members.shared))
    seen.append((prefix, any("prompt/" in k for k in names)))
    return find(subject, prefix, split)

  monkeypatch.setattr(scores, "find", watched)
  c = config | {"method": {"name": "prompt_tuning", "length": 4}, "train": {"steps": 1}}
  experiment.run(c, tmp_path / "alone")
  assert set(seen) == {("before", False), ("after", True)}
  seen.clear()
  sweep.run(c | {"sweep": {"product": {"train": {"seed": (0, 1)}}}}, tmp_path / "s")
  assert set(seen) == {("before", False), ("after", True)}


def test_the_base_is_left_as_it_is(swept, tmp_path):
  """Full finetuning of float32 weights donates what it trains; the model that it was given must outlive that."""
  c = variants.members(swept)["full"][1]
  mesh = sharding.make_mesh(1)
  model = build.load(c, tasks.get(**c.task), mesh)
  before = jax.tree.map(np.array, model.params)
  experiment.run(c, tmp_path, model=model)
  jax.tree.map(np.testing.assert_array_equal, model.params, before)


def test_checkpoints_of_a_group_go_when_all_its_members_are_written(done):
  directory, summary = done
  assert len(list(directory.glob("groups/*/members.json"))) == 1 and not list(directory.glob("groups/*/checkpoints"))
  assert (directory / "members" / "full" / "checkpoints").exists(), "a member alone is a run like any"


def test_checkpoints_go_that_a_kill_after_the_last_member_has_left(swept, done, tmp_path):
  shutil.copytree(done[0], tmp_path / "s")
  (tmp_path / "s" / "summary.json").unlink()
  (path,) = tmp_path.glob("s/groups/*/members.json")
  (path.parent / "checkpoints" / "3").mkdir(parents=True)
  sweep.run(swept, tmp_path / "s")
  assert path.exists() and not (path.parent / "checkpoints").exists()


def test_what_a_group_compiles_before_its_first_step_is_of_that_step(done):
  directory, summary = done
  for m in summary["members"][:3]:
    rows = [r for r in metrics.read_metrics(directory / "members" / m["name"] / "metrics.jsonl") if "train/loss" in r]
    assert rows[0]["train/compile_seconds"] > 0 and rows[0]["train/seconds"] > 0
    assert m["train"]["compile_seconds"] == sum(r["train/compile_seconds"] for r in rows)


def test_a_member_that_diverges_is_reported(done):
  directory, summary = done
  assert "not finite" in summary["members"][3]["error"]
  assert "**diverges** failed" in (directory / "report.md").read_text()


def test_report_and_plots(done):
  directory, summary = done
  text = (directory / "report.md").read_text()
  assert text.count("\n| lora |") == 1 and text.count("\n| full |") == 1
  for name in ("tradeoff", "costs"):
    assert (directory / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
  assert "lora" in comparison.text_table(summary["members"])
  assert comparison.rows(summary["members"])[0]["trainable_params"] == summary["members"][0]["trainable_params"]


def test_reports_of_members_show_texts_and_how_to_use_them(done):
  directory, _ = done
  for name, use in (("lora", "## Use the adapter"), ("full", "## Use the model")):
    text = (directory / "members" / name / "report.md").read_text()
    assert text.count("\nbefore: ") == text.count("\nafter: ") == 4 and use in text


def test_finished_members_are_not_run_again(swept, done, tmp_path, monkeypatch):
  directory, summary = done
  shutil.copytree(directory, tmp_path / "s")
  (tmp_path / "s" / "summary.json").unlink()
  shutil.rmtree(tmp_path / "s" / "members" / "full")
  ran, build = [], experiment.build
  monkeypatch.setattr(experiment, "build", lambda c, m: ran.append(c.method[0]["name"]) or build(c, m))
  monkeypatch.setattr(group, "build", None)
  again = sweep.run(swept, tmp_path / "s")
  assert ran == ["full"]
  assert again["members"][1]["train"]["loss_last"] == summary["members"][1]["train"]["loss_last"]


@pytest.mark.parametrize(
  "change, message",
  [
    ({}, "overrides in one of"),
    ({"list": {"a": 3}}, r"list\.a"),
    ({"list": {"a/b": {}}}, "name is letters"),
    ({"list": {"a": {"methd": {}}}}, "did you mean 'method'"),
    ({"list": {"a": {"method": {"name": "lora", "ranks": 2}}}}, r"member a.*ranks.*'rank'"),
    ({"list": {"a": {"mesh": {"data": 2}}}}, "member a: mesh; members share the mesh"),
    ({"list": {"a": {"task": {"name": "glu"}}}}, "task 'glu'"),
    ({"product": {"train": {"seed": 3}}}, r"product\.train\.seed is a sequence"),
    ({"product": {"train": {"seed": (1, 1)}}}, "twice"),
    ({"zip": {"train": {"seed": (1, 2)}, "method": {"rank": (1,)}}}, "one length"),
    ({"random": {"optim": {"learning_rate": {"log_uniform": (0, 1)}}}}, "low, high"),
    ({"random": {"optim": {"learning_rate": {"normal": (0, 1)}}}}, "uniform"),
    ({"product": {"train": {"seed": (1,)}}, "max_member": 3}, "max_members"),
  ],
)
def test_bad_sweeps_are_refused(swept, tmp_path, change, message):
  with pytest.raises(errors.UserError, match=message):
    sweep.run({**swept, "sweep": change}, tmp_path / "s")
  assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
  "metric, message",
  [
    ("exact_mach", "unknown metric: config.table.metric is 'exact_mach'; did you mean 'exact_match'"),
    (("exact_match", "train.loss"), "config.table.metric is 'train.loss'; did you mean .*'train.loss_last'"),
    ("eval.after.accuracy", "config.table.metric is 'eval.after.accuracy'"),
  ],
)
def test_a_metric_that_no_member_will_have_is_refused(swept, tmp_path, metric, message):
  with pytest.raises(errors.UserError, match=message):
    sweep.run({**swept, "table": {"metric": metric}}, tmp_path / "s")
  assert not (tmp_path / "s").exists()


def test_metrics_that_a_member_may_have_are_accepted(swept):
  """A metric of one member's task is enough; what only the generated texts tell is not known."""
  configs = {n: c for n, (_, c) in variants.members(swept).items()}
  check = lambda metric, configs, mine: sweep._check_metrics({"metric": metric}, configs, mine)
  for metric in ("exact_match", "trainable_params", "train.loss_last", "eval.before.exact_match", ""):
    check(metric, configs, list(configs))
  c = configs["lora"]
  general = dataclasses.replace(c, eval=dataclasses.replace(c.eval, general="bbc_news"))
  check("general_loss", {"a": general}, ["a"])
  labels = dataclasses.replace(c, task={**c.task, "labels": "all"})
  check("accuracy", configs | {"labels": labels}, [*configs, "labels"])
  check("accuracy", configs | {"labels": labels}, list(configs))  # another shard has it
  with pytest.raises(errors.UserError, match="accuracy"):
    check("accuracy", configs, list(configs))


def test_parts_of_a_sweep_combine(swept):
  method, rate = {"targets": ("q", "q,v"), "rank": (8, 4)}, {"learning_rate": {"log_uniform": (1e-4, 1e-2)}}
  parts = {"zip": {"method": method}, "product": {"train": {"seed": (0, 1, 2)}}, "random": {"n": 2, "optim": rate}}
  found = variants.members({**swept, "sweep": parts})
  assert len(found) == 12 and list(found)[1] == "targets_q-rank_8-seed_0-sample_1"
  overrides, whole = found["targets_q+v-rank_4-seed_2-sample_0"]
  assert overrides["method"] == {"targets": "q,v", "rank": 4} and whole.train.seed == 2
  assert whole.method == methods.resolve({**swept["method"], "targets": "q,v", "rank": 4})
  rates = [c.optim.learning_rate for _, c in found.values()]
  assert len(set(rates)) == 2 and all(1e-4 <= r <= 1e-2 for r in rates)
  assert sweep.groups({n: c for n, (_, c) in found.items()}) == [list(found)]
  assert [len(g) for g in sweep.groups({n: c for n, (_, c) in found.items()}, 5)] == [4, 4, 4]


def test_the_command_line_changes_a_sweep():
  argv = ["--config=x.py", "--config.sweep.product.optim.learning_rate=(1e-3, 1e-4)", "--workdir", "w"]
  argv += ["--config.sweep.zip.method.targets", "('q', 'v')", "--config.sweep.random.n=4"]
  rest, changes = run.split_changes(argv)
  assert rest == ["--config=x.py", "--workdir", "w"]
  given = {"sweep": {"product": {"train": {"seed": (0, 1)}}, "zip": {"method": {"targets": ("k",)}}}}
  product = {"train": {"seed": (0, 1)}, "optim": {"learning_rate": (1e-3, 1e-4)}}
  want = {"product": product, "zip": {"method": {"targets": ("q", "v")}}, "random": {"n": 4}}
  assert config_file.change(given, changes) == {"sweep": want}
  assert config_file.change({"optim": {}}, {"sweep.max_members": "2"}) == {"optim": {}, "sweep": {"max_members": 2}}
  with pytest.raises(errors.UserError, match="method has no keys"):
    config_file.change({"sweep": {"product": {"method": ({"name": "lora"},)}}}, {"sweep.product.method.rank": "(1, 2)"})


def test_shards_take_all_members_once(swept):
  configs = {n: c for n, (_, c) in variants.members(swept).items()}
  assert sweep.groups(configs) == [["lora", "other", "diverges"], ["full"]]
  of = lambda n: [sweep.shard_of(configs, i, n) for i in range(n)]
  assert of(2) == sweep.groups(configs), "whole groups"
  assert of(3) == [["lora", "full"], ["other"], ["diverges"]], "fewer groups than shards"
  with pytest.raises(errors.UserError, match="shard"):
    sweep.shard_of(configs, 2, 2)


@pytest.mark.slow
def test_shards_are_joined(swept, done, tmp_path):
  c = copy.deepcopy(swept)
  del c["sweep"]["list"]["full"]
  paths = [tmp_path / str(i) for i in range(2)]
  for i, p in enumerate(paths):
    sweep.run(c, p, shard=(i, 2))
    assert not (p / "summary.json").exists()
  joined = outcome.join(paths, tmp_path / "all")
  assert [m["name"] for m in joined["members"]] == ["lora", "other", "diverges"]
  for m in joined["members"][:2]:
    whole = next(x for x in done[1]["members"] if x["name"] == m["name"])
    assert m["train"]["loss_last"] == pytest.approx(whole["train"]["loss_last"], rel=1e-5)
  assert (tmp_path / "all" / "report.md").exists()


@pytest.mark.slow
def test_a_group_whose_arrays_do_not_fit_is_halved(swept, tmp_path, capsys, monkeypatch):
  c = copy.deepcopy(swept)
  c["sweep"] = {"product": {"train": {"seed": (0, 1, 2, 3)}}}
  fit = loop.fit

  def small(built, *args):
    if len(built.members) > 2:
      raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
    return fit(built, *args)

  monkeypatch.setattr(loop, "fit", small)
  summary = sweep.run(c, tmp_path / "s")
  rows = metrics.read_metrics(tmp_path / "s" / "members" / "seed_0" / "metrics.jsonl")
  assert sum(any(k.startswith("before/") for k in r) for r in rows) == 1
  assert "do not fit: cut into 2 groups of 2 or fewer" in capsys.readouterr().err
  assert len(summary["members"]) == 4 and not any("error" in m for m in summary["members"])
  assert summary["groups"] == [["seed_0", "seed_1"], ["seed_2", "seed_3"]], "as they ran"


@pytest.mark.slow
def test_a_group_that_does_not_fit_is_cut(swept, tmp_path, capsys):
  c = copy.deepcopy(swept)
  c["sweep"] = {"product": {"train": {"seed": (0, 1, 2)}}, "memory_gib": 1e-4}
  summary = sweep.run(c, tmp_path / "s")
  assert "groups of 1 or fewer" in capsys.readouterr().err
  assert summary["groups"] == [["seed_0"], ["seed_1"], ["seed_2"]]


@pytest.fixture
def mixed(swept, files, tmp_path):  # noqa: F811
  """A sweep of classifiers with two and three labels and a language model; `a` starts from the adapter of `c`."""
  two, three = ({k: test_warm_start.labelled(files, swept, n)[k] for k in ("task", "objective")} for n in (2, 3))
  warm = {"train": {"init_from": str(tmp_path / "s" / "members" / "c" / "adapter")}}
  other = two | {"task": two["task"] | {"labels": two["task"]["labels"][::-1]}}
  members = {"a": two | warm, "b": two, "c": three, "d": {}, "e": two, "f": other}
  return {**swept, "sweep": {"list": members}, "data": {"batch_size": 8, "seq_len": 32}}


def test_members_over_one_model_come_together_and_warm_starts_last(mixed):
  found = {n: whole for n, (_, whole) in variants.members(mixed).items()}
  assert sweep.groups(found) == [["b", "e"], ["f"], ["c"], ["d"], ["a"]]
  assert sweep.shard_of(found, 1, 2) == ["f", "d"]


@pytest.mark.slow
def test_tasks_and_models_may_differ(mixed, tmp_path, monkeypatch):
  """Each member is a run of its own; one model's memory is free when the next is loaded."""
  found, load, seen = variants.members(mixed), build.load, []

  def watched(*args):
    gc.collect()
    assert not any(ref() for ref in seen)
    model = load(*args)
    seen.extend(map(weakref.ref, jax.tree.leaves(model.params)))
    return model

  monkeypatch.setattr(build, "load", watched)
  summary = sweep.run(mixed, tmp_path / "s")
  assert [m["name"] for m in summary["members"]] == list("abcdef")
  monkeypatch.setattr(build, "load", load)
  for m in summary["members"]:
    alone = experiment.run(found[m["name"]][1], tmp_path / m["name"])
    for k in ("loss_first", "loss_last"):
      assert m["train"][k] == pytest.approx(alone["train"][k], rel=1e-5)
    for k in ("before", "after"):
      assert m["eval"][k] == pytest.approx(alone["eval"][k])


@pytest.mark.slow
def test_a_group_goes_on_from_its_checkpoint(swept, done, tmp_path, monkeypatch):
  """Killed while its members are written: what is trained is not trained again."""
  c = copy.deepcopy(swept)
  del c["sweep"]["list"]["full"]
  with monkeypatch.context() as m:
    m.setattr(artifacts, "write", lambda *a, **kw: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
      sweep.run(c, tmp_path / "s")
  monkeypatch.setattr(train.Stepper, "__call__", None)
  again = sweep.run(c, tmp_path / "s")
  for m in again["members"][:2]:
    whole = next(x for x in done[1]["members"] if x["name"] == m["name"])
    assert m["train"]["loss_last"] == pytest.approx(whole["train"]["loss_last"], rel=1e-6)
    assert m["eval"]["after"] == whole["eval"]["after"]
  assert "not finite" in again["members"][2]["error"]


@pytest.mark.slow
def test_members_are_spread_over_the_population_axis(swept, done, tmp_path, monkeypatch):
  """Three on two devices, which is padded to four; then they go on on one."""
  c = copy.deepcopy(swept)
  c["mesh"] = {"population": -1, "data": 1, "fsdp": 1, "tensor": 1}
  del c["sweep"]["list"]["full"]
  monkeypatch.setattr(jax, "device_count", lambda: 2)
  with monkeypatch.context() as m:
    m.setattr(artifacts, "write", lambda *a, **kw: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
      sweep.run(c, tmp_path / "s")
  monkeypatch.setattr(jax, "device_count", lambda: 1)
  monkeypatch.setattr(train.Stepper, "__call__", None)
  summary = sweep.run(c, tmp_path / "s")
  for m in summary["members"][:2]:
    whole = next(x for x in done[1]["members"] if x["name"] == m["name"])
    assert m["train"]["loss_last"] == pytest.approx(whole["train"]["loss_last"], rel=1e-5)


def test_a_checkpoint_holds_the_members_alone(tmp_path):
  """And not what fills the mesh, which another one has another number of."""
  place = lambda x, n: sharding.put(x, sharding.stacked(sharding.Placer(sharding.make_mesh(1, population=n))))

  def state(rows, n):
    x = np.array(rows, np.float32)
    return place(population.State(train.State(x.astype(np.int32), {"x": x[:, None]}, (x, None), None), x > 0), n)

  for saved, n, resumed, m in (([1, 2, 3, 3], 2, [1, 2, 3], 1), ([1, 2, 3], 1, [1, 2, 3, 3, 3, 3], 3)):
    with checkpoint.Checkpoints(tmp_path / str(n)) as checkpoints:
      checkpoints.save(1, group.rows(state(saved, n), 3), ["data"])
      like = state([0] * len(resumed), m)
      found, data = checkpoints.restore(1, group.rows(like, 3))
      found = group.placed_like(found, like)
    jax.tree.map(np.testing.assert_array_equal, found, state(resumed, m))
    assert data == ["data"] and all(jax.tree.leaves(jax.tree.map(lambda x, y: x.sharding == y.sharding, found, like)))


@pytest.mark.slow
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
    (got,) = evaluate.text_losses(
      model.config, members.one(model.params), model.tokenizer, texts, batch_size=batch_size
    ).run()
    assert math.isclose(got, total / n, rel_tol=1e-5)
