"""Modules that an adapter holds whole beside others, such as a trained embedding whose head is tied to it."""

import json

import jax
import numpy as np
import pytest

from lora_jax import errors, methods
from lora_jax.formats import adapter, peft as peft_format
from lora_jax.formats.peft import saved_modules
from tests.test_bitfit import pair
from tests.test_loha import edited, noisy, same_outputs

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

KEY = jax.random.key(0)
TIED = {"qwen3-mha-tied-bias": "embed_tokens", "gpt2": "wte"}
LORA = {"name": "lora", "rank": 2}
EMBED = {"name": "full", "targets": [r"embed/kernel$", r"^norm/scale$"]}


@pytest.mark.parametrize("name", TIED)
def test_peft_loads_lora_beside_a_tied_embedding_and_the_final_norm(tmp_path, name):
  """LongLoRA's (Chen et al. 2023, section 3.3); the head follows the table there as it does here."""
  peft = pytest.importorskip("peft")
  ref, model = pair(name)
  assert model.config.tied
  params, mask = methods.init(KEY, model.params, [LORA | {"targets": "qkv" if name == "gpt2" else "q,v"}, EMBED])
  params = noisy(params, mask)
  adapter.save(model, params, mask, [LORA, EMBED], tmp_path)
  config = json.loads((tmp_path / "adapter_config.json").read_text())
  assert config["ensure_weight_tying"] and TIED[name] in config["modules_to_save"]
  same_outputs(model, params, peft.PeftModel.from_pretrained(ref, str(tmp_path)).eval())
  jax.tree.map(np.testing.assert_array_equal, peft_format.load(model, tmp_path), params)


@pytest.mark.parametrize("name, tied", [("qwen3-mha-tied-bias", True), ("qwen3-mha-tied-bias", False), ("gpt2", True)])
def test_we_load_what_peft_saves_of_a_tied_embedding_or_refuse_it(tmp_path, name, tied):
  """Without `ensure_weight_tying`, and of GPT-2 with it, the head stays the pretrained table: here both are one."""
  peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
  ref, model = pair(name)
  how = dict(target_modules=["c_attn" if name == "gpt2" else "q_proj"], ensure_weight_tying=tied)
  theirs = peft.get_peft_model(ref, peft.LoraConfig(modules_to_save=[TIED[name]], **how)).eval()
  with torch.no_grad():
    for p in filter(lambda p: p.requires_grad, theirs.parameters()):
      p.add_(0.1 * torch.randn_like(p))
  theirs.save_pretrained(str(tmp_path))
  if tied and name != "gpt2":
    same_outputs(model, peft_format.load(model, tmp_path), theirs)
    return
  with pytest.raises(errors.UserError, match=r"lm_head.weight: PEFT then keeps the pretrained table"):
    peft_format.load(model, tmp_path)


def test_what_has_no_form_is_saved_in_ours(tmp_path):
  """IA3 has no way to tie a head to a table that is trained."""
  _, model = pair("qwen3-mha-tied-bias")
  method = [{"name": "ia3"}, EMBED]
  params, mask = methods.init(KEY, model.params, method)
  params = noisy(params, mask)
  adapter.save(model, params, mask, method, tmp_path)
  assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA_JAX"
  jax.tree.map(np.testing.assert_array_equal, adapter.load(model, tmp_path), params)


def test_modules_that_are_not_whole_are_refused(tmp_path):
  _, model = pair("bert-classifier")
  params, mask = methods.train_also(*methods.init(KEY, model.params, [LORA]), model.head_leaves)
  adapter.save(model, params, mask, [LORA], tmp_path)
  edited(tmp_path, tensors=lambda t: {k: x for k, x in t.items() if not k.endswith("classifier.bias")})
  with pytest.raises(errors.UserError, match="modules_to_save of the config without tensors: classifier.bias"):
    peft_format.load(model, tmp_path)


@pytest.mark.parametrize("name", ["lora", "dora", "loha", "lokr", "vera", "adalora", "ia3", "norms"])
def test_an_adapter_without_one_of_its_modules_is_refused(tmp_path, name):
  """PEFT warns, and leaves the module as it was."""
  _, model = pair("llama")
  params, mask = methods.init(KEY, model.params, [{"name": name}])
  adapter.save(model, noisy(params, mask), mask, [{"name": name}], tmp_path)
  peft_format.load(model, tmp_path)
  edited(tmp_path, tensors=lambda t: {k: x for k, x in t.items() if ".layers.1." not in k})
  with pytest.raises(errors.UserError, match=r"target_modules of the config without tensors: model\.layers\.1\."):
    peft_format.load(model, tmp_path)


def test_targets_are_those_of_peft(tmp_path):
  """By name, end of a name or regex, in some layers, but for what is excluded."""
  module = "model.layers.12.self_attn.q_proj"
  yes = [
    {"target_modules": ["q_proj"]},
    {"target_modules": [module], "layers_to_transform": [3]},
    {"target_modules": r".*\.q_proj"},
    {"target_modules": ["self_attn.q_proj"], "layers_to_transform": 12},
    {"target_modules": ["q_proj"], "layers_to_transform": [1, 12], "layers_pattern": "layers"},
  ]
  no = [
    {"target_modules": ["proj"]},
    {"target_modules": None},
    {"target_modules": "q_proj"},
    {"target_modules": ["q_proj"], "layers_to_transform": [1, 2]},
    {"target_modules": ["q_proj"], "layers_to_transform": [12], "layers_pattern": ["h"]},
    {"target_modules": ["q_proj"], "exclude_modules": r".*12.*"},
  ]
  assert all(saved_modules.is_target(c, module) for c in yes)
  assert not any(saved_modules.is_target(c, module) for c in no)
