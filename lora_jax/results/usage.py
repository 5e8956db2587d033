"""How to use what a run has left: code for transformers and peft, or for lora_jax where the adapter is in our form."""

import json
import os
import pathlib
import shlex
from collections.abc import Sequence

from lora_jax import models
from lora_jax.batches import rows
from lora_jax.formats import adapter, hf

CLASSES = {"lm": "AutoModelForCausalLM", "classification": "AutoModelForSequenceClassification"}


def section(model: models.Model, workdir: str | os.PathLike, labels: Sequence[str] = ()) -> str:
  """The section of report.md on `workdir/adapter` or `workdir/model`; "" if there is neither.

  Args:
    model: the pretrained one.
    labels: the labels that a classifier scores.
  """
  workdir = pathlib.Path(workdir)
  left = next((d for d in (workdir / "adapter", workdir / "model") if d.is_dir()), None)
  if left is None:
    return ""
  if left.name == "model":
    parts = [_transformers(model, json.dumps(str(left)), "model")]
  elif hf.read_json(left / "adapter_config.json").get("peft_type") == adapter.TYPE:
    parts = ["`peft` has no form for this adapter; `lora_jax` loads it:", _own(model, left)]
  else:
    parts = _peft(model, left)
  if model.config.head == "classification":
    meant = f"scores of {', '.join(map(repr, labels))}, in this order" if labels else "one number"
    parts.append(f"Its output is {meant}.")
  else:
    names = ["--model", str(left)] if left.name == "model" else ["--model", model.name, "--adapter", str(left)]
    parts.append(f"`python scripts/generate.py {shlex.join(names)} --prompt ...` writes text with it.")
  return "\n\n".join([f"## Use the {left.name}", *parts])


def _peft(model: models.Model, left: pathlib.Path) -> list[str]:
  """Code that loads an adapter with `peft`; before it, how to write a base model that transformers cannot load."""
  source = json.dumps(model.path)
  parts = []
  if model.path.endswith(".gguf") or (pathlib.Path(model.path) / models.OWN).exists():
    source = json.dumps("base")
    parts = [
      "The base model as transformers loads it, with the weights that the adapter was trained on:",
      f"```sh\npython scripts/convert.py --model {shlex.quote(model.name)} --out base\n```",
    ]
  elif model.name.startswith("hf:"):
    source = json.dumps(model.hub_name) + (f", revision={json.dumps(model.revision)}" if model.revision else "")
  load = _transformers(model, source, "base", "from peft import PeftModel")
  return [*parts, load.removesuffix("```") + f"model = PeftModel.from_pretrained(base, {json.dumps(str(left))})\n```"]


def _transformers(model: models.Model, source: str, name: str, *imports: str) -> str:
  """Code that loads `name` from `source` with transformers."""
  kind = "AutoModelForSeq2SeqLM" if model.config.encoder_layers else CLASSES[model.config.head]
  arguments = [source]
  if model.config.head == "classification" and name == "base":
    arguments.append(f"num_labels={model.config.n_labels}")
    if model.config.causal and model.hf_config.get("pad_token_id") is None:  # a batch is classified by its last tokens
      arguments.append(f"pad_token_id={rows.padding_id(model.tokenizer)}")
  lines = [*imports, f"from transformers import {kind}", "", f"{name} = {kind}.from_pretrained({', '.join(arguments)})"]
  return "```python\n" + "\n".join(lines) + "\n```"


def _own(model: models.Model, left: pathlib.Path) -> str:
  """Code that loads an adapter with `lora_jax` and uses it."""
  arguments = [json.dumps(model.name), f"dtype={json.dumps(model.config.dtype)}"]
  imports = ["from lora_jax import generate, models", "from lora_jax.formats import adapter"]
  use = ['print(generate.generate(model, ["..."], params=params))']
  if model.config.head == "classification":
    arguments += ['head="classification"', f"n_labels={model.config.n_labels}"]
    imports = ["import numpy as np", "", "from lora_jax import models", "from lora_jax.formats import adapter"]
    imports.append("from lora_jax.model import transformer")
    use = [
      'tokens = np.array([model.tokenizer.encode("...", add_special_tokens=True)])',
      "states, _ = transformer.hidden(model.config, params, tokens)",
      "print(transformer.classify(model.config, params, states))",
    ]
  loads = [f"model = models.load({', '.join(arguments)})", f"params = adapter.load(model, {json.dumps(str(left))})"]
  return "\n".join(["```python", *imports, "", *loads, *use, "```"])
