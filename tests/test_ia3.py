"""IA3: its formula, how many numbers it trains, and parity with the peft library."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import errors, families, methods, models, tree, weights
from lora_jax.formats import peft as peft_format
from lora_jax.methods import ia3
from lora_jax.model import transformer
from tests import test_loha, test_lora
from tests.test_families import TOKENS, jitted
from tests.test_loha import edited, noisy, same_outputs

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

CONFIG = transformer.Config(97, 16, 3, 4, 2, 4, 24, dtype="float32", tied=True)
FUSED = dataclasses.replace(CONFIG, fused=True, attn_bias="all", mlp_bias=True)
KEY = jax.random.key(0)


def model_of(config, deviation=0.2):
  """Random parameters, biases too."""
  rng = np.random.default_rng(0)
  params = transformer.init(config, KEY)
  return jax.tree.map(lambda x: jnp.asarray(x + deviation * rng.standard_normal(x.shape), x.dtype), params)


def scales(params):
  return {k: x for k, x in tree.flatten(params).items() if k.endswith("_scale")}


@pytest.mark.slow
@pytest.mark.parametrize("layers", [3, 16])
def test_keys_values_and_hidden_units_are_scaled(layers):
  """The same as a model whose matrices are scaled by hand, also where there are as many layers as the width."""
  config = dataclasses.replace(CONFIG, n_layers=layers)
  base = model_of(config)
  params = noisy(*ia3.init(KEY, base))
  s = scales(params)
  assert {k: x.shape for k, x in s.items()} == {
    "layers/attn/k/kernel/output_scale": (layers, 2, 4),
    "layers/attn/v/kernel/output_scale": (layers, 2, 4),
    "layers/mlp/down/kernel/input_scale": (layers, 24),
  }
  flat = tree.flatten(base)
  for name in "kv":
    flat[f"layers/attn/{name}/kernel"] *= s[f"layers/attn/{name}/kernel/output_scale"][:, None]
  flat["layers/mlp/down/kernel"] *= s["layers/mlp/down/kernel/input_scale"][..., None]
  by_hand = tree.unflatten(base, flat)
  ours = jitted(config, params, TOKENS)
  np.testing.assert_allclose(ours, jitted(config, by_hand, TOKENS), atol=1e-4)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), weights.merge(params), by_hand)
  assert np.abs(ours - jitted(config, base, TOKENS)).max() > 1e-2


def test_the_input_of_down_is_the_output_of_up():
  """In a gated layer: T-Few's code scales the output of wi_1."""
  base = model_of(CONFIG)
  down = noisy(*ia3.init(KEY, base, targets=""))
  up, _ = ia3.init(KEY, base, targets="up", feedforward="")
  mlp = up["layers"]["mlp"]
  mlp["up"]["kernel"] = mlp["up"]["kernel"].replace(output_scale=down["layers"]["mlp"]["down"]["kernel"].input_scale)
  np.testing.assert_allclose(jitted(CONFIG, down, TOKENS), jitted(CONFIG, up, TOKENS), atol=1e-4)


@pytest.mark.parametrize(
  "targets, parts", [("k,v", "kv"), ("v", "v"), ("q,v", "qv"), ("qkv", ""), ("kernel/[kv]$", "kv")]
)
def test_fused_matrices(targets, parts):
  """Parts of q, k and v in one matrix are scaled, and their bias too: (Wx + b) o l."""
  base = model_of(FUSED)
  params = noisy(*ia3.init(KEY, base, targets=targets))
  s = {k.split("/")[-2]: x for k, x in scales(params).items() if "qkv" in k}
  assert set(s) == (set(parts) or {"kernel"})
  heads = {"q": 4, "k": 2, "v": 2}
  whole = s["kernel"] if not parts else jnp.concatenate([s.get(p, jnp.ones((3, n, 4))) for p, n in heads.items()], 1)
  by_hand, ff = jax.tree.map(lambda x: x, base), params["layers"]["mlp"]["down"]["kernel"].input_scale
  qkv, down = by_hand["layers"]["attn"]["qkv"], by_hand["layers"]["mlp"]["down"]
  qkv["kernel"], qkv["bias"] = qkv["kernel"] * whole[:, None], qkv["bias"] * whole
  down["kernel"] *= ff[..., None]
  np.testing.assert_allclose(jitted(FUSED, params, TOKENS), jitted(FUSED, by_hand, TOKENS), atol=1e-4)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), weights.merge(params), by_hand)


def test_gate_and_up_in_one_matrix():
  base = model_of(FUSED)
  up = noisy(*ia3.init(KEY, base, targets="up", feedforward=""))
  down, _ = ia3.init(KEY, base, targets="", feedforward="down")
  mlp, scale = down["layers"]["mlp"], up["layers"]["mlp"]["gate_up"]["kernel"].parts["up"].output_scale[:, 0]
  mlp["down"]["kernel"] = mlp["down"]["kernel"].replace(input_scale=scale)
  np.testing.assert_allclose(jitted(FUSED, up, TOKENS), jitted(FUSED, down, TOKENS), atol=1e-4)


def size(config, **kw):
  """How many numbers are trained, from shapes alone."""
  masks = []

  def run():
    params, mask = ia3.init(KEY, transformer.init(config, KEY), **kw)
    masks.append(mask)
    return params

  return methods.size(jax.eval_shape(run), masks[0])


def test_how_many_numbers_are_trained():
  """d_k + d_v + d_ff a layer, and d_k + d_v for attention to an encoder; T0-3B: Liu et al. 2022, appendix."""
  assert size(CONFIG) == 3 * (8 + 8 + 24) == size(FUSED)
  t0 = dict(vocab_size=32128, d_model=2048, d_kv=64, d_ff=5120, num_layers=24, num_heads=32)
  t0 = families.get("t5").config(t0 | dict(model_type="t5", feed_forward_proj="gated-gelu", tie_word_embeddings=False))
  assert size(t0) == 24 * (2 * 2048 + 5120) + 24 * (4 * 2048 + 5120) == 540_672


def test_over_an_adapter():
  """LoRA's change is scaled with the rest, merged or not."""
  params, mask = methods.init(KEY, model_of(CONFIG), [{"name": "lora", "targets": "k,v"}, {"name": "ia3"}])
  params = noisy(params, mask)
  np.testing.assert_allclose(jitted(CONFIG, params, TOKENS), jitted(CONFIG, weights.merge(params), TOKENS), atol=1e-4)


@pytest.mark.parametrize(
  "config, kw, message",
  [
    (CONFIG, {"targets": "w_k"}, "targets 'w_k' matches nothing"),
    (CONFIG, {"targets": "", "feedforward": ""}, "scales nothing"),
    (CONFIG, {"targets": "k,v,down"}, "not both: layers/mlp/down"),
    (
      CONFIG,
      {"targets": "layers/1/attn/k/"},
      "every layer, but config.method.targets names some layers of layers/attn/k",
    ),
    (CONFIG, {"targets": "head"}, "'head' matches nothing"),
    (dataclasses.replace(CONFIG, n_experts=4), {}, "does not scale experts .*choose config.method.feedforward"),
  ],
)
def test_bad_settings_are_refused(config, kw, message):
  with pytest.raises(errors.UserError, match=message):
    ia3.init(KEY, transformer.init(config, KEY), **kw)


def test_experts_can_be_left_out():
  config = dataclasses.replace(CONFIG, n_experts=4)
  params, _ = ia3.init(KEY, transformer.init(config, KEY), feedforward="")
  assert set(scales(params)) == {"layers/attn/k/kernel/output_scale", "layers/attn/v/kernel/output_scale"}


def test_inputs_of_a_part_have_no_form_in_peft(tmp_path):
  params = model_of(FUSED)
  model = models.Model("tiny", FUSED, params, None, {"model_type": "llama"})
  with pytest.raises(peft_format.NoForm, match="no module for layers/mlp/gate_up/kernel/gate"):
    peft_format.save(model, ia3.init(KEY, params, targets="", feedforward="gate")[0], tmp_path)


# {name: (target_modules, feedforward_modules)} of PEFT, its defaults where it has them.
MODULES = {
  "llama": (["k_proj", "v_proj", "down_proj"], ["down_proj"]),
  "gpt2": (["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
  "bert": (["key", "value", "output.dense"], ["output.dense"]),
  "phi3": (["qkv_proj", "gate_up_proj", "o_proj"], ["o_proj"]),
  "neox": (["query_key_value", "dense_4h_to_h"], ["dense_4h_to_h"]),
  "t5": (["k", "v", "wo"], r".*\.wo"),
}
FAMILIES = test_lora.FAMILIES | test_loha.FAMILIES


def load(directory, name):
  """(transformers model, ours) of a family, all parameters random."""
  torch = pytest.importorskip("torch")
  cls, config, _ = FAMILIES[name]
  cls = getattr(pytest.importorskip("transformers"), cls)
  torch.manual_seed(0)
  ref = cls(cls.config_class(**config, attn_implementation="eager")).eval()
  with torch.no_grad():
    for p in ref.parameters():
      p.add_(0.1 * torch.randn_like(p))
  ref.save_pretrained(directory)
  return ref, models.load(str(directory), dtype="float32")


@pytest.mark.parametrize("name", MODULES)
def test_peft_loads_what_we_save_and_so_do_we(tmp_path, name):
  """k and v of GPT-2's one matrix become a vector with ones for q there, and k and v again here."""
  peft = pytest.importorskip("peft")
  ref, model = load(tmp_path / "base", name)
  params = noisy(*ia3.init(KEY, model.params))
  peft_format.save(model, params, tmp_path / "adapter")
  again = peft_format.load(model, tmp_path / "adapter")
  assert tree.names(again) == tree.names(params)
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), params, again)
  same_outputs(model, params, peft.PeftModel.from_pretrained(ref, str(tmp_path / "adapter")).eval())


@pytest.mark.parametrize("name", MODULES)
def test_we_load_what_peft_saves(tmp_path, name):
  peft = pytest.importorskip("peft")
  torch = pytest.importorskip("torch")
  ref, model = load(tmp_path / "base", name)
  targets, feedforward = MODULES[name]
  config = peft.IA3Config(target_modules=targets, feedforward_modules=feedforward, fan_in_fan_out=name == "gpt2")
  theirs = peft.get_peft_model(ref, config).eval()
  with torch.no_grad():
    for k, p in theirs.named_parameters():
      if "ia3_l" in k:
        p.add_(0.3 * torch.randn_like(p))
  theirs.save_pretrained(str(tmp_path / "adapter"))
  params = peft_format.load(model, tmp_path / "adapter")
  same_outputs(model, params, theirs)
  assert len(scales(params)) >= 2


def test_modules_that_share_a_name(tmp_path):
  """PEFT takes a module for a feed-forward one by the end of its name: whole names where "o" would end "wo" too."""
  peft = pytest.importorskip("peft")
  ref, model = load(tmp_path / "base", "t5")
  params = noisy(*ia3.init(KEY, model.params, targets="down", feedforward="o"))
  peft_format.save(model, params, tmp_path / "adapter")
  config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
  assert not any("wo".endswith(m) for m in config["feedforward_modules"])
  same_outputs(model, params, peft.PeftModel.from_pretrained(ref, str(tmp_path / "adapter")).eval())


def test_single_layers_of_a_peft_adapter(tmp_path):
  peft = pytest.importorskip("peft")
  ref, model = load(tmp_path / "base", "llama")
  config = peft.IA3Config(target_modules=r".*layers\.1\.self_attn\.v_proj", feedforward_modules=None)
  theirs = peft.get_peft_model(ref, config).eval()
  for p in (p for k, p in theirs.named_parameters() if "ia3_l" in k):
    p.data.mul_(1.7)
  theirs.save_pretrained(str(tmp_path / "adapter"))
  params = peft_format.load(model, tmp_path / "adapter")
  same_outputs(model, params, theirs)
  (scale,) = scales(params).values()
  np.testing.assert_allclose(scale[:, 0, 0], [1, 1.7, 1], rtol=1e-6)


@pytest.mark.parametrize(
  "config, tensors, message",
  [
    ({"feedforward_modules": 3}, None, "feedforward_modules is 3"),
    ({"feedforward_modules": "("}, None, "not a regular expression"),
    ({"feedforward_modules": None}, None, r"down_proj.ia3_l is \(1, 24\), expected \(16, 1\)"),
    ({"modules_to_save": ["x"]}, None, "modules_to_save"),
    ({}, lambda t: {k.replace("k_proj", "w_proj"): x for k, x in t.items()}, "no place .*0.*w_proj.*2.*w_proj"),
    ({}, lambda t: {k: x[:-1].copy() for k, x in t.items()}, r"(?s)k_proj.ia3_l is \(7, 1\).*v_proj"),
  ],
)
def test_foreign_adapters_are_refused(tmp_path, config, tensors, message):
  params = transformer.init(CONFIG, KEY)
  model = models.Model("tiny", CONFIG, params, None, {"model_type": "llama"})
  peft_format.save(model, ia3.init(KEY, params)[0], tmp_path)
  edited(tmp_path, config, tensors)
  with pytest.raises(errors.UserError, match=message):
    peft_format.load(model, tmp_path)
