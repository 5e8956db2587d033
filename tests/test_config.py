"""The door: every key has a type and a range, and whatever a user writes is a config or one message."""

import json
import math
import pathlib
import re
from typing import Literal

import pytest

from lora_jax import errors, methods, values
from lora_jax.model import architecture
from lora_jax.runs import config as config_lib, config_file, config_keys, variants
from lora_jax.training import objectives
from lora_jax.values import Count, Name, Positive, Probability, Seed, Size

ROOT = pathlib.Path(__file__).parents[1]
BASE = {
  "model": {"name": "smollm2-135m"},
  "method": {"name": "lora", "rank": 4, "alpha": 8},
  "task": {"name": "rotten_tomatoes"},
  "objective": {"name": "causal_lm"},
  "data": {"batch_size": 8, "seq_len": 64},
  "train": {"steps": 6},
}
WRONG = [None, "", "False", "8", "x", True, 2.5, -1, -1.5, 0, 2**64, 10**400, math.nan, math.inf, [], {}, [1], {"a": 1}]
WRONG += [b"x", object(), {1: 2}, [None], ({"name": 1},), "\ud800"]


NEEDED = {"glue": {"subset": "sst2"}, "jsonl": {"path": "x"}}


@pytest.mark.parametrize("section, name", [(s, n) for s, n, *_ in config_keys.sections()])
def test_a_wrong_value_of_any_key_is_one_message_that_names_it(section, name):
  keys = config_lib.FIELDS.get(section) or config_lib.named_fields(section, name)
  rest = {"name": name} | NEEDED.get(name, {}) if name else BASE.get(section, {})
  for k in keys:
    for value in WRONG:
      try:
        found = config_lib.section(section, rest | {k: value})
      except errors.UserError as e:
        assert f"config.{section}.{k}=" in str(e) and "\n" not in str(e)
        continue
      found = found[0] if section == "method" else found
      kept = found[k] if name else getattr(found, k)
      as_given = tuple(value) if isinstance(value, list) else value
      assert kept == as_given and type(kept) in (type(as_given), float), f"{k}={value!r} became {kept!r}"


@pytest.mark.parametrize("section", [*config_lib.SECTIONS, "sweep"])
@pytest.mark.parametrize("value", [None, 3, "x", [], [1], True, {1: 2}])
def test_a_section_of_another_kind_is_one_message(section, value):
  with pytest.raises(errors.UserError, match="^[^\n]*config"):
    config_lib.resolve(BASE | {section: value}) if section != "sweep" else variants.members(BASE | {"sweep": value})


@pytest.mark.parametrize(
  "hint, good, bad",
  [
    (Count, [1, 10**12], [0, -1, 1.0, "1", True, None]),
    (Size, [0, 3], [-1, 0.5, False]),
    (Seed, [0, 2**32 - 1], [2**32, -1]),
    (Positive, [1e-9, 3], [0, 0.0, -1.0, math.nan, math.inf, "1", True]),
    (Probability, [0, 0.5], [1, 1.5, -0.1]),
    (Name, ["x"], ["", 3, None]),
    (bool, [True, False], [0, 1, "True", None]),
    (bool | Literal["never"], [True, "never"], ["always", 1, None]),
  ],
)
def test_values_are_checked_strictly(hint, good, bad):
  for x in good:
    assert values.check(hint, x, "k") == x
  for x in bad:
    with pytest.raises(errors.UserError, match="k=.*: expected "):
      values.check(hint, x, "k")


def test_all_that_is_wrong_is_one_error():
  given = BASE | {"train": {"step": 3, "seed": -1}, "optim": {"name": "adam"}, "modle": {}}
  with pytest.raises(errors.UserError) as e:
    config_lib.resolve(given)
  for text in (
    "config.modle; did you mean 'model'",
    "config.train.step; did you mean 'steps'",
    "config.train needs steps",
  ):
    assert text in str(e.value)
  for text in ("config.train.seed=-1: expected a whole number", "config.optim.name='adam'", "did you mean 'adamw'"):
    assert text in str(e.value)


def test_what_is_resolved_resolves_to_itself():
  """Whatever JSON makes of it."""
  given = BASE | {"method": [{"name": "lora", "targets": ["q", "v"]}, {"name": "norms"}]}
  found = config_lib.resolve(given)
  assert config_lib.resolve(found) is found
  assert config_lib.resolve(json.loads(json.dumps(found.to_dict()))) == found
  assert found.method[0]["targets"] == ("q", "v") and found.method[0]["alpha"] == 16.0 and found.data.seed == 0


def test_prompts_count_what_suits_the_task_where_nothing_is_asked(monkeypatch):
  asked = lambda **kw: config_lib.resolve(BASE | {"objective": {"name": "causal_lm", **kw}})
  decoder = architecture.Config(47, 16, 2, 4, 2, 4, 24)
  for task, given, weight in ((None, {}, 0.1), (0.0, {}, 0.0), (0.0, {"prompt_loss_weight": 0.5}, 0.5)):
    task = type("Task", (), {"prompt_loss_weight": task})
    _, own = objectives.make(**asked(**given).objective).batches(decoder, task)
    assert own == {"prompt_loss_weight": weight}
  with pytest.raises(errors.UserError, match="unknown key config.objective.prompt_loss_weight"):
    config_lib.resolve(BASE | {"objective": {"name": "classification", "prompt_loss_weight": 0.1}})


def changed(**texts):
  return config_lib.resolve(config_file.change(BASE, {k.replace("__", "."): v for k, v in texts.items()}))


@pytest.mark.parametrize("name", methods.names())
def test_the_name_of_a_method_alone_chooses_it(name, capsys):
  """Its keys are its own defaults, and what the file said of the other one is said to be unused."""
  found = changed(method__name=name)
  assert found.method == methods.resolve(BASE["method"] if name == "lora" else {"name": name})
  said = capsys.readouterr().err
  assert ("what the config says of lora is not used: rank=4, alpha=8" in said) == (name != "lora")


def test_any_key_can_be_set_on_the_command_line():
  found = changed(data__eos="False", optim__b2="0.95", data__train_examples="9", eval__early_stopping="never")
  assert found.data.eos is False and found.data.train_examples == 9
  assert found.optim.b2 == 0.95 and found.eval.early_stopping == "never"
  found = changed(method__name="dora", method__rank="2", method__targets="('q', 'v')", train__init_from="123")
  assert found.method[0]["rank"] == 2 and found.method[0]["targets"] == ("q", "v") and found.train.init_from == "123"
  assert changed(method="[{'name': 'lora'}, {'name': 'norms'}]").method[1]["name"] == "norms"
  assert changed(data__pack="true", method__rank_pattern="{'q': 3}").method[0]["rank_pattern"] == {"q": 3}


@pytest.mark.parametrize(
  "change, message",
  [
    ({"data.packed": "True"}, "unknown key config.data.packed; did you mean 'pack'"),
    ({"datas.pack": "True"}, "unknown section config.datas; did you mean 'data'"),
    ({"method.name": "lroa"}, "unknown method 'lroa'; did you mean 'lora'"),
    ({"method.name": "ia3", "method.rank": "4"}, "unknown key config.method.rank"),
    ({"train.steps": "6.0"}, "config.train.steps=6.0: expected a whole number, at least 1"),
    ({"data.pack": "yes"}, "config.data.pack='yes': expected True or False"),
    ({"optim.learning_rate": "-1"}, "config.optim.learning_rate=-1: expected a number, at least 0"),
    ({"method": "[{'name': 'lora'}]", "method.rank": "3"}, r"config.method is a list; give it as a whole"),
    ({"train": "6"}, "config.train is a section with keys, not 6"),
    ({"task": {"name": ["jsonl"]}}, r"config.task.name is .*jsonl.*, expected a name"),
  ],
)
def test_what_cannot_be_set_is_one_message(change, message):
  with pytest.raises(errors.UserError, match=message):
    config_lib.resolve(config_file.change(BASE, change))


@pytest.mark.parametrize(
  "source, arg, message",
  [
    ("", "", r"c\.py has no function get_config"),
    ("def get_config():\n  return 3", "", r"get_config\(\) returned 3, not a config"),
    ("def get_config(:\n", "", r"c\.py:1: SyntaxError: "),
    ("import nowhere", "", r"c\.py:1: ModuleNotFoundError: No module named 'nowhere'"),
    ("\n\ndef get_config():\n  return {}['x']", "", r"c\.py:4: KeyError: x"),
    ("def get_config():\n  return 1 / 0", "", r"c\.py:2: ZeroDivisionError: division by zero"),
    ("def get_config():\n  return {}", ":smol", r"c\.py takes no argument, and is given 'smol'"),
    ("def get_config(size):\n  return {}", "", r"c\.py needs an argument: --config=.*c\.py:SIZE"),
    ("import sys\nsys.exit(3)", "", r"c\.py:2: SystemExit: 3"),
    ("def get_config():\n  raise SystemExit(3)", "", r"c\.py:2: SystemExit: 3"),
    ("\udcff", "", r"c\.py"),
    ("def get_config():\n  return get_config()", "", r"c\.py:2: RecursionError"),
  ],
)
def test_what_is_wrong_with_a_file_is_one_message_with_its_line(tmp_path, source, arg, message):
  (tmp_path / "c.py").write_bytes(source.encode("utf-8", "surrogateescape"))
  with pytest.raises(errors.UserError, match=message) as e:
    config_file.load(f"{tmp_path}/c.py{arg}")
  assert "\n" not in str(e.value)


def test_a_file_that_is_none_is_one_message(tmp_path):
  for name in (tmp_path / "none.py", tmp_path):
    with pytest.raises(errors.UserError, match="there is no file"):
      config_file.load(str(name))
  (tmp_path / "c.txt").write_text("x")
  with pytest.raises(errors.UserError, match="is no Python file"):
    config_file.load(str(tmp_path / "c.txt"))


def test_the_page_of_keys_is_that_of_the_code_and_says_what_each_means():
  assert (ROOT / "docs" / "config.md").read_text() == config_keys.markdown(), (
    "python -m lora_jax.runs.config_keys > docs/config.md"
  )
  for section, name, keys, meanings in config_keys.sections():
    assert not [k for k in keys if not meanings.get(k)], (section, name)
    assert all(f"{k}=" in config_keys.text() for k in keys)
  assert not re.search(r"\| anything \|", config_keys.markdown())
