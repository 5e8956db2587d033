"""BitFit and norm tuning: which leaves they train, what they add, and parity with the peft library."""

import copy
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import errors, methods, models, tree, weights
from lora_jax.formats import adapter, peft as peft_format
from lora_jax.methods import bitfit, norms
from lora_jax.model import transformer
from lora_jax.runs import warm_start
from lora_jax.training import optim
from lora_jax.weights import fused
from tests import test_families
from tests.test_families import TOKENS, jitted
from tests.test_ia3 import model_of
from tests.test_loha import edited, noisy, same_outputs

pytestmark = [
  pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
  pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),  # PEFT says so of any norm
]

LLAMA = transformer.Config(97, 16, 3, 4, 2, 4, 24, dtype="float32", tied=True)
FUSED = dataclasses.replace(LLAMA, fused=True)
LAYER = dict(norm="layer", gated=False, attn_bias="all", mlp_bias=True)
BERT = dataclasses.replace(
  LLAMA, **LAYER, norm_order="post", final_norm=False, embed_norm=True, causal=False, pooler="tanh", head="mlm"
)
GPT2 = dataclasses.replace(LLAMA, **LAYER, n_kv_heads=4, fused=True)
KEY = jax.random.key(0)


def pair(name):
  """(transformers model, ours) of a case of test_families; PEFT changes what it is given."""
  ref, model = test_families.pair(name)
  return copy.deepcopy(ref), model


def trained(mask):
  return {k for k, m in tree.flatten(mask).items() if m}


@pytest.mark.parametrize(
  "config, targets, expected",
  [
    (LLAMA, "all", {f"layers/{k}/bias" for k in "attn/q attn/k attn/v attn/o mlp/gate mlp/up mlp/down".split()}),
    (LLAMA, "q,up", {"layers/attn/q/bias", "layers/mlp/up/bias"}),
    (FUSED, ["qkv", "mlp/gate"], {"layers/attn/qkv/bias", "layers/mlp/gate_up/bias"}),
    (FUSED, "q,qkv,down", {"layers/attn/qkv/bias", "layers/mlp/down/bias"}),
    (GPT2, "q,k,v", {"layers/attn/qkv/bias"}),
    (GPT2, "all", {k for k in tree.names(transformer.shapes(GPT2)) if k.endswith("/bias")}),
    (BERT, "norm", {f"{k}/bias" for k in ("layers/attn_norm", "layers/mlp_norm", "embed/norm", "head/norm")}),
    (BERT, ["attn/[qv]/", "mlp_norm"], {"layers/attn/q/bias", "layers/attn/v/bias", "layers/mlp_norm/bias"}),
    (BERT, "all", {k for k in tree.names(transformer.shapes(BERT)) if k.endswith("/bias")}),
  ],
)
def test_which_biases_are_trained(config, targets, expected):
  base = transformer.init(config, KEY)
  params, mask = bitfit.init(KEY, base, targets=targets)
  assert trained(mask) == expected
  flat, old = tree.flatten(params), tree.flatten(base)
  assert flat.keys() == old.keys() | expected
  assert all(x is old[k] for k, x in flat.items() if k in old and k not in expected)
  assert all(not flat[k].any() and flat[k].dtype == jnp.float32 for k in expected - old.keys())


@pytest.mark.parametrize(
  "config, targets, names, size",
  [
    (GPT2, "q,up", {"layers/attn/qkv/bias/q", "layers/mlp/up/bias"}, 3 * (4 * 4 + 24)),
    (GPT2, ["attn/[qv]/"], {"layers/attn/qkv/bias/q", "layers/attn/qkv/bias/v"}, 3 * 2 * 4 * 4),
    (FUSED, "q,up", {"layers/attn/qkv/bias/q", "layers/mlp/gate_up/bias/up"}, 3 * (4 * 4 + 24)),
    (FUSED, "k", {"layers/attn/qkv/bias/k"}, 3 * 2 * 4),
  ],
)
def test_biases_of_parts(tmp_path, config, targets, names, size):
  """They are trained alone, are those of the matrices if these stood alone, and are saved, loaded and merged."""
  model = models.Model("tiny", config, model_of(config), None, {"model_type": "gpt2"})
  method = [{"name": "bitfit", "targets": targets}]
  params, mask = methods.init(KEY, model.params, method)
  assert trained(mask) == names and methods.size(params, mask) == size
  np.testing.assert_array_equal(jitted(config, params, TOKENS), jitted(config, model.params, TOKENS))
  params = noisy(params, mask)
  merged = weights.merge(params)
  want = {**tree.flatten(params), **tree.flatten(merged)}
  for k in {fused.whole(n) for n in names} - names:
    parts = [np.asarray(want[part]) for part in fused.part_names(k)]
    old = tree.flatten(model.params).get(k, np.zeros_like(want[k]))
    ends = np.cumsum([p.shape[-2] for p in parts])
    for part, new, before in zip(fused.part_names(k), parts, np.split(np.asarray(old), ends[:-1], -2), strict=True):
      assert np.array_equal(new, before) == (part not in names)
    np.testing.assert_array_equal(want[k], np.concatenate(parts, -2))
  ours = jitted(config, params, TOKENS)
  np.testing.assert_array_equal(ours, jitted(config, merged, TOKENS))
  assert np.abs(ours - jitted(config, model.params, TOKENS)).max() > 1e-2
  adapter.save(model, params, mask, method, tmp_path)
  loaded = adapter.load(model, tmp_path)
  assert jax.tree.structure(loaded) == jax.tree.structure(params)
  jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_training_starts_from_no_part_that_it_does_not_train(tmp_path):
  """It would not be saved again."""
  model = models.Model("tiny", GPT2, model_of(GPT2), None, {"model_type": "gpt2"})
  method = [{"name": "bitfit", "targets": "q,k"}]
  params, mask = methods.init(KEY, model.params, method)
  adapter.save(model, noisy(params, mask), mask, method, tmp_path)
  params, mask = methods.init(KEY, model.params, {"name": "bitfit", "targets": "q"})
  with pytest.raises(errors.UserError, match="it has layers/attn/qkv/bias/k, which is not trained here"):
    warm_start.start(model, params, mask, tmp_path)


@pytest.mark.slow
def test_biases_of_parts_beside_other_methods(tmp_path):
  """Nothing that was trained is left out, whichever method comes first, and biases do not decay."""
  model = models.Model("tiny", GPT2, model_of(GPT2), None, {"model_type": "gpt2"})
  part = {"name": "bitfit", "targets": "q"}
  method = [{"name": "lora", "rank": 2, "targets": "q,v"}, part]
  params, mask = methods.init(KEY, model.params, method)
  params = noisy(params, mask)
  adapter.save(model, params, mask, method, tmp_path)
  jax.tree.map(np.testing.assert_array_equal, adapter.load(model, tmp_path), params)
  for rest in (
    [{"name": "bitfit", "targets": "v"}],
    [{"name": "bitfit", "targets": "qkv"}],
    [{"name": "lora", "bias": "all"}],
  ):
    one, other = (trained(methods.init(KEY, model.params, each)[1]) for each in ([part, *rest], [*rest, part]))
    assert one == other and "layers/attn/qkv/bias/v" in one
    assert ("layers/attn/qkv/bias/k" in one) == (rest != [{"name": "bitfit", "targets": "v"}])
  own, tx = tree.split(params, mask)[0], optim.make(steps=1, learning_rate=1.0, weight_decay=0.5)[0]
  updates = tree.flatten(tx.update(jax.tree.map(jnp.zeros_like, own), tx.init(own), own)[0])
  assert not updates["layers/attn/qkv/bias/q"].any() and updates["layers/attn/qkv/kernel/q/a"].any()


@pytest.mark.parametrize("config", [LLAMA, FUSED])
def test_added_biases_are_biases(config):
  """A Llama with biases of zero is a Llama, and with others one that has biases from the start."""
  base = model_of(config)
  params, mask = bitfit.init(KEY, base)
  np.testing.assert_array_equal(jitted(config, params, TOKENS), jitted(config, base, TOKENS))
  whole = dataclasses.replace(config, attn_bias="all", mlp_bias=True)
  assert sorted(tree.names(params)) == sorted(tree.names(transformer.shapes(whole)))
  shapes = tree.flatten(transformer.shapes(whole))
  assert all(x.shape == shapes[k].shape for k, x in tree.flatten(params).items())
  assert methods.size(params, mask) == 3 * (8 * 4 + 16 + 2 * 24 + 16)
  moved = noisy(params, mask)
  assert np.abs(jitted(config, moved, TOKENS) - jitted(config, base, TOKENS)).max() > 1e-2
  assert set(tree.names(weights.strip(moved))) == set(tree.names(params)), "strip cannot tell them"


def test_experts_and_norms_without_biases_get_none():
  config = dataclasses.replace(LLAMA, n_experts=4, qk_norm=True)
  params, _ = bitfit.init(KEY, transformer.init(config, KEY))
  assert {k for k in tree.names(params) if k.endswith("bias")} == {f"layers/attn/{k}/bias" for k in "qkvo"}


@pytest.mark.parametrize(
  "method, config, kw, message",
  [
    (bitfit, LLAMA, {"targets": "norm"}, "'norm' matches nothing; valid: all, down, gate"),
    (bitfit, LLAMA, {"targets": "w_q"}, "'w_q' matches nothing; "),
    (bitfit, FUSED, {"targets": "w"}, "'w' matches nothing; .*qkv"),
    (bitfit, LLAMA, {"targets": "q("}, "not a regular expression"),
    (norms, LLAMA, {"targets": "att_norm"}, "did you mean 'attn_norm'"),
    (norms, LLAMA, {"targets": "layers/1/"}, "matches nothing"),
  ],
)
def test_bad_settings_are_refused(method, config, kw, message):
  with pytest.raises(errors.UserError, match=message):
    method.init(KEY, transformer.init(config, KEY), **kw)


@pytest.mark.parametrize("method", [[{"name": "bitfit"}], [{"name": "lora"}, {"name": "bitfit", "targets": "o,down"}]])
@pytest.mark.parametrize("adapted", [False, True])
def test_added_biases_are_saved_in_our_form(tmp_path, method, adapted):
  """Not in PEFT's: transformers' Llama has no bias that they could be loaded into. Whatever tree the model holds."""
  model = models.Model("tiny", LLAMA, model_of(LLAMA), None, {"model_type": "llama"})
  params, mask = methods.init(KEY, model.params, method)
  params = noisy(params, mask)
  adapter.save(dataclasses.replace(model, params=params) if adapted else model, params, mask, method, tmp_path)
  assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == adapter.TYPE
  loaded = adapter.load(model, tmp_path)
  assert tree.names(loaded) == tree.names(params)
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), loaded, params)
  with pytest.raises(errors.UserError, match="no place for layers/.*bias"):
    models.save(dataclasses.replace(model, params=params), tmp_path / "model")
  assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
  "config, targets, expected",
  [
    (LLAMA, "norm", {"layers/attn_norm/scale", "layers/mlp_norm/scale", "norm/scale"}),
    (LLAMA, "^norm/", {"norm/scale"}),
    (BERT, "attn_norm,mlp_norm", {f"layers/{k}_norm/{x}" for k in ("attn", "mlp") for x in ("scale", "bias")}),
    (BERT, "norm", {k for k in tree.names(transformer.shapes(BERT)) if "norm/" in k}),
  ],
)
def test_which_norms_are_trained(config, targets, expected):
  base = transformer.init(config, KEY)
  params, mask = norms.init(KEY, base, targets=targets)
  assert trained(mask) == expected
  assert tree.names(params) == tree.names(base)


def test_only_norms_are_norms():
  """Adapters have fields of the same names, and biases of their own."""
  params, _ = methods.init(KEY, transformer.init(BERT, KEY), [{"name": "lora", "lora_bias": True}, {"name": "houlsby"}])
  assert set(norms.leaves(params)) == {k for k in tree.names(transformer.shapes(BERT)) if "norm/" in k}
  assert trained(bitfit.init(KEY, params)[1]) == {k for k in tree.names(transformer.shapes(BERT)) if "/bias" in k}


# Last parts of the names of norms in transformers, of all kinds of them.
NORMS = {
  "llama": ["input_layernorm", "post_attention_layernorm", "norm"],
  "qwen3-window": ["q_norm", "k_norm", "norm"],
  "gemma2": ["input_layernorm", "post_feedforward_layernorm", "norm"],
  "gpt2": ["ln_1", "ln_2", "ln_f"],
  "bert-classifier": ["LayerNorm"],
  "t5": ["layer_norm", "final_layer_norm"],
}


@pytest.mark.parametrize("name", NORMS)
def test_we_load_what_peft_saves(tmp_path, name):
  """And PEFT what we save of the same; Gemma's scales, which are one less than what it multiplies by, included."""
  peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
  ref, model = pair(name)
  theirs = peft.get_peft_model(ref, peft.LNTuningConfig(target_modules=NORMS[name])).eval()
  with torch.no_grad():
    for k, p in theirs.named_parameters():
      if "ln_tuning" in k:
        p.add_(0.3 * torch.randn_like(p))
  theirs.save_pretrained(str(tmp_path / "theirs"))
  params = peft_format.load(model, tmp_path / "theirs")
  same_outputs(model, params, theirs)
  changed = tree.map_named(lambda k, a, b: a is not b, params, model.params)
  assert trained(changed) and trained(changed) <= set(norms.leaves(params))
  ours, mask = methods.train_also(params, changed, model.head_leaves)  # a classifier goes with any adapter
  ours = noisy(ours, mask, seed=5)
  adapter.save(model, ours, mask, [{"name": "norms"}], tmp_path / "ours")
  config = json.loads((tmp_path / "ours/adapter_config.json").read_text())
  assert config["peft_type"] == "LN_TUNING" and sorted(config["target_modules"]) == sorted(NORMS[name])
  again = peft.PeftModel.from_pretrained(pair(name)[0], str(tmp_path / "ours")).eval()
  same_outputs(model, ours, again)
  jax.tree.map(np.testing.assert_array_equal, peft_format.load(model, tmp_path / "ours"), ours)


def test_single_norms(tmp_path):
  """Those of some layers: the others are the model's own."""
  peft = pytest.importorskip("peft")
  ref, model = pair("llama")
  theirs = peft.get_peft_model(ref, peft.LNTuningConfig(target_modules=r".*layers\.1\.input_layernorm")).eval()
  next(p for k, p in theirs.named_parameters() if "ln_tuning" in k).data.mul_(-2)
  theirs.save_pretrained(str(tmp_path))
  params = peft_format.load(model, tmp_path)
  same_outputs(model, params, theirs)
  new, old = (np.asarray(p["layers"]["attn_norm"]["scale"]) for p in (params, model.params))
  np.testing.assert_allclose(new, old * np.array([[1], [-2], [1]]), rtol=1e-6)


def test_norms_beside_lora_are_modules_to_save(tmp_path):
  peft = pytest.importorskip("peft")
  ref, model = pair("llama")
  method = [{"name": "lora"}, {"name": "norms", "targets": "attn_norm"}]
  params, mask = methods.init(KEY, model.params, method)
  params = noisy(params, mask)
  adapter.save(model, params, mask, method, tmp_path)
  config = json.loads((tmp_path / "adapter_config.json").read_text())
  assert config["peft_type"] == "LORA" and config["modules_to_save"] == ["input_layernorm"]
  theirs = peft.PeftModel.from_pretrained(ref, str(tmp_path)).eval()
  same_outputs(model, params, theirs)


@pytest.mark.parametrize(
  "tensors, message",
  [
    (
      lambda t: {k.replace("input_layernorm", "ln"): x for k, x in t.items()},
      "no place in this model: .*layers.0.ln.*layers.2.ln",
    ),
    (lambda t: {k: x[:-1].copy() for k, x in t.items()}, r"(?s)0.input_layernorm.*\(15,\), expected \(16,\).*2.input"),
    (
      lambda t: {k.replace("norm.ln_tuning_layers.weight", "norm.ln_tuning_layers.bias"): x for k, x in t.items()},
      "None",
    ),
  ],
)
def test_foreign_adapters_are_refused(tmp_path, tensors, message):
  params, mask = norms.init(KEY, transformer.init(LLAMA, KEY))
  model = models.Model("tiny", LLAMA, params, None, {"model_type": "llama"})
  peft_format.save(model, params, tmp_path, trained(mask), [{"name": "norms"}])
  edited(tmp_path, tensors=tensors)
  with pytest.raises(errors.UserError, match=message):
    peft_format.load(model, tmp_path)
