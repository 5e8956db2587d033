"""merging/lowrank.py: any change of weights as LoRA, exact at full rank, the best of its rank below."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import errors, families, methods, tree, weights
from lora_jax.formats import peft as peft_format
from lora_jax.merging import lowrank
from lora_jax.methods import lora
from lora_jax.model import transformer
from lora_jax.weights import fused
from tests import test_families
from tests.noise import moved
from tests.test_families import jitted as outputs
from tests.test_lora import TOKENS, first_output, load_family

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

CONFIG = transformer.Config(50, 16, 3, 4, 2, 4, 24, dtype="float32", tied=True)
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def base():
  return transformer.init(CONFIG, KEY)


def adapted(params, name="lora", noise=0.05, **kw):
  return moved(*methods.init(KEY, params, {"name": name, **kw}), noise)


def deltas(params):
  """{leaf name: change of each layer, float64 [L, in, out]} of a merged tree against its base."""
  flat = tree.flatten(params, is_leaf=weights.is_node)
  flat = {k: w for k, w in flat.items() if weights.is_node(w)}
  two = lambda k, x: np.asarray(x, np.float64).reshape(3, np.prod(x.shape[1 : 1 + transformer.in_axes(k)]), -1)
  return {k: two(k, w.delta()) for k, w in flat.items()}


@pytest.mark.slow
def test_lora_of_a_rank_is_itself(base):
  """At its own rank the error is rounding; a larger one is not used up."""
  params = adapted(base, targets="all-linear", rank=4, rank_pattern={"layers/1/": 2, "o": 3}, alpha=6.0)
  before = outputs(CONFIG, params, TOKENS)
  for rank in (4, 9):
    made, report = lowrank.to_lora(params, rank=rank)
    assert all(fit.error < 2e-6 for fit in report.values())
    assert report["layers/attn/q/kernel"].ranks == (4, 2, 4) and report["layers/attn/o/kernel"].ranks == (3, 2, 3)
    np.testing.assert_allclose(outputs(CONFIG, made, TOKENS), before, atol=1e-5)
    old, new = deltas(params), deltas(made)
    for k, x in old.items():
      assert np.linalg.norm(new[k] - x) < 2e-6 * np.linalg.norm(x)
  assert np.abs(before - outputs(CONFIG, base, TOKENS)).max() > 1e-2


def test_a_smaller_rank_is_the_best_of_that_rank(base):
  """The error of each layer is the norm of the singular values that are cut off."""
  params = adapted(base, targets="q,down", rank=6)
  made, report = lowrank.to_lora(params, rank=2)
  for k, x in deltas(params).items():
    s = np.linalg.svd(x, compute_uv=False)
    np.testing.assert_allclose(report[k].error, np.sqrt((s[:, 2:] ** 2).sum() / (s**2).sum()), rtol=1e-4)
    got = np.linalg.norm(deltas(made)[k] - x, axis=(1, 2))
    np.testing.assert_allclose(got, np.sqrt((s[:, 2:] ** 2).sum(1)), rtol=1e-4)
    assert report[k].ranks == (2, 2, 2) and report[k].error > 0.1
    node = tree.flatten(made, is_leaf=weights.is_node)[k]
    assert node.a.shape[-1] == 2 and node.a.dtype == jnp.float32


@pytest.mark.parametrize("variance", [0.3, 0.9, 1.0])
def test_the_smallest_rank_that_explains_the_variance(base, variance):
  params = adapted(base, targets="q,v,up", rank=7)
  _, report = lowrank.to_lora(params, variance=variance)
  for k, x in deltas(params).items():
    explained = np.cumsum(np.linalg.svd(x, compute_uv=False) ** 2, 1)
    explained /= explained[:, -1:]
    for r, e in zip(report[k].ranks, explained, strict=True):
      assert e[r - 1] >= variance - 1e-6 and (r == 1 or e[r - 2] < variance)
  if variance == 1.0:
    assert {fit.ranks for fit in report.values()} == {(7, 7, 7)}
  assert len({fit.ranks for fit in report.values()}) > 1 or variance != 0.9


METHODS = {
  "dora": {"targets": "q,o,down"},
  "loha": {"targets": "q,up", "rank": 2, "alpha": 64.0},
  "lokr": {"targets": "v,down", "rank": 2, "alpha": 64.0},
  "adalora": {"targets": "q,k", "alpha": 1024.0},
  "vera": {"targets": "q,down", "d_init": 1.0, "rank": 5},
  "ia3": {"noise": 0.3},
  "pissa": {"targets": "q,up"},
  "tokens": {"ids": [3, 7, 49]},
}


fast = ("dora", "ia3", "tokens")


@pytest.mark.parametrize("name", [m if m in fast else pytest.param(m, marks=pytest.mark.slow) for m in METHODS])
def test_every_method_that_changes_weights(base, name):
  """At full rank the model computes the same; what is left is LoRA over the same base, not copied."""
  params = adapted(base, name, **METHODS[name])
  made, report = lowrank.to_lora(params, rank=50)
  want = outputs(CONFIG, params, TOKENS)
  assert np.abs(want - outputs(CONFIG, base, TOKENS)).max() > 1e-3
  np.testing.assert_allclose(outputs(CONFIG, made, TOKENS), want, atol=1e-5)
  assert all(fit.error < 1e-5 for fit in report.values())
  nodes = [w for w in jax.tree.leaves(made, is_leaf=weights.is_node) if weights.is_node(w)]
  assert nodes and all(type(w) is weights.LoRA for w in nodes)
  assert tree.names(weights.strip(made)) == tree.names(base)
  if name != "tokens":
    assert all(a is b for a, b in zip(jax.tree.leaves(weights.strip(made)), jax.tree.leaves(base), strict=True))
  else:
    assert report == {"embed/kernel": lowrank.Fit((3,), pytest.approx(0, abs=1e-5))}
  if name == "vera":
    assert "shared" not in made and {fit.ranks for fit in report.values()} == {(5, 5, 5)}


def test_several_methods_become_one(base):
  method = [{"name": "lora", "targets": "k", "rank": 2}, {"name": "loha", "targets": "k", "rank": 1}, {"name": "ia3"}]
  params = moved(*methods.init(KEY, base, method), 0.05)
  made, report = lowrank.to_lora(params, variance=1.0)
  np.testing.assert_allclose(outputs(CONFIG, made, TOKENS), outputs(CONFIG, params, TOKENS), atol=1e-5)
  assert set(report) == {f"layers/{k}/kernel" for k in ("attn/k", "attn/v", "mlp/down")}


def test_biases_under_scales_and_in_bfloat16(base):
  """A scale of the outputs changes what the bias adds: LoRA gets a bias of its own."""
  config = dataclasses.replace(CONFIG, attn_bias="qkv")
  biased = transformer.init(config, KEY)
  biased["layers"]["attn"]["k"]["bias"] += 0.5
  params = adapted(biased, "ia3")
  made, _ = lowrank.to_lora(params, rank=50)
  np.testing.assert_allclose(outputs(config, made, TOKENS), outputs(config, params, TOKENS), atol=1e-5)
  assert np.abs(outputs(config, params, TOKENS) - outputs(config, biased, TOKENS)).max() > 1e-3
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), base)
  params = adapted(half, targets="q,up")
  made, report = lowrank.to_lora(params, rank=8)
  assert all(fit.error < 2e-6 for fit in report.values())  # not that of the rounded sum
  assert made["layers"]["attn"]["q"]["kernel"].base.dtype == jnp.bfloat16


@pytest.mark.slow
def test_experts_and_parts_of_fused_matrices():
  hf = dict(test_families.MIXTRAL, model_type="mixtral")
  config = dataclasses.replace(families.get("mixtral").config(hf), dtype="float32")
  params = adapted(transformer.init(config, KEY), targets="gate,down,router", rank=2)
  made, report = lowrank.to_lora(params, variance=1.0)
  np.testing.assert_allclose(outputs(config, made, TOKENS), outputs(config, params, TOKENS), atol=1e-5)
  assert report["layers/moe/gate/kernel"].ranks == (2, 2, 2) and made["layers"]["moe"]["gate"]["kernel"].a.ndim == 4
  config = dataclasses.replace(CONFIG, fused=True)
  params = adapted(transformer.init(config, KEY), targets="q,v,up", rank=2)
  made, report = lowrank.to_lora(params, rank=2)
  np.testing.assert_allclose(outputs(config, made, TOKENS), outputs(config, params, TOKENS), atol=1e-5)
  assert {k.rpartition("/")[2] for k in report} == {"q", "v", "up"}
  node = made["layers"]["attn"]["qkv"]["kernel"]
  assert isinstance(node, fused.Fused) and not weights.is_node(node.parts["k"])


def test_layers_without_change(base):
  """Rank 0 there; with nothing to keep the weight is plain, and with no change at all there is an error."""
  params = adapted(base, targets=["layers/1/attn/q"], rank=2)
  made, report = lowrank.to_lora(params, rank=3)
  assert report["layers/attn/q/kernel"].ranks == (0, 2, 0)
  np.testing.assert_array_equal(made["layers"]["attn"]["q"]["kernel"].scale > 0, [False, True, False])
  with pytest.raises(errors.UserError, match="changes nothing"):
    lowrank.to_lora(lora.init(KEY, base)[0], rank=2)
  with pytest.raises(errors.UserError, match="no adapter"):
    lowrank.to_lora(base, rank=2)


@pytest.mark.parametrize(
  "kw, message",
  [
    ({}, "either a rank or a variance"),
    ({"rank": 2, "variance": 0.5}, "either a rank or a variance"),
    ({"rank": 0}, "rank=0"),
    ({"variance": 90}, "90"),
  ],
)
def test_bad_settings_are_refused(base, kw, message):
  with pytest.raises(errors.UserError, match=message):
    lowrank.to_lora(adapted(base), **kw)


@pytest.mark.parametrize("name, leaf", [("parallel", "layers/mlp/adapter"), ("prompt_tuning", "prompt")])
def test_what_is_no_change_of_weights_is_refused(base, name, leaf):
  params = adapted(base, name)
  with pytest.raises(errors.UserError, match=f"no change of weights.*{leaf}"):
    lowrank.to_lora(params, rank=2)


def test_the_table_is_readable(base):
  _, report = lowrank.to_lora(adapted(base, targets=["q", "layers/[12]/attn/v"], rank=3), rank=2)
  lines = lowrank.table(report).splitlines()
  assert len(lines) == 2 and len({line.index("  error") for line in lines}) == 1
  assert lines[0].split() == [
    "layers/attn/q/kernel",
    "rank",
    "2",
    "error",
    f"{report['layers/attn/q/kernel'].error:.2e}",
  ]
  assert lines[1].split()[:3] == ["layers/attn/v/kernel", "rank", "0,2,2"]


@pytest.mark.slow
@pytest.mark.parametrize("family, name", [("gpt2", "ia3"), ("qwen2", "dora")])
def test_peft_loads_what_is_converted(tmp_path, family, name):
  """With biases, and ranks of each layer."""
  peft = pytest.importorskip("peft")
  ref, model, _ = load_family(tmp_path / "base", family)
  made, report = lowrank.to_lora(adapted(model.params, name), variance=0.8)
  assert len({r for fit in report.values() for r in fit.ranks}) > 1
  peft_format.save(model, made, tmp_path / "adapter", method={"name": "lora"})
  theirs = peft.PeftModel.from_pretrained(ref, str(tmp_path / "adapter")).eval()
  ours = outputs(model.config, made, TOKENS)
  np.testing.assert_allclose(ours, first_output(theirs), atol=1e-4, rtol=1e-4)
  assert np.abs(ours - outputs(model.config, model.params, TOKENS)).max() > 1e-3
