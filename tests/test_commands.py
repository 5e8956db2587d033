"""The command lines' own parts: shares of a sweep, and joining results."""

import json
import pathlib
import shutil

import pytest
from absl import logging

from experiments import report, run
from lora_jax import errors
from lora_jax.results import plots
from lora_jax.runs import experiment, sweep

ROOT = pathlib.Path(__file__).parents[1]
TABLE5 = ROOT / "experiments" / "results" / "lora_table5"


@pytest.fixture
def slurm(monkeypatch):
  """A function that sets the variables of an array's task, and none besides."""

  def set_variables(**values):
    for k in ("ID", "MIN", "MAX", "COUNT", "STEP"):
      monkeypatch.delenv(f"SLURM_ARRAY_TASK_{k}", raising=False)
    for k, value in values.items():
      monkeypatch.setenv(f"SLURM_ARRAY_TASK_{k}", str(value))

  set_variables()
  return set_variables


@pytest.mark.parametrize("value, expected", [("", (0, 1)), ("0/4", (0, 4)), ("3/4", (3, 4)), ("0/1", (0, 1))])
def test_shards(slurm, value, expected):
  assert run.shard(value) == expected


@pytest.mark.parametrize("value", ["4", "/4", "1/", "a/4", "-1/4", "1/2/3", "0.5/4"])
def test_what_is_no_shard_is_refused(value):
  with pytest.raises(errors.UserError, match=f"--shard={value}: expected i/n, such as 0/4"):
    run.shard(value)


@pytest.mark.parametrize("index, count", [(4, 4), (0, 0)])
def test_shards_that_there_are_not_are_refused(index, count):
  with pytest.raises(errors.UserError, match="0 <= i < n"):
    sweep.shard_of({}, index, count)


@pytest.mark.parametrize(
  "values, expected",
  [
    (dict(ID=0, MIN=0, MAX=3, COUNT=4), (0, 4)),
    (dict(ID=3, MIN=0, MAX=3, COUNT=4), (3, 4)),
    (dict(ID=7, MIN=5, MAX=8, COUNT=4), (2, 4)),
    (dict(ID=2, MIN=1, COUNT=2), (1, 2)),
    (dict(ID=2), (0, 1)),
  ],
)
def test_tasks_of_an_array_are_shards(slurm, values, expected):
  slurm(**values)
  assert run.shard("") == expected
  assert run.shard("1/3") == (1, 3)


@pytest.mark.parametrize(
  "values",
  [
    *(dict(ID=i, MIN=0, MAX=5, COUNT=3) for i in (0, 2, 5)),  # --array=0,2,5
    dict(ID=2, MIN=0, MAX=6, COUNT=4, STEP=2),  # --array=0-6:2
    dict(ID=5, MIN=0, COUNT=3),
  ],
)
def test_arrays_with_gaps_are_refused(slurm, values):
  """By every task, as the shares of those whose ids are missing would never run."""
  slurm(**values)
  n = values["COUNT"]
  with pytest.raises(errors.UserError, match=rf"consecutive ids, such as --array=0-{n - 1}, or .* --shard i/{n}"):
    run.shard("")


@pytest.mark.parametrize(
  "config, more, message",
  [
    ("lora_table5.py:smol", [], "error: the 3 tasks of this SLURM array .* consecutive"),
    ("lora_table5.py:smol", ["--shard=4"], "error: --shard=4: expected i/n"),
    ("lora_table5.py:smol", ["--shard=٣/٤"], "error: --shard=.*: expected i/n"),
    ("lora_table5.py:smol", ["--shard=0/" + "9" * 5000], "error: --shard=.*: expected i/n"),
    ("lora_table5.py:smol", ["--shard="], "error: --shard='': expected text that is not empty"),
    ("quickstart.py", ["--shard=0/4"], "error: --shard is for a config with a sweep"),
  ],
)
def test_a_wrong_shard_ends_in_one_message(slurm, monkeypatch, tmp_path, config, more, message):
  slurm(ID=5, MIN=0, MAX=5, COUNT=3)
  monkeypatch.setattr(logging, "set_verbosity", lambda level: None)
  with pytest.raises(SystemExit, match=message) as end:
    run.main(["--config", f"{ROOT}/configs/{config}", "--workdir", str(tmp_path / "w"), *more])
  assert "\n" not in end.value.code and not (tmp_path / "w").exists()


@pytest.mark.parametrize(
  "error, ends",
  [
    (OSError(28, "No space left on device"), SystemExit),
    (ValueError("RESOURCE_EXHAUSTED: Failed writing: No space left on device [os_error_code='28']"), SystemExit),
    (ValueError("anything else"), ValueError),
  ],
)
def test_a_full_disk_ends_in_one_message(slurm, monkeypatch, tmp_path, error, ends):
  def full(*args):
    raise error

  monkeypatch.setattr(logging, "set_verbosity", lambda level: None)
  monkeypatch.setattr(experiment, "run", full)
  command = ["--config", f"{ROOT}/configs/quickstart.py", "--workdir", str(tmp_path / "w")]
  with pytest.raises(ends, match=r"no space left to write .*/w; |anything else"):
    run.main(command)


def test_results_of_directories_are_joined(monkeypatch, tmp_path):
  """What is committed of a run, out of its directory and in place."""
  monkeypatch.setattr(plots, "png", lambda figure: b"")
  kept = tmp_path / "kept"
  kept.mkdir()
  for file in ("config.json", "summary.json"):
    shutil.copy(TABLE5 / file, kept)
  for out in (None, str(tmp_path / "out")):
    report.main([str(kept), *(["--out", out] if out else [])])
    written = pathlib.Path(out or kept)
    for file in ("table.md", "report.md"):
      assert (written / file).read_text() == (TABLE5 / file).read_text()
    for file in ("config.json", "summary.json"):
      assert json.loads((written / file).read_text()) == json.loads((TABLE5 / file).read_text())


def test_a_slurm_array_of_no_numbers_ends_in_one_message(slurm, tmp_path):
  slurm(ID="9" * 5000, MIN=0, MAX=1, COUNT=2)
  with pytest.raises(SystemExit, match="error: these variables should be whole numbers: .*SLURM_ARRAY_TASK_ID"):
    run.main(["--config", f"{ROOT}/configs/lora_table5.py:smol", "--workdir", str(tmp_path / "w")])


def test_what_the_system_refuses_ends_in_one_message():
  with pytest.raises(SystemExit, match=r"error: .*No such file or directory: '/proc/nowhere'"):
    report.main([str(TABLE5), "--out", "/proc/nowhere"])


def test_what_cannot_be_joined_ends_in_one_message(tmp_path):
  with pytest.raises(SystemExit, match="error: .* required: DIR; --help lists the flags"):
    report.main([])
  with pytest.raises(SystemExit, match="error: .* has no config.json: it holds no run"):
    report.main([str(tmp_path)])
  assert not list(tmp_path.iterdir())


def test_a_sweep_of_which_all_members_fail_is_an_error(monkeypatch, tmp_path):
  failed, ran = {"name": "a", "error": "no such module"}, {"name": "b", "train": {}}
  command = ["--config", f"{ROOT}/configs/alpha.py:smol", "--workdir", str(tmp_path / "w")]
  monkeypatch.setattr(logging, "set_verbosity", lambda level: None)
  monkeypatch.setattr(sweep, "run", lambda *a, **kw: {"members": [failed]})
  with pytest.raises(SystemExit, match="error: no member ended well; a: no such module"):
    run.main(command)
  monkeypatch.setattr(sweep, "run", lambda *a, **kw: {"members": [failed, ran]})
  run.main(command)
