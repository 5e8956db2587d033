"""Runs spread over processes, started as SLURM starts them: each is what one process with as many devices does."""

import json
import os
import re
import shutil
import socket
import subprocess

import pytest

from lora_jax.runs import experiment, sweep
from tests.test_experiment import ROOT, assert_same_run, changed, command, compiled, config, files  # noqa: F401

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:The default value of")]
LIST = {
  "lora": {"method": {"name": "lora", "rank": 2, "targets": "q,v"}},
  "other": {"method": {"name": "lora", "rank": 4, "targets": "o"}, "train": {"seed": 5}},
  "diverges": {"method": {"name": "lora", "targets": "q,v"}, "optim": {"learning_rate": 1e38, "clip_norm": 0.0}},
  "pissa": {"method": {"name": "pissa", "targets": "q"}},
  "full": {"method": {"name": "full"}, "optim": {"learning_rate": 1e-3}},
}


def spread(given, directory, n=2):
  """What n processes of one device each print while they run a config in `directory`/run."""
  directory.mkdir(exist_ok=True)
  with socket.socket() as s:
    s.bind(("localhost", 0))
    port = str(s.getsockname()[1])
  args, common = command(given, directory, "--distributed"), {"STEP_NODELIST": "localhost", "NTASKS": str(n)}
  flags = re.sub(r"device_count=\d+", "device_count=1", os.environ["XLA_FLAGS"])
  processes = []
  for i in range(n):
    slurm = common | {"JOB_ID": "1", "PROCID": str(i), "LOCALID": str(i)}
    env = os.environ | {f"SLURM_{k}": v for k, v in slurm.items()} | {"XLA_FLAGS": flags, "JAX_COORDINATOR_PORT": port}
    env |= {"JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo", "JAX_PLATFORMS": "cpu"}
    processes.append(
      subprocess.Popen(args, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env)
    )
  try:
    told = [p.communicate(timeout=300)[0] for p in processes]
  finally:
    for p in processes:
      p.kill()
  assert [p.returncode for p in processes] == [0] * n, "\n".join(told)
  return told


@pytest.mark.parametrize("mesh", ["data", "fsdp"])
def test_a_run(config, tmp_path, mesh):  # noqa: F811
  """Also one that goes on from its checkpoint; process 0 alone tells what happens."""
  given = changed(config, mesh={"data": 1, "fsdp": 1, "tensor": 1} | {mesh: 2}, eval__every=4)
  experiment.run(given, tmp_path / "one")
  first, second = spread(given, tmp_path / "two")
  assert_same_run(tmp_path / "two" / "run", tmp_path / "one")
  assert "step 6/6" in first and "step 6/6" not in second

  for part in ("summary.json", "report.md"):
    (tmp_path / "two" / "run" / part).unlink()
  shutil.rmtree(tmp_path / "two" / "run" / "checkpoints" / "6")
  assert "going on from the checkpoint of step 4" in spread(given, tmp_path / "two")[0]
  assert_same_run(tmp_path / "two" / "run", tmp_path / "one")


def test_a_sweep(config, tmp_path):  # noqa: F811
  """A population, members alone, one whose loss is not finite; each process has all results at the end."""
  given = changed(config, mesh={"data": 1, "fsdp": 2, "tensor": 1}, train__steps=3, sweep={"list": LIST})
  one = sweep.run(given, tmp_path / "one")
  told = spread(given, tmp_path / "two")
  two = json.loads((tmp_path / "two" / "run" / "summary.json").read_text())
  known = lambda m: [m.get(k) for k in ("eval", "error", "trainable_params")]
  losses = lambda m: [m.get("train", {}).get(k) for k in ("loss_first", "loss_last")]
  found = lambda summary: {m["name"]: known(m) + losses(m) for m in json.loads(json.dumps(summary))["members"]}
  assert found(two) == found(one)
  programs = lambda summary: {frozenset(names) for names in summary["groups"]}
  assert (
    programs(one) == programs(two) == {frozenset(g) for g in (("lora", "other", "diverges"), ("pissa",), ("full",))}
  )
  for out in told:
    assert "missing" not in out and "are not here" not in out and "diverges: step " in out
  for name in ("lora", "other", "pissa"):
    assert_same_run(*(d / "members" / name for d in (tmp_path / "two" / "run", tmp_path / "one")))
