"""Adapters of the peft library with several things wrong: one error says all of them."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from lora_jax import errors, methods, models, patterns, tree
from lora_jax.formats import adapter, hf, peft as peft_format
from lora_jax.model import transformer

METHODS = "lora dora lora_bias adalora vera ia3 norms loha lokr whole".split()
MORE = {
  "dora": [{"name": "dora"}],
  "lora_bias": [{"name": "lora", "bias": "all"}],
  "whole": [{"name": "lora"}, {"name": "norms"}],
}


def save(directory, method, **config):
  """(the model, tensors of an adapter of it, a function that replaces those)."""
  import safetensors.numpy

  config = transformer.Config(50, 16, 3, 4, 2, 4, 24, dtype="float32", tied=True, **config)
  base = transformer.init(config, jax.random.key(0))
  model = models.Model("tiny", config, base, None, {"model_type": "llama"})
  params, mask = methods.init(jax.random.key(1), base, method)
  peft_format.save(model, params, directory, [k for k, m in tree.flatten(mask).items() if m], method)
  path = directory / "adapter_model.safetensors"
  return model, safetensors.numpy.load_file(path), lambda tensors: safetensors.numpy.save_file(tensors, path)


def said(model, directory):
  with pytest.raises(errors.UserError) as e:
    peft_format.load(model, directory)
  return str(e.value)


@pytest.mark.parametrize("name", METHODS)
def test_all_misfits_are_listed(tmp_path, name):
  """A tensor that is missing, one of another name, of another shape, and one without the prefix."""
  method = MORE.get(name, [{"name": name}])
  model, tensors, write = save(tmp_path, method, **({"attn_bias": "qkv"} if name == "lora_bias" else {}))
  last = {"lora_bias": ".bias", "whole": "layernorm.weight", "vera": "vera_lambda_b"}.get(name, "")
  missing, *_, misnamed, misshapen, foreign = sorted(k for k in tensors if k.endswith(last))
  shared = [k for k in tensors if "vera_A" in k or "vera_B" in k]
  bad = {k: x for k, x in tensors.items() if k not in (missing, *shared)}
  bad["base_model.model.what." + misnamed.removeprefix("base_model.model.")] = bad.pop(misnamed)
  bad[misshapen] = np.zeros((1, *bad[misshapen].shape), np.float32)
  bad["module." + foreign] = bad.pop(foreign)
  write(bad)
  message = said(model, tmp_path)
  module = missing.removeprefix("base_model.model.").rpartition("." if name == "whole" else ".lora_A")[0]
  for k in (module, f"what.{misnamed.removeprefix('base_model.model.')}", f"module.{foreign}", *shared):
    assert k.removeprefix("base_model.") in message, (k, message)
  shape = bad[misshapen].shape
  assert f"{misshapen.removeprefix('base_model.model.')} is {shape}" in message, message


@pytest.mark.parametrize("name", ["lora", "ia3", "prompt_tuning"])
def test_options_of_a_later_peft_are_refused_where_they_ask_for_something(tmp_path, name):
  model, *_ = save(tmp_path, [{"name": name}])
  path = tmp_path / "adapter_config.json"
  config = json.loads(path.read_text())
  path.write_text(json.dumps(config | {"a_config": None, "use_b": False, "c_modules": [], "d_scale": 2.0}))
  peft_format.load(model, tmp_path)
  path.write_text(json.dumps(config | {"a_config": {"e": 1}, "use_b": True, "c_modules": ["f"], "g_init": "h"}))
  message = said(model, tmp_path)
  for option in ("a_config={'e': 1}", "use_b=True", "c_modules=['f']", "g_init='h'"):
    assert f"option {option} is not known" in message


def test_all_options_of_peft_are_known():
  """A field that a new version has is to be looked at: supported, refused, or of no matter."""
  peft = pytest.importorskip("peft")
  for kind, config in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.items():
    if kind.value in {form.TYPE for form in peft_format.forms().values()}:
      assert not {f.name for f in dataclasses.fields(config)} - peft_format.OPTIONS, kind


@pytest.mark.parametrize("name", ["prompt_tuning", "prefix_tuning", "p_tuning"])
def test_all_misfits_of_a_soft_prompt_are_listed(tmp_path, name):
  model, tensors, write = save(tmp_path, [{"name": name, "length": 5}])
  (table,) = tensors.values()
  for own in ({"prompt_embeddings": table[:, 1:].copy()}, {}):
    write(own | {"base_model.x": table, "y": table})
    message = said(model, tmp_path)
    shape = own["prompt_embeddings"].shape if own else None
    for k in (f"prompt_embeddings is {shape}, expected {table.shape}", "model: ['x']", "'base_model.': ['y']"):
      assert k in message, (k, message)


@pytest.mark.parametrize("beside", [[], [{"name": "lora"}]])
def test_all_misfits_of_trained_tokens_are_listed(tmp_path, beside):
  model, tensors, write = save(tmp_path, [*beside, {"name": "tokens", "ids": [3, 7]}])
  (name,) = [k for k in tensors if "tokens_delta" in k and "lm_head" not in k]
  path = tmp_path / "adapter_config.json"
  config = json.loads(path.read_text())
  key = "trainable_token_indices" if beside else "token_indices"
  path.write_text(json.dumps(config | {key: [3, 70]}))
  bad = {k: x for k, x in tensors.items() if k != name and "q_proj.lora_B" not in k}
  bad["base_model.model.what"] = tensors[name]
  for own in ({name: tensors[name][:, :3].copy()}, {}):
    write(bad | own)
    message = said(model, tmp_path)
    shape = own[name].shape if own else None
    more = [f"model.layers.{i}.self_attn.q_proj.lora_B" for i in range(3)] if beside else []
    for k in (
      f"{name.removeprefix('base_model.model.')} is {shape}",
      f"{key}: expected ids of tokens",
      "['what']",
      *more,
    ):
      assert k in message, (k, message)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite(tmp_path, name, value):
  method = MORE.get(name, [{"name": name}])
  model, tensors, write = save(tmp_path, method, **({"attn_bias": "qkv"} if name == "lora_bias" else {}))
  bad = sorted(tensors)[-1]
  tensors[bad].flat[-1] = value
  write(tensors)
  name = bad.removeprefix("base_model.").removeprefix("model.")
  assert f"{name} has values that are not finite" in said(model, tmp_path)


def test_adapters_in_our_form(tmp_path):
  """The same holds of them: values, and regexes that do not end."""
  config = transformer.Config(50, 16, 2, 4, 2, 4, 24, dtype="float32")
  base = transformer.init(config, jax.random.key(0))
  model = models.Model("tiny", config, base, None, {"model_type": "llama"})
  method = [{"name": "houlsby"}, {"name": "lora", "targets": r"attn/(q|v)/kernel"}]
  params, mask = methods.init(jax.random.key(1), base, method)
  adapter.save(model, params, mask, method, tmp_path)
  again = adapter.load(model, tmp_path)
  assert jax.tree.all(jax.tree.map(np.array_equal, again, params))
  path, config = tmp_path / "adapter_model.safetensors", json.loads((tmp_path / "adapter_config.json").read_text())
  tensors = {k: np.array(x) for k, x in hf_tensors(path).items()}
  bad = next(iter(tensors))
  hf.save_tensors(path, tensors | {bad: np.full_like(tensors[bad], np.nan)})
  with pytest.raises(errors.UserError, match=f"{bad} has values that are not finite"):
    adapter.load(model, tmp_path)
  config["method"][1]["targets"] = r"([\w/]+)+([\w/]+)+!"
  (tmp_path / "adapter_config.json").write_text(json.dumps(config))
  with pytest.MonkeyPatch.context() as patch, pytest.raises(errors.UserError, match="takes more than .* to search"):
    patch.setattr(patterns, "SECONDS", 0.5)
    adapter.load(model, tmp_path)


def hf_tensors(path):
  source = hf.Tensors([path])
  return {k: source.read(k) for k in source.names()}
