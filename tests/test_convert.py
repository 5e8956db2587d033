"""scripts/convert.py: forms, adapters merged, runs, and what is refused."""

import contextlib
import io
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from lora_jax import methods, models, tree, weights
from lora_jax.formats import adapter, peft
from lora_jax.merging import lowrank
from lora_jax.methods import lora
from scripts import convert as script
from tests.test_classification import (
  config as classification,
  files,  # noqa: F401, a fixture
)

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).parents[1]


def convert(*arguments):
  """(exit code, what it printed)."""
  said, code = io.StringIO(), 0
  with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
    try:
      script.main([*map(str, arguments)])
    except SystemExit as e:
      code = e.code
      if isinstance(code, str):  # which Python would print
        print(code)
  return code or 0, said.getvalue()


def process(*arguments, shell=()):
  """`convert` in a process of its own; `shell` is a command line that runs what follows it."""
  command = [*shell, sys.executable, ROOT / "scripts" / "convert.py", *map(str, arguments)]
  env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
  done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
  return done.returncode, done.stdout + done.stderr


def same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_an_adapter_is_merged_and_forms_convert(files, tmp_path):  # noqa: F811
  model = models.load(str(files / "llama"), dtype="float32")
  params, mask = lora.init(jax.random.key(0), model.params, targets="all-linear")
  params = tree.map_named(lambda k, x, m: x + 0.1 if m and k.endswith("/b") else x, params, mask)
  peft.save(model, params, tmp_path / "adapter")
  base = ("--model", files / "llama", "--dtype", "float32")
  assert process(*base, "--adapter", tmp_path / "adapter", "--out", tmp_path / "a") == (0, f"wrote {tmp_path}/a\n")
  merged = models.load(str(tmp_path / "a"), dtype="float32").params
  same(merged, weights.merge(peft.load(model, tmp_path / "adapter")))
  assert np.abs(merged["layers"]["attn"]["q"]["kernel"] - model.params["layers"]["attn"]["q"]["kernel"]).max() > 1e-3
  assert convert("--model", tmp_path / "a", "--dtype", "float32", "--to", "orbax", "--out", tmp_path / "b")[0] == 0
  assert convert("--model", tmp_path / "b", "--dtype", "float32", "--out", tmp_path / "c")[0] == 0
  for name in ("model.safetensors", "config.json", "tokenizer.json"):
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "c" / name).read_bytes()


def test_any_adapter_becomes_lora(files, tmp_path):  # noqa: F811
  """With what it says of the errors; an adapter in our own form too, and what changes no weights is refused."""
  model = models.load(str(files / "llama"), dtype="float32")
  method = [{"name": "loha", "targets": "q", "alpha": 64.0}, {"name": "dora", "targets": "o"}]
  params, mask = methods.init(jax.random.key(0), model.params, method)
  params = tree.map_named(lambda k, x, m: x + 0.1 if m else x, params, mask)
  adapter.save(model, params, mask, method, tmp_path / "own")
  arguments = ("--model", files / "llama", "--adapter", tmp_path / "own", "--to", "adapter")
  code, said = convert(*arguments, "--out", tmp_path / "a")
  assert code and "--rank or --variance" in said
  code, said = convert(*arguments, "--variance", 1, "--out", tmp_path / "b")
  assert code == 0 and len(said.splitlines()) == 3 and said.startswith("layers/attn/o/kernel  rank ")
  got = peft.load(model, tmp_path / "b")
  expected, _ = lowrank.to_lora(params, variance=1.0)
  for k, x in tree.flatten(weights.merge(expected)).items():
    np.testing.assert_allclose(tree.flatten(weights.merge(got))[k], x, atol=2e-3 if "attn" in k else 0)
  code, said = convert(*arguments, "--rank", 2, "--variance", 0.5, "--out", tmp_path / "c")
  assert code and "either a rank or a variance" in said
  params, mask = methods.init(jax.random.key(0), model.params, {"name": "parallel"})
  adapter.save(model, params, mask, {"name": "parallel"}, tmp_path / "beside")
  code, said = convert(
    "--model", files / "llama", "--adapter", tmp_path / "beside", *arguments[4:], "--rank", 2, "--out", tmp_path / "d"
  )
  assert code and "no change of weights" in said and not (tmp_path / "d").exists()


def test_a_run_becomes_a_model_or_an_adapter(files, tmp_path):  # noqa: F811
  from lora_jax.runs import experiment

  settings = classification(files)
  settings["train"] |= {"steps": 3, "checkpoint_every": 2}
  experiment.run(settings, tmp_path / "run")
  assert convert("--run", tmp_path / "run", "--to", "adapter", "--out", tmp_path / "adapter")[0] == 0
  for name in ("adapter_config.json", "adapter_model.safetensors"):
    assert (tmp_path / "adapter" / name).read_bytes() == (tmp_path / "run" / "adapter" / name).read_bytes()
  assert convert("--run", tmp_path / "run", "--step", 2, "--out", tmp_path / "model")[0] == 0
  earlier = models.load(str(tmp_path / "model"), dtype="float32").params
  last = weights.merge(experiment.trained(tmp_path / "run").params)
  assert tree.names(earlier) == tree.names(last)
  assert not np.array_equal(earlier["classifier"]["kernel"], last["classifier"]["kernel"])


def test_an_adapter_says_which_classifier_it_is_of(files, tmp_path):  # noqa: F811
  model = models.load(str(files / "bert"), dtype="float32", head="classification", n_labels=3)
  params, _ = lora.init(jax.random.key(0), model.params)
  params = tree.map_named(lambda k, x: x + 1 if k.startswith("classifier/") else x, params)
  peft.save(model, params, tmp_path / "adapter", trained=model.head_leaves)
  assert peft.head(tmp_path / "adapter") == {"head": "classification", "n_labels": 3}
  arguments = ("--model", files / "bert", "--adapter", tmp_path / "adapter")
  assert convert(*arguments, "--out", tmp_path / "a") == (0, f"wrote {tmp_path}/a\n")
  merged = models.load(str(tmp_path / "a"), dtype=None)
  assert (merged.config.head, merged.config.n_labels, merged.config.dtype) == ("classification", 3, "float32")
  same(merged.params, weights.merge(params))
  code, said = convert(*arguments, "--n_labels", 4, "--out", tmp_path / "b")
  assert code and "is (3,), expected (4,)" in said and not (tmp_path / "b").exists()


def test_the_dtype_is_kept_and_random_weights_are_named(files, tmp_path):  # noqa: F811
  half = models.load(str(files / "bert"), dtype="float16")
  models.save(half, tmp_path / "half")
  arguments = ("--model", tmp_path / "half", "--head", "classification", "--n_labels", 5)
  code, said = convert(*arguments, "--out", tmp_path / "a")
  assert code == 0 and "classifier/kernel" in said and "random" in said
  got = models.load(str(tmp_path / "a"), dtype=None)
  assert (got.config.dtype, got.config.n_labels) == ("float16", 5)
  same(got.params["layers"], half.params["layers"])


def test_a_failed_conversion_leaves_nothing(files, tmp_path):  # noqa: F811
  limit = ("sh", "-c", 'ulimit -f 16 && exec "$0" "$@"')
  (tmp_path / "there").mkdir()
  code, said = process("--model", files / "llama", "--out", tmp_path / "there", shell=limit)
  assert code and "error: " in said and "File too large" in said and "Traceback" not in said
  assert not any((tmp_path / "there").iterdir())
  assert convert("--model", files / "llama", "--out", tmp_path / "there")[0] == 0
  assert sorted(p.name for p in (tmp_path / "there").iterdir()) == sorted(p.name for p in (files / "llama").iterdir())


@pytest.mark.parametrize(
  "arguments, message",
  [
    (("--model", "x", "--run", "y", "--out", "z"), "give --model or --run"),
    (("--model", "absent", "--out", "{tmp}/z"), "error: unknown model 'absent'"),
    (("--model", "absent", "--out", "{tmp}"), "is not empty"),
    (("--run", "{tmp}/absent", "--out", "{tmp}/z"), "error: {tmp}/absent/config.json does not exist"),
    (("--model", "x", "--step", "3", "--out", "{tmp}/z"), "error: --step would do nothing without --run"),
    (
      ("--run", "x", "--head=lm", "--dtype=float32", "--adapter=y", "--out", "{tmp}/z"),
      "error: --head, --dtype, --adapter would do nothing with --run",
    ),
    (("--model", "x", "--adapter", "y", "--to=adapter", "--dtype=float32", "--out", "{tmp}/z"), "with --to=adapter"),
    (("--model", "x", "--rank", "3", "--out", "{tmp}/z"), "error: --rank would do nothing without --to=adapter"),
    (("--model", "x", "--out", "{tmp}/something"), "error: --out={tmp}/something: {tmp}/something is a file"),
    (
      ("--model", "x", "--out", "{tmp}/something/z"),
      "error: --out={tmp}/something/z: it is below {tmp}/something, which is a file",
    ),
  ],
)
def test_mistakes_end_in_one_message(tmp_path, arguments, message):
  (tmp_path / "something").write_text("")
  code, said = convert(*(a.format(tmp=tmp_path) for a in arguments))
  assert code and message.format(tmp=tmp_path) in said and "Traceback" not in said
  assert not (tmp_path / "z").exists()
