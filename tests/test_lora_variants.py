"""LoRA's variants and starts, biases, embeddings and heads: laws, and parity with the peft library both ways."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_jax import errors, methods, models, tree, weights
from lora_jax.formats import adapter, peft as peft_format
from lora_jax.methods import lora, lora_fa, lora_plus, olora, pissa, rslora
from lora_jax.model import transformer
from tests import test_families
from tests.noise import moved
from tests.test_families import outputs

# What peft says of tied tables, of saving them, and of options that do not apply to a module.
pytestmark = [
  pytest.mark.filterwarnings(f"ignore:{text}")
  for text in (
    "Model with `tie_word_embeddings=True`",
    "Model has `tie_word_embeddings=True`",
    "Setting `save_embedding_layers`",
    "You have requested `ensure_weight_tying`",
    "fan_in_fan_out is set to",
    "Could not find a config file",
    "`lora_bias=True` was passed",
    "Adapter 'default'",  # takes the vector of a bias for a broken matrix
    "`init_lora_weights` is 'eva'",
    "`is_gradient_checkpointing`:FutureWarning",
  )
]
KEY = jax.random.key(0)
CONFIG = transformer.Config(50, 16, 3, 4, 2, 4, 24, dtype="float32", tied=True)
TOKENS = np.random.default_rng(0).integers(0, 50, (2, 12))


apply = jax.jit(functools.partial(models.apply, CONFIG))


@pytest.fixture(scope="module")
def base():
  return transformer.init(CONFIG, KEY)


def kernel(params, name="q"):
  return params["layers"]["attn"][name]["kernel"]


def test_pissa_starts_at_the_best_approximation(base):
  """`scale A0 B0` is the part of the first singular triplets, to which A and B contribute evenly."""
  params, _ = pissa.init(KEY, base, rank=3, alpha=6.0, targets="q,o")
  for name, rows in (("q", 16), ("o", 16)):
    node, w = kernel(params, name), np.asarray(kernel(base, name))
    for i in range(3):
      u, d, v = np.linalg.svd(w[i].reshape(rows, -1))
      a, b = np.asarray(node.a[i]).reshape(rows, 3), np.asarray(node.b[i]).reshape(3, -1)
      np.testing.assert_allclose(node.scale[i] * a @ b, u[:, :3] * d[:3] @ v[:3], atol=1e-6)
      np.testing.assert_allclose((a * a).sum(0), (b * b).sum(1), rtol=1e-4)


@pytest.mark.slow
def test_subspace_iterations_approach_the_exact_start():
  wide = transformer.init(dataclasses.replace(CONFIG, d_model=64, d_ff=64), KEY)

  def start(**kw):
    node = pissa.init(KEY, wide, rank=4, targets="gate", **kw)[0]["layers"]["mlp"]["gate"]["kernel"]
    return np.einsum("LDR,LRF->LDF", *node.start)

  far, near, nearest = (np.linalg.norm(start(iterations=n) - start()) for n in (0, 4, 40))
  assert far > 2 * near > 4 * nearest and nearest < 1e-3


def test_olora_starts_at_an_orthonormal_basis(base):
  params, _ = olora.init(KEY, base, rank=3, targets="q")
  node, w = kernel(params), np.asarray(kernel(base)).reshape(3, 16, 16)
  for i in range(3):
    b = np.asarray(node.b[i]).reshape(3, 16)
    np.testing.assert_allclose(b @ b.T, np.eye(3), atol=1e-5)
    # The product restores the first inputs' rows of W and projects the others on their span.
    product = np.asarray(node.a[i]) @ b
    np.testing.assert_allclose(product[:3], w[i][:3], atol=1e-6)
    np.testing.assert_allclose(product, w[i] @ b.T @ b, atol=1e-6)


def test_orthogonal_factors_cancel(base):
  node = kernel(lora.init(KEY, base, init="orthogonal", rank=4)[0])
  np.testing.assert_allclose(jnp.einsum("LDR,LRNH->LDNH", node.a, node.b), 0, atol=1e-7)
  assert np.abs(node.a).min() > 0 and np.abs(node.b).min() > 0


def test_a_start_does_not_lose_small_changes_in_bfloat16(base):
  """What is trained is small beside the principal part; differences are taken before rounding."""
  node = jax.tree.map(lambda x: x[0], kernel(pissa.init(KEY, base, rank=8)[0]))
  big = lambda n: n.replace(base=n.base * 0)
  step = 1e-3 * jax.random.normal(KEY, node.b.shape)
  x = jax.random.normal(KEY, (1, 8, 16))
  moved = big(node.replace(b=node.b + step))
  exact = node.scale * jnp.einsum("BTD,DR,RNH->BTNH", x, node.a, step)
  got = moved.dot("BTD,DNH->BTNH", x.astype(jnp.bfloat16)).astype(jnp.float32)
  np.testing.assert_allclose(got, exact, atol=0.03 * float(np.abs(exact).max()))


def test_trained_buffers_are_not_those_of_the_start(base):
  """A training step donates the first and reads the second."""
  node = kernel(pissa.init(KEY, base)[0])
  address = lambda x: x.unsafe_buffer_pointer()
  assert {address(node.a), address(node.b)}.isdisjoint(map(address, node.start))


@pytest.mark.parametrize("init", [*lora.INITS, "pissa_niter_1"])
def test_shapes_alone_can_be_made(base, init):
  kw = dict(targets=["all-linear", "embed"], init=init, rank=4, rank_pattern={"layers/1/": 2})
  shapes = jax.eval_shape(lambda p: lora.init(KEY, p, **kw)[0], base)
  made, _ = lora.init(KEY, base, **kw)
  same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), shapes, made)
  assert all(jax.tree.leaves(same))
  node = kernel(made)
  assert not node.a[1, :, 2:].any() and not node.b[1, 2:].any()


def test_layers_to_transform(base):
  params, mask = lora.init(KEY, base, targets="q,embed", layers_to_transform=[0, 2], rank=4)
  np.testing.assert_array_equal(kernel(params).rank, [4, 0, 4])
  assert int(params["embed"]["kernel"].rank) == 4
  n = 4 * (2 * (16 + 16) + 50 + 16)
  assert methods.size(params, mask) == n
  again, mask = lora_fa.init(KEY, base, targets="q", layers_to_transform=1, rank=4)
  np.testing.assert_array_equal(kernel(again).rank, [0, 4, 0])
  assert methods.size(again, mask) == 4 * 16


def test_rslora_is_lora_with_another_scale(base):
  np.testing.assert_allclose(kernel(rslora.init(KEY, base, rank=4, alpha=12.0)[0]).scale, 6.0)


def test_lora_fa_trains_the_factor_that_starts_at_zero(base):
  params, mask = lora_fa.init(KEY, base, targets="q,embed")
  assert {k for k, m in tree.flatten(mask).items() if m} == {"layers/attn/q/kernel/b", "embed/kernel/a"}
  assert not kernel(params).b.any() and not params["embed"]["kernel"].a.any()


def test_lora_plus_learning_rates_are_those_of_peft(tmp_path):
  """Which group each parameter is in, read off one step of SGD on gradients of ones."""
  peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
  from peft.optimizers import create_loraplus_optimizer

  ref, model = load(tmp_path, "llama-bias", tie_word_embeddings=False)
  targets = ["q_proj", "embed_tokens", "lm_head"]
  theirs = peft.get_peft_model(ref, peft.LoraConfig(target_modules=targets, bias="all"))
  optimizer = create_loraplus_optimizer(theirs, torch.optim.SGD, lr=2e-4, loraplus_lr_ratio=8.0)
  rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
  rates = {k: rates[id(p)] for k, p in theirs.named_parameters() if p.requires_grad}
  params, mask = lora_plus.init(KEY, model.params, targets="q,embed,head", bias="all")
  trainable = tree.split(params, mask)[0]
  rule = lora_plus.optimiser(optax.sgd(2e-4), steps=1, lr_ratio=8.0, embedding_lr_ratio=0.005)
  updates, _ = rule.update(jax.tree.map(jnp.ones_like, trainable), rule.init(trainable))
  ours = {k: -float(np.ravel(u)[0]) for k, u in tree.flatten(updates).items()}
  suffixes = {"/a": "lora_A.default.weight", "/b": "lora_B.default.weight"}
  rows = {k.path: k.module for k in model.keys}
  for path, rate in ours.items():
    leaf, _, factor = path.rpartition("/")
    if leaf == "embed/kernel":
      name = f"{rows[leaf]}.lora_embedding_{factor.upper()}.default"
    elif leaf in rows:
      name = f"{rows[leaf]}.{suffixes['/' + factor]}"
    else:
      name = f"{rows[path]}.bias"
    found = [r for k, r in rates.items() if k.replace(".base_layer", "").endswith(name.format(1))]
    np.testing.assert_allclose(rate, found, rtol=1e-5, err_msg=path)


@pytest.mark.parametrize("kw", [{"targets": "embed"}, {"targets": "head"}, {"targets": "q,head,embed"}])
def test_an_adapter_of_a_tied_table_acts_on_both_uses(base, kw):
  params, mask = lora.init(KEY, base, **kw)
  assert {k for k, m in tree.flatten(mask).items() if m} >= {"embed/kernel/a", "embed/kernel/b"}
  params = moved(params, mask)
  merged = weights.merge(params)
  assert tree.names(merged) == tree.names(base)
  got = apply(params, TOKENS)
  np.testing.assert_allclose(got, apply(merged, TOKENS), atol=2e-5)
  alone = merged | {"head": {"kernel": base["embed"]["kernel"].T}}
  assert np.abs(got - apply(alone, TOKENS)).max() > 0.01


@pytest.mark.parametrize("use, other", [("embed", "head"), ("head", "embed")])
def test_an_adapter_of_one_use_of_a_tied_table(base, use, other):
  params, mask = lora.init(KEY, base, targets=use, tied=False)
  params = moved(params, mask)
  table, changed = base["embed"]["kernel"], base["embed"]["kernel"] + params["embed"]["kernel"].delta()
  both = {"embed": changed if use == "embed" else table, "head": changed if use == "head" else table}
  apart = base | {"embed": {"kernel": both["embed"]}, "head": {"kernel": both["head"].T}}
  np.testing.assert_allclose(apply(params, TOKENS), apply(apart, TOKENS), atol=1e-5, rtol=1e-5)
  assert use != other
  with pytest.raises(errors.UserError, match=f"adapter of the {use} alone cannot be merged"):
    weights.merge(params)


def test_both_uses_may_have_adapters_of_their_own(base):
  params, mask = lora.init(KEY, base, targets="embed,head", tied=False, rank_pattern={"head": 3})
  trained = {k for k, m in tree.flatten(mask).items() if m}
  assert trained == {f"embed/kernel/{k}" for k in ("a", "b", "base/a", "base/b")}
  assert {int(params["embed"]["kernel"].rank), int(params["embed"]["kernel"].base.rank)} == {3, 8}
  assert lora.trainable(params) == mask


def test_lora_bias_is_merged_into_the_bias(base):
  config = dataclasses.replace(CONFIG, attn_bias="qkv", tied=False)
  plain = transformer.init(config, KEY)
  params, mask = lora.init(KEY, plain, targets="q,v", lora_bias=True, layers_to_transform=[1])
  assert methods.size(params, mask) == 8 * (16 + 16 + 16 + 8) + 16 + 8
  params = moved(params, mask)
  merged = weights.merge(params)
  assert tree.names(merged) == tree.names(plain)
  np.testing.assert_allclose(models.apply(config, params, TOKENS), models.apply(config, merged, TOKENS), atol=2e-5)
  assert np.array_equal(
    merged["layers"]["attn"]["q"]["bias"] != 0, np.repeat([[[False]], [[True]], [[False]]], 4, 1).repeat(4, 2)
  )
  with pytest.raises(errors.UserError, match="layers/attn/q/kernel: the adapter has a bias"):
    weights.merge(lora.init(KEY, base, lora_bias=True)[0])


def test_biases_that_are_trained():
  config = dataclasses.replace(CONFIG, attn_bias="all", norm="layer", tied=False)
  params = transformer.init(config, KEY)
  trained = lambda **kw: {k for k, m in tree.flatten(lora.init(KEY, params, targets="q", **kw)[1]).items() if m}
  pair = {"layers/attn/q/kernel/a", "layers/attn/q/kernel/b"}
  assert trained() == pair
  assert trained(bias="lora_only") == pair | {"layers/attn/q/bias"}
  assert trained(bias="all") == pair | {k for k in tree.names(params) if k.endswith("/bias")}
  with pytest.raises(errors.UserError, match="layers/attn/q/bias.* not all layers are adapted"):
    trained(bias="lora_only", layers_to_transform=0)


# Models that the parity tests run on: (class in transformers, config keywords).
MODELS = {
  "llama": ("LlamaForCausalLM", test_families.SMALL),
  "llama-bias": ("LlamaForCausalLM", test_families.SMALL | dict(attention_bias=True, mlp_bias=True)),
  "gemma": ("GemmaForCausalLM", test_families.SMALL | dict(head_dim=16)),
  "gpt2": ("GPT2LMHeadModel", test_families.GPT2),
  "bert": ("BertForMaskedLM", test_families.BERT),
  "classifier": ("BertForSequenceClassification", test_families.BERT | dict(num_labels=3)),
  "t5": ("T5ForConditionalGeneration", test_families.T5),
}


def load(directory, name, **overrides):
  """(transformers model, ours) of a random model, with biases that are not zero."""
  torch = pytest.importorskip("torch")
  cls, config = MODELS[name]
  cls = getattr(pytest.importorskip("transformers"), cls)
  torch.manual_seed(0)
  ref = cls(cls.config_class(**config | overrides, attn_implementation="eager")).eval()
  with torch.no_grad():
    for p in ref.parameters():
      p.add_(0.1 * torch.randn_like(p))
  ref.save_pretrained(directory)
  return ref, models.load(str(directory), dtype="float32")


def theirs(model, tokens=TOKENS):
  torch = pytest.importorskip("torch")
  ids = torch.tensor(tokens)
  more = {"decoder_input_ids": ids} if "T5" in type(model.get_base_model()).__name__ else {}
  with torch.no_grad():
    return model(input_ids=ids, **more).logits.float().numpy()


@functools.cache
def compiled(config):
  def run(params, tokens):
    if config.encoder_layers:
      return models.apply(config, params, tokens, encoded=transformer.encode(config, params, tokens))
    return outputs(config, params, tokens)

  return jax.jit(run)


def ours(model, params, tokens=TOKENS):
  return np.asarray(compiled(model.config)(params, tokens))


# (model, overrides of its config, keywords of lora.init, what must stand in the adapter's config)
SAVED = {
  "embed": ("llama", {}, {"targets": "embed,q", "rank": 4}, {"ensure_weight_tying": False}),
  "head": ("llama", {}, {"targets": "head,embed", "rank_pattern": {"head": 3}}, {}),
  "tied": ("llama", {"tie_word_embeddings": True}, {"targets": "embed,q"}, {"ensure_weight_tying": True}),
  "tied-rslora": ("gemma", {}, {"targets": "head", "rslora": True, "rank": 3}, {"ensure_weight_tying": True}),
  "tied-gpt2": ("gpt2", {}, {"targets": "embed,o"}, {"fan_in_fan_out": True}),
  "tied-bert": ("bert", {}, {"targets": "embed,v"}, {}),
  "tied-t5": ("t5", {}, {"targets": "embed,v"}, {"ensure_weight_tying": False}),
  "embed-alone": ("gemma", {}, {"targets": "embed", "tied": False}, {"ensure_weight_tying": False}),
  "head-alone": ("gpt2", {}, {"targets": "head", "tied": False}, {"ensure_weight_tying": False}),
  "apart": ("gemma", {}, {"targets": "embed,head", "tied": False, "rank_pattern": {"head": 3}}, {}),
  "embed-alone-t5": ("t5", {}, {"targets": "embed", "tied": False}, {}),
  "bias-all": ("llama-bias", {}, {"targets": "q,down", "bias": "all"}, {"bias": "all"}),
  "bias-only": ("llama-bias", {}, {"targets": "q,down", "bias": "lora_only"}, {"bias": "lora_only"}),
  "bias-gpt2": ("gpt2", {}, {"targets": "attn/qkv", "bias": "all"}, {"bias": "all"}),
  "bias-bert": ("bert", {}, {"targets": "q,embed", "bias": "all"}, {"bias": "all"}),
  "bias-classifier": ("classifier", {}, {"targets": "q", "bias": "all"}, {"modules_to_save": ["classifier"]}),
  "lora-bias": ("llama-bias", {}, {"targets": "q,o,up", "lora_bias": True}, {"lora_bias": True}),
  "lora-bias-layers": ("gpt2", {}, {"targets": "qkv,o", "lora_bias": True, "layers_to_transform": [0, 2]}, {}),
  "layers": ("llama", {}, {"targets": "q,up", "layers_to_transform": [1]}, {}),
  "pissa": ("llama", {}, {"targets": "q,o,head", "init": "pissa", "rank": 3, "alpha": 5.0}, {"r": 6, "lora_alpha": 10}),
  "pissa-gpt2": ("gpt2", {}, {"targets": "qkv,up", "init": "pissa_niter_2", "rank_pattern": {"up": 2}}, {}),
  "pissa-rslora": ("llama", {}, {"init": "pissa", "rslora": True, "layers_to_transform": [0, 1]}, {"r": 16}),
  "olora": ("llama", {}, {"targets": "all-linear", "init": "olora", "rank": 3}, {"r": 6, "init_lora_weights": True}),
}


def quick(cases, slow):
  """Names of cases; those whose parts other cases have too are slow."""
  assert set(slow.split()) <= set(cases)
  return [pytest.param(name, marks=[pytest.mark.slow] * (name in slow.split())) for name in cases]


@pytest.mark.parametrize(
  "name", quick(SAVED, "head tied-gpt2 tied-bert apart embed-alone-t5 bias-gpt2 lora-bias-layers layers pissa-rslora")
)
def test_peft_loads_what_we_save(tmp_path, name):
  peft = pytest.importorskip("peft")
  kind, overrides, kw, written = SAVED[name]
  ref, model = load(tmp_path / "base", kind, **overrides)
  params, mask = lora.init(KEY, model.params, **kw)
  if kind == "classifier":
    params, mask = methods.train_also(params, mask, model.head_leaves)
  params = moved(params, mask)
  trained = [k for k, m in tree.flatten(mask).items() if m]
  peft_format.save(model, params, tmp_path / "adapter", trained)
  config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
  assert {k: config[k] for k in written} == written
  loaded = peft.PeftModel.from_pretrained(ref, str(tmp_path / "adapter")).eval()
  want = ours(model, params)
  np.testing.assert_allclose(theirs(loaded), want, atol=1e-4, rtol=1e-4)
  assert np.abs(want - ours(model, model.params)).max() > 1e-2
  again = peft_format.load(model, tmp_path / "adapter")
  np.testing.assert_allclose(ours(model, again), want, atol=1e-4, rtol=1e-4)


# (model, overrides of its config, keywords of peft.LoraConfig)
LOADED = {
  "embed": ("llama", {}, {"target_modules": ["embed_tokens", "q_proj"]}),
  "head": ("llama", {}, {"target_modules": ["lm_head", "v_proj"], "use_rslora": True}),
  "tied": ("llama", {"tie_word_embeddings": True}, {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}),
  "tied-by-head": ("gpt2", {}, {"target_modules": ["lm_head", "c_fc"], "ensure_weight_tying": True}),
  "embed-alone": ("gemma", {}, {"target_modules": ["embed_tokens", "q_proj"]}),
  "head-alone": ("gemma", {}, {"target_modules": ["lm_head"]}),
  "apart": ("gemma", {}, {"target_modules": ["lm_head", "embed_tokens"], "alpha_pattern": {"lm_head": 3}}),
  "wte": ("gpt2", {}, {"target_modules": ["wte"], "r": 3}),
  "bert": ("bert", {}, {"target_modules": ["word_embeddings", "query", "decoder"]}),
  "bias-all": ("llama-bias", {}, {"target_modules": ["q_proj", "down_proj"], "bias": "all"}),
  "bias-only": ("llama-bias", {}, {"target_modules": ["q_proj"], "bias": "lora_only", "layers_to_transform": [1]}),
  "bias-gpt2": ("gpt2", {}, {"target_modules": ["c_attn"], "bias": "all"}),
  "bias-bert": ("bert", {}, {"target_modules": ["query"], "bias": "all"}),
  "bias-bert-head": ("bert", {}, {"target_modules": ["decoder"], "bias": "lora_only"}),
  "bias-classifier": ("classifier", {}, {"target_modules": ["query"], "bias": "all", "task_type": "SEQ_CLS"}),
  "lora-bias": ("llama-bias", {}, {"target_modules": ["q_proj", "up_proj"], "lora_bias": True}),
  "lora-bias-gpt2": (
    "gpt2",
    {},
    {"target_modules": ["c_attn", "c_proj"], "lora_bias": True, "rank_pattern": {"c_attn": 3}},
  ),
  "pissa": ("llama", {}, {"target_modules": "all-linear", "init_lora_weights": "pissa", "rank_pattern": {"o_proj": 2}}),
  "pissa-gpt2": ("gpt2", {}, {"target_modules": ["c_attn", "c_proj"], "init_lora_weights": "pissa", "lora_alpha": 3}),
  "pissa-embed": ("llama", {}, {"target_modules": ["embed_tokens", "v_proj"], "init_lora_weights": "pissa"}),
  "olora": ("llama", {}, {"target_modules": "all-linear", "init_lora_weights": "olora", "use_rslora": True}),
  "orthogonal": ("llama", {}, {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"}),
  "gaussian": ("llama", {}, {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"}),
  "mica": ("llama", {}, {"target_modules": ["q_proj", "embed_tokens"], "init_lora_weights": "mica"}),
}


@pytest.mark.parametrize(
  "name",
  quick(LOADED, "head tied-by-head wte bias-gpt2 bias-bert-head lora-bias-gpt2 pissa-embed orthogonal gaussian"),
)
def test_we_load_what_peft_saves(tmp_path, name):
  peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
  kind, overrides, kw = LOADED[name]
  ref, model = load(tmp_path / "base", kind, **overrides)
  config = {"r": 4, "lora_alpha": 6, "fan_in_fan_out": kind == "gpt2"} | kw
  wrapped = peft.get_peft_model(ref, peft.LoraConfig(**config)).eval()
  with torch.no_grad():
    for p in wrapped.parameters():
      if p.requires_grad:
        p.add_(0.1 * torch.randn_like(p))
  wrapped.save_pretrained(str(tmp_path / "adapter"))
  params = peft_format.load(model, tmp_path / "adapter")
  want = theirs(wrapped)
  np.testing.assert_allclose(ours(model, params), want, atol=1e-4, rtol=1e-4)
  assert np.abs(want - ours(model, model.params)).max() > 1e-2


@pytest.mark.parametrize("method", ["Lora", "AdaLora", "Vera"])
@pytest.mark.parametrize("kind, target", [("gpt2", "c_attn"), ("llama-bias", "q_proj"), ("llama", "q_proj")])
def test_biases_are_all_there_that_the_config_says(tmp_path, method, kind, target):
  """Read as the peft library writes them; what is missing is named."""
  import safetensors.numpy

  peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
  only = f"{'vera' if method == 'Vera' else 'lora'}_only"
  for bias, more in (("all", {}), (only, {"layers_to_transform": [1]})):
    directory = tmp_path / bias
    ref, model = load(directory / "base", kind)
    how = dict(target_modules=[target], bias=bias, fan_in_fan_out=kind == "gpt2", **more)
    how |= {"total_step": 3} if method == "AdaLora" else {}
    wrapped = peft.get_peft_model(ref, getattr(peft, f"{method}Config")(**how)).eval()
    with torch.no_grad():
      for p in wrapped.parameters():
        if p.requires_grad:
          p.add_(0.1 * torch.randn_like(p))
    wrapped.save_pretrained(str(directory))
    params = peft_format.load(model, directory)
    np.testing.assert_allclose(ours(model, params), theirs(wrapped), atol=1e-4, rtol=1e-4)
    path = directory / "adapter_model.safetensors"
    good = safetensors.numpy.load_file(path)
    biases = [k for k in good if k.endswith(".bias")]
    assert len(biases) == {"llama": 0, "gpt2": 19, "llama-bias": 21}[kind] or bias == only and len(biases) == 1
    for gone in (biases, biases[:1]) if biases else ():
      safetensors.numpy.save_file({k: x for k, x in good.items() if k not in gone}, path)
      with pytest.raises(errors.UserError, match=f"bias='{bias}' of the config without tensors") as e:
        peft_format.load(model, directory)
      named = str(e.value).partition("without tensors: ")[2].split(", ")
      assert sorted(named) == sorted(k.removeprefix("base_model.model.").replace("base_layer.", "") for k in gone)


def test_biases_beside_a_module_of_one_layer_that_is_saved_whole(tmp_path):
  import safetensors.numpy

  peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
  ref, model = load(tmp_path / "base", "gpt2")
  how = dict(target_modules=["c_attn"], modules_to_save=["h.0.ln_1"], bias="all", fan_in_fan_out=True)
  wrapped = peft.get_peft_model(ref, peft.LoraConfig(**how)).eval()
  with torch.no_grad():
    for p in wrapped.parameters():
      if p.requires_grad:
        p.add_(0.1 * torch.randn_like(p))
  wrapped.save_pretrained(str(tmp_path))
  np.testing.assert_allclose(ours(model, peft_format.load(model, tmp_path)), theirs(wrapped), atol=1e-4, rtol=1e-4)
  path = tmp_path / "adapter_model.safetensors"
  good = safetensors.numpy.load_file(path)
  safetensors.numpy.save_file({k: x for k, x in good.items() if "h.1.ln_1.bias" not in k}, path)
  with pytest.raises(errors.UserError, match="bias='all' of the config without tensors: transformer.h.1.ln_1.bias$"):
    peft_format.load(model, tmp_path)


@pytest.mark.parametrize("beside, want", [("attn/o", "all"), ("qkv", "lora_only")])
def test_some_trained_biases_are_saved_with_all_that_their_kind_means(tmp_path, beside, want):
  peft = pytest.importorskip("peft")
  ref, model = load(tmp_path / "base", "gpt2")
  method = [{"name": "lora", "targets": "qkv,down"}, {"name": "bitfit", "targets": beside}]
  params, mask = methods.init(KEY, model.params, method)
  params = moved(params, mask)
  adapter.save(model, params, mask, method, tmp_path / "adapter")
  saved = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
  assert saved["peft_type"] == "LORA" and saved["bias"] == want
  wrapped = peft.PeftModel.from_pretrained(ref, str(tmp_path / "adapter")).eval()
  np.testing.assert_allclose(ours(model, params), theirs(wrapped), atol=1e-4, rtol=1e-4)
  np.testing.assert_allclose(ours(model, peft_format.load(model, tmp_path / "adapter")), theirs(wrapped), atol=1e-4)


@pytest.mark.parametrize(
  "name, overrides, kw, message",
  [
    ("t5", {}, {"target_modules": ["embed_tokens"]}, "encoder.embed_tokens, decoder.embed_tokens differ"),
    ("gpt2", {}, {"target_modules": ["c_attn"], "init_lora_weights": "pissa_niter_4"}, "each load draws anew"),
  ],
)
def test_what_cannot_be_represented_is_refused(tmp_path, name, overrides, kw, message):
  peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
  ref, model = load(tmp_path / "base", name, **overrides)
  wrapped = peft.get_peft_model(ref, peft.LoraConfig(fan_in_fan_out=name == "gpt2", **kw))
  with torch.no_grad():
    for p in wrapped.parameters():
      if p.requires_grad:
        p.add_(0.1 * torch.randn_like(p))
  wrapped.save_pretrained(str(tmp_path / "adapter"))
  with pytest.raises(errors.UserError, match=message):
    peft_format.load(model, tmp_path / "adapter")
