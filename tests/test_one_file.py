"""Adding one file is adding one file: a method, a family, a task and a config are found where they lie.

Each file below is put into a folder of its room; nothing else learns its name. None says more than it has to.
"""

import dataclasses
import importlib
import json
import sys

import jax
import pytest
import safetensors.numpy
import tokenizers

from configs import methods as comparison_config
from experiments import run
from lora_jax import families, methods, models, tasks, tokenizer
from lora_jax.model import transformer
from lora_jax.results import comparison
from lora_jax.runs import config as config_lib, config_file, config_keys, outcome
from tests.test_experiment import HF_CONFIG, compiled  # noqa: F401, a fixture

METHOD = '''"""LoRA whose B shrinks: its square is added to the loss."""

from lora_jax import tree
from lora_jax.methods import lora
from lora_jax.values import NonNegative, Size


def init(key, params, *, rank: Size = 2, decay: NonNegative = 0.1):
  """Adapts q alone.

  Args:
    decay: how much of the square of B is added.
  """
  del decay
  return lora.init(key, params, rank=rank, alpha=rank, targets="q")


def penalty(params, *, decay=0.1, **others):
  return decay * sum((x**2).sum() for k, x in tree.flatten(params).items() if k.endswith("/b"))
'''
FAMILY = '''"""Llama under another name."""

from lora_jax.families import llama

ARCHITECTURES = {"lm": "MirrorForCausalLM"}
PREFIX, IGNORED, KEYS = llama.PREFIX, llama.IGNORED, llama.KEYS

TABLE = llama.DECODER.but("mirror", ARCHITECTURES)
config, hf_config = TABLE.config, TABLE.hf_config
'''
TASK = '''"""Which letter comes next?"""

from lora_jax import tasks

LABELS = (" a", " b")
PROMPT_LOSS_WEIGHT = None


def load(split, *, length: int = 4):
  """Texts of two letters.

  Args:
    length: of a text.
  """
  start = ("train", "validation", "test").index(split)
  return [{"text": ("abababab" * length)[i % 2 : i % 2 + length], "next": (i + length) % 2} for i in range(start, 24)]


def format(example):
  return tasks.Formatted(example["text"], LABELS[example["next"]])


def score(example, text):
  return tasks.exact_match(LABELS[example["next"]], text)
'''
# Room: (name, source). A family is named by its model_type.
FILES = {methods: ("shrinking", METHOD), families: ("mirror", FAMILY), tasks: ("alternating", TASK)}
CONFIG = '''"""The method, the family and the task of this file's neighbours."""

from configs import common


def get_config():
  config = common.get_config()
  config.model = {{"name": {model!r}, "dtype": "float32"}}
  config.method = {{"name": "shrinking"}}
  config.task = {{"name": "alternating", "length": 6}}
  config.data = {{"batch_size": 4, "seq_len": 32}}
  config.train = {{"steps": 3, "log_every": 1}}
  config.mesh = {{"data": 1}}
  config.eval = {{"examples": 4, "batch_size": 4, "seq_len": 32}}
  return config
'''


def forget():
  """What is kept of the files that there are."""
  importlib.invalidate_caches()
  for function in (methods.names, methods.fields, tasks.names, tasks.fields):
    function.cache_clear()


@pytest.fixture(scope="module")
def added(tmp_path_factory):
  """The path of a config whose method, family and task are in folders that have been added to their rooms."""
  directory = tmp_path_factory.mktemp("added")
  with pytest.MonkeyPatch.context() as patch:
    for room, (name, source) in FILES.items():
      folder = directory / room.__name__
      folder.mkdir()
      (folder / f"{name}.py").write_text(source)
      patch.setattr(room, "__path__", [*room.__path__, str(folder)])
    forget()
    write_model(directory / "model")
    (directory / "new.py").write_text(CONFIG.format(model=str(directory / "model")))
    yield str(directory / "new.py")
  for room, (name, _) in FILES.items():
    sys.modules.pop(f"{room.__name__}.{name}", None)
    room.__dict__.pop(name, None)
  forget()


def write_model(directory):
  """A random model of the family, with a tokenizer of bytes."""
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
  backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = tokenizers.decoders.ByteLevel()
  backend.add_special_tokens(["<s>", "</s>"])
  tok = tokenizer.Tokenizer(backend, bos_id=256, eos_id=257, pad_id=257)
  hf_config = HF_CONFIG | {"model_type": "mirror"}
  config = dataclasses.replace(families.get("mirror").config(hf_config), dtype="float32")
  params = transformer.init(config, jax.random.key(0))
  models.save(models.Model("tiny", config, params, tok, hf_config), directory)


def test_the_command_line_lists_them(added, capsys):
  run.main(["--help"])
  text = capsys.readouterr().out
  for line in (
    "method, name=shrinking",
    "decay=0.1 (a number, at least 0): how much of the square of B is added.",
    "task, name=alternating",
    "length=4 (a whole number): of a text.",
  ):
    assert line in text
  assert "### method.name = shrinking" in config_keys.markdown() and "mirror" in families.names()


def test_their_keys_are_resolved(added):
  given = config_file.change(config_file.load(added), {"method.decay": "0.5"})
  found = config_lib.resolve(given)
  assert found.method == ({"name": "shrinking", "rank": 2, "decay": 0.5},)
  assert found.task == {"name": "alternating", "length": 6}
  assert config_lib.resolve(found.to_dict()) == found


def test_a_run_with_them_trains_and_leaves_its_artifacts(added, tmp_path):
  run.main(["--config", added, "--workdir", str(tmp_path / "run")])
  summary = json.loads((tmp_path / "run" / "summary.json").read_text())
  assert (summary["method"], summary["task"]) == ("shrinking", "alternating")
  assert summary["eval"]["before"].keys() == summary["eval"]["after"].keys() == {"accuracy"}
  assert "# shrinking on" in (tmp_path / "run" / "report.md").read_text()
  saved = safetensors.numpy.load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
  trained = [x for k, x in saved.items() if k.endswith("/b")]
  assert trained and all(x.any() for x in trained), "B starts at zero"


@pytest.fixture(scope="module")
def compared(added, tmp_path_factory):
  """(directory, summary) of a sweep of the new method beside LoRA."""
  directory = tmp_path_factory.mktemp("compared") / "sweep"
  members = {"new": {"method": {"name": "shrinking"}}, "old": {"method": {"name": "lora", "targets": "q"}}}
  run.main(["--config", added, "--workdir", str(directory), f"--config.sweep={ {'list': members} }"])
  return directory, json.loads((directory / "summary.json").read_text())


def test_a_comparison_has_them(compared):
  """In its table and its plots, where a method that does not say what it is has a colour that is left."""
  directory, summary = compared
  text = (directory / "report.md").read_text()
  assert text.startswith("# alternating: 2 methods") and "\n| new |" in text
  found = comparison.rows(summary["members"])
  assert [r["kind"] for r in found] == ["other", "low rank"]
  assert comparison.colours(found)["other"] not in comparison.COLOURS.values()
  for name in ("tradeoff", "costs"):
    assert (directory / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_table_has_them(compared, tmp_path):
  _, summary = compared
  outcome.write_report(tmp_path, summary | {"table": {"metric": "accuracy", "rows": "method.name"}})
  assert "\n| shrinking |" in (tmp_path / "report.md").read_text()


def test_the_comparison_of_all_methods_has_them(added):
  """With LoRA's learning rate, as the file publishes none."""
  member = comparison_config.get_config().sweep.list["shrinking"].to_dict()
  assert member == {"method": {"name": "shrinking"}, "optim": {"learning_rate": 2e-4}}
