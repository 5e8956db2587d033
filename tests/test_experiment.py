"""Whole runs: what they leave, that an interrupted one ends as if it had not been, and how bad input is refused."""

import copy
import dataclasses
import json
import math
import os
import pathlib
import random
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import safetensors.numpy
import tokenizers

from configs import common
from experiments import run as script
from lora_jax import errors, families, models, tasks, tokenizer, tree
from lora_jax.formats import checkpoint, hf, peft
from lora_jax.inference.members import Evaluation
from lora_jax.model import transformer
from lora_jax.results import report
from lora_jax.runs import build, config as config_lib, experiment
from lora_jax.training import metrics, train

ROOT = pathlib.Path(__file__).parents[1]
STEPS = 6
MUCH = dict(data__pack=True, train__accumulate=2, mesh__data=2, optim__schedule="cosine", optim__weight_decay=0.1)
HF_CONFIG = dict(
  model_type="llama",
  vocab_size=264,
  hidden_size=32,
  intermediate_size=48,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  max_position_embeddings=128,
  tie_word_embeddings=True,
)
CHAT = (
  "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>{% endfor %}"
  "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory):
  """Runs of the same config compile once."""
  names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
  before = [getattr(jax.config, k) for k in names]
  for k, v in zip(names, (str(tmp_path_factory.mktemp("compiled")), 0.0), strict=True):
    jax.config.update(k, v)
  yield
  for k, v in zip(names, before, strict=True):
    jax.config.update(k, v)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  """A directory with a random `model` and the splits of a jsonl task."""
  directory = tmp_path_factory.mktemp("files")
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
  backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = tokenizers.decoders.ByteLevel()
  backend.add_special_tokens(["<s>", "</s>"])
  tok = tokenizer.Tokenizer(backend, CHAT, bos_id=256, eos_id=257, pad_id=257)
  config = dataclasses.replace(families.get("llama").config(HF_CONFIG), dtype="float32")
  params = transformer.init(config, jax.random.key(0))
  models.save(models.Model("tiny", config, params, tok, HF_CONFIG), directory / "model")
  rng = random.Random(0)
  for split, n in (("train", 40), ("validation", 6), ("test", 6)):
    words = ["".join(rng.choices("abcdef", k=rng.randint(3, 6))) for _ in range(n)]
    rows = [{"prompt": f"Write {w} backwards:", "response": f" {w[::-1]}"} for w in words]
    (directory / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
  return directory


@pytest.fixture(scope="module")
def config(files):
  """A run of six steps with checkpoints at 2, 4 and 6."""
  c = common.get_config().to_dict()
  c["model"] |= {"name": str(files / "model"), "dtype": "float32"}
  c["method"] |= {"rank": 4, "targets": "q,v", "dropout": 0.1}
  c["task"] = {"name": "jsonl"} | {
    k: str(files / f"{s}.jsonl")
    for k, s in (("path", "train"), ("validation_path", "validation"), ("test_path", "test"))
  }
  c["data"] = {"batch_size": 8, "seq_len": 64, "pack": False}
  c["optim"] |= {"learning_rate": 1e-2}
  c["train"] |= {"steps": STEPS, "checkpoint_every": 2, "log_every": 1}
  c["mesh"] = {"data": 1, "fsdp": 1, "tensor": 1}
  c["eval"] = {"examples": 4, "every": 0, "batch_size": 4, "seq_len": 64, "max_new_tokens": 4}
  return c


@pytest.fixture(scope="module")
def done(config, tmp_path_factory):
  """(directory, summary) of an uninterrupted run of `config`."""
  workdir = tmp_path_factory.mktemp("runs") / "done"
  return workdir, experiment.run(config, workdir, "python -m experiments.run --config tiny.py")


@pytest.fixture(scope="module")
def done_much(config, tmp_path_factory):
  """(directory, summary) of an uninterrupted run of `config` with `MUCH`."""
  workdir = tmp_path_factory.mktemp("runs") / "much"
  return workdir, experiment.run(changed(config, **MUCH), workdir)


def changed(config, **values):
  """A copy of the config with `section__key=value`; the value `...` removes the key."""
  config = copy.deepcopy(config)
  for name, value in values.items():
    *sections, key = name.split("__")
    section = config
    for s in sections:
      section = section[s]
    section[key] = value
    if value is ...:
      del section[key]
  return config


def rows(workdir):
  return metrics.read_metrics(workdir / "metrics.jsonl")


def timeless(workdir):
  """What metrics.jsonl says of anything but time."""
  return [{k: v for k, v in row.items() if "second" not in k} for row in rows(workdir)]


def adapter(workdir):
  return safetensors.numpy.load_file(workdir / "adapter" / "adapter_model.safetensors")


def assert_same_run(ours, theirs):
  """Bit-identical adapters, and the same log but for time."""
  a, b = adapter(ours), adapter(theirs)
  assert a.keys() == b.keys()
  for k in a:
    assert a[k].tobytes() == b[k].tobytes(), k
  assert timeless(ours) == timeless(theirs)


def leftovers(workdir):
  """Files under names that are not final."""
  return [str(p) for p in workdir.rglob("*") if p.suffix == ".tmp" or "orbax-checkpoint-tmp" in p.name]


def interrupt(monkeypatch, owner, name, when):
  """Makes `owner.name` raise KeyboardInterrupt on its call number `when`; the function undoes it."""
  original, calls = getattr(owner, name), []

  def wrapper(*args, **kw):
    calls.append(1)
    if len(calls) == when:
      raise KeyboardInterrupt
    return original(*args, **kw)

  monkeypatch.setattr(owner, name, wrapper)
  return lambda: monkeypatch.setattr(owner, name, original)


def test_artifacts(config, done):
  workdir, summary = done
  names = {p.name for p in workdir.iterdir()}
  assert names == {
    *("config.json", "metrics.jsonl", "texts.json", "summary.json", "report.md"),
    *("checkpoints", "adapter", "plots", "tensorboard"),
  }
  assert config_lib.resolve(json.loads((workdir / "config.json").read_text())) == config_lib.resolve(config)
  assert json.loads((workdir / "summary.json").read_text()) == summary
  assert {p.name for p in (workdir / "adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
  assert {p.name for p in (workdir / "checkpoints").iterdir()} == {"4", "6"}
  assert list((workdir / "plots").glob("*.png")) and list((workdir / "tensorboard").iterdir())
  assert "python -m experiments.run --config tiny.py" in (workdir / "report.md").read_text()
  assert not leftovers(workdir)


def test_summary(config, done):
  workdir, summary = done
  assert (summary["model"], summary["method"], summary["task"]) == (config["model"]["name"], "lora", "jsonl")
  # q: 32 -> 32 and v: 32 -> 16, rank 4, two layers; the base is counted from the files.
  assert summary["trainable_params"] == 2 * 4 * (32 + 32 + 32 + 16)
  base = safetensors.numpy.load_file(pathlib.Path(config["model"]["name"]) / "model.safetensors")
  assert summary["total_params"] == summary["trainable_params"] + sum(x.size for x in base.values())
  assert set(summary["eval"]) == {"before", "after"}
  assert all(0 <= v <= 1 for when in summary["eval"].values() for v in when.values())
  losses = [r["train/loss"] for r in rows(workdir) if "train/loss" in r]
  assert summary["train"]["steps"] == STEPS
  assert (summary["train"]["loss_first"], summary["train"]["loss_last"]) == (losses[0], losses[-1])
  assert summary["train"]["loss_last"] < summary["train"]["loss_first"]
  assert summary["train"]["tokens_per_second"] > 0 and summary["train"]["compile_seconds"] > 0
  assert summary["wall_seconds"] > summary["train"]["compile_seconds"]
  assert summary["peak_memory_bytes"] > 2**20
  assert summary["versions"]["jax"] == jax.__version__


def test_the_report_shows_texts(done):
  """Those of the evaluations, of the first test examples."""
  workdir, summary = done
  texts = metrics.read_texts(workdir / "texts.json")
  task = tasks.get(**hf.read_json(workdir / "config.json")["task"])
  asked = [(f.prompt, f.response) for f in map(task.format, task.load("test"))]
  for when in ("before", "after"):
    assert len(texts[when]) == 4 and {(r["prompt"], r["expected"]) for r in texts[when]} <= set(asked)
    right = [r["text"].strip() == r["expected"].strip() for r in texts[when]]
    assert sum(right) / 4 == summary["eval"][when]["exact_match"]
  text = (workdir / "report.md").read_text()
  for row in texts["before"]:
    assert f"prompt:   {row['prompt']}\nexpected: {row['expected']}\nbefore:   " in text


def test_training_examples_that_are_cut_are_counted(config, tmp_path, capfd):
  config = changed(config, data__seq_len=24, train__steps=1)
  summary = experiment.run(config, tmp_path)
  examples = tasks.get(**config["task"]).load("train")
  cut = sum(len(e["prompt"] + e["response"]) > 24 for e in examples)  # a token ends it, and one has no target
  assert 0 < cut < len(examples) and (summary["cut"], summary["train_examples"]) == (cut, len(examples))
  assert f"cut to config.data.seq_len=24: {cut} of {len(examples)} training examples\n" in capfd.readouterr().err
  assert f"| training examples cut | {cut} of {len(examples)} |" in (tmp_path / "report.md").read_text()


def test_metrics_rows(done):
  workdir, summary = done
  log = rows(workdir)
  assert [r["step"] for r in log] == [0, *range(1, STEPS + 1), STEPS]
  assert log[0]["before/exact_match"] == summary["eval"]["before"]["exact_match"]
  assert log[-1]["after/exact_match"] == summary["eval"]["after"]["exact_match"]
  for row in log[1:-1]:
    assert {f"train/{k}" for k in ("loss", "grad_norm", "learning_rate", "tokens", "tokens_per_second")} <= row.keys()
    assert all(math.isfinite(v) for v in row.values())
    assert 0 < row["train/tokens"] <= 8 * 64
  assert log[0].keys().isdisjoint({"train/loss"})


@pytest.mark.slow
def test_adapter_is_the_final_state(config, done):
  workdir, _ = done
  exp = experiment.build(config)
  with checkpoint.Checkpoints(workdir / "checkpoints") as saved:
    assert saved.latest_step() == STEPS
    state, _ = saved.restore(STEPS, exp.state)
  assert int(state.step) == STEPS
  model = models.load(**config["model"])
  loaded = peft.load(model, workdir / "adapter")
  tokens = np.random.default_rng(0).integers(0, 256, (2, 30))
  final = models.apply(exp.model.config, tree.join(state.trainable, exp.frozen), tokens)
  np.testing.assert_allclose(models.apply(model.config, loaded, tokens), final, rtol=1e-6, atol=1e-6)
  assert np.abs(final - models.apply(model.config, model.params, tokens)).max() > 1e-3


def test_a_finished_run_is_not_run_again(config, done, monkeypatch, capfd):
  workdir, summary = done
  before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()}
  monkeypatch.setattr(experiment, "build", None)
  assert experiment.run(config, workdir) == summary
  assert {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()} == before
  assert "is complete" in capfd.readouterr().err


@pytest.mark.parametrize(
  "owner, name, when, left, much",
  [
    (train.Stepper, "__call__", 5, [2, 4], False),
    (train.Stepper, "__call__", 2, [], False),
    (checkpoint.Checkpoints, "save", 2, [2], True),
    (peft, "save", 1, [4, 6], False),
    (report, "write_report", 1, [4, 6], True),
  ],
  ids=["step", "no_checkpoint", "saving", "exporting", "reporting"],
)
def test_an_interrupted_run_ends_bit_identical(
  config, done, much, done_much, tmp_path, monkeypatch, owner, name, when, left
):
  config, (whole, expected) = (changed(config, **MUCH), done_much) if much else (config, done)
  undo = interrupt(monkeypatch, owner, name, when)
  with pytest.raises(KeyboardInterrupt):
    experiment.run(config, tmp_path / "cut")
  assert not (tmp_path / "cut" / "summary.json").exists()
  assert sorted(int(p.name) for p in (tmp_path / "cut" / "checkpoints").iterdir()) == left
  undo()
  seen, step = [], train.Stepper.__call__
  monkeypatch.setattr(train.Stepper, "__call__", lambda self, *a: seen.append(1) or step(self, *a))
  summary = experiment.run(config, tmp_path / "cut")
  assert len(seen) == STEPS - max(left, default=0)
  assert_same_run(tmp_path / "cut", whole)
  assert (tmp_path / "cut" / "texts.json").read_bytes() == (whole / "texts.json").read_bytes()
  assert json.loads((tmp_path / "cut" / "summary.json").read_text()) == summary
  assert summary["eval"] == expected["eval"]
  for k in ("steps", "loss_first", "loss_last"):
    assert summary["train"][k] == expected["train"][k]
  assert not leftovers(tmp_path / "cut")


@pytest.mark.slow
def test_resume_between_two_logged_steps(config, tmp_path, monkeypatch):
  config = changed(config, train__log_every=3, train__steps=6)
  experiment.run(config, tmp_path / "whole")
  undo = interrupt(monkeypatch, train.Stepper, "__call__", 6)
  with pytest.raises(KeyboardInterrupt):
    experiment.run(config, tmp_path / "cut")
  undo()
  experiment.run(config, tmp_path / "cut")
  assert_same_run(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.slow
def test_seconds_are_those_of_training(config, tmp_path, monkeypatch):
  config = changed(config, train__log_every=STEPS, train__checkpoint_every=99, eval__every=5)
  step, score, scored = train.Stepper.__call__, Evaluation.run, []

  def slow_validation(*args, **kw):
    scored.append(1)
    time.sleep(3 if len(scored) == 2 else 0)
    return score(*args, **kw)

  monkeypatch.setattr(train.Stepper, "__call__", lambda *a: time.sleep(0.2) or step(*a))
  monkeypatch.setattr(Evaluation, "run", slow_validation)
  experiment.run(config, tmp_path / "run")
  (row,) = [r for r in rows(tmp_path / "run") if "train/loss" in r and r["step"] == STEPS]
  assert 4 * 0.2 <= row["train/seconds"] < 3  # at least steps 3 to 6: the row before is written while 2 runs
  assert row["train/tokens_per_second"] == pytest.approx(row["train/tokens"] / row["train/seconds"])


@pytest.mark.slow
def test_validation_is_logged_and_survives_interruption(config, tmp_path, monkeypatch):
  config = changed(config, eval__every=2)
  experiment.run(config, tmp_path / "whole")
  log = rows(tmp_path / "whole")
  assert [r["step"] for r in log if any(k.startswith("validation/") for k in r)] == [2, 4]
  undo = interrupt(monkeypatch, Evaluation, "run", 3)  # before, step 2, step 4
  with pytest.raises(KeyboardInterrupt):
    experiment.run(config, tmp_path / "cut")
  undo()
  experiment.run(config, tmp_path / "cut")
  assert_same_run(tmp_path / "cut", tmp_path / "whole")


def explode_at(monkeypatch, step):
  """Makes the loss of `step` and of those after it infinite or nan."""
  call = train.Stepper.__call__

  def poisoned(self, state, frozen, aux, batch):
    weights = batch["weights"] * (np.inf if int(state.step) + 1 >= step else 1)
    return call(self, state, frozen, aux, batch | {"weights": weights})

  monkeypatch.setattr(train.Stepper, "__call__", poisoned)


@pytest.mark.parametrize("step, left", [(1, []), (4, [2]), (5, [2, 4])])
def test_a_loss_that_is_not_finite_ends_the_run(config, done, tmp_path, monkeypatch, step, left):
  with monkeypatch.context() as m:
    explode_at(m, step)
    kept = f"checkpoint of step {left[-1]} is kept" if left else "no checkpoint yet"
    with pytest.raises(errors.UserError, match=rf"^step {step}: loss (nan|inf).*{kept}.*learning_rate"):
      experiment.run(config, tmp_path / "run")
  assert sorted(int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir()) == left
  assert not (tmp_path / "run" / "summary.json").exists() and not (tmp_path / "run" / "adapter").exists()
  last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
  assert (last["step"], last["train/loss"]) == (step, None)
  if left == [2, 4]:
    experiment.run(config, tmp_path / "run")
    assert_same_run(tmp_path / "run", done[0])


@pytest.mark.slow
def test_full_writes_a_model(config, tmp_path):
  summary = experiment.run(changed(config, method={"name": "full"}), tmp_path / "run")
  assert summary["trainable_params"] == summary["total_params"]
  assert not (tmp_path / "run" / "adapter").exists()
  model = models.load(str(tmp_path / "run" / "model"), dtype="float32")
  exp = experiment.build(changed(config, method={"name": "full"}))
  with checkpoint.Checkpoints(tmp_path / "run" / "checkpoints") as saved:
    state, _ = saved.restore(STEPS, exp.state)
  jax.tree.map(np.testing.assert_array_equal, model.params, tree.join(state.trainable, exp.frozen))
  assert model.tokenizer.decode(model.tokenizer.encode("abc")) == "abc"
  assert model.tokenizer.chat_template == CHAT


BAD = {
  "section": (dict(modle={"name": "x"}), r"unknown section config\.modle;.*'model'"),
  "no section": (dict(task=...), r"no section task"),
  "no name": (dict(task__name=""), r"config\.task needs a name"),
  "model key": (dict(model__dtpye="float32"), r"config\.model\.dtpye;.*'dtype'"),
  "dtype": (dict(model__dtype="float31"), r"config\.model\.dtype='float31'.*did you mean 'float32'"),
  "method": (dict(method={"name": "lroa"}), r"unknown method 'lroa'.*'lora'"),
  "method key": (dict(method__ranks=3), r"config\.method\.ranks.*'rank'"),
  "method init": (dict(method__init="peff"), r"config\.method\.init='peff'.*did you mean 'peft'"),
  "target": (dict(method__targets="querry"), r"config\.method\.targets 'querry' matches nothing"),
  "target regex": (dict(method__targets="mlp/gait/.*"), r"config\.method\.targets 'mlp/gait/\.\*' matches nothing"),
  "no regex": (dict(method__targets="attn/(q"), r"'attn/\(q' is not a regular expression"),
  "task": (dict(task={"name": "jsonnl"}), r"unknown task 'jsonnl'.*'jsonl'"),
  "task key": (dict(task__paths="x"), r"config\.task\.paths.*'path'"),
  "task without path": (dict(task={"name": "jsonl"}), r"config\.task needs path"),
  "objective": (dict(objective__name="casual_lm"), r"unknown objective 'casual_lm'.*'causal_lm'"),
  "objective key": (dict(objective__chunks=2), r"config\.objective\.chunks.*'chunk'"),
  "data key": (dict(data__batchsize=8), r"config\.data\.batchsize.*'batch_size'"),
  "optimiser": (dict(optim__name="adamww"), r"config\.optim\.name='adamww'.*did you mean 'adamw'"),
  "optimiser key": (dict(optim__lr=1.0), r"config\.optim\.lr;.*learning_rate"),
  "schedule": (dict(optim__schedule="linaer"), r"config\.optim\.schedule='linaer'.*did you mean 'linear'"),
  "warmup": (dict(optim__warmup=99), r"config\.optim\.warmup=99.*6 steps"),
  "train key": (dict(train__step=1), r"config\.train\.step;.*'steps'"),
  "steps": (dict(train__steps=0), r"config\.train\.steps=0: expected a whole number, at least 1"),
  "eval key": (dict(eval__example=1), r"config\.eval\.example;.*'examples'"),
  "mesh key": (dict(mesh__tensors=1), r"config\.mesh\.tensors.*'tensor'"),
  "mesh": (dict(mesh__data=16), r"config\.mesh asks for at least 16 devices.*there are 8"),
  "batch and accumulate": (dict(train__accumulate=3), r"config\.data\.batch_size=8 is no multiple of 3"),
  "batch and mesh": (
    dict(mesh__data=4, train__accumulate=4),
    r"config\.data\.batch_size=8 is no multiple of 16",
  ),
  "batch of none": (dict(data__batch_size=0), r"batch_size=0"),
  "model": (dict(model__name="smollm2-135"), r"unknown model 'smollm2-135'.*did you mean 'smollm2-135m'"),
  "model directory": (dict(model__name=str(ROOT / "configs")), r"config\.json does not exist"),
  "data file": (dict(task__path="nowhere/train.jsonl"), r"nowhere/train\.jsonl does not exist"),
  "test file": (dict(task__test_path="nowhere/test.jsonl"), r"nowhere/test\.jsonl does not exist"),
  "validation file": (
    dict(task__validation_path="nowhere/val.jsonl"),
    r"nowhere/val\.jsonl does not exist",
  ),
  "eval batch": (dict(eval__batch_size=0), r"config\.eval.*batch_size"),
  "eval examples": (dict(eval__examples=0), r"config\.eval.*examples"),
  "eval every": (dict(eval__every=-1), r"config\.eval.*every"),
  "eval length": (dict(eval__seq_len=0), r"config\.eval.*seq_len"),
  "section of no keys": (dict(train=3), r"config\.train"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_config_is_refused_before_anything_is_written(config, tmp_path, name):
  values, message = BAD[name]
  with pytest.raises(errors.UserError, match=message):
    experiment.run(changed(config, **values), tmp_path / "run")
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  "line, message",
  [
    ("{", "not JSON"),
    ('{"prompt": "x"}', "no 'response'"),
    ('{"prompt": 1, "response": "x"}', "'prompt' must be a string"),
    ('["x"]', "found list"),
    ('{"messages": [{"role": "user", "content": "x"}]}', "must be the assistant's"),
  ],
)
def test_bad_line_is_named(config, files, tmp_path, line, message):
  path = tmp_path / "train.jsonl"
  path.write_text((files / "train.jsonl").read_text() + "\n" + line + "\n")
  with pytest.raises(errors.UserError, match=rf"{path}:42: .*{message}"):
    experiment.run(changed(config, task__path=str(path)), tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_model_without_tokenizer(config, files, tmp_path):
  (tmp_path / "model").mkdir()
  for name in ("config.json", "model.safetensors"):
    (tmp_path / "model" / name).write_bytes((files / "model" / name).read_bytes())
  with pytest.raises(errors.UserError, match=r"no tokenizer\.json"):
    experiment.run(changed(config, model__name=str(tmp_path / "model")), tmp_path / "run")


@pytest.mark.parametrize(
  "values, message",
  [
    (dict(method__rank=2), r"method\.rank was 4, now 2\)"),
    (dict(train__accumulate=2), r"train\.accumulate was 1, now 2\)"),
    (dict(optim__b1=0.8), r"optim\.b1 was 0\.9, now 0\.8\)"),
  ],
)
def test_directory_of_another_config(config, done, values, message):
  before = sorted(done[0].rglob("*"))
  with pytest.raises(errors.UserError, match=rf"belongs to another config \({message}.*--workdir"):
    experiment.run(changed(config, **values), done[0])
  assert sorted(done[0].rglob("*")) == before


def test_a_default_that_is_written_out_is_the_same_config(config, done):
  same = changed(config, train__accumulate=1, optim__b1=0.9, method__alpha=16, eval__beams=1)
  assert experiment.run(same, done[0]) == json.loads((done[0] / "summary.json").read_text())


def test_directory_of_something_else(config, tmp_path):
  (tmp_path / "thesis.txt").write_text("dear")
  with pytest.raises(errors.UserError, match=r"not empty and holds no run.*--workdir"):
    experiment.run(config, tmp_path)
  assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
  with pytest.raises(errors.UserError, match=r"thesis\.txt.*director"):
    experiment.run(config, tmp_path / "thesis.txt")
  (tmp_path / "config.json").write_text("[]")
  with pytest.raises(errors.UserError, match=r"config\.json should hold a JSON object"):
    experiment.run(config, tmp_path)


def test_damaged_checkpoint_is_named(config, done, tmp_path, monkeypatch):
  undo = interrupt(monkeypatch, train.Stepper, "__call__", 6)
  with pytest.raises(KeyboardInterrupt):
    experiment.run(config, tmp_path / "run")
  undo()
  files = [p for p in (tmp_path / "run" / "checkpoints" / "4" / "state").rglob("*") if p.is_file()]
  biggest = max(files, key=lambda p: p.stat().st_size)
  biggest.write_bytes(biggest.read_bytes()[:-1])
  with pytest.raises(errors.UserError, match=r"checkpoints/4 is damaged .*delete it to go on from step 2"):
    experiment.run(config, tmp_path / "run")


def command(config, directory, *more):
  """The command line of a run of `config` in `directory`/run."""
  file = directory / "tiny.py"
  text = "import json\nfrom ml_collections import ConfigDict\n\n\ndef get_config():\n"
  text += f"  return ConfigDict(json.loads({json.dumps(config)!r}))\n"
  file.write_text(text)
  return [sys.executable, "-m", "experiments.run", "--config", str(file), "--workdir", str(directory / "run"), *more]


def start(args):
  return subprocess.Popen(args, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ)


def refused(capsys, args):
  """What the command prints and how it ends, in the process of the tests."""
  with pytest.raises(SystemExit) as end:
    script.main(args[3:])  # after python -m experiments.run
  said = capsys.readouterr()
  return said.out, said.err, end.value.code


@pytest.mark.parametrize(
  "arg, message",
  [
    ("--config.optim.name=adan", "config.optim.name='adan'"),
    ("--config.data.batch_size=7", "config.data.batch_size=7"),
    ("--config.task.path=nowhere.jsonl", "nowhere.jsonl does not exist"),
    ("--config.sweep.product.train.seed=3", "config.sweep.product.train.seed is a sequence of values, not 3"),
  ],
)
def test_command_line_ends_in_one_message(config, tmp_path, capsys, arg, message):
  out, err, end = refused(capsys, command(changed(config, train__accumulate=2), tmp_path, arg))
  assert out == err == "" and "\n" not in end
  assert end.startswith("error: ") and message in end
  assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_process_that_fails_says_why(config, tmp_path):
  process = start(command(config, tmp_path, "--config.optim.name=adan"))
  out, err = process.communicate(timeout=120)
  assert process.returncode == 1 and out == ""
  lines = [line for line in err.splitlines() if line.strip()]
  assert len(lines) == 1 and lines[0].startswith("error: ") and "config.optim.name='adan'" in lines[0], err


@pytest.mark.slow
def test_the_command_line_makes_a_sweep_of_any_config(config, tmp_path):
  args = "--config.sweep.product.method.rank=(1, 2)", "--config.sweep.max_members", "1", "--config.train.steps=1"
  process = start(command(config, tmp_path, *args))
  _, err = process.communicate(timeout=240)
  assert process.returncode == 0, err
  summary = hf.read_json(tmp_path / "run" / "summary.json")
  assert [m["overrides"] for m in summary["members"]] == [{"method": {"rank": r}} for r in (1, 2)]
  assert summary["groups"] == [["rank_1"], ["rank_2"]] and summary["config"]["train"]["steps"] == 1
  assert "rank=(1, 2)' --config.sweep.max_members 1" in (tmp_path / "run" / "report.md").read_text()


@pytest.mark.parametrize(
  "args, message",
  [
    (["--config.optim.learning_rat=1"], "learning_rate"),
    (["--config.optm.name=sgd"], "optim"),
    (["--config.train.steps=many"], "config.train.steps='many': expected a whole number"),
    (["--wrkdir=x"], "--wrkdir=x; did you mean '--workdir'?"),
    (["extra"], "unrecognized arguments: extra"),
    (["--config", "nowhere.py"], "nowhere.py"),
  ],
)
def test_command_line_that_cannot_be_read(config, tmp_path, capsys, args, message):
  out, err, end = refused(capsys, command(config, tmp_path, *args))
  assert end and message in f"{out}{err}{end}"
  assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_killed_at_random_moments(config, tmp_path):
  steps = 30
  config = changed(config, train__steps=steps, train__accumulate=2, data__pack=True, eval__every=7)
  experiment.run(config, tmp_path / "whole")
  args, workdir = command(config, tmp_path), tmp_path / "run"
  seed, kills = time.time_ns(), 0
  rng = random.Random(seed)
  print("seed", seed)  # pytest shows it of a test that fails
  # After how many logged rows, more than there are, a process is killed; the first one while it starts.
  for grow in (0, 2, 5, 9):
    process = start(args)
    known = len(rows(workdir))
    while process.poll() is None and grow and len(rows(workdir)) < known + grow:
      time.sleep(0.01)
    time.sleep(rng.uniform(0, 0.3) if grow else rng.uniform(1, 4))
    kills += process.poll() is None
    process.kill()
    process.communicate()
    assert not (workdir / "summary.json").exists() or process.returncode == 0
  assert kills >= 3
  process = start(args)
  _, err = process.communicate(timeout=300)
  assert process.returncode == 0, err
  assert "going on from the checkpoint of step" in err
  assert_same_run(workdir, tmp_path / "whole")
  assert not leftovers(workdir)


@pytest.mark.parametrize(
  "mesh, message",
  [
    ({"data": 1, "tensor": 2}, "data \\* fsdp is 1, no multiple of the 2 processes"),
    ({"data": 2, "population": 2}, r"population=2: .* its --shard i/n"),
  ],
)
def test_processes_have_rows_of_their_own(config, monkeypatch, mesh, message):
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  with pytest.raises(errors.UserError, match=message):
    build.check(config | {"mesh": mesh})


def test_more_examples_than_there_are_are_refused(config, tmp_path):
  with pytest.raises(errors.UserError, match=r"config\.data\.train_examples=41: task 'jsonl' has \d+ to train on"):
    experiment.run(changed(config, data__train_examples=41), tmp_path / "run")
