"""What reports say on how to use a model or an adapter; that the code runs is tested where such runs are."""

import json
import re

import pytest

from lora_jax import models
from lora_jax.model import transformer
from lora_jax.results import usage
from tests.test_generate import byte_tokenizer

LM = transformer.Config(259, 8, 1, 2, 2, 4, 8, dtype="bfloat16")
CLASSIFIER = transformer.Config(259, 8, 1, 2, 2, 4, 8, head="classification", n_labels=3)


def model(config=LM, name="runs/it's", path="runs/it's", **hf_config):
  return models.Model(name, config, {}, byte_tokenizer(), hf_config, path)


def said(directory, model, left="adapter", peft_type="LORA", labels=()):
  (directory / left).mkdir()
  (directory / left / "adapter_config.json").write_text(json.dumps({"peft_type": peft_type}))
  text = usage.section(model, directory, labels)
  assert text.startswith(f"## Use the {left}\n")
  (code,) = re.findall("```python\n(.*?)```", text, re.S)
  compile(code, "report.md", "exec")
  assert json.dumps(str(directory / left)) in code
  return text, code


def as_reported(workdir):
  """The model that the code in a report makes."""
  (code,) = re.findall("```python\n(.*?)```", (workdir / "report.md").read_text(), re.S)
  names = {}
  exec(code, names)
  return names["model"]


def test_a_language_model(tmp_path):
  text, code = said(tmp_path, model())
  assert 'base = AutoModelForCausalLM.from_pretrained("runs/it\'s")\n' in code and "PeftModel" in code
  assert f"scripts/generate.py --model 'runs/it'\"'\"'s' --adapter {tmp_path / 'adapter'}" in text


def test_an_encoder_decoder(tmp_path):
  config = transformer.Config(259, 8, 1, 2, 2, 4, 8, encoder_layers=1)
  assert "base = AutoModelForSeq2SeqLM.from_pretrained(" in said(tmp_path, model(config))[1]


@pytest.mark.parametrize("pad", [None, 0])
def test_a_classifier(tmp_path, pad):
  """Of a decoder, which classifies a batch by its last tokens that are no padding."""
  text, code = said(tmp_path, model(CLASSIFIER, pad_token_id=pad), labels=(" bad", " good"))
  more = ", pad_token_id=257" if pad is None else ""
  assert f'AutoModelForSequenceClassification.from_pretrained("runs/it\'s", num_labels=3{more})\n' in code
  assert "scores of ' bad', ' good', in this order" in text and "generate.py" not in text


@pytest.mark.parametrize("config", [LM, CLASSIFIER])
def test_an_adapter_in_our_own_form(tmp_path, config):
  text, code = said(tmp_path, model(config), peft_type="LORA_JAX")
  head = ', head="classification", n_labels=3' if config is CLASSIFIER else ""
  assert f'models.load("runs/it\'s", dtype="{config.dtype}"{head})' in code and "PeftModel" not in text
  exec("\n".join(line for line in code.splitlines() if "import " in line), {})


def test_a_whole_model(tmp_path):
  text, code = said(tmp_path, model(CLASSIFIER), "model")
  assert code == (
    "from transformers import AutoModelForSequenceClassification\n\n"
    f"model = AutoModelForSequenceClassification.from_pretrained({json.dumps(str(tmp_path / 'model'))})\n"
  )


@pytest.mark.parametrize("kind", ["gguf", "orbax"])
def test_a_base_that_is_converted_first(tmp_path, kind):
  base = tmp_path / ("base.gguf" if kind == "gguf" else "base")
  if kind == "orbax":
    base.mkdir()
    (base / models.OWN).write_text("{}")
  text, code = said(tmp_path, model(name="smollm2-135m", path=str(base)))
  assert 'from_pretrained("base")\n' in code and "convert.py --model smollm2-135m --out base\n" in text


@pytest.mark.parametrize("name, source", [("hf:a/b", '"a/b"'), ("hf:a/b@v1", '"a/b", revision="v1"')])
def test_a_base_on_the_hub(tmp_path, name, source):
  assert f"from_pretrained({source})\n" in said(tmp_path, model(name=name, path="/cache/x"))[1]


def test_a_run_that_has_left_nothing(tmp_path):
  assert usage.section(model(), tmp_path) == ""
