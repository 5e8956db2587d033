"""Files that are not read: each message has the Python that makes a file which is, and that works."""

import copy

import jax
import numpy as np
import pytest

from lora_jax import errors, models, tree
from lora_jax.formats import peft as peft_format
from tests import test_families

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def follow(load, *said):
  """What `load` gives after the Python of its message has been run."""
  with pytest.raises(errors.UserError) as e:
    load()
  message = str(e.value)
  assert all(s in message for s in said), message
  assert "\n" not in message
  exec(message.partition(" in Python: ")[2], {})
  return load()


def same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture
def base(tmp_path):
  """(transformers model, ours, its directory)."""
  ref, model = test_families.pair("llama")
  ref.save_pretrained(tmp_path / "base")
  return copy.deepcopy(ref), model, tmp_path / "base"


@pytest.fixture
def adapted(base):
  """(PEFT model, its adapter's directory, our parameters of it)."""
  peft = pytest.importorskip("peft")
  ref, model, directory = base
  config = dict(target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"], init_lora_weights=False)
  theirs = peft.get_peft_model(ref, peft.LoraConfig(r=2, use_dora=False, **config))
  theirs.save_pretrained(directory / "adapter")
  return theirs, directory / "adapter", peft_format.load(model, directory / "adapter")


def test_a_pickled_model(base):
  torch = pytest.importorskip("torch")

  ref, model, directory = base
  (directory / "model.safetensors").unlink()
  torch.save(ref.state_dict(), directory / "pytorch_model.bin")
  again = follow(
    lambda: models.load(str(directory), dtype="float32"), "pytorch_model.bin is pickled", "LlamaForCausalLM"
  )
  same(again.params, model.params)


def test_a_pickled_adapter(base, adapted):
  import torch
  from safetensors.torch import load_file

  _, directory, params = adapted
  torch.save(load_file(directory / "adapter_model.safetensors"), directory / "adapter_model.bin")
  (directory / "adapter_model.safetensors").unlink()
  same(follow(lambda: peft_format.load(base[1], directory), "adapter_model.bin beside it is pickled"), params)


@pytest.mark.parametrize(
  "wrap, said",
  [
    (lambda k: f"_orig_mod.{k}", ["torch.compile"]),
    (lambda k: f"module.{k}", ["DistributedDataParallel"]),
    (
      lambda k: k.replace(".layers.", "._fsdp_wrapped_module.layers.").replace(
        "mlp.", "mlp._checkpoint_wrapped_module."
      ),
      ["FSDP", "activation checkpointing"],
    ),
  ],
)
def test_names_of_what_was_wrapped_around_a_model(base, adapted, wrap, said):
  from safetensors.torch import load_file, save_file

  _, model, directory = base
  for path in (directory / "model.safetensors", adapted[1] / "adapter_model.safetensors"):
    save_file({wrap(k): x for k, x in load_file(path).items()}, path, {"format": "pt"})
  same(follow(lambda: models.load(str(directory), dtype="float32"), *said).params, model.params)
  same(follow(lambda: peft_format.load(model, adapted[1]), said[0]), adapted[2])


@pytest.mark.parametrize("dora", [False, True])
def test_a_state_dict_of_a_peft_model(base, dora):
  """`torch.save(model.state_dict())`, or safetensors of it: all of the base, and the adapter below its name."""
  peft = pytest.importorskip("peft")
  from safetensors.torch import save_file

  ref, model, directory = base
  config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], use_dora=dora)
  theirs = peft.get_peft_model(ref, config, adapter_name="mine")
  theirs.save_pretrained(directory / "a")
  params = peft_format.load(model, directory / "a" / "mine")
  path = directory / "a" / "mine" / "adapter_model.safetensors"
  save_file({k: x.clone() for k, x in theirs.state_dict().items()}, path)
  same(follow(lambda: peft_format.load(model, path.parent), "'mine'", "save_pretrained"), params)


def test_a_module_called_module_is_a_models_own(tmp_path):
  import safetensors.numpy

  from lora_jax.formats import hf

  safetensors.numpy.save_file({"module.x": np.zeros(1), "y": np.zeros(1)}, tmp_path / "a.safetensors")
  assert tree.names(dict.fromkeys(hf.Tensors([tmp_path / "a.safetensors"]).names(), 0)) == ["module.x", "y"]
