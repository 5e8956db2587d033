"""LoHa: its formula and gradients, and parity with the peft library."""

import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import errors, methods, models, tree, weights
from lora_jax.formats import adapter, peft as peft_format
from lora_jax.formats.peft import loha as loha_form
from lora_jax.methods import loha
from lora_jax.model import transformer
from tests import test_families, test_lora
from tests.test_families import TOKENS, jitted

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

CONFIG = transformer.Config(50, 16, 3, 4, 2, 4, 24, dtype="float32", tied=True)
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def base():
  return transformer.init(CONFIG, KEY)


def noisy(params, mask, seed=1, deviation=0.3):
  """Parameters with noise on what is trained, zero where a smaller rank is padded."""
  rng = np.random.default_rng(seed)
  shake = lambda x, m: jnp.asarray(x + deviation * rng.standard_normal(x.shape), x.dtype) if m else x
  clean = lambda _, w: w.clean() if hasattr(w, "clean") else w
  return weights.map_nodes(clean, jax.tree.map(shake, params, mask))


def node(inner=(6,), outer=(2, 5), r=3, seed=0, **kw):
  """A LoHa node that is not stacked, all factors random."""
  sizes = dict(base=(*inner, *outer), a1=(*inner, r), b1=(r, *outer), a2=(*inner, r), b2=(r, *outer))
  keys = jax.random.split(jax.random.key(seed), 5)
  arrays = {name: jax.random.normal(k, s) for (name, s), k in zip(sizes.items(), keys, strict=True)}
  return loha.LoHa(**arrays, scale=jnp.float32(0.7), rank=jnp.int32(r), **kw)


@pytest.mark.parametrize("r, formed", [(2, False), (3, True)])
@pytest.mark.parametrize(
  "spec, x, inner, outer", [("BTD,DNH->BTNH", (2, 4, 6), (6,), (4, 5)), ("BTNH,NHD->BTD", (2, 4, 4, 5), (4, 5), (6,))]
)
def test_change_is_the_formula(spec, x, inner, outer, r, formed):
  """Both ways of computing it, by whether the jaxpr has a matrix of the weight's size."""
  w, x = node(inner, outer, r), jax.random.normal(KEY, x)
  delta = 0.7 * jnp.tensordot(w.a1, w.b1, 1) * jnp.tensordot(w.a2, w.b2, 1)
  np.testing.assert_allclose(w.layer_delta(), delta, rtol=1e-5)
  np.testing.assert_allclose(w.change(spec, x), jnp.einsum(spec, x, delta), atol=2e-5)
  shape = ",".join(map(str, (*inner, *outer)))
  text = str(jax.make_jaxpr(lambda a1, x: w.replace(a1=a1).change(spec, x))(w.a1, x))
  assert (f"f32[{shape}]" in text) == formed


def test_gradients_are_those_of_the_formula_and_of_peft():
  torch = pytest.importorskip("torch")
  layer = pytest.importorskip("peft.tuners.loha.layer")
  w, x = node(inner=(6,), outer=(5,)), jax.random.normal(KEY, (2, 4, 6))
  g = jax.random.normal(jax.random.key(9), (2, 4, 5))

  def ours(fields):
    return (w.replace(**fields).change("BTD,DF->BTF", x) * g).sum()

  def formula(fields):
    a, b = (fields[f"a{i}"] @ fields[f"b{i}"] for i in (1, 2))
    return (jnp.einsum("BTD,DF->BTF", x, 0.7 * a * b) * g).sum()

  fields = {f: getattr(w, f) for f in loha.FACTORS}
  grads = jax.grad(ours)(fields)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), grads, jax.grad(formula)(fields))
  theirs = {f: torch.tensor(np.asarray(v).T, requires_grad=True) for f, v in fields.items()}
  delta = layer.make_weight(*(theirs[f] for f in ("b1", "a1", "b2", "a2")), scale=torch.tensor(0.7))
  (torch.nn.functional.linear(torch.tensor(np.asarray(x)), delta) * torch.tensor(np.asarray(g))).sum().backward()
  for f in fields:
    np.testing.assert_allclose(grads[f], theirs[f].grad.numpy().T, atol=1e-4, err_msg=f)


def test_forward_keeps_no_matrix_for_the_backward_pass():
  """Where the change has to be formed, what is kept is the input and the factors."""
  w, x = node(inner=(8,), outer=(8,)), jax.random.normal(KEY, (2, 3, 8))
  _, back = jax.vjp(lambda a1: w.replace(a1=a1).change("BTD,DF->BTF", x), w.a1)
  kept = [leaf.shape for leaf in jax.tree.leaves(back) if hasattr(leaf, "shape")]
  assert kept and (8, 8) not in kept


def test_initial_values(base):
  """PEFT: kaiming_uniform_(a=sqrt(5)), one factor zero. LyCORIS: normal with deviations 0.1 and 1, another zero."""
  torch = pytest.importorskip("torch")
  peft = pytest.importorskip("peft")
  ours = loha.init(KEY, base, rank=64)[0]["layers"]["attn"]["q"]["kernel"]
  net = torch.nn.Sequential(torch.nn.Linear(16, 16))
  theirs = peft.get_peft_model(net, peft.LoHaConfig(target_modules=["0"], r=64)).base_model.model[0]
  for name, field in loha_form.NAMES.items():
    x, y = getattr(theirs, name)["default"].detach().numpy(), np.asarray(getattr(ours, field))
    np.testing.assert_allclose(y.std(), x.std(), rtol=0.1, err_msg=name)
    np.testing.assert_allclose(np.abs(y).max(), np.abs(x).max(), rtol=0.1, err_msg=name)
  ours = loha.init(KEY, base, rank=64, init="lycoris")[0]["layers"]["attn"]["q"]["kernel"]
  for field, deviation in dict(a1=1.0, b1=0.1, a2=1.0, b2=0.0).items():
    np.testing.assert_allclose(np.std(getattr(ours, field)), deviation, rtol=0.05, err_msg=field)


def test_a_column_does_not_depend_on_the_rank(base):
  a1 = lambda rank: loha.init(KEY, base, rank=rank)[0]["layers"]["attn"]["v"]["kernel"].a1
  np.testing.assert_array_equal(a1(8)[..., :3], a1(3))


@pytest.mark.slow
def test_single_layers_and_patterns(base):
  params, mask = loha.init(
    KEY, base, targets=["layers/[12]/attn/q/", "down"], rank=4, rank_pattern={"layers/2/": 2}, alpha_pattern={"q": 6.0}
  )
  w = params["layers"]["attn"]["q"]["kernel"]
  np.testing.assert_array_equal(w.rank, [0, 4, 2])
  np.testing.assert_allclose(w.scale, [0, 1.5, 3.0])
  down = 4 + 4 + 2
  assert methods.size(params, mask) == 6 * 2 * (16 + 16) + down * 2 * (24 + 16)
  trainable, frozen = tree.split(noisy(params, mask), mask)
  loss = lambda t: test_families.outputs(CONFIG, tree.join(t, frozen), TOKENS % 50).std()
  g = test_families.fast(jax.grad(loss))(trainable)["layers"]["attn"]["q"]["kernel"]
  assert not g.a1[0].any() and not g.b2[2, 2:].any() and g.a1[2, :, :2].all()


def test_dropout():
  """Whole outputs are dropped and the others scaled so that the mean of the mask is 1; without a key none is."""
  w, x = node(dropout=0.5), jax.random.normal(KEY, (1, 4, 6))
  clean = w.change("BTD,DNH->BTNH", x)
  np.testing.assert_array_equal(clean, node().change("BTD,DNH->BTNH", x))
  ratio = np.asarray(w.replace(key=jax.random.key(3)).change("BTD,DNH->BTNH", x) / clean)[0]
  kept = ratio.mean(0) != 0
  np.testing.assert_allclose(ratio, np.broadcast_to(kept / kept.mean(), ratio.shape), rtol=1e-4)
  assert 0 < kept.sum() < kept.size
  assert float(w.replace(key=KEY, dropout=0.999999).change("BTD,DNH->BTNH", x).sum()) == 0


@pytest.mark.parametrize(
  "kw, message",
  [
    ({"targets": "w_q"}, "'w_q' matches nothing"),
    ({"rank": 0}, "rank 0"),
    ({"rank": 1.5}, "whole"),
    ({"dropout": 1.0}, "dropout"),
    ({"init": "zeros"}, "config.method.init"),
  ],
)
def test_bad_settings_are_refused(base, kw, message):
  with pytest.raises(errors.UserError, match=message):
    loha.init(KEY, base, **kw)


# In PEFT LoHa and LoKr take `nn.Linear` alone: (class, config, target_modules).
FAMILIES = {
  **{k: v for k, v in test_lora.FAMILIES.items() if k in ("phi3", "neox", "bert")},
  "llama": ("LlamaForCausalLM", test_families.SMALL, ["q_proj", "v_proj", "o_proj", "down_proj"]),
  "t5": ("T5ForConditionalGeneration", test_families.T5 | {"num_decoder_layers": 2}, ["q", "v", "o", "wo"]),
}


def load(directory, name):
  """(transformers model, ours, target_modules) of a family, random."""
  torch = pytest.importorskip("torch")
  cls, config, targets = FAMILIES[name]
  cls = getattr(pytest.importorskip("transformers"), cls)
  torch.manual_seed(0)
  ref = cls(cls.config_class(**config, attn_implementation="eager")).eval()
  ref.save_pretrained(directory)
  return ref, models.load(str(directory), dtype="float32"), targets


def paths(model, targets):
  """Names of our leaves of torch modules whose last parts are `targets`."""
  return [re.escape(k.path) for k in model.keys if k.module.rpartition(".")[2] in targets and k.path.endswith("kernel")]


def same_outputs(model, params, theirs, effect=1e-2):
  """Ours equal those of a peft model, and the adapter has an effect."""
  torch = pytest.importorskip("torch")
  with torch.no_grad():
    want = test_families.run_reference(theirs).numpy()
  ours = jitted(model.config, params, TOKENS)
  np.testing.assert_allclose(ours, want, atol=1e-4, rtol=1e-4)
  assert np.abs(ours - jitted(model.config, model.params, TOKENS)).max() > effect


@pytest.mark.parametrize("name", FAMILIES)
def test_peft_loads_what_we_save_and_so_do_we(tmp_path, name):
  peft = pytest.importorskip("peft")
  ref, model, targets = load(tmp_path / "base", name)
  kw = {"rank_pattern": {"layers/1/": 2}, "alpha_pattern": {"down": 5.0}} if name == "llama" else {}
  params = noisy(*loha.init(KEY, model.params, targets=paths(model, targets), rank=3, **kw))
  peft_format.save(model, params, tmp_path / "adapter")
  config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
  assert config["peft_type"] == "LOHA" and {t.rpartition(".")[2] for t in config["target_modules"]} == set(targets)
  again = peft_format.load(model, tmp_path / "adapter")
  assert tree.names(again) == tree.names(params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), params, again)
  same_outputs(model, params, peft.PeftModel.from_pretrained(ref, str(tmp_path / "adapter")).eval())


@pytest.mark.parametrize("name", FAMILIES)
def test_we_load_what_peft_saves(tmp_path, name):
  peft = pytest.importorskip("peft")
  torch = pytest.importorskip("torch")
  ref, model, targets = load(tmp_path / "base", name)
  kw = {"layers_to_transform": [0, 2], "rank_pattern": {"layers.2.self_attn.q_proj": 2}} if name == "llama" else {}
  theirs = peft.get_peft_model(ref, peft.LoHaConfig(target_modules=targets, r=4, alpha=6, **kw)).eval()
  with torch.no_grad():
    for k, p in theirs.named_parameters():
      if "hada" in k:
        p.add_(0.3 * torch.randn_like(p))
  theirs.save_pretrained(str(tmp_path / "adapter"))
  same_outputs(model, peft_format.load(model, tmp_path / "adapter"), theirs)


@pytest.mark.parametrize("targets", ["qkv", "q,v"])
def test_what_peft_has_no_form_for(tmp_path, targets):
  """GPT-2's Conv1D, and parts of one; they are saved in our own form."""
  cls = pytest.importorskip("transformers").GPT2LMHeadModel
  cls(cls.config_class(**test_families.GPT2)).save_pretrained(tmp_path)
  model = models.load(str(tmp_path), dtype="float32")
  params, mask = loha.init(KEY, model.params, targets=targets)
  params = noisy(params, mask)
  with pytest.raises(peft_format.NoForm, match="whole `nn.Linear` .* not on layers/attn/qkv"):
    peft_format.save(model, params, tmp_path / "adapter")
  adapter.save(model, params, mask, [{"name": "loha", "targets": targets}], tmp_path / "adapter")
  jax.tree.map(np.testing.assert_array_equal, adapter.load(model, tmp_path / "adapter"), params)


@pytest.mark.parametrize("order", [1, -1])
def test_a_second_adapter_of_a_matrix_is_not_lost(tmp_path, base, order):
  model = models.Model("tiny", CONFIG, base, None, {"model_type": "llama"})
  method = [{"name": "lora"}, {"name": "loha"}][::order]
  params, _ = methods.init(KEY, base, method)
  with pytest.raises(peft_format.NoForm, match="without other adapters, not on"):
    peft_format.save(model, params, tmp_path / "adapter", method=method)


def edited(directory, config=None, tensors=None):
  """Edits a saved adapter."""
  import safetensors.numpy

  path = directory / "adapter_config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | (config or {})))
  path = directory / "adapter_model.safetensors"
  safetensors.numpy.save_file((tensors or dict)(safetensors.numpy.load_file(path)), path)


@pytest.mark.parametrize(
  "config, tensors, message",
  [
    ({"alpha": "8"}, None, "alpha is '8', expected a number"),
    ({"rank_dropout": 2, "alpha": math.inf}, None, "alpha is inf.*rank_dropout is 2, expected"),
    ({"modules_to_save": ["x"]}, None, "modules_to_save"),
    ({"module_dropout": 0.1}, None, "module_dropout is 0.1, expected 0"),
    ({"r": 4}, None, r"hada_w1_a is \(16, 8\), expected \(16, 4\)"),
    ({}, lambda t: {k.replace("q_proj", "w_proj"): x for k, x in t.items()}, "no place in this model: .*w_proj"),
    ({}, lambda t: {k: x for k, x in t.items() if "0.self_attn.q_proj.hada_w2_b" not in k}, "hada_w2_b is None"),
    ({}, lambda t: {k: x[..., :-1].copy() for k, x in t.items()}, "(?s)hada_w1_a is.*hada_w2_b is"),
  ],
)
def test_foreign_adapters_are_refused(tmp_path, base, config, tensors, message):
  model = models.Model("tiny", CONFIG, base, None, {"model_type": "llama"})
  peft_format.save(model, loha.init(KEY, base)[0], tmp_path)
  edited(tmp_path, config, tensors)
  with pytest.raises(errors.UserError, match=message):
    peft_format.load(model, tmp_path)
