import io
import json
import math
import os
import re
import struct
import subprocess
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import errors, progress
from lora_jax.results import report
from lora_jax.training import metrics


class Terminal(io.StringIO):
  def isatty(self):
    return True


def make_summary(**more):
  values = {
    "model": "tiny",
    "method": "lora",
    "task": "a|b",
    "trainable_params": 1_500,
    "total_params": 200_000,
    "before": {"accuracy": 0.5, "label_loss": 2.0, "examples": 400},
    "after": {"accuracy": 0.75, "label_loss": 0.5, "examples": 400},
    "steps": 200,
    "loss_first": 3.25,
    "loss_last": 1.125,
    "tokens_per_second": 12_345.6,
    "compile_seconds": 4.5,
    "step_seconds": 0.25,
    "wall_seconds": 67.25,
  }
  return report.summary(**(values | more))


def make_history(n=40):
  rows = [{"step": i, "train/loss": 3 * math.exp(-i / 10)} for i in range(1, n + 1)]
  return rows + [{"step": 20, "eval/loss": 1.0}, {"step": n, "train/loss": math.nan}]


def read_events(directory):
  """Events of all files of a directory; the records are length, CRC, protobuf, CRC."""
  from tensorboardX.proto.event_pb2 import Event

  events = []
  for path in sorted(directory.iterdir()):
    data, at = path.read_bytes(), 0
    while at < len(data):
      (n,) = struct.unpack_from("<Q", data, at)
      events.append(Event.FromString(data[at + 12 : at + 12 + n]))
      at += 16 + n
  return events


def test_metrics_are_read_back_as_written(tmp_path):
  with metrics.Metrics(tmp_path) as m:
    m.log(1, {"loss": 1 / 3, "lr": jnp.float32(0.5)})
    m.log(1, {"accuracy": np.float64(0.25)}, prefix="eval")
    want = [{"step": 1, "train/loss": 1 / 3, "train/lr": 0.5}, {"step": 1, "eval/accuracy": 0.25}]
    assert m.history() == want
  assert metrics.read_metrics(tmp_path / "metrics.jsonl") == want
  events = read_events(tmp_path / "tensorboard")
  assert [(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value] == [
    (1, "train/loss", pytest.approx(1 / 3)),
    (1, "train/lr", 0.5),
    (1, "eval/accuracy", 0.25),
  ]


def test_each_line_is_on_disk_when_log_returns(tmp_path):
  with metrics.Metrics(tmp_path) as m:
    for step in range(1, 10):
      m.log(step, {"loss": step})
      assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == step


def test_numbers_that_are_not_finite_are_valid_json(tmp_path):
  def refuse(constant):
    raise ValueError(constant)

  bad = {"a": math.nan, "b": math.inf, "c": jnp.float32(-math.inf), "d": 1.0}
  with metrics.Metrics(tmp_path) as m:
    m.log(1, bad)
    assert all(math.isnan(m.history()[0][f"train/{k}"]) for k in "abc")
  metrics.write_json(tmp_path / "x.json", bad | {"nested": [(np.nan, 2)]})
  row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
  assert row == {"step": 1, "train/a": None, "train/b": None, "train/c": None, "train/d": 1.0}
  obj = json.loads((tmp_path / "x.json").read_text(), parse_constant=refuse)
  assert obj == {"a": None, "b": None, "c": None, "d": 1.0, "nested": [[None, 2]]}


def test_resume_drops_later_rows_and_a_torn_line(tmp_path):
  with metrics.Metrics(tmp_path) as m:
    for step in range(1, 8):
      m.log(step, {"loss": step})
    m.log(2, {"loss": math.inf}, "eval")
  path = tmp_path / "metrics.jsonl"
  before = path.read_text()
  path.write_text(before + '{"step": 8, "train/lo')
  assert len(metrics.read_metrics(path)) == 8
  with metrics.Metrics(tmp_path, resume_step=5) as m:
    m.log(6, {"loss": 60.0})
    assert [r["step"] for r in m.history()] == [1, 2, 3, 4, 5, 2, 6]
  starts = [e.step for e in read_events(tmp_path / "tensorboard") if e.session_log.status == e.session_log.START]
  assert starts[-1] == 6, "TensorBoard drops earlier events from this step on"
  kept = [line for line in before.splitlines() if json.loads(line)["step"] <= 5]
  assert path.read_text().splitlines() == [*kept, '{"step": 6, "train/loss": 60.0}']


def test_a_run_that_starts_anew_starts_with_no_rows(tmp_path):
  for _ in range(2):
    with metrics.Metrics(tmp_path) as m:
      m.log(1, {"loss": 1.0})
      assert len(m.history()) == 1


@pytest.mark.parametrize("line", ["{", "5", '{"loss": 1}', "\x00"])
def test_a_bad_line_is_named(tmp_path, line):
  path = tmp_path / "metrics.jsonl"
  path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
  with pytest.raises(errors.UserError, match=re.escape(f"{path}:2")):
    metrics.Metrics(tmp_path, resume_step=1)


def test_plain_lines_off_a_terminal(monkeypatch):
  monkeypatch.setattr(sys, "stderr", io.StringIO())
  clock = iter(range(0, 1000, 2))
  monkeypatch.setattr(progress, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
  shown = progress.Progress(1200, "step")
  shown.update(1)
  shown.update(2, "loss 1.250  1,234 tokens/s")
  progress.say("saved")
  shown.close()
  assert sys.stderr.getvalue() == "step 2/1,200  loss 1.250  1,234 tokens/s  time left 39:56\nsaved\n"


def test_silent_work_prints_a_line_every_ten_seconds(monkeypatch):
  monkeypatch.setattr(sys, "stderr", io.StringIO())
  clock = iter(range(0, 1000, 2))
  monkeypatch.setattr(progress, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
  shown = progress.Progress(20, "evaluate")
  for i in range(20):
    shown.update(i + 1)
  assert len(sys.stderr.getvalue().splitlines()) == 3


def test_a_bar_on_a_terminal(monkeypatch):
  monkeypatch.setattr(sys, "stderr", Terminal())
  monkeypatch.setenv("COLUMNS", "100")
  shown = progress.Progress(20, "step", 4)
  shown.update(5, "loss 1.500  100 tokens/s")
  progress.say("saved")
  shown.update(20)
  shown.close()
  text = sys.stderr.getvalue()
  assert "step 4/20" in text and "saved\n" in text
  last = text.split("\r")[-1]
  assert all(x in last for x in ("step 20/20", "loss 1.500", "100 tokens/s", "time left"))


def test_another_process_of_the_run_writes_nothing(tmp_path, monkeypatch, capfd):
  monkeypatch.setattr(report.jax, "process_index", lambda: 1)
  with metrics.Metrics(tmp_path) as m:
    m.log(1, {"loss": 1.0})
  assert not list(tmp_path.iterdir()) and capfd.readouterr().err == ""


def test_write_json_is_all_or_nothing(tmp_path, monkeypatch):
  path = tmp_path / "x.json"
  metrics.write_json(path, {"a": np.int64(1), "p": tmp_path, "t": (1, 2)})
  assert json.loads(path.read_text()) == {"a": 1, "p": str(tmp_path), "t": [1, 2]}

  def fail(*_):
    raise OSError("disk full")

  with pytest.raises(TypeError):
    metrics.write_json(path, {"a": object()})
  for call in ("fsync", "replace"):
    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
      patch.setattr(os, call, fail)
      metrics.write_json(path, {"a": 2})
  assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
  assert json.loads(path.read_text())["a"] == 1


def test_summary_has_the_agreed_keys():
  got = make_summary(dtype="bfloat16")
  assert list(got) == [
    *("model", "method", "task", "trainable_params", "total_params", "eval", "train"),
    *("peak_memory_bytes", "wall_seconds", "versions", "dtype"),
  ]
  assert set(got["train"]) == {
    "steps",
    "loss_first",
    "loss_last",
    "tokens_per_second",
    "compile_seconds",
    "step_seconds",
  }
  assert got["eval"]["after"]["accuracy"] == 0.75
  assert {"python", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "lora_jax"} == set(got["versions"])
  assert got["versions"]["numpy"] == np.__version__ and got["versions"]["lora_jax"] == lora_jax.__version__
  assert got["versions"]["python"] == sys.version.split()[0]


@pytest.mark.slow
def test_peak_memory_is_in_bytes_and_remembers_the_peak():
  code = "from lora_jax.results import report; import numpy as np; np.ones(2**26); print(report.peak_memory_bytes())"
  env = os.environ | {"JAX_PLATFORMS": "cpu"}
  root = os.path.dirname(os.path.dirname(lora_jax.__file__))
  out = subprocess.run([sys.executable, "-c", code], cwd=root, env=env, capture_output=True, text=True, check=True)
  assert 2**29 < int(out.stdout) < 2**31


def test_report_contains_what_the_summary_holds(tmp_path):
  command = "python -m experiments.run --config configs/x.py"
  cut = dict(cut=12, train_examples=1000)
  report.write_report(tmp_path, make_summary(**cut), make_history(), {"model": {"name": "tiny"}}, command, "## Use it")
  text = (tmp_path / "report.md").read_text()
  for part in (
    "# lora on tiny: a|b",
    "| accuracy | 50.0% | 75.0% | +25.0 points |",
    "| label_loss | 2 | 0.5 | -1.5 |",
    "| examples | 400 | 400 | +0 |",
    "1,500 of 200,000 (0.75%)",
    "3.250 to 1.125",
    "12,346 tokens/s",
    "4.5 s",
    "67.2 s",
    "GiB",
    "| training examples cut | 12 of 1,000 |",
    "## Use it",
    "](plots/loss.png)",
    command,
    '"name": "tiny"',
    '"optax"',
  ):
    assert part in text, part
  assert (tmp_path / "plots" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_report_leaves_out_what_there_is_not(tmp_path):
  summary = make_summary(before={}, after={"exact|match": math.nan, "f1": 0.5, "rouge": 30.0})
  report.write_report(tmp_path, summary, [], {})
  text = (tmp_path / "report.md").read_text()
  assert "| exact\\|match | - | - | - |" in text and "| f1 | - | 50.0% | - |" in text
  assert "| rouge | - | 30 | - |" in text
  assert "plots/" not in text and "Use" not in text and "Reproduce" not in text and "cut" not in text
  assert not (tmp_path / "plots").exists()


def test_texts_before_and_after_in_the_report(tmp_path):
  """Lines of a text stay lines, what it has of Markdown does nothing, and what is left out of a long one is said."""
  rows = lambda *texts: [{"prompt": "first\n```\nline", "expected": " a", "text": t} for t in texts]
  with metrics.Metrics(tmp_path) as out:
    out.keep_texts("before", rows("x" * 999, "`````"))
    out.keep_texts("after", rows(" a", ""))
  report.write_report(tmp_path, make_summary(), [], {})
  text = (tmp_path / "report.md").read_text()
  half = 300 * "x"
  assert (
    f"""## Texts

````text
prompt:   first
          ```
          line
expected:  a
before:   {half} [... 399 characters left out ...] {half}
after:     a
````

``````text
"""
    in text
  )


@pytest.mark.parametrize("n", [1, 2, 3, 10, 101])
def test_smoothing_keeps_constants_and_order(n):
  np.testing.assert_allclose(report.smooth([2.5] * n), [2.5] * n)
  smoothed = report.smooth(list(range(n)))
  assert len(smoothed) == n and np.all(np.diff(smoothed) > 0)


def test_smoothing_removes_noise():
  noise = np.random.default_rng(0).normal(size=400)
  assert np.std(report.smooth(noise)) < 0.3
