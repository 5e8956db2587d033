"""LoRA: laws of the node, what is adapted, and parity with the peft library."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import errors, models, patterns, tree, weights
from lora_jax.formats import peft as peft_format
from lora_jax.methods import lora
from lora_jax.model import transformer
from tests import noise, test_families
from tests.test_families import outputs
from tests.test_models import reference, torch_logits

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

CONFIG = transformer.Config(50, 16, 3, 4, 2, 4, 24, dtype="float32", tied=True)
KEY = jax.random.key(0)
TOKENS = np.random.default_rng(0).integers(0, 50, (2, 12))


@pytest.fixture(scope="module")
def base():
  return transformer.init(CONFIG, KEY)


def adapted(base, seed=1, **kw):
  """Parameters with LoRA whose B is not zero."""
  params, mask = lora.init(jax.random.key(seed), base, **kw)

  ranks = {k: w.rank for k, w in tree.flatten(params, is_leaf=weights.is_node).items() if weights.is_node(w)}

  def shake(k, x, m):
    if not (m and k.endswith("/b")):
      return x
    rank = ranks[k.removesuffix("/b")]
    row = np.arange(x.shape[rank.ndim]).reshape(-1, *(1,) * (x.ndim - rank.ndim - 1))
    used = row < np.asarray(rank).reshape(*rank.shape, *(1,) * (x.ndim - rank.ndim))
    return jnp.asarray(used * noise.add(k, np.zeros(x.shape, np.float32), seed=seed))

  return tree.map_named(shake, params, mask), mask


@pytest.mark.parametrize("init", [*lora.INITS, "pissa_niter_2"])
def test_the_start_is_the_identity(base, init):
  """To the last bit, but for "orthogonal", where the product of two random factors is zero up to rounding."""
  params, _ = lora.init(KEY, base, targets=["all-linear", "embed"], init=init, rank=6, alpha=3.0)
  atol = 1e-6 if init == "orthogonal" else 0
  np.testing.assert_allclose(
    models.apply(CONFIG, params, TOKENS), models.apply(CONFIG, base, TOKENS), atol=atol, rtol=0
  )


@pytest.mark.parametrize("kw", [{}, {"rslora": True, "rank": 3}, {"targets": "all-linear", "rank": 2}])
def test_merged_weights_give_the_same_logits(base, kw):
  params, _ = adapted(base, **kw)
  merged = weights.merge(params)
  assert tree.names(merged) == tree.names(base)
  ours = models.apply(CONFIG, params, TOKENS)
  np.testing.assert_allclose(models.apply(CONFIG, merged, TOKENS), ours, atol=1e-5)
  assert np.abs(ours - models.apply(CONFIG, base, TOKENS)).max() > 1e-2


def test_strip_gives_the_base_back_without_a_copy(base):
  params, _ = adapted(base, targets="all-linear")
  assert all(a is b for a, b in zip(jax.tree.leaves(weights.strip(params)), jax.tree.leaves(base), strict=True))


def test_scale():
  """alpha / rank, or alpha / sqrt(rank): Kalajdzievski 2023, theorem 3.2."""
  node = lambda **kw: lora.init(KEY, transformer.init(CONFIG, KEY), **kw)[0]["layers"]["attn"]["q"]["kernel"]
  np.testing.assert_allclose(node(rank=4, alpha=12.0).scale, 3.0)
  np.testing.assert_allclose(node(rank=4, alpha=12.0, rslora=True).scale, 6.0)


def test_initial_values(base):
  """peft: uniform in +-1/sqrt(in); paper: normal with deviation 1/rank."""
  a = lambda init: np.asarray(lora.init(KEY, base, rank=64, init=init)[0]["layers"]["attn"]["q"]["kernel"].a)
  uniform, gaussian = a("peft"), a("paper")
  assert np.abs(uniform).max() <= 0.25
  np.testing.assert_allclose(uniform.std(), 0.25 / np.sqrt(3), rtol=0.05)
  np.testing.assert_allclose(gaussian.std(), 1 / 64, rtol=0.05)
  assert len(np.unique(uniform)) == uniform.size


def test_a_column_does_not_depend_on_the_rank(base):
  """So a run padded to a larger rank starts where the unpadded one does."""
  a = lambda rank: lora.init(KEY, base, rank=rank)[0]["layers"]["attn"]["v"]["kernel"].a
  np.testing.assert_array_equal(a(8)[..., :3], a(3))


@pytest.mark.parametrize(
  "targets, expected",
  [
    ("q,v", {"layers/attn/q", "layers/attn/v"}),
    (["gate", "attn/o"], {"layers/mlp/gate", "layers/attn/o"}),
    ("all-linear", {f"layers/{k}" for k in "attn/q attn/k attn/v attn/o mlp/gate mlp/up mlp/down".split()}),
    ("mlp/.*kernel$", {"layers/mlp/gate", "layers/mlp/up", "layers/mlp/down"}),
    ("layers/[02]/attn/k", {"layers/attn/k"}),
  ],
)
def test_targets(base, targets, expected):
  params, mask = lora.init(KEY, base, targets=targets, rank=2)
  flat = tree.flatten(params, is_leaf=weights.is_node)
  assert {k.removesuffix("/kernel") for k, w in flat.items() if weights.is_node(w)} == expected
  trained = {k for k, m in tree.flatten(mask).items() if m}
  assert trained == {f"{k}/kernel/{c}" for k in expected for c in "ab"}


def test_single_layers_and_patterns(base):
  params, _ = lora.init(
    KEY,
    base,
    targets=r"layers/[12]/attn/q/",
    rank=4,
    rank_pattern={"layers/2/": 2, "q": 3},
    alpha_pattern={"layers/1/": 6.0},
  )
  node = params["layers"]["attn"]["q"]["kernel"]
  np.testing.assert_array_equal(node.rank, [0, 3, 2])
  np.testing.assert_allclose(node.scale, [0, 2.0, 8.0])
  assert not node.a[0].any() and not node.a[2, :, 2:].any() and node.a[1].all()


def test_unused_rank_stays_zero_in_training(base):
  """Zero columns of A against zero rows of B have no gradient."""
  params, mask = adapted(base, targets="q", rank=4, rank_pattern={"layers/1/": 2})
  trainable, frozen = tree.split(params, mask)
  loss = lambda t: models.apply(CONFIG, tree.join(t, frozen), TOKENS).std()
  node = jax.grad(loss)(trainable)["layers"]["attn"]["q"]["kernel"]
  assert not node.a[1, :, 2:].any() and not node.b[1, 2:].any()
  assert node.a[1, :, :2].all() and node.b[1, :2].all()


@pytest.mark.parametrize(
  "kw, message",
  [
    ({"targets": "w_q"}, "'w_q' matches nothing; did you mean|valid: .*q"),
    ({"targets": "al-linear"}, "did you mean 'all-linear'"),
    ({"targets": ""}, "names no matrix; 'all-linear' names all in the layers"),
    ({"targets": ["q", " ,"]}, "names no matrix"),
    ({"targets": "layers/9/attn/q"}, "matches nothing"),
    ({"targets": "embed/positions"}, "matches nothing"),
    ({"layers_to_transform": [0, 3]}, r"\[3\]; the layers of the targets are 0 to 2"),
    ({"init": "pissa_niter_"}, "did you mean 'pissa_niter_N'"),
    ({"init": "pissa", "targets": "v", "rank": 9}, "layers/attn/v/kernel has rank at most 8, not 9"),
    ({"init": "olora", "alpha": 0}, "alpha > 0"),
    ({"init": "orthogonal", "rank": 3}, "even ranks"),
    ({"bias": "lora"}, "'lora_only'"),
    ({"bias": "all"}, "no biases"),
    ({"lora_bias": True, "targets": "embed"}, "embed/kernel cannot have a bias"),
    ({"targets": "q("}, "not a regular expression"),
    ({"rank_pattern": {"layers/7/": 2}}, "rank_pattern"),
    ({"init": "zeros"}, "init"),
    ({"dropout": 1.5}, "dropout"),
    ({"rank": 0}, "rank 0"),
  ],
)
def test_bad_settings_are_refused(base, kw, message):
  with pytest.raises(errors.UserError, match=message):
    lora.init(KEY, base, **kw)


def test_dropout(base):
  """Without a key none; with one, x is kept with 1 - p and scaled by 1 / (1 - p) before A alone."""
  params, _ = adapted(base, targets="q", dropout=0.5)
  plain, _ = adapted(base, targets="q")
  np.testing.assert_array_equal(models.apply(CONFIG, params, TOKENS), models.apply(CONFIG, plain, TOKENS))
  node = jax.tree.map(lambda x: x[0], params["layers"]["attn"]["q"]["kernel"])
  x = jax.random.normal(KEY, (1, 4, 16))
  clean = node.dot("BTD,DNH->BTNH", x)
  keys = jax.random.split(jax.random.key(3), 2000)
  noisy = jax.vmap(lambda k: node.replace(key=k).dot("BTD,DNH->BTNH", x))(keys)
  assert np.abs(noisy[0] - clean).max() > 1e-3
  np.testing.assert_allclose(noisy.mean(0), clean, atol=5 * float(noisy.std(0).max()) / np.sqrt(2000))
  seeded = weights.with_dropout(params, KEY)["layers"]["attn"]["q"]["kernel"]
  assert len(np.unique(jax.random.key_data(seeded.key), axis=0)) == 3


@pytest.mark.parametrize(
  "spec, shapes", [("BTNH,NHD->BTD", ((2, 3, 4, 5), (4, 5, 6))), ("BTD,DF->BTF", ((2, 3, 4), (4, 5)))]
)
def test_split_spec(spec, shapes):
  x, w = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate(shapes))
  inner = 2 if "NHD" in spec else 1
  a = jax.random.normal(KEY, (*w.shape[:inner], 2))
  b = jax.random.normal(KEY, (2, *w.shape[inner:]))
  spec_a, spec_b = weights.split_spec(spec)
  full = jnp.einsum(spec, x, jnp.tensordot(a, b, 1))
  np.testing.assert_allclose(jnp.einsum(spec_b, jnp.einsum(spec_a, x, a), b), full, atol=1e-4)


SETTINGS = {
  "q,v": {},
  "all-linear": {"targets": "all-linear", "rank": 4, "alpha": 6.0},
  "rslora": {"targets": "q,o,down", "rslora": True, "rank": 3},
  "patterns": {
    "targets": ["q,up", "layers/[01]/attn/v"],
    "rank": 4,
    "rank_pattern": {"layers/1/": 2, "up": 3},
    "alpha_pattern": {"q": 5.0},
  },
  "head": {"targets": ["head", "k"], "rank": 2},
}


def load(directory, **overrides):
  ref = reference(directory, **overrides)
  return ref, models.load(str(directory), dtype="float32")


@pytest.mark.parametrize("name", SETTINGS)
def test_peft_loads_what_we_save(tmp_path, name):
  peft = pytest.importorskip("peft")
  ref, model = load(tmp_path / "base")
  params, _ = adapted(model.params, **SETTINGS[name])
  peft_format.save(model, params, tmp_path / "adapter")
  theirs = peft.PeftModel.from_pretrained(ref, str(tmp_path / "adapter")).eval()
  tokens = np.arange(60).reshape(2, 30)
  ours = models.apply(model.config, params, tokens)
  np.testing.assert_allclose(ours, torch_logits(theirs, tokens), atol=1e-4, rtol=1e-4)
  assert np.abs(ours - models.apply(model.config, model.params, tokens)).max() > 1e-2


@pytest.mark.parametrize(
  "kw",
  [
    {"target_modules": ["q_proj", "v_proj"]},
    {"target_modules": "all-linear", "r": 4, "lora_alpha": 3},
    {"target_modules": ["k_proj", "down_proj"], "use_rslora": True},
    {"target_modules": ["q_proj"], "layers_to_transform": [0, 2]},
    {"target_modules": ["o_proj"], "rank_pattern": {"layers.1.self_attn.o_proj": 3}, "alpha_pattern": {"o_proj": 7}},
  ],
)
def test_we_load_what_peft_saves(tmp_path, kw):
  peft = pytest.importorskip("peft")
  torch = pytest.importorskip("torch")

  ref, model = load(tmp_path / "base", num_key_value_heads=2)
  theirs = peft.get_peft_model(ref, peft.LoraConfig(task_type="CAUSAL_LM", **kw)).eval()
  with torch.no_grad():
    for k, p in theirs.named_parameters():
      if "lora_B" in k:
        p.add_(0.1 * torch.randn_like(p))
  theirs.save_pretrained(str(tmp_path / "adapter"))
  params = peft_format.load(model, tmp_path / "adapter")
  tokens = np.arange(60).reshape(2, 30)
  np.testing.assert_allclose(
    models.apply(model.config, params, tokens), torch_logits(theirs, tokens), atol=1e-4, rtol=1e-4
  )


@pytest.mark.parametrize("name", SETTINGS)
def test_load_is_the_inverse_of_save(tmp_path, name):
  _, model = load(tmp_path / "base")
  params, _ = adapted(model.params, **SETTINGS[name])
  peft_format.save(model, params, tmp_path / "adapter")
  again = peft_format.load(model, tmp_path / "adapter")
  assert tree.names(again) == tree.names(params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), params, again)


# Matrices that PEFT adapts in families whose names or layouts are not Llama's: (class, config, target_modules).
FAMILIES = {
  "qwen2": ("Qwen2ForCausalLM", test_families.SMALL, ["q_proj", "v_proj", "o_proj", "down_proj"]),
  "phi3": ("Phi3ForCausalLM", test_families.PHI3, ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]),
  "gpt2": ("GPT2LMHeadModel", test_families.GPT2, ["c_attn", "c_proj", "c_fc"]),
  "neox": ("GPTNeoXForCausalLM", test_families.NEOX, ["query_key_value", "dense", "dense_4h_to_h"]),
  "opt": ("OPTForCausalLM", test_families.OPT_350M, ["q_proj", "out_proj", "fc1", "project_in", "project_out"]),
  "bert": ("BertForMaskedLM", test_families.BERT, ["query", "value"]),
  "bert-bare": ("BertModel", test_families.BERT, ["key", "dense"]),
  "distilbert": ("DistilBertForMaskedLM", test_families.DISTILBERT, ["q_lin", "out_lin", "lin2"]),
}


def load_family(directory, name):
  """(transformers model, ours, target_modules) of a family, random."""
  torch = pytest.importorskip("torch")
  cls, config, targets = FAMILIES[name]
  cls = getattr(pytest.importorskip("transformers"), cls)
  torch.manual_seed(0)
  ref = cls(cls.config_class(**config, attn_implementation="eager")).eval()
  ref.save_pretrained(directory)
  return ref, models.load(str(directory), dtype="float32"), targets


def first_output(model):
  """Logits of a transformers model, or states of a bare one."""
  torch = pytest.importorskip("torch")

  with torch.no_grad():
    return model(input_ids=torch.tensor(TOKENS))[0].numpy()


@pytest.mark.parametrize("name", FAMILIES)
def test_peft_loads_what_we_save_of_a_family(tmp_path, name):
  peft = pytest.importorskip("peft")
  ref, model, targets = load_family(tmp_path / "base", name)
  modules = {k.path: k.module.rpartition(".")[2] for k in model.keys}
  paths = [path for path, module in modules.items() if module in targets and path.endswith("kernel")]
  params, _ = adapted(model.params, targets=paths, rank=3)
  peft_format.save(model, params, tmp_path / "adapter")
  assert set(json.loads((tmp_path / "adapter/adapter_config.json").read_text())["target_modules"]) == set(targets)
  theirs = peft.PeftModel.from_pretrained(ref, str(tmp_path / "adapter")).eval()
  ours = outputs(model.config, params, TOKENS)
  np.testing.assert_allclose(ours, first_output(theirs), atol=1e-4, rtol=1e-4)
  assert np.abs(ours - outputs(model.config, model.params, TOKENS)).max() > 1e-2


@pytest.mark.parametrize("name", FAMILIES)
def test_we_load_what_peft_saves_of_a_family(tmp_path, name):
  peft = pytest.importorskip("peft")
  torch = pytest.importorskip("torch")

  ref, model, targets = load_family(tmp_path / "base", name)
  theirs = peft.get_peft_model(ref, peft.LoraConfig(target_modules=targets, fan_in_fan_out=name == "gpt2")).eval()
  with torch.no_grad():
    for k, p in theirs.named_parameters():
      if "lora_B" in k:
        p.add_(0.1 * torch.randn_like(p))
  theirs.save_pretrained(str(tmp_path / "adapter"))
  params = peft_format.load(model, tmp_path / "adapter")
  ours = outputs(model.config, params, TOKENS)
  np.testing.assert_allclose(ours, first_output(theirs), atol=1e-4, rtol=1e-4)
  assert np.abs(ours - outputs(model.config, model.params, TOKENS)).max() > 1e-2


@pytest.mark.parametrize("name, targets", [("gpt2", "attn/o/"), ("bert-bare", ["mlp/up", "layers/1/mlp/down"])])
def test_modules_that_share_a_name(tmp_path, name, targets):
  """`c_proj` and `dense` end the names of several modules; those that are not adapted must stay plain in PEFT."""
  peft = pytest.importorskip("peft")
  ref, model, _ = load_family(tmp_path / "base", name)
  params, _ = adapted(model.params, targets=targets, rank=3)
  peft_format.save(model, params, tmp_path / "adapter")
  theirs = peft.PeftModel.from_pretrained(ref, str(tmp_path / "adapter")).eval()
  wrapped = {k for k, module in theirs.named_modules() if hasattr(module, "lora_A")}
  assert len(wrapped) == (3 if name == "gpt2" else 4)
  np.testing.assert_allclose(outputs(model.config, params, TOKENS), first_output(theirs), atol=1e-4, rtol=1e-4)


def broken(config=None, tensors=None):
  """An edit of a saved adapter."""

  def edit(directory):
    import safetensors.numpy

    if config:
      path = directory / "adapter_config.json"
      path.write_text(json.dumps(json.loads(path.read_text()) | config))
    if tensors:
      path = directory / "adapter_model.safetensors"
      safetensors.numpy.save_file(tensors(safetensors.numpy.load_file(path)), path)

  return edit


def truncate(directory):
  path = directory / "adapter_model.safetensors"
  path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize(
  "edit, message",
  [
    (broken({"peft_type": "LORRA"}), "did you mean 'LORA'"),
    (broken({"use_dora": True}), "q_proj.lora_magnitude_vector is None"),
    (broken({"bias": "most", "use_qalora": True}), "use_qalora=True is not supported; bias='most' is not"),
    (broken({"init_lora_weights": "pissa_niter_4"}), "pissa_niter_4'.*path_initial_model_for_weight_conversion"),
    (broken({"init_lora_weights": "loftq"}), "loftq'.* a part that is not in the adapter"),
    (broken({"init_lora_weights": "lora_ga"}), "lora_ga"),
    (broken({"init_lora_weights": "corda"}), "corda"),
    (broken({"r": 4}), "q_proj.lora_A.weight is .8, 16., expected .4, 16.*layers.2.self_attn.v_proj.lora_B"),
    (broken({"r": "8", "lora_alpha": float("nan")}), "adapter_config.json: r is '8', .*; lora_alpha is nan, expected"),
    (broken({"r": True, "lora_dropout": 1.0}), "r is True.*lora_dropout is 1.0, expected a number in"),
    (broken({"r": 2**31}), "r is 2147483648, expected a whole number from 1 to 64"),
    (broken({"target_modules": r"(\w+\.?)+x"}), "takes more than .* seconds to search"),
    (broken(tensors=lambda t: {k: x * np.nan if "lora_B" in k else x for k, x in t.items()}), "lora_B.* not finite"),
    (broken({"alpha_pattern": ["q_proj"]}), "alpha_pattern is .*, expected an object"),
    (broken({"alpha_pattern": {"q_proj": "16"}}), "alpha_pattern is .*, expected an object"),
    (broken({"rank_pattern": {"(q_proj": 4}}), r"'\(q_proj' is not a regular expression"),
    (broken({"modules_to_save": "score"}), "modules_to_save is 'score', expected a list"),
    (broken(tensors=lambda t: {k.removeprefix("base_model."): x for k, x in t.items()}), "prefix"),
    (broken(tensors=lambda t: {k.replace("q_proj", "w_proj"): x for k, x in t.items()}), "w_proj"),
    (broken(tensors=lambda t: {k: x[..., :-1].copy() for k, x in t.items()}), "expected"),
    (broken(tensors=lambda t: {k: x for k, x in t.items() if "lora_B" not in k}), "lora_B"),
    (
      broken(tensors=lambda t: {k: x for k, x in t.items() if "layers.1." not in k and "v_proj" not in k}),
      "without tensors: .*0.self_attn.v_proj, .*1.self_attn.q_proj, .*1.self_attn.v_proj",
    ),
    (truncate, "adapter_model.safetensors"),
    (lambda d: (d / "adapter_config.json").unlink(), "adapter_config.json does not exist"),
    (lambda d: (d / "adapter_config.json").write_text("[]"), "JSON object"),
  ],
)
def test_foreign_adapters_are_refused(tmp_path, base, edit, message, monkeypatch):
  monkeypatch.setattr(patterns, "SECONDS", 0.5)
  model = models.Model("tiny", CONFIG, base, None, {"model_type": "llama"})
  params, _ = adapted(base)
  peft_format.save(model, params, tmp_path)
  edit(tmp_path)
  with pytest.raises(errors.UserError, match=re.compile(message)):
    peft_format.load(model, tmp_path)
  with pytest.raises(errors.UserError, match="0 kinds"):
    peft_format.save(model, base, tmp_path)
