"""Directories that a run cannot be written to: one message each, and nothing is made."""

import os
import pathlib

import pytest

from lora_jax import errors
from lora_jax.runs import workdir


@pytest.fixture
def place(tmp_path):
  (tmp_path / "file").write_text("x")
  (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
  for name in ("file", "loop"):
    (tmp_path / f"run_{name}").mkdir()
  (tmp_path / "loop").symlink_to(tmp_path / "loop")
  (tmp_path / "run_file" / "checkpoints").write_text("x")
  (tmp_path / "run_loop" / "metrics.jsonl").mkdir()
  return tmp_path


@pytest.mark.parametrize(
  "name, message",
  [
    ("file", "file is a file"),
    ("file/run", "it is below .*/file, which is a file"),
    ("dangling", "dangling is a link to .*nowhere, which is not there"),
    ("dangling/run", "dangling is a link to .*nowhere, which is not there"),
    ("loop", "loop is a link to"),
    ("lr[1e-3]", r"its path has '\['"),
    ("a**b", r"its path has '\*'"),
    ("x" * 300, "a name in it has 300 bytes, and 255 is the most"),
    ("/".join(["x" * 200] * 30), "its path is too long"),
    ("null\0byte", "a null byte"),
    ("run_file", "checkpoints in it is no directory"),
    ("run_loop", "metrics.jsonl in it is no file"),
  ],
)
def test_what_cannot_be_written_is_one_message(place, name, message):
  before = sorted(place.rglob("*"))
  with pytest.raises(errors.UserError, match=f"--workdir=.*{message}.*; give another directory") as e:
    workdir.check(place / name)
  assert "\n" not in str(e.value) and sorted(place.rglob("*")) == before


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_directory_without_permission(tmp_path):
  tmp_path.chmod(0o500)
  with pytest.raises(errors.UserError, match="cannot be written to"):
    workdir.check(tmp_path / "run")


def test_what_can_be_written(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  monkeypatch.chdir(tmp_path)
  assert workdir.check("~/runs/a") == tmp_path / "runs" / "a"
  assert workdir.check("runs/lr=1e-3, ünï {x}") == pathlib.Path("runs/lr=1e-3, ünï {x}")
  with pytest.raises(errors.UserError, match="home directory"):
    workdir.check("~nobody-of-that-name/runs")
  assert not list(tmp_path.iterdir())
