"""Names address weights, then the tensors of a weight that training may change."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import errors, methods, tree, weights
from lora_jax.model import transformer
from tests.noise import moved
from tests.test_families import TOKENS, jitted

KEY = jax.random.key(0)
CONFIG = transformer.Config(97, 16, 2, 4, 2, 4, 24, dtype="float32")
FUSED = dataclasses.replace(CONFIG, fused=True, attn_bias="all")


def trained(method, config=CONFIG):
  params, mask = methods.init(KEY, transformer.init(config, KEY), method)
  return params, mask, {k for k, m in tree.flatten(mask).items() if m}


def full(*targets):
  return {"name": "full", "targets": targets}


@pytest.mark.parametrize("name", ["lora", "dora", "loha", "lokr", "vera", "adalora", "ia3"])
def test_a_weight_that_was_asked_for_is_trained_whatever_is_put_around_it(name):
  adapter = {"name": name, "targets": "q"} | ({"feedforward": ""} if name == "ia3" else {})
  _, _, before = trained([adapter])
  for method in ([full("attn/q"), adapter], [adapter, full("attn/q/kernel")]):
    _, _, both = trained(method)
    (base,) = both - before
    assert base.startswith("layers/attn/q/kernel/base") and both > before


def test_an_adapter_in_an_adapter_keeps_to_its_own_mask():
  """LoRA-FA freezes its A, around a LoRA whose A is trained."""
  _, _, found = trained([{"name": "lora", "targets": "q"}, {"name": "lora_fa", "targets": "q"}])
  assert found == {f"layers/attn/q/kernel/{k}" for k in ("b", "base/a", "base/b")}


def test_parts_of_a_fused_matrix_that_was_asked_for_are_trained():
  _, _, found = trained([full("attn/qkv/kernel"), {"name": "lora", "targets": "v"}], FUSED)
  assert found == {f"layers/attn/qkv/kernel/{k}" for k in ("q", "k", "v/base", "v/a", "v/b")}


def test_a_scale_and_a_rank_are_no_leaves_that_a_pattern_finds():
  """`scale$` means the norms, and `attn/q/` the pretrained matrix and the factors."""
  _, _, found = trained([{"name": "lora", "targets": "q"}, full("scale$")])
  norms = {k for k in found if "norm" in k}
  assert norms and found - norms == {"layers/attn/q/kernel/a", "layers/attn/q/kernel/b"}
  _, _, found = trained([{"name": "lora", "targets": "q"}, full("attn/q/")])
  assert found == {f"layers/attn/q/kernel/{k}" for k in ("base", "a", "b")}
  with pytest.raises(errors.UserError, match="targets 'kernel/rank' matches nothing"):
    trained([{"name": "lora", "targets": "q"}, full("kernel/rank")])


def test_dora_over_a_trained_matrix_measures_it_anew():
  """`m (W + s A B) / ||W + s A B||` with W as it is now, by hand."""
  params, mask, _ = trained([full("mlp/down"), {"name": "dora", "targets": "down", "rank": 2}])
  start = jitted(CONFIG, params, TOKENS)
  np.testing.assert_allclose(start, jitted(CONFIG, transformer.init(CONFIG, KEY), TOKENS), atol=1e-5)
  params = moved(params, mask, 0.3)
  node = params["layers"]["mlp"]["down"]["kernel"]
  lora = node.base
  w = lora.base + lora.scale[:, None, None] * jnp.einsum("lfr,lrd->lfd", lora.a, lora.b)
  by_hand = transformer.init(CONFIG, KEY)
  down = node.magnitude[:, None] * w / jnp.linalg.norm(w, axis=1, keepdims=True)
  by_hand["layers"]["mlp"]["down"]["kernel"] = down
  np.testing.assert_allclose(weights.merge(params)["layers"]["mlp"]["down"]["kernel"], down, rtol=2e-5, atol=2e-6)
  got = jitted(CONFIG, params, TOKENS)
  np.testing.assert_allclose(got, jitted(CONFIG, by_hand, TOKENS), atol=1e-4)
  assert np.abs(got - start).max() > 0.01


def test_a_classifier_is_trained_under_its_adapter():
  config = dataclasses.replace(CONFIG, head="classification", n_labels=3)
  params, mask = methods.init(KEY, transformer.init(config, KEY), {"name": "lora", "targets": "classifier/kernel"})
  _, mask = methods.train_also(params, mask, {"classifier/kernel"})
  assert {k for k, m in tree.flatten(mask).items() if m} == {f"classifier/kernel/{k}" for k in ("base", "a", "b")}
