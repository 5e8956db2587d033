"""DoRA: the formula, its gradient and what it computes on the way, and parity with the peft library."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import errors, methods, models, tree, weights
from lora_jax.formats import peft as peft_format
from lora_jax.formats.peft import dora as dora_form
from lora_jax.methods import dora, lora
from lora_jax.model import transformer
from tests.noise import moved
from tests.packed import packed
from tests.test_families import outputs
from tests.test_lora import first_output, load, load_family
from tests.test_models import torch_logits

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

CONFIG = transformer.Config(50, 16, 3, 4, 2, 4, 24, dtype="float32", tied=True)
KEY = jax.random.key(0)
TOKENS = np.random.default_rng(0).integers(0, 50, (2, 12))
SPEC = "BTD,DNH->BTNH"
apply = jax.jit(models.apply, static_argnums=0)


@pytest.fixture(scope="module")
def base():
  return transformer.init(CONFIG, KEY)


def one(seed=0, shape=(6, 2, 5), rank=3, **kw):
  """A node on one matrix, everything random, and an input."""
  keys = jax.random.split(jax.random.key(seed), 5)
  w, n = jax.random.normal(keys[0], shape), 1
  a, b = jax.random.normal(keys[1], (*shape[:n], rank)), jax.random.normal(keys[2], (rank, *shape[n:]))
  node = weights.LoRA(w, a, b, jnp.float32(0.7), jnp.int32(rank), **kw)
  magnitude = jax.random.uniform(keys[3], shape[n:]) + 0.5
  return dora.DoRA(node, magnitude, dora.norm(w, 0, n)), jax.random.normal(keys[4], (2, 4, *shape[:n]))


def dense(a, b, magnitude, w, scale=0.7, start=None):
  """Equation 5 by the letter, with the norm held constant."""
  v = w + scale * (jnp.tensordot(a, b, 1) - (0 if start is None else jnp.tensordot(*start, 1)))
  return magnitude * v / jax.lax.stop_gradient(jnp.sqrt(jnp.sum(v**2, 0)))


@pytest.mark.parametrize("with_start", [False, True])
def test_formula(with_start):
  start = tuple(0.3 * jax.random.normal(jax.random.key(i), s) for i, s in enumerate(((6, 3), (3, 2, 5))))
  node, x = one(start=start if with_start else None)
  lo = node.base
  want = dense(lo.a, lo.b, node.magnitude, lo.base, start=lo.start)
  np.testing.assert_allclose(node.dense(), want, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(node.dot(SPEC, x), jnp.einsum(SPEC, x, want), rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(jnp.sqrt(jnp.sum(node.dense() ** 2, 0)), node.magnitude, rtol=1e-5)


def test_gradient_is_that_of_the_formula_with_a_constant_norm():
  node, x = one()
  parts = node.base.a, node.base.b, node.magnitude

  def ours(a, b, m):
    return jnp.sum(jnp.sin(node.replace(base=node.base.replace(a=a, b=b), magnitude=m).dot(SPEC, x)))

  def formula(a, b, m):
    return jnp.sum(jnp.sin(jnp.einsum(SPEC, x, dense(a, b, m, node.base.base))))

  got, want = (jax.grad(f, (0, 1, 2))(*parts) for f in (ours, formula))
  for g, w in zip(got, want, strict=True):
    np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-5)


def shapes_of(jaxpr):
  """Shapes of all floating-point values that a program computes, those of its inner programs too."""
  for eqn in jaxpr.eqns:
    yield from (v.aval.shape for v in eqn.outvars if jnp.issubdtype(v.aval.dtype, jnp.floating))
    for inner in jax.tree.leaves(eqn.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
      if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
        yield from shapes_of(getattr(inner, "jaxpr", inner))


@pytest.mark.slow
def test_training_forms_nothing_of_the_size_of_a_matrix():
  """In bfloat16, where a cast of a matrix would be seen too."""
  config = transformer.Config(50, 16, 3, 4, 2, 4, 24, dtype="bfloat16", tied=True)
  params = transformer.init(config, KEY)
  params, mask = dora.init(KEY, params, targets="q,v,down", rank=2, dropout=0.1)
  params = weights.with_dropout(params, KEY)
  mask = jax.tree.map(lambda _, m: m, params, _with_keys(mask))
  trainable, frozen = tree.split(params, mask)

  def loss(trainable, forward):
    return forward(tree.join(trainable, frozen)).std()

  plain = lambda params: models.apply(config, params, TOKENS[:, :5])
  merged = lambda params: models.apply(config, weights.merge(params), TOKENS[:, :5])
  matrices = {(16, 4, 4), (16, 2, 4), (24, 16), (16, 24)}
  forms = lambda forward: (
    matrices & set(shapes_of(jax.make_jaxpr(jax.grad(loss), static_argnums=1)(trainable, forward).jaxpr))
  )
  assert not forms(plain)
  assert forms(merged)


def _with_keys(mask):
  """A mask for a tree with dropout keys."""
  return jax.tree.map(
    lambda w: w.replace(base=w.base.replace(key=False)) if isinstance(w, dora.DoRA) else w,
    mask,
    is_leaf=weights.is_node,
  )


@pytest.mark.slow
@pytest.mark.parametrize("dtype, kw", [("float32", {"rslora": True, "init": "paper"}), ("bfloat16", {"init": "pissa"})])
def test_starts_as_the_model(dtype, kw):
  config = transformer.Config(50, 16, 3, 4, 2, 4, 24, dtype=dtype, tied=True)
  base = transformer.init(config, KEY)
  params, mask = dora.init(KEY, base, targets="all-linear", rank=2, **kw)
  run = jax.jit(lambda p: models.apply(config, p, TOKENS))
  np.testing.assert_array_equal(run(params), run(base))
  node = params["layers"]["mlp"]["down"]["kernel"]
  want = np.linalg.norm(np.asarray(node.base.base, np.float32), axis=1)
  np.testing.assert_allclose(node.magnitude, want, rtol=1e-6)
  trained = {k.rpartition("/")[2] for k, m in tree.flatten(mask).items() if m}
  assert trained == {"a", "b", "magnitude"}


@pytest.mark.slow
def test_patterns_and_single_layers(base):
  params, mask = dora.init(KEY, base, targets=["layers/[12]/attn/q/"], rank=4, rank_pattern={"layers/2/": 2})
  assert methods.size(params, mask) == (4 + 2) * 32 + 2 * 16
  params = moved(params, mask)
  x = jax.random.normal(KEY, (1, 3, 16))
  node = params["layers"]["attn"]["q"]["kernel"]
  layer = lambda i: jax.tree.map(lambda v: v[i], node)
  np.testing.assert_array_equal(layer(0).dot(SPEC, x), weights.dot(SPEC, x, base["layers"]["attn"]["q"]["kernel"][0]))
  assert np.abs(layer(1).dot(SPEC, x) - weights.dot(SPEC, x, layer(1).base.base)).max() > 1e-2
  merged = weights.merge(params)
  np.testing.assert_array_equal(merged["layers"]["attn"]["q"]["kernel"][0], base["layers"]["attn"]["q"]["kernel"][0])
  np.testing.assert_allclose(apply(CONFIG, merged, TOKENS), apply(CONFIG, params, TOKENS), atol=1e-5, rtol=1e-5)


def test_outputs_without_weights_stay_zero_and_finite():
  """Rows of a padded vocabulary are zeros, which have no direction."""
  node, x = one()
  w = node.base.base.at[:, 1, 2].set(0)
  node = node.replace(base=node.base.replace(base=w, b=jnp.zeros_like(node.base.b)))
  norm = dora.norm(w, 0, 1)
  f = lambda m: node.replace(magnitude=m, norm=norm).dot(SPEC, x)
  np.testing.assert_array_equal(f(norm), weights.dot(SPEC, x, w))
  assert np.isfinite(jax.grad(lambda m: jnp.sum(jnp.sin(f(m))))(norm)).all()


@pytest.mark.slow
def test_over_any_base(base):
  """A packed weight, and another adapter."""
  adapted, mask = lora.init(KEY, base, targets="q", rank=3)
  for tree_ in (packed(base), moved(adapted, mask)):
    params, mask = dora.init(KEY, tree_, targets="q", rank=2)
    assert {k for k, m in tree.flatten(mask).items() if m} == {
      f"layers/attn/q/kernel/{k}" for k in ("base/a", "base/b", "magnitude")
    }
    np.testing.assert_array_equal(apply(CONFIG, params, TOKENS), apply(CONFIG, tree_, TOKENS))
    params = moved(params, mask)
    want = apply(CONFIG, params, TOKENS)
    np.testing.assert_allclose(apply(CONFIG, weights.merge(params), TOKENS), want, atol=1e-4)


def peft_layer(rank=3, **kw):
  """A linear layer with DoRA of the peft library, random, and ours."""
  peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
  torch.manual_seed(0)
  module = torch.nn.ModuleDict({"q": torch.nn.Linear(6, 10)})
  config = peft.LoraConfig(target_modules=["q"], r=rank, lora_alpha=5, use_dora=True, init_lora_weights=False, **kw)
  layer = peft.get_peft_model(module, config).base_model.model["q"]
  magnitude = layer.lora_magnitude_vector["default"].weight
  with torch.no_grad():
    magnitude.mul_(1 + 0.3 * torch.rand_like(magnitude))
  array = lambda t: jnp.asarray(t.detach().numpy())
  a, b = (array(layer.lora_A["default"].weight), array(layer.lora_B["default"].weight))
  w = array(layer.base_layer.weight).T
  node = weights.LoRA(w, a.T, b.T, jnp.float32(5 / rank), jnp.int32(rank))
  return torch, layer, dora.DoRA(node, array(magnitude), dora.norm(w, 0, 1)), array(layer.base_layer.bias)


def test_output_gradient_and_dropout_are_those_of_peft(monkeypatch):
  torch, layer, node, bias = peft_layer(lora_dropout=0.5)
  x = torch.randn(4, 6)
  kept = torch.randint(0, 2, x.shape) * 2.0

  class Dropped(torch.nn.Module):
    def forward(self, x):
      return x * kept

  layer.lora_dropout["default"] = Dropped()
  layer.train()
  theirs = layer(x)
  torch.sin(theirs).sum().backward()
  monkeypatch.setattr(weights, "dropout", lambda x, rate, key: x if key is None else x * jnp.asarray(kept.numpy()))

  def ours(parts, node=node, key=KEY):
    lo = node.base.replace(a=parts[0], b=parts[1], key=key, dropout=0.5)
    return dora.DoRA(lo, parts[2], node.norm).dot("TD,DF->TF", jnp.asarray(x.numpy())) + bias

  parts = node.base.a, node.base.b, node.magnitude
  np.testing.assert_allclose(ours(parts), theirs.detach().numpy(), atol=1e-5)
  grads = jax.grad(lambda p: jnp.sum(jnp.sin(ours(p))))(parts)
  want = [layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.lora_magnitude_vector["default"].weight]
  for g, p in zip(grads, want, strict=True):
    np.testing.assert_allclose(g.T, p.grad.numpy(), atol=1e-4)
  np.testing.assert_allclose(ours(parts, key=None), layer.eval()(x).detach().numpy(), atol=1e-5)


SETTINGS = {
  "q,v": {},
  "patterns": {"targets": ["q,up", "layers/[01]/attn/v"], "rank": 4, "rank_pattern": {"layers/1/": 2}, "alpha": 5.0},
  "head": {"targets": "head,o", "rank": 2, "rslora": True},
  "pissa": {"targets": "all-linear", "rank": 2, "init": "pissa"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_peft_loads_what_we_save_and_so_do_we(tmp_path, name):
  peft = pytest.importorskip("peft")
  ref, model = load(tmp_path / "base", num_key_value_heads=2)
  params = moved(*dora.init(KEY, model.params, **SETTINGS[name]))
  peft_format.save(model, params, tmp_path / "adapter")
  theirs = peft.PeftModel.from_pretrained(ref, str(tmp_path / "adapter")).eval()
  tokens = np.arange(60).reshape(2, 30)
  ours = apply(model.config, params, tokens)
  np.testing.assert_allclose(ours, torch_logits(theirs, tokens), atol=1e-4, rtol=1e-4)
  assert np.abs(ours - apply(model.config, model.params, tokens)).max() > 1e-2
  again = peft_format.load(model, tmp_path / "adapter")
  np.testing.assert_allclose(apply(model.config, again, tokens), ours, atol=1e-4, rtol=1e-4)
  if name != "pissa":
    assert tree.names(again) == tree.names(params)


@pytest.mark.parametrize(
  "kw", [{"target_modules": "all-linear", "r": 4}, {"use_rslora": True, "layers_to_transform": 1}]
)
def test_we_load_what_peft_saves(tmp_path, kw):
  peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
  ref, model = load(tmp_path / "base", num_key_value_heads=2)
  kw = {"target_modules": ["q_proj", "v_proj"], **kw}
  theirs = peft.get_peft_model(ref, peft.LoraConfig(task_type="CAUSAL_LM", use_dora=True, **kw)).eval()
  _randomise(torch, theirs)
  theirs.save_pretrained(str(tmp_path / "adapter"))
  params = peft_format.load(model, tmp_path / "adapter")
  tokens = np.arange(60).reshape(2, 30)
  ours = apply(model.config, params, tokens)
  np.testing.assert_allclose(ours, torch_logits(theirs, tokens), atol=1e-4, rtol=1e-4)


def _randomise(torch, model):
  with torch.no_grad():
    for k, p in model.named_parameters():
      if "lora_B" in k or "magnitude" in k:
        p.add_(0.1 * torch.randn_like(p))


@pytest.mark.parametrize("name", ["gpt2", "neox", "bert"])
def test_families_both_ways(tmp_path, name):
  """Also a Conv1D, and heads that are stored in another order."""
  peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
  ref, model, targets = load_family(tmp_path / "base", name)
  config = peft.LoraConfig(target_modules=targets, use_dora=True, fan_in_fan_out=name == "gpt2")
  theirs = peft.get_peft_model(ref, config).eval()
  _randomise(torch, theirs)
  theirs.save_pretrained(str(tmp_path / "adapter"))
  want = first_output(theirs)
  params = peft_format.load(model, tmp_path / "adapter")
  np.testing.assert_allclose(outputs(model.config, params, TOKENS), want, atol=1e-4, rtol=1e-4)
  peft_format.save(model, params, tmp_path / "again")
  again = peft.PeftModel.from_pretrained(theirs.unload(), str(tmp_path / "again")).eval()
  np.testing.assert_allclose(first_output(again), want, atol=1e-4, rtol=1e-4)


def test_misfits_are_listed_together(tmp_path, base):
  import safetensors.numpy

  model = models.Model("tiny", CONFIG, base, None, {"model_type": "llama"})
  params, _ = dora.init(KEY, base, rank=2)
  peft_format.save(model, params, tmp_path)
  path = tmp_path / "adapter_model.safetensors"
  tensors = safetensors.numpy.load_file(path)
  names = sorted(k for k in tensors if k.endswith(dora_form.MAGNITUDE))
  del tensors[names[0]]
  tensors[names[1]] = tensors[names[1]][:-1].copy()
  tensors[names[2].replace("_proj", "_what")] = tensors.pop(names[2])
  safetensors.numpy.save_file(tensors, path)
  with pytest.raises(errors.UserError) as e:
    peft_format.load(model, tmp_path)
  for n in names[:3]:
    assert n.removeprefix("base_model.model.") in str(e.value)
  assert "_what" in str(e.value) and "is None" in str(e.value)
  (tmp_path / "adapter_config.json").write_text(
    json.dumps(json.loads((tmp_path / "adapter_config.json").read_text()) | {"lora_bias": True})
  )
  with pytest.raises(errors.UserError, match="lora_"):
    peft_format.load(model, tmp_path)


@pytest.mark.parametrize(
  "kw, message",
  [
    ({"targets": "embed"}, "embeddings"),
    ({"targets": "w_q"}, "matches nothing"),
    ({"init": "zeros"}, "init"),
    ({"dropout": 1.0}, "dropout"),
  ],
)
def test_bad_settings_are_refused(base, kw, message):
  with pytest.raises(errors.UserError, match=re.compile(message)):
    dora.init(KEY, base, **kw)


def test_mixed_with_lora_has_no_peft_form(tmp_path, base):
  params, _ = methods.init(KEY, base, [{"name": "lora", "targets": "k"}, {"name": "dora", "targets": "q"}])
  model = models.Model("tiny", CONFIG, base, None, {"model_type": "llama"})
  with pytest.raises(peft_format.NoForm):
    peft_format.save(model, params, tmp_path)
