"""LoRA on experts and routers against the peft library, which adapts them as parameters."""

import json
import re

import jax
import numpy as np
import pytest

from lora_jax import errors, methods, models, weights
from lora_jax.formats import peft as peft_format
from lora_jax.methods import lora
from tests import noise, test_families
from tests.test_families import jitted as outputs
from tests.test_lora import TOKENS, first_output

# PEFT 0.21 compares patterns with the names of modules alone, and says so of those for parameters, which it follows.
pytestmark = [
  pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
  pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]
KEY = jax.random.key(0)
FAMILIES = {
  "mixtral": ("MixtralForCausalLM", test_families.MIXTRAL),
  "qwen3_moe": ("Qwen3MoeForCausalLM", test_families.QWEN3_MOE),
  "mixtral-bare": ("MixtralModel", test_families.MIXTRAL),
}


def load(directory, name):
  """(transformers model, ours) of a family, random."""
  torch = pytest.importorskip("torch")
  pytest.importorskip("peft")
  cls, config = FAMILIES[name]
  cls = getattr(pytest.importorskip("transformers"), cls)
  torch.manual_seed(0)
  ref = cls(cls.config_class(**config, attn_implementation="eager")).eval()
  with torch.no_grad():
    for p in ref.parameters():
      p.add_(0.1 * torch.randn_like(p))
  ref.save_pretrained(directory)
  return ref, models.load(str(directory), dtype="float32")


def adapted(params, **kw):
  params, mask = lora.init(KEY, params, **kw)
  return noise.moved(params, mask), mask


def moe(params):
  return {name: p["kernel"] for name, p in params["layers"]["moe"].items()}


def share_a(params):
  """Gate and up with one A, as PEFT has them."""
  nodes = params["layers"]["moe"]
  nodes["up"]["kernel"] = nodes["up"]["kernel"].replace(a=nodes["gate"]["kernel"].a)
  return params


SETTINGS = {
  "experts": dict(targets="gate,up,down", rank=3),
  "shared-a": dict(targets="gate,up,down", rank=3),
  "all-linear": dict(targets="all-linear", rank=2, rslora=True),
  "gate": dict(targets="gate", rank=2),
  "down-and-router": dict(targets="down,router,q", rank=2),
  "layers": dict(
    targets=["layers/1/moe/down", "layers/[12]/moe/up", "layers/0/moe/router", "v"],
    rank_pattern={"up": 4},
    alpha_pattern={"layers/1/": 5.0},
  ),
  "pissa": dict(targets="gate,up,down", rank=2, init="pissa"),
}


slow = lambda *args: pytest.param(*args, marks=pytest.mark.slow)  # two libraries compile and load each


@pytest.mark.parametrize("name", ["experts", *map(slow, [*list(SETTINGS)[1:], "mixtral-bare", "qwen3_moe"])])
def test_peft_loads_what_we_save(tmp_path, name):
  peft = pytest.importorskip("peft")

  family = name if name in FAMILIES else "mixtral"
  ref, model = load(tmp_path / "base", family)
  params, _ = adapted(model.params, **SETTINGS.get(name, SETTINGS["all-linear"]))
  params = share_a(params) if name == "shared-a" else params
  ours = outputs(model.config, params, TOKENS)
  assert np.abs(ours - outputs(model.config, model.params, TOKENS)).max() > 1e-2
  peft_format.save(model, params, tmp_path / "adapter")
  config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
  theirs = peft.PeftModel.from_pretrained(ref, str(tmp_path / "adapter")).eval()
  np.testing.assert_allclose(ours, first_output(theirs), atol=1e-4, rtol=1e-4)
  again = peft_format.load(model, tmp_path / "adapter")
  np.testing.assert_allclose(outputs(model.config, again, TOKENS), ours, atol=1e-5, rtol=1e-5)
  if name in ("experts", "shared-a"):
    assert config["target_parameters"] == ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    assert moe(again)["gate"].a.shape[-1] == (3 if name == "shared-a" else 6) and moe(again)["down"].a.shape[-1] == 3


@pytest.mark.parametrize(
  "family, kw",
  [
    ("mixtral", dict(target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], target_modules=[])),
    slow("mixtral", dict(target_parameters=["experts.gate_up_proj"], target_modules=["q_proj"], r=4)),
    slow(
      "mixtral",
      dict(
        target_parameters=["mlp.experts.down_proj", "layers.1.mlp.experts.gate_up_proj", "mlp.gate.weight"],
        target_modules=["v_proj"],
        rank_pattern={"experts.down_proj": 2},
        alpha_pattern={"layers.1.mlp.experts.down_proj": 3, "gate.weight": 5},
      ),
    ),
    slow(
      "qwen3_moe", dict(target_parameters=["gate_up_proj", "down_proj"], target_modules=["o_proj"], use_rslora=True)
    ),
    slow("qwen3_moe", dict(target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"])),
    slow("mixtral-bare", dict(target_parameters=["mlp.experts.down_proj"], target_modules=[])),
  ],
)
def test_we_load_what_peft_saves(tmp_path, family, kw):
  peft = pytest.importorskip("peft")
  torch = pytest.importorskip("torch")

  ref, model = load(tmp_path / "base", family)
  theirs = peft.get_peft_model(ref, peft.LoraConfig(**kw)).eval()
  with torch.no_grad():
    for k, p in theirs.named_parameters():
      if "lora_B" in k:
        p.add_(0.1 * torch.randn_like(p))
  theirs.save_pretrained(str(tmp_path / "adapter"))
  params = peft_format.load(model, tmp_path / "adapter")
  ours = outputs(model.config, params, TOKENS)
  np.testing.assert_allclose(ours, first_output(theirs), atol=1e-4, rtol=1e-4)
  assert np.abs(ours - outputs(model.config, model.params, TOKENS)).max() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_adapters_of_single_experts(tmp_path, family):
  """The names that transformers 4 had: a module for each matrix. PEFT converts them as it loads."""
  peft = pytest.importorskip("peft")
  import safetensors.numpy

  ref, model = load(tmp_path / "base", family)
  parts = ("w1", "w3", "w2") if family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
  block = "block_sparse_moe" if family == "mixtral" else "mlp"
  width, rng, tensors = model.config.d_ff, np.random.default_rng(0), {}
  for i, e in np.ndindex(3, 5):
    for part, (inner, outer) in zip(parts, [(32, width), (32, width), (width, 32)], strict=True):
      name = f"base_model.model.model.layers.{i}.{block}.experts.{e}.{part}"
      tensors[f"{name}.lora_A.weight"] = rng.standard_normal((2, inner), np.float32) / 8
      tensors[f"{name}.lora_B.weight"] = rng.standard_normal((outer, 2), np.float32) / 8
  (tmp_path / "adapter").mkdir()
  safetensors.numpy.save_file(tensors, tmp_path / "adapter/adapter_model.safetensors")
  config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 6, "target_modules": list(parts)}
  (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
  params = peft_format.load(model, tmp_path / "adapter")
  ours = outputs(model.config, params, TOKENS)
  theirs = peft.PeftModel.from_pretrained(ref, str(tmp_path / "adapter")).eval()
  np.testing.assert_allclose(ours, first_output(theirs), atol=1e-4, rtol=1e-4)
  assert np.abs(ours - outputs(model.config, model.params, TOKENS)).max() > 1e-2


def test_what_is_adapted_and_how_it_starts(tmp_path):
  """Leaves, counts, and A uniform in +-1/sqrt(in) of one expert, as in PEFT."""
  _, model = load(tmp_path, "mixtral")
  params, mask = lora.init(KEY, model.params, targets="all-linear", rank=4, rank_pattern={"layers/1/moe/up": 1})
  node = moe(params)["up"]
  assert node.a.shape == (3, 5, 32, 4) and node.b.shape == (3, 5, 4, 48) and node.scale.shape == (3,)
  assert all(np.abs(w.a).max() <= 1 / np.sqrt(w.shape[-2]) for w in moe(params).values())
  assert np.abs(node.a).max() > 0.9 / np.sqrt(32) and len(np.unique(node.a[:, :, 0, 0])) == 15
  assert not node.a[1, ..., 1:].any() and node.a[1, ..., 0].all()
  per = {"q": 64, "k": 48, "v": 48, "o": 64}
  want = 3 * 4 * (sum(per.values()) + 37 + 5 * 3 * 80) - 3 * 5 * 80
  assert methods.size(params, mask) == want
  np.testing.assert_array_equal(outputs(model.config, params, TOKENS), outputs(model.config, model.params, TOKENS))
  shaken, _ = adapted(model.params, targets="all-linear", rank=4, rank_pattern={"layers/1/moe/up": 1})
  merged = outputs(model.config, weights.merge(shaken), TOKENS)
  np.testing.assert_allclose(outputs(model.config, shaken, TOKENS), merged, atol=2e-5)
  for a, b in zip(jax.tree.leaves(weights.strip(shaken)), jax.tree.leaves(model.params), strict=True):
    assert a is b


def test_misfits_are_all_listed(tmp_path):
  import safetensors.numpy

  _, model = load(tmp_path / "base", "mixtral")
  params, _ = adapted(model.params, targets="up,down,router", rank=2)
  peft_format.save(model, params, tmp_path / "adapter")
  path = tmp_path / "adapter/adapter_model.safetensors"
  tensors = safetensors.numpy.load_file(path)
  name = "base_model.model.model.layers.{}.mlp."
  del tensors[name.format(0) + "experts.lora_B.weight"]
  tensors[name.format(1) + "experts.base_layer.lora_A.weight"] = np.zeros((9, 32), np.float32)
  tensors[name.format(2) + "gate.lora_A.weight"] = np.zeros((2, 31), np.float32)
  tensors[name.format(2) + "exports.lora_A.weight"] = np.zeros((2, 32), np.float32)
  safetensors.numpy.save_file(tensors, path)
  config = tmp_path / "adapter/adapter_config.json"
  config.write_text(
    json.dumps(
      json.loads(config.read_text()) | {"target_parameters": ["down_proj", "gate_up_proj", "gate.weight", "w9"]}
    )
  )
  with pytest.raises(errors.UserError) as e:
    peft_format.load(model, tmp_path / "adapter")
  for said in (
    "layers.0.mlp.experts.lora_A.weight is .* and lora_B.weight None",
    r"layers.1.mlp.experts.base_layer.lora_A.weight is \(9, 32\)",
    r"gate is \(5, 31\), expected \(5, 32\)",
    "exports.lora_A",
    "'w9' of no matrix",
  ):
    assert re.search(said, str(e.value)), (said, str(e.value))
