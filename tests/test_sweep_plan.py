"""What of a sweep runs when: plans, shards, kills, memory's end; the members leave results and compile nothing."""

import copy
import os
import time
import types

import jax
import pytest

from lora_jax import errors, files as files_lib
from lora_jax.formats import hf
from lora_jax.runs import build as build_lib, config as config_lib, experiment, group, needs, outcome, sweep, variants
from lora_jax.training import metrics
from tests.test_experiment import compiled, config, files  # noqa: F401, fixtures

pytestmark = pytest.mark.filterwarnings("ignore:The default value of")


@pytest.fixture(scope="module")
def swept(config):  # noqa: F811
  return config | {"train": config["train"] | {"steps": 3, "checkpoint_every": 3}, "sweep": {"list": {"one": {}}}}


@pytest.fixture
def pretended(monkeypatch):
  """The members that ran together, in order: runs that leave a result and compile nothing."""
  ran = []

  def leave(directory, **more):
    metrics.write_json(directory / "summary.json", {"train": {"steps": 3}, "versions": {"jax": "0.1"}} | more)
    metrics.write_json(directory / "adapter" / "adapter_config.json", {})

  def start(configs):
    for c in configs.values():
      source = c.train.init_from
      if source and not os.path.exists(source):
        raise errors.UserError("no adapter_config.json there")

  def alone(c, directory, **_):
    start({directory.name: c})
    ran.append([directory.name])
    leave(directory)

  def build(configs, *_):
    start(configs)
    return types.SimpleNamespace(members=configs)

  def together(built, workdir, *_):
    ran.append(list(built.members))
    for n in built.members:
      leave(workdir / "members" / n, population=len(built.members))

  monkeypatch.setattr(build_lib, "load", lambda *a: object())
  monkeypatch.setattr(sweep, "_pretrained", lambda *a: dict)
  monkeypatch.setattr(needs, "least_memory", lambda *a: {})
  monkeypatch.setattr(experiment, "run", alone)
  monkeypatch.setattr(group, "build", build)
  monkeypatch.setattr(group, "fits", lambda *a: True)
  monkeypatch.setattr(group, "run", together)
  monkeypatch.setattr(outcome, "write_report", lambda *a: None)
  monkeypatch.setattr(outcome, "text_table", lambda *a: "")
  return ran


def seeds(swept, n):
  return {**swept, "sweep": {"product": {"train": {"seed": tuple(range(n))}}}}


def test_a_file_may_be_written_by_several_at_once(swept, tmp_path, monkeypatch):
  path, fsync = tmp_path / "s" / "config.json", os.fsync

  def other(fd):
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(files_lib, "WRITER", ".1-of-2")
    assert config_lib.started(path.parent) is None, "half a file is no other run"
    files_lib.write(path, b"{}")
    monkeypatch.setattr(files_lib, "WRITER", ".0-of-2")
    fsync(fd)

  monkeypatch.setattr(os, "fsync", other)
  files_lib.write(path, b"{}")
  assert [p.name for p in path.parent.iterdir()] == ["config.json"]


def test_members_wait_for_the_adapters_that_they_start_from(swept, tmp_path, pretended, capsys):
  """In groups and alone: what is not there yet leaves the others alone, and is no result."""
  c, adapters = copy.deepcopy(swept), [tmp_path / str(i) for i in range(2)]
  warm = lambda p: {"train": {"init_from": str(p)}}
  own = tmp_path / "s" / "members" / "source" / "adapter"
  c["sweep"] = {"list": {"x": warm(own), "y": warm(adapters[0]), "z": warm(own), "source": {}}}
  full, ia3 = ({"method": {"name": n}} for n in ("full", "ia3"))
  c["sweep"]["list"] |= {"alone": full | warm(adapters[1]), "other": ia3}
  found = sweep.run(c, tmp_path / "s")
  assert pretended == [["source"], ["other"], ["x", "z"]]
  assert found["missing"] == ["y", "alone"] and not any("error" in m for m in found["members"])
  assert not (tmp_path / "s" / "summary.json").exists()
  assert "y: config.train.init_from" in capsys.readouterr().err
  for p in adapters:
    metrics.write_json(p / "adapter_config.json", {})
  found = sweep.run(c, tmp_path / "s")
  assert pretended[3:] == [["y"], ["alone"]] and not found["missing"]


def test_a_mistake_is_the_result_of_its_member_alone(swept, tmp_path, pretended, monkeypatch):
  """The others of its group train, together as far as they can."""
  c = seeds(swept, 4)
  c["sweep"]["list"] = {"a": {"method": {"rank": 2}}, "b": {"method": {"name": "ia3"}}}
  build, run = group.build, experiment.run

  def fails(configs, *args):
    if "a-seed_1" in configs:
      raise errors.UserError("no such module")
    return build(configs, *args)

  def alone(c, directory, **how):
    if directory.name == "a-seed_1":
      raise errors.UserError("no such module")
    run(c, directory, **how)

  monkeypatch.setattr(group, "build", fails)
  monkeypatch.setattr(experiment, "run", alone)
  found = sweep.run(c, tmp_path / "s")
  assert {m["name"]: m["error"] for m in found["members"] if "error" in m} == {"a-seed_1": "no such module"}
  assert (tmp_path / "s" / "summary.json").exists()
  assert pretended == [["a-seed_0"], ["a-seed_2", "a-seed_3"], [f"b-seed_{i}" for i in range(4)]]


def test_a_directory_is_of_one_sweep(swept, tmp_path, pretended):
  """However its config is written."""
  c = seeds(swept, 2)
  summary = sweep.run(c, tmp_path / "s")
  same = c | {"optim": c["optim"] | {"b1": 0.9}, "table": None}
  assert sweep.run(same, tmp_path / "s") == summary and len(pretended) == 1
  others = {
    "seed_2.data.batch_size was None, now 8": seeds(swept, 3),
    "seed_0.optim.b1 was 0.9, now 0.8": c | {"optim": c["optim"] | {"b1": 0.8}},
    "table.rows was None, now 'train.seed'": c | {"table": {"rows": "train.seed"}},
  }
  for message, other in others.items():
    with pytest.raises(errors.UserError, match=f"belongs to another config .*{message}"):
      sweep.run(other, tmp_path / "s")


def test_a_group_that_has_begun_goes_on_as_it_was(swept, tmp_path, pretended, monkeypatch):
  """Whatever fits by now: its checkpoint is of those members."""
  c = seeds(swept, 5)
  build, run = group.build, group.run

  def small(configs, *args):
    if len(configs) > 3:
      raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
    return build(configs, *args)

  def killed(built, workdir, *args):
    run(types.SimpleNamespace(members=dict(list(built.members.items())[:1])), workdir)
    raise KeyboardInterrupt

  with monkeypatch.context() as m:
    m.setattr(group, "build", small)
    m.setattr(group, "run", killed)
    with pytest.raises(KeyboardInterrupt):
      sweep.run(c, tmp_path / "s")
  sweep.run(c, tmp_path / "s")
  assert pretended == [["seed_0"], ["seed_0", "seed_1"], ["seed_2", "seed_3", "seed_4"]]


@pytest.mark.parametrize("where", ["build", "fits", "run"])
def test_a_group_is_halved_wherever_memory_ends(swept, tmp_path, pretended, monkeypatch, where):
  real = getattr(group, where)

  def small(x, *args):
    if len(getattr(x, "members", x)) > 2:
      raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
    return real(x, *args)

  monkeypatch.setattr(group, where, small)
  sweep.run(seeds(swept, 4), tmp_path / "s")
  assert pretended == [["seed_0", "seed_1"], ["seed_2", "seed_3"]]
  kept = sorted(len(hf.read_json(p)["members"]) for p in tmp_path.glob("s/groups/*/members.json"))
  assert kept == [2, 2], "the group that was cut is not one that has begun"


def test_groups_are_those_that_ran(swept, tmp_path):
  """By what members say; one that says nothing ran alone."""
  c = {n: {} for n in "abcde"}
  says = {"a": {"group": "1"}, "b": {"group": "2"}, "c": {"group": "1"}, "d": {"group": "2", "error": "x"}}
  for n in c:
    metrics.write_json(tmp_path / "members" / n / "summary.json", says.get(n, {}))
  c = {**swept, "sweep": {"list": c}}
  found = outcome.summary(c, variants.overrides(c["sweep"]), [tmp_path])
  assert found["groups"] == [["a", "c"], ["b", "d"], ["e"]]


def test_seconds_are_those_of_all_calls_and_shards(swept, tmp_path, pretended, monkeypatch):
  c, run = seeds(swept, 4), group.run

  def slow(built, *args):
    time.sleep(0.2)
    if not pretended:
      pretended.append("killed")
      raise KeyboardInterrupt
    run(built, *args)

  monkeypatch.setattr(group, "run", slow)
  with pytest.raises(KeyboardInterrupt):
    sweep.run(c, tmp_path / "0", shard=(0, 2))
  found = sweep.run(c, tmp_path / "0", shard=(0, 2))
  assert found["wall_seconds"] >= 0.4
  other = sweep.run(c, tmp_path / "1", shard=(1, 2))
  joined = outcome.join([tmp_path / "0", tmp_path / "1"], tmp_path / "all")
  assert joined["wall_seconds"] == pytest.approx(found["wall_seconds"] + other["wall_seconds"])
  assert joined["versions"] == {"jax": "0.1"}, "of those who ran it"
  whole = sweep.run(c, tmp_path / "0", shard=(1, 2))
  assert whole["wall_seconds"] > found["wall_seconds"] + 0.2 and not whole["missing"]


def test_an_unfinished_sweep_is_not_joined_into_itself(swept, tmp_path, pretended):
  """Under whatever name: the next call would take the summary for that of all members."""
  sweep.run(seeds(swept, 4), tmp_path / "a", shard=(0, 2))
  (tmp_path / "b").symlink_to("a")
  outcome.join([tmp_path / "a"], tmp_path / "b")
  assert not (tmp_path / "a" / "summary.json").exists()
