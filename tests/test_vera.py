"""VeRA: the formula, what is shared, and parity with the peft library."""

import jax
import numpy as np
import pytest

from lora_jax import errors, methods, models, tree, weights
from lora_jax.formats import adapter, peft as peft_format
from lora_jax.methods import vera
from lora_jax.model import transformer
from tests.noise import moved
from tests.test_dora import apply
from tests.test_families import outputs
from tests.test_lora import first_output, load, load_family
from tests.test_models import torch_logits

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

CONFIG = transformer.Config(50, 16, 3, 4, 2, 4, 24, dtype="float32", tied=True)
KEY = jax.random.key(0)
TOKENS = np.random.default_rng(0).integers(0, 50, (2, 12))


@pytest.fixture(scope="module")
def base():
  return transformer.init(CONFIG, KEY)


def test_formula_with_slices_of_the_shared_matrices(base):
  params, mask = vera.init(KEY, base, rank=5, targets="all-linear")
  params = moved(params, mask)
  a, b = params["shared"]["vera"]["a"], params["shared"]["vera"]["b"]
  assert a.shape == (5, 24) and b.shape == (24, 5)
  x = jax.random.normal(KEY, (2, 3, 16))
  for name, out, spec in (
    ("attn/q", 16, "BTD,DNH->BTNH"),
    ("attn/k", 8, "BTD,DKH->BTKH"),
    ("mlp/up", 24, "BTD,DF->BTF"),
  ):
    node = params["layers"][name[:-2] if name != "mlp/up" else "mlp"][name.split("/")[1]]["kernel"]
    layer = weights.bind(jax.tree.map(lambda v: v[1], node), params["shared"])
    change = (((x @ a[:, :16].T) * layer.d) @ b[:out].T) * layer.b.reshape(-1)
    want = weights.dot(spec, x, layer.base) + change.reshape(2, 3, *layer.b.shape)
    np.testing.assert_allclose(layer.dot(spec, x), want, rtol=1e-4, atol=1e-5)


def test_starts_as_the_model_with_kaiming_matrices_that_do_not_depend_on_the_layers(base):
  params, mask = vera.init(KEY, base, rank=64, targets="q,v,down", d_init=0.3)
  np.testing.assert_array_equal(apply(CONFIG, params, TOKENS), apply(CONFIG, base, TOKENS))
  arrays = params["shared"]["vera"]
  for x in arrays.values():
    bound = np.sqrt(6 / x.shape[1])
    assert np.abs(x).max() <= bound
    np.testing.assert_allclose(x.std(), bound / np.sqrt(3), rtol=0.05)
  node = params["layers"]["attn"]["q"]["kernel"]
  assert (np.asarray(node.d) == np.float32(0.3)).all() and not node.b.any()
  assert not mask["shared"]["vera"]["a"] and not mask["shared"]["vera"]["b"]


def test_only_vectors_are_counted(base):
  """Table 1 of the paper: L (out + r) for each kind of matrix."""
  params, mask = vera.init(KEY, base, rank=7, targets="q,v")
  assert methods.size(params, mask) == 3 * (16 + 7) + 3 * (8 + 7)
  params, mask = vera.init(KEY, base, rank=7, targets="layers/1/attn/q")
  assert methods.size(params, mask) == 16 + 7
  params = moved(params, mask)
  merged = weights.merge(params)["layers"]["attn"]["q"]["kernel"]
  np.testing.assert_array_equal(merged[0], base["layers"]["attn"]["q"]["kernel"][0])
  assert np.abs(merged[1] - base["layers"]["attn"]["q"]["kernel"][1]).max() > 1e-3


@pytest.mark.slow
def test_shared_matrices_get_no_gradient_and_reach_head_classifier_and_encoder():
  """Everywhere that a weight is used outside of the stacked layers."""
  for kw in (dict(tied=False), dict(head="classification"), dict(encoder_layers=2, position="relative", norm="rms")):
    config = transformer.Config(50, 16, 2, 4, 4, 4, 24, dtype="float32", **{"tied": True, **kw})
    params = transformer.init(config, KEY)
    targets = {"classification": "classifier,q"}.get(config.head, "q" if config.encoder_layers else "head,q")
    adapted = moved(*vera.init(KEY, params, rank=4, targets=targets), size=1.0)

    def run(p):
      given = {}
      if config.encoder_layers:
        given = dict(encoded=transformer.encode(config, p, TOKENS))
      x = transformer.hidden(config, p, TOKENS, **given)[0]
      return transformer.classify(config, p, x) if config.head == "classification" else transformer.logits(config, p, x)

    got = run(adapted)
    assert np.abs(got - run(params)).max() > 1e-3
    np.testing.assert_allclose(got, run(weights.merge(adapted)), atol=1e-4)
    if config.head != "classification":
      x = transformer.hidden(
        config,
        adapted,
        TOKENS,
        **({} if not config.encoder_layers else dict(encoded=transformer.encode(config, adapted, TOKENS))),
      )[0]
      np.testing.assert_array_equal(transformer.logits(config, transformer.head(adapted), x), got)


def test_dropout_acts_before_a(base):
  params, mask = vera.init(KEY, base, rank=4, targets="q", dropout=0.5)
  params = moved(params, mask)
  node = jax.tree.map(lambda x: x[0], params["layers"]["attn"]["q"]["kernel"])
  node = weights.bind(node, params["shared"])
  x = jax.random.normal(KEY, (1, 4, 16))
  dropped = node.replace(key=KEY).change("BTD,DNH->BTNH", x)
  np.testing.assert_allclose(dropped, node.change("BTD,DNH->BTNH", weights.dropout(x, 0.5, KEY)), rtol=1e-5, atol=1e-7)
  seeded = weights.with_dropout(params, KEY)["layers"]["attn"]["q"]["kernel"]
  assert len(np.unique(jax.random.key_data(seeded.key), axis=0)) == 3
  assert np.isfinite(apply(CONFIG, weights.with_dropout(params, KEY), TOKENS)).all()


@pytest.mark.parametrize("targets", ["q,v", "all-linear", "layers/1/attn/q"])
def test_peft_loads_what_we_save_and_so_do_we(tmp_path, targets):
  peft = pytest.importorskip("peft")
  ref, model = load(tmp_path / "base", num_key_value_heads=2)
  params = moved(*vera.init(KEY, model.params, targets=targets, rank=6))
  peft_format.save(model, params, tmp_path / "adapter")
  theirs = peft.PeftModel.from_pretrained(ref, str(tmp_path / "adapter")).eval()
  tokens = np.arange(60).reshape(2, 30)
  ours = apply(model.config, params, tokens)
  np.testing.assert_allclose(ours, torch_logits(theirs, tokens), atol=1e-4, rtol=1e-4)
  assert np.abs(ours - apply(model.config, model.params, tokens)).max() > 1e-2
  again = peft_format.load(model, tmp_path / "adapter")
  np.testing.assert_allclose(apply(model.config, again, tokens), ours, atol=1e-5)
  assert tree.names(again) == tree.names(params)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_we_load_what_peft_saves(tmp_path, name):
  peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
  if name == "llama":
    ref, model = load(tmp_path / "base", num_key_value_heads=2)
    targets = ["q_proj", "v_proj", "down_proj"]
  else:
    ref, model, targets = load_family(tmp_path / "base", name)
  config = peft.VeraConfig(target_modules=targets, r=5, fan_in_fan_out=name == "gpt2")
  theirs = peft.get_peft_model(ref, config).eval()
  with torch.no_grad():
    for k, p in theirs.named_parameters():
      if "vera_lambda" in k:
        p.add_(0.5 * torch.randn_like(p))
  theirs.save_pretrained(str(tmp_path / "adapter"))
  params = peft_format.load(model, tmp_path / "adapter")
  ours = outputs(model.config, params, TOKENS)
  np.testing.assert_allclose(ours, first_output(theirs), atol=1e-4, rtol=1e-4)
  assert np.abs(ours - outputs(model.config, model.params, TOKENS)).max() > 1e-2


def test_heads_in_another_order_are_saved_in_our_form(tmp_path):
  """GPT-NeoX interleaves q, k and v: the first rows of B would not be those of its first outputs."""
  _, model, _ = load_family(tmp_path / "base", "neox")
  method = [{"name": "vera", "targets": "qkv", "rank": 4}]
  params, mask = methods.init(KEY, model.params, method)
  params = moved(params, mask)
  with pytest.raises(peft_format.NoForm, match="another order"):
    peft_format.save(model, params, tmp_path / "no")
  adapter.save(model, params, mask, method, tmp_path / "adapter")
  jax.tree.map(np.testing.assert_array_equal, adapter.load(model, tmp_path / "adapter"), params)


def test_misfits_are_listed_together(tmp_path, base):
  import safetensors.numpy

  model = models.Model("tiny", CONFIG, base, None, {"model_type": "llama"})
  params, _ = vera.init(KEY, base, rank=4)
  peft_format.save(model, params, tmp_path)
  path = tmp_path / "adapter_model.safetensors"
  good = safetensors.numpy.load_file(path)
  names = sorted(k for k in good if k.endswith("vera_lambda_b"))
  bad = dict(good)
  del bad[names[0]]
  bad[names[1]] = bad[names[1]][:-1].copy()
  bad[names[2].replace("_proj", "_what")] = bad.pop(names[2])
  safetensors.numpy.save_file(bad, path)
  with pytest.raises(errors.UserError) as e:
    peft_format.load(model, tmp_path)
  for said in (*(n.removeprefix("base_model.model.") for n in names[:2]), "_what"):
    assert said in str(e.value)
  for edit, message in (
    (lambda t: {k: x for k, x in t.items() if "vera_A" not in k}, "save_projection=True"),
    (lambda t: t | {"base_model.vera_A": t["base_model.vera_A"][:3].copy()}, "expected .* r=4"),
    (lambda t: t | {"base_model.vera_A": t["base_model.vera_A"][:, :9].copy()}, "too small"),
    (lambda t: t | {"base_model.vera_C": t["base_model.vera_A"]}, "vera_C"),
  ):
    safetensors.numpy.save_file(edit(dict(good)), path)
    with pytest.raises(errors.UserError, match=message):
      peft_format.load(model, tmp_path)


@pytest.mark.parametrize(
  "kw, message",
  [({"targets": "w_q"}, "matches nothing"), ({"rank": 0}, "rank >= 1"), ({"dropout": 1.0}, "dropout")],
)
def test_bad_settings_are_refused(base, kw, message):
  with pytest.raises(errors.UserError, match=message):
    vera.init(KEY, base, **kw)


def test_a_second_one_is_refused_and_unbound_nodes_say_so(base):
  params, _ = vera.init(KEY, base, rank=2, targets="q")
  with pytest.raises(errors.UserError, match="already"):
    vera.init(KEY, params, rank=2, targets="v")
  with pytest.raises(ValueError, match="bind"):
    weights.dense(params["layers"]["attn"]["q"]["kernel"])
