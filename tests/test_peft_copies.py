"""Adapters of a resized vocabulary, with all copies of the base that PEFT stores; what is loaded is saved again."""

import copy
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import errors, methods, models, tree, weights
from lora_jax.formats import adapter, peft as peft_format
from lora_jax.weights import fused
from tests import test_families
from tests.test_families import jitted

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

V = 97
TOKENS = test_families.TOKENS + 3  # of which some are new
LORA = dict(peft="Lora", r=2, target_modules=["q_proj"], init_lora_weights=False)
TIE = dict(modules_to_save=["embed_tokens"], ensure_weight_tying=True)
# What PEFT trains: (case of test_families, whether it is tied, the config, whether PEFT is asked to store the tables).
CASES = {
  "lora": ("llama", True, {}, "auto"),
  "lora, untied": ("llama", False, {}, "auto"),
  "saved": ("llama", False, dict(modules_to_save=["embed_tokens", "lm_head", "norm"]), "auto"),
  "saved head": ("llama", False, dict(modules_to_save=["lm_head"], use_dora=True), "auto"),
  "saved and tied": ("llama", True, TIE, "auto"),
  "tokens": ("llama", True, dict(trainable_token_indices=[4, V + 1]), "auto"),
  "tokens of both": ("llama", True, dict(trainable_token_indices={"embed_tokens": [9], "lm_head": [9]}), True),
  "tokens, untied": ("llama", False, dict(trainable_token_indices=[4], modules_to_save=["lm_head"]), True),
  "tokens alone": ("llama", True, dict(peft="TrainableTokens", token_indices=[4, V + 1]), True),
  "adapted tables": ("llama", True, dict(target_modules=["q_proj", "embed_tokens", "lm_head"]), "auto"),
  "adapted head": ("llama", False, dict(target_modules=["q_proj", "lm_head"], modules_to_save=["embed_tokens"]), True),
  "norms": ("llama", False, dict(peft="LNTuning", target_modules=["norm"], modules_to_save=["lm_head"]), "auto"),
  "ia3": ("llama", True, dict(peft="IA3", target_modules=["k_proj"], feedforward_modules=[]), "auto"),
  "prefix": ("llama", True, dict(peft="PrefixTuning", task_type="CAUSAL_LM", num_virtual_tokens=3), "auto"),
  "gpt2": ("gpt2", True, dict(target_modules=["c_attn", "wte"], fan_in_fan_out=True, bias="all"), "auto"),
  "neox": ("neox", False, dict(target_modules=["query_key_value", "lm_head"]), "auto"),
  "neox, saved": ("neox", False, dict(target_modules=["query_key_value"], modules_to_save=["lm_head"]), "auto"),
  "bert": ("bert-mlm", True, dict(target_modules=["query"], bias="all", modules_to_save=["transform"]), "auto"),
  "bert, untied": ("bert-mlm", False, dict(target_modules=["query"], modules_to_save=["cls"]), "auto"),
  "t5": ("t5", True, dict(target_modules=["q", "lm_head"]), "auto"),
  "t5, tokens": ("t5", True, dict(target_modules=["q"], trainable_token_indices=[9]), "auto"),
}


def grown(directory, case, tied, new=3):
  """A transformers model with `new` further tokens, saved in DIRECTORY/grown; as it was, in DIRECTORY/base."""
  transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
  name, keywords = copy.deepcopy(test_families.CASES[case])
  cls = getattr(transformers, name)
  torch.manual_seed(0)
  model = cls(cls.config_class(**keywords | {"tie_word_embeddings": tied}, attn_implementation="eager"))
  noise(model.parameters())
  model.save_pretrained(directory / "base")
  model.resize_token_embeddings(V + new)
  model.save_pretrained(directory / "grown")
  return again(directory / "grown", cls)


def again(directory, cls):
  return cls.from_pretrained(directory, attn_implementation="eager").eval()


def noise(parameters):
  import torch

  with torch.no_grad():
    for p in parameters:
      if p.requires_grad:
        p.add_(0.1 * torch.randn_like(p))


def theirs(base, path):
  peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
  model = peft.PeftModel.from_pretrained(base, str(path)).eval()
  with torch.no_grad():
    x = {"decoder_input_ids": torch.tensor(TOKENS)} if base.config.is_encoder_decoder else {}
    x |= {"attention_mask": torch.tensor(test_families.SEEN).long()} if x else {}
    return model(input_ids=torch.tensor(test_families.SOURCE if x else TOKENS), **x).logits.numpy()


def trained(directory, ref, base, save="auto", **config):
  """An adapter of PEFT with noise in all that it trains, in DIRECTORY/theirs."""
  import peft

  config = (LORA if config.get("peft", "Lora") == "Lora" else {}) | config
  kind = getattr(peft, f"{config.pop('peft')}Config")
  ref.name_or_path = ref.config._name_or_path = str(base)  # as where a base is loaded and then resized
  model = peft.get_peft_model(ref, kind(**config))
  noise(model.parameters())
  model.save_pretrained(directory / "theirs", save_embedding_layers=save)


@pytest.mark.parametrize("name", CASES)
def test_what_peft_saves_is_read_and_saved_again(tmp_path, name):
  """To PEFT's logits both times; without `trained`, the head and whatever else was in it has to be noticed."""
  case, tied, config, save = CASES[name]
  ref = grown(tmp_path, case, tied)
  trained(tmp_path, ref, tmp_path / "base", save, **config)
  want = theirs(again(tmp_path / "grown", type(ref)), tmp_path / "theirs")
  model = models.load(str(tmp_path / "grown"), dtype="float32")
  params = peft_format.load(model, tmp_path / "theirs")
  ours = np.asarray(jitted(model.config, params, TOKENS))
  np.testing.assert_allclose(ours, want, atol=1e-4, rtol=1e-4)
  assert np.abs(ours - jitted(model.config, model.params, TOKENS)).max() > 1e-2
  peft_format.save(model, params, tmp_path / "ours")
  np.testing.assert_allclose(
    theirs(again(tmp_path / "grown", type(ref)), tmp_path / "ours"), want, atol=1e-4, rtol=1e-4
  )


def test_tables_of_another_base_come_with_the_adapter(tmp_path):
  """PEFT puts the tables that an adapter stores into whatever base it is loaded on; so do we, and save them again."""
  ref = grown(tmp_path, "llama", True)
  trained(tmp_path, ref, tmp_path / "base", target_modules=["q_proj", "embed_tokens"])
  other = again(tmp_path / "grown", type(ref))
  noise([other.get_input_embeddings().weight])
  other.save_pretrained(tmp_path / "other")
  want = theirs(again(tmp_path / "other", type(ref)), tmp_path / "theirs")
  model = models.load(str(tmp_path / "other"), dtype="float32")
  params = peft_format.load(model, tmp_path / "theirs")
  np.testing.assert_allclose(jitted(model.config, params, TOKENS), want, atol=1e-4, rtol=1e-4)
  peft_format.save(model, params, tmp_path / "ours")
  np.testing.assert_allclose(
    theirs(again(tmp_path / "other", type(ref)), tmp_path / "ours"), want, atol=1e-4, rtol=1e-4
  )


def test_another_vocabulary_is_said(tmp_path):
  ref = grown(tmp_path, "llama", False)
  model = models.load(str(tmp_path / "base"), dtype="float32")
  message = r"a vocabulary of 100 rows \(.* is \(100, 32\)\), this model has 97; .*resize_token_embeddings\(100\)"
  for targets in (["q_proj"], ["q_proj", "embed_tokens"], ["lm_head"]):
    trained(tmp_path, again(tmp_path / "grown", type(ref)), tmp_path / "base", target_modules=targets)
    with pytest.raises(errors.UserError, match=message):
      peft_format.load(model, tmp_path / "theirs")


def test_copies_that_differ_are_refused(tmp_path):
  import safetensors.numpy

  ref = grown(tmp_path, "llama", True)
  trained(tmp_path, ref, tmp_path / "base", **TIE)
  model, path = models.load(str(tmp_path / "grown"), dtype="float32"), tmp_path / "theirs/adapter_model.safetensors"
  tensors, top = safetensors.numpy.load_file(path), "base_model.model."
  for name, other in {
    "lm_head.weight": "model.embed_tokens.weight",
    "lm_head.modules_to_save.weight": "lm_head.weight",
    "model.embed_tokens.original_module.weight": "lm_head.original_module.weight",
  }.items():
    safetensors.numpy.save_file(tensors | {top + name: tensors[top + name] + 1}, path)
    with pytest.raises(errors.UserError, match=rf"{name} and {other} differ|{other} and {name} differ"):
      peft_format.load(model, tmp_path / "theirs")


def test_a_head_apart_from_its_table_needs_an_untied_base(tmp_path):
  """What the message says to do works."""
  torch = pytest.importorskip("torch")
  ref = grown(tmp_path, "llama", True)
  trained(tmp_path, ref, tmp_path / "base", modules_to_save=["lm_head"])
  want = theirs(again(tmp_path / "grown", type(ref)), tmp_path / "theirs")
  with pytest.raises(
    errors.UserError, match="lm_head.weight is saved without model.embed_tokens.weight.*the base untied"
  ):
    peft_format.load(models.load(str(tmp_path / "grown"), dtype="float32"), tmp_path / "theirs")
  model = again(tmp_path / "grown", type(ref))
  model.config.tie_word_embeddings = False
  head = model.get_output_embeddings()
  head.weight = torch.nn.Parameter(head.weight.clone())
  model.save_pretrained(tmp_path / "untied")
  model = models.load(str(tmp_path / "untied"), dtype="float32")
  params = peft_format.load(model, tmp_path / "theirs")
  np.testing.assert_allclose(jitted(model.config, params, TOKENS), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", ["t5", "t5-flan"])
def test_the_table_of_an_encoder_decoder(tmp_path, case):
  """`shared` is a module that PEFT wraps and nobody calls; what we save whole is what the two stacks look up."""
  ref, model = test_families.pair(case)
  trained(tmp_path, copy.deepcopy(ref), "", target_modules=["q"], modules_to_save=["shared"])
  with pytest.raises(errors.UserError, match="shared.weight is saved whole, which has no effect in PEFT"):
    peft_format.load(model, tmp_path / "theirs")
  params, mask = methods.init(jax.random.key(0), model.params, {"name": "lora"})
  params["embed"] = {"kernel": params["embed"]["kernel"] + 1}
  if model.config.tied:
    with pytest.raises(peft_format.NoForm, match="does not update lm_head"):
      peft_format.save(model, params, tmp_path / "ours")
    return
  peft_format.save(model, params, tmp_path / "ours")
  np.testing.assert_allclose(
    jitted(model.config, params, TOKENS - 3), theirs_of(ref, tmp_path / "ours"), atol=1e-4, rtol=1e-4
  )
  jax.tree.map(np.testing.assert_array_equal, peft_format.load(model, tmp_path / "ours"), params)


def theirs_of(ref, path):
  import torch

  peft = pytest.importorskip("peft")
  with torch.no_grad():
    return test_families.run_reference(peft.PeftModel.from_pretrained(copy.deepcopy(ref), str(path)).eval()).numpy()


@pytest.mark.parametrize("name", ["lora", "houlsby"])
def test_changed_weights_of_the_base_are_saved_or_refused(tmp_path, name):
  """By PEFT where they are whole modules, by our own form beneath adapters too, and never left out."""
  _, model = test_families.pair("llama")
  params, mask = methods.init(jax.random.key(0), model.params, {"name": name})
  same = jax.tree.map(jnp.array, params)  # as after a training step: other arrays, the same values
  if name == "lora":
    peft_format.save(model, same, tmp_path / "same")
    assert not json.loads((tmp_path / "same/adapter_config.json").read_text())["modules_to_save"]
  changed = params | {"norm": {"scale": params["norm"]["scale"] + 1}}
  adapter.save(model, changed, mask, {"name": name}, tmp_path / "norm")
  jax.tree.map(np.testing.assert_array_equal, adapter.load(model, tmp_path / "norm"), changed)
  beneath = tree.map_named(lambda k, x: x + 1 if fused.plain(k) == "layers/attn/q/kernel" else x, changed)
  with pytest.raises(peft_format.NoForm, match="q_proj.weight differs .* beneath an adapter|0 kinds"):
    peft_format.save(model, beneath, tmp_path / "beneath", method={"name": name})
  adapter.save(model, beneath, mask, {"name": name}, tmp_path / "own")
  assert json.loads((tmp_path / "own/adapter_config.json").read_text())["peft_type"] == "LORA_JAX"
  jax.tree.map(np.testing.assert_array_equal, adapter.load(model, tmp_path / "own"), beneath)


def test_a_random_classifier_is_saved_untrained(tmp_path):
  """Its values are nowhere else."""
  _, model = test_families.pair("llama")
  models.save(model, tmp_path / "base")
  model = models.load(str(tmp_path / "base"), dtype="float32", head="classification", n_labels=3)
  params, _ = methods.init(jax.random.key(0), model.params, {"name": "lora"})
  peft_format.save(model, params, tmp_path / "a")
  other = dataclasses.replace(model, params=model.params | {"classifier": {"kernel": jnp.ones((32, 3))}})
  loaded = peft_format.load(other, tmp_path / "a")
  np.testing.assert_array_equal(loaded["classifier"]["kernel"], weights.dense(params["classifier"]["kernel"]))
