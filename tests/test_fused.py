"""weights/fused.py: parts of fused matrices, against the same model with matrices of their own and against peft."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from lora_jax import errors, families, methods, models, tree, weights
from lora_jax.formats import adapter, peft as peft_format
from lora_jax.methods import lora, targeting
from lora_jax.model import transformer
from lora_jax.weights import fused
from tests import test_families, test_lora
from tests.noise import moved
from tests.test_families import jitted as outputs
from tests.test_lora import first_output, load_family

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

CONFIG = transformer.Config(50, 16, 3, 4, 2, 4, 24, dtype="float32", tied=True, fused=True, attn_bias="qkv")
KEY = jax.random.key(0)
TOKENS = test_lora.TOKENS
QKV = "layers/attn/qkv/kernel"


@pytest.fixture(scope="module")
def base():
  return transformer.init(CONFIG, KEY)


def separate(params):
  """The same parameters for a config that is not fused."""
  attn, mlp = dict(params["layers"]["attn"]), dict(params["layers"]["mlp"])
  qkv, both = attn.pop("qkv"), mlp.pop("gate_up")["kernel"]
  for name, rows in (("q", slice(0, 4)), ("k", slice(4, 6)), ("v", slice(6, 8))):
    attn[name] = {"kernel": qkv["kernel"][:, :, rows], "bias": qkv["bias"][:, rows]}
  mlp |= {"gate": {"kernel": both[:, :, 0]}, "up": {"kernel": both[:, :, 1]}}
  return params | {"layers": params["layers"] | {"attn": attn, "mlp": mlp}}


def parts(params):
  """{part: node} of all fused matrices."""
  flat = fused.flatten(params)
  return {k.rpartition("/")[2]: w for k, w in flat.items() if fused.part_names(k.rpartition("/")[0])}


@pytest.mark.slow
def test_the_same_function_as_lora_on_separate_matrices(base):
  """Logits, and the gradients of all factors."""
  plain = dataclasses.replace(CONFIG, fused=False)
  ours, mask = lora.init(KEY, base, targets="q,v,gate", rank=3)
  ours = moved(ours, mask)
  theirs, their_mask = lora.init(KEY, separate(base), targets="q,v,gate", rank=3)
  for name, node in parts(ours).items():
    if weights.is_node(node):
      module = theirs["layers"]["mlp" if name == "gate" else "attn"][name]
      module["kernel"] = module["kernel"].replace(a=node.a, b=node.b.reshape(module["kernel"].b.shape))
  np.testing.assert_allclose(outputs(CONFIG, ours, TOKENS), outputs(plain, theirs, TOKENS), atol=1e-5)
  assert np.abs(outputs(CONFIG, ours, TOKENS) - outputs(CONFIG, base, TOKENS)).max() > 1e-2

  def grads(config, params, mask):
    trainable, frozen = tree.split(params, mask)
    return jax.grad(lambda t: (test_families.outputs(config, tree.join(t, frozen), TOKENS) ** 2).sum())(trainable)

  mine, other = parts(grads(CONFIG, ours, mask)), grads(plain, theirs, their_mask)["layers"]
  for name in ("q", "v", "gate"):
    node = other["mlp" if name == "gate" else "attn"][name]["kernel"]
    np.testing.assert_allclose(mine[name].a, node.a, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(mine[name].b.reshape(node.b.shape), node.b, rtol=1e-3, atol=1e-4)
    assert np.abs(node.a).max() > 1e-3 and np.abs(node.b).max() > 1e-3


def test_splitting_changes_nothing(base):
  """Dense, stripped and merged are what was split, bit for bit; starting values leave the model as it is."""
  split = fused.split(base, {QKV, "layers/mlp/gate_up/kernel"})
  for back in (weights.strip(split), weights.merge(split)):
    jax.tree.map(np.testing.assert_array_equal, back, base)
  node = split["layers"]["attn"]["qkv"]["kernel"]
  assert node.shape == (3, 16, 8, 4) and [p.shape[2] for p in node.parts.values()] == [4, 2, 2]
  params, _ = lora.init(KEY, base, targets="k,up")
  np.testing.assert_allclose(outputs(CONFIG, params, TOKENS), outputs(CONFIG, base, TOKENS), atol=1e-6)
  jax.tree.map(np.testing.assert_array_equal, weights.strip(params), base)


def test_merged_compiled_unrolled_and_eager_agree(base):
  params = moved(*lora.init(KEY, base, targets="q,v,gate", rank=3))
  want = outputs(CONFIG, params, TOKENS)
  unrolled = dataclasses.replace(CONFIG, scan=False, remat=True)
  np.testing.assert_allclose(outputs(CONFIG, weights.merge(params), TOKENS), want, atol=1e-5)
  np.testing.assert_allclose(jax.jit(lambda p: test_families.outputs(unrolled, p, TOKENS))(params), want, atol=1e-5)


@pytest.mark.parametrize(
  "targets, expected",
  [
    ("q,v", {f"{QKV}/q", f"{QKV}/v"}),
    ("qkv", {QKV}),
    ("attn/q", {QKV}),
    (["q", "layers/attn/"], {f"{QKV}/q", QKV, "layers/attn/o/kernel"}),
    ("all-linear", {QKV, "layers/attn/o/kernel", "layers/mlp/gate_up/kernel", "layers/mlp/down/kernel"}),
    ("up", {"layers/mlp/gate_up/kernel/up"}),
    ("kernel/(k|v)$", {f"{QKV}/k", f"{QKV}/v"}),
    ("layers/1/attn/qkv/kernel/q$", {f"{QKV}/q"}),
  ],
)
def test_what_is_found_in_the_whole_name_means_the_whole(base, targets, expected):
  split = targeting.split(base, targets)
  linear = targeting.matrices(split)
  chosen = targeting.select(targets, linear, "targets")
  assert set(chosen) == expected
  if "layers/1/" in targets:
    np.testing.assert_array_equal(chosen[f"{QKV}/q"], [False, True, False])
  assert any(isinstance(w, fused.Fused) for w in tree.flatten(split, is_leaf=weights.is_node).values()) == any(
    k.rpartition("/")[2] != "kernel" for k in expected
  )


def test_patterns_and_mistakes(base):
  params, _ = lora.init(KEY, base, targets="q,v", rank=4, rank_pattern={"layers/1/": 2, "qkv/kernel/v": 3, "qkv": 1})
  assert [p.rank.tolist() for p in parts(params).values() if weights.is_node(p)] == [[1, 2, 1], [3, 2, 3]]
  with pytest.raises(errors.UserError, match="'w' matches nothing; .*qkv"):
    lora.init(KEY, base, targets="w")
  whole, _ = lora.init(KEY, base, targets="qkv")
  with pytest.raises(errors.UserError, match=f"{QKV} is LoRA as a whole"):
    lora.init(KEY, whole, targets="q")


def test_gpt2_medium_has_the_count_of_the_paper():
  """Hu et al. 2021, table 3: 0.35M for rank 4 on q and v; methods.size leaves out what pads smaller ranks."""
  hf = dict(model_type="gpt2", vocab_size=50257, n_embd=1024, n_layer=24, n_head=16, n_positions=1024)
  config, static = families.get("gpt2").config(hf), []

  def run():
    params, mask = lora.init(KEY, transformer.init(config, KEY), targets="q,v", rank=4)
    static.append((tree.size(tree.split(params, mask)[0]), mask))
    return params

  jax.eval_shape(run)
  assert static[0][0] == 393_216
  small = transformer.init(CONFIG, KEY)
  params, mask = lora.init(KEY, small, targets="q", rank=4, rank_pattern={"layers/1/": 1})
  assert methods.size(params, mask) == (4 + 1 + 4) * (16 + 16)


# Settings of LoRA by family: parts of qkv, of several ranks, in some layers, with starts and biases.
PEFT = {
  "gpt2": ("gpt2", dict(targets="q,v", rank=3)),
  "gpt2-layers": (
    "gpt2",
    dict(targets=["kernel/q$", "layers/1/.*kernel/v$", "attn/o"], rank_pattern={"v": 5}, alpha_pattern={"v": 7.0}),
  ),
  "gpt2-pissa-bias": ("gpt2", dict(targets="q,k", rank=2, init="pissa", lora_bias=True)),
  "phi3": ("phi3", dict(targets="k,up,down", rank=3, rslora=True)),
  "neox": ("neox", dict(targets="q,v", rank=3)),
}


slow = lambda name: pytest.param(name, marks=pytest.mark.slow)  # two libraries compile and load each


@pytest.mark.parametrize("name", ["gpt2", *map(slow, list(PEFT)[1:])])
def test_peft_loads_parts(tmp_path, name):
  """One LoRA of the fused matrix whose rank is the sum, with exact zeros in the outputs of the others."""
  peft = pytest.importorskip("peft")
  family, kw = PEFT[name]
  ref, model, _ = load_family(tmp_path / "base", family)
  params, mask = lora.init(KEY, model.params, **kw)
  params = moved(params, mask)
  ours = outputs(model.config, params, TOKENS)
  assert np.abs(ours - outputs(model.config, model.params, TOKENS)).max() > 1e-2
  peft_format.save(model, params, tmp_path / "adapter")
  theirs = peft.PeftModel.from_pretrained(ref, str(tmp_path / "adapter")).eval()
  np.testing.assert_allclose(ours, first_output(theirs), atol=1e-4, rtol=1e-4)
  again = peft_format.load(model, tmp_path / "adapter")
  np.testing.assert_allclose(outputs(model.config, again, TOKENS), ours, atol=1e-4, rtol=1e-4)
  if name == "gpt2":
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (6, 32)
    b = again["layers"]["attn"]["qkv"]["kernel"].b
    assert not b[:, :3, 4:].any() and not b[:, 3:, :8].any() and b[:, :3, :4].all() and b[:, 3:, 8:].all()


def test_our_own_form_keeps_parts(tmp_path):
  """What PEFT has no form for, here two methods, is saved without the frozen slices of the base."""
  hf = dict(test_families.GPT2, model_type="gpt2")
  config = dataclasses.replace(families.get("gpt2").config(hf), dtype="float32")
  model = models.Model("tiny", config, transformer.init(config, KEY), None, hf)
  method = [{"name": "lora", "targets": "q"}, {"name": "lora", "targets": "o"}]
  params, mask = methods.init(KEY, model.params, method)
  assert sum(jax.tree.leaves(mask)) == 4
  params = moved(params, mask)
  adapter.save(model, params, mask, method, tmp_path)
  assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA_JAX"
  saved = safetensors_names(tmp_path)
  assert f"{QKV}/q/a" in saved and not [k for k in saved if k.endswith(("base", "/k", "/v"))]
  jax.tree.map(np.testing.assert_array_equal, adapter.load(model, tmp_path), params)


def safetensors_names(directory):
  import safetensors.numpy

  return set(safetensors.numpy.load_file(directory / "adapter_model.safetensors"))


def test_another_method_on_a_part_has_no_peft_form(base, tmp_path):
  """Its part would be left out of the file unnoticed."""
  hf = dict(test_families.PHI3, model_type="phi3")
  model = models.Model("tiny", CONFIG, base, None, hf)
  params = fused.split(base, {QKV})
  node = params["layers"]["attn"]["qkv"]["kernel"]
  other = Twice(node.parts["k"])
  params["layers"]["attn"]["qkv"]["kernel"] = node.map(lambda k, p: other if k == "k" else p)
  params, _ = lora.init(KEY, params, targets="o")
  with pytest.raises(peft_format.NoForm):
    peft_format.save(model, params, tmp_path, method={"name": "lora"})


@struct.dataclass
class Twice(weights.Adapter):
  """A node of no method of ours: the doubled weight."""

  base: jax.Array

  def dense(self):
    return 2 * self.base

  def dot(self, spec, x, dtype=None):
    return weights.dot(spec, x, self.dense(), dtype)


def test_any_node_can_wrap_a_part(base):
  params = fused.split(base, {QKV})
  node = params["layers"]["attn"]["qkv"]["kernel"]
  params["layers"]["attn"]["qkv"]["kernel"] = node.map(lambda k, p: Twice(p) if k == "v" else p)
  by_hand = base | {"layers": base["layers"] | {"attn": dict(base["layers"]["attn"])}}
  kernel = base["layers"]["attn"]["qkv"]["kernel"]
  by_hand["layers"]["attn"]["qkv"] = base["layers"]["attn"]["qkv"] | {"kernel": kernel.at[:, :, 6:].multiply(2)}
  np.testing.assert_allclose(outputs(CONFIG, params, TOKENS), outputs(CONFIG, by_hand, TOKENS), atol=1e-6)
  names = []
  weights.map_nodes(lambda k, w: names.append(k) or w, params)
  assert names == [f"{QKV}/v", QKV]
  assert jnp.array_equal(weights.strip(params)["layers"]["attn"]["qkv"]["kernel"], kernel)
