"""LoKr: its factors and formula, and parity with the peft library."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import errors, methods, models, tree
from lora_jax.formats import peft as peft_format
from lora_jax.formats.peft import lokr as lokr_form
from lora_jax.methods import lokr
from lora_jax.model import transformer
from tests import test_loha
from tests.test_loha import edited, load, noisy, paths, same_outputs

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

CONFIG = transformer.Config(50, 16, 3, 4, 2, 4, 24, dtype="float32", tied=True)
KEY = jax.random.key(0)
FAMILIES = {k: v for k, v in test_loha.FAMILIES.items() if k != "bert"}
FAMILIES["neox"] = (*FAMILIES["neox"][:2], ["dense", "dense_4h_to_h"])  # whose q, k and v are interleaved


@pytest.fixture(scope="module")
def base():
  return transformer.init(CONFIG, KEY)


def node(inner, outer, left, right, **kw):
  """A LoKr node that is not stacked, its factors random; a factor's size has three numbers where it is of low rank."""
  rng = np.random.default_rng(0)
  draw = lambda *size: jnp.asarray(rng.standard_normal(size), jnp.float32)
  factor = lambda size: draw(*size) if len(size) == 2 else (draw(*size[:2]), draw(*size[1:]))
  factors = dict(left=factor(left), right=factor(right))
  return lokr.LoKr(base=draw(*inner, *outer), **factors, scale=jnp.float32(0.7), rank=jnp.int32(2), **kw)


@pytest.mark.parametrize("size", [1, 2, 7, 12, 18, 36, 100, 127, 128, 250, 4096, 11008, 49152])
def test_factorization_is_that_of_peft(size):
  layer = pytest.importorskip("peft.tuners.lokr.layer")
  for factor in [-1, 1, 2, 3, 4, 5, 6, 8, 12, 13, 64, 1000]:
    assert lokr.factorization(size, factor) == layer.factorization(size, factor), (size, factor)


@pytest.mark.parametrize("left, right", [((2, 5), (3, 4)), ((2, 2, 5), (3, 4)), ((2, 5), (3, 2, 4))])
@pytest.mark.parametrize(
  "spec, x, inner, outer", [("BTD,DNH->BTNH", (2, 4, 6), (6,), (4, 5)), ("BTNH,NHD->BTD", (2, 4, 2, 3), (2, 3), (20,))]
)
def test_change_is_the_formula(spec, x, inner, outer, left, right):
  """Equal to x times the Kronecker product, which is not formed."""
  w, x = node(inner, outer, left, right), jax.random.normal(KEY, x)
  full = lambda f: f[0] @ f[1] if isinstance(f, tuple) else f
  delta = 0.7 * np.kron(full(w.left), full(w.right)).reshape(*inner, *outer)
  np.testing.assert_allclose(w.layer_delta(), delta, rtol=1e-5)
  np.testing.assert_allclose(w.change(spec, x), jnp.einsum(spec, x, delta), atol=2e-5)
  text = str(jax.make_jaxpr(lambda scale, x: w.replace(scale=scale).change(spec, x))(w.scale, x))
  assert "f32[6,20]" not in text and f"f32[{','.join(map(str, (*inner, *outer)))}]" not in text


def test_gradients_are_those_of_the_formula():
  w, x = node((6,), (20,), (2, 2, 5), (3, 2, 4)), jax.random.normal(KEY, (2, 4, 6))
  change = lambda f: jnp.sin(w.replace(**f).change("BTD,DF->BTF", x)).sum()
  formula = lambda f: jnp.sin(jnp.einsum("BTD,DF->BTF", x, w.replace(**f).layer_delta())).sum()
  fields = dict(left=w.left, right=w.right)
  grads = jax.grad(change)(fields), jax.grad(formula)(fields)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), *grads)


SETTINGS = {
  "whole": dict(r=64),
  "right of low rank": dict(r=2, decompose_both=False),
  "both of low rank": dict(r=1, decompose_both=True),
  "factor": dict(r=3, decompose_factor=2),
  "half of the right side": dict(r=3),
  "half of the left side": dict(r=2, decompose_both=True),
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("init", lokr.INITS)
def test_shapes_and_initial_values_are_those_of_peft(base, name, init):
  torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
  kw = dict(SETTINGS[name])
  rank = kw.pop("r")
  params, mask = lokr.init(KEY, base, rank=rank, init=init, targets="up", **kw)
  ours = params["layers"]["mlp"]["up"]["kernel"]
  net = torch.nn.Sequential(torch.nn.Linear(16, 24))
  config = peft.LoKrConfig(
    target_modules=["0"], init_weights="lycoris" if init == "lycoris" else True, **SETTINGS[name]
  )
  theirs = peft.get_peft_model(net, config)
  assert methods.size(params, mask) == 3 * sum(p.numel() for p in theirs.parameters() if p.requires_grad)
  for suffix, (field, part) in lokr_form.NAMES.items():
    table, f = getattr(theirs.base_model.model[0], suffix), getattr(ours, field)
    assert ("default" in table) == (isinstance(f, tuple) == (part is not None)), suffix
    if "default" not in table:
      continue
    y, x = np.asarray(f if part is None else f[part]), table["default"].detach().numpy().T
    assert y[0].shape == x.shape
    bound = 1 / np.sqrt(x.shape[0])
    assert bool(x.any()) == bool(y.any()), suffix
    assert np.abs(y).max() <= bound and (not y.any() or np.abs(y).max() > 0.6 * bound), suffix


def test_single_layers_and_patterns(base):
  kw = dict(rank=2, decompose_both=True, decompose_factor=2)
  params, mask = lokr.init(KEY, base, targets="layers/[12]/mlp/up", rank_pattern={"layers/2/": 1}, **kw)
  w = params["layers"]["mlp"]["up"]["kernel"]
  np.testing.assert_array_equal(w.rank, [0, 2, 1])
  np.testing.assert_allclose(w.scale, [0, 4.0, 8.0])
  assert not isinstance(w.left, tuple) and w.right[0].shape == (3, 8, 2)
  assert methods.size(params, mask) == 2 * 2 * 2 + (2 + 1) * (8 + 12)
  with pytest.raises(errors.UserError, match=r"ranks \[2, 64\] of layers/mlp/up/kernel make a factor whole"):
    lokr.init(KEY, base, targets="up", rank=64, rank_pattern={"layers/2/": 2})


def test_dropout():
  """Whole outputs are dropped; the rest is scaled up only if asked."""
  x = jax.random.normal(KEY, (1, 4, 6))
  run = lambda **kw: node((6,), (20,), (2, 5), (3, 4), **kw).change("BTD,DF->BTF", x)[0]
  for rescale in (False, True):
    ratio = np.asarray(run(key=jax.random.key(1), dropout=0.5, rescale=rescale) / run())
    kept = ratio.mean(0) != 0
    assert 0 < kept.sum() < 20
    np.testing.assert_allclose(ratio, np.broadcast_to(kept / (kept.mean() if rescale else 1), (4, 20)), rtol=1e-5)


@pytest.mark.parametrize(
  "kw, message",
  [
    ({"targets": "w_q"}, "'w_q' matches nothing"),
    ({"decompose_factor": 0}, "decompose_factor"),
    ({"dropout": -1}, "dropout"),
    ({"init": "zeros"}, "config.method.init"),
  ],
)
def test_bad_settings_are_refused(base, kw, message):
  with pytest.raises(errors.UserError, match=message):
    lokr.init(KEY, base, **kw)


@pytest.mark.parametrize("name", FAMILIES)
def test_peft_loads_what_we_save_and_so_do_we(tmp_path, name):
  peft = pytest.importorskip("peft")
  ref, model, _ = load(tmp_path / "base", name)
  kw = {"rank_pattern": {"layers/1/": 1}, "decompose_factor": 4} if name == "llama" else {"decompose_both": True}
  params = noisy(*lokr.init(KEY, model.params, targets=paths(model, FAMILIES[name][2]), rank=2, **kw))
  peft_format.save(model, params, tmp_path / "adapter")
  assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["peft_type"] == "LOKR"
  again = peft_format.load(model, tmp_path / "adapter")
  assert tree.names(again) == tree.names(params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), params, again)
  same_outputs(model, params, peft.PeftModel.from_pretrained(ref, str(tmp_path / "adapter")).eval())


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("setting", ["whole", "both of low rank"])
def test_we_load_what_peft_saves(tmp_path, name, setting):
  peft = pytest.importorskip("peft")
  torch = pytest.importorskip("torch")
  ref, model, _ = load(tmp_path / "base", name)
  kw = {"layers_to_transform": [0, 2], "alpha_pattern": {"q_proj": 3}} if name == "llama" else {}
  config = peft.LoKrConfig(target_modules=FAMILIES[name][2], alpha=2, **SETTINGS[setting], **kw)
  theirs = peft.get_peft_model(ref, config).eval()
  with torch.no_grad():
    for k, p in theirs.named_parameters():
      if "lokr" in k:
        p.add_(0.3 * torch.randn_like(p))
  theirs.save_pretrained(str(tmp_path / "adapter"))
  same_outputs(model, peft_format.load(model, tmp_path / "adapter"), theirs, effect=1e-3)


def test_interleaved_axes(tmp_path):
  """GPT-NeoX's q, k and v lie head by head: no Kronecker product in our order is one in theirs."""
  peft = pytest.importorskip("peft")
  ref, model, _ = load(tmp_path / "base", "neox")
  params, _ = lokr.init(KEY, model.params, targets="qkv")
  with pytest.raises(peft_format.NoForm, match="interleaves the axes of layers/attn/qkv/kernel"):
    peft_format.save(model, params, tmp_path / "adapter")
  peft.get_peft_model(ref, peft.LoKrConfig(target_modules=["query_key_value"])).save_pretrained(tmp_path / "adapter")
  with pytest.raises(errors.UserError, match="query_key_value: a Kronecker product over its interleaved axes"):
    peft_format.load(model, tmp_path / "adapter")


@pytest.mark.parametrize(
  "config, tensors, message",
  [
    ({"decompose_both": 3, "decompose_factor": "2"}, None, "decompose_factor is '2'.*decompose_both is 3"),
    ({"module_dropout": 0.1}, None, "module_dropout is 0.1, expected 0"),
    ({"r": 1}, None, r"lokr_w2 is \(4, 4\), expected None.*lokr_w2_a is None, expected \(4, 1\)"),
    ({"decompose_factor": 2}, None, r"lokr_w1 is \(4, 4\), expected \(2, 2\)"),
    ({}, lambda t: {k.replace("q_proj", "w_proj"): x for k, x in t.items()}, "no place in this model: .*w_proj"),
    ({}, lambda t: {k: x for k, x in t.items() if "0.self_attn.q_proj.lokr_w2" not in k}, "0.self.*lokr_w2 is None"),
  ],
)
def test_foreign_adapters_are_refused(tmp_path, base, config, tensors, message):
  model = models.Model("tiny", CONFIG, base, None, {"model_type": "llama"})
  peft_format.save(model, lokr.init(KEY, base)[0], tmp_path)
  edited(tmp_path, config, tensors)
  with pytest.raises(errors.UserError, match=message):
    peft_format.load(model, tmp_path)
