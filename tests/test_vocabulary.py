"""Tokens beyond the model's embedding, of which transformers raises IndexError: refused wherever texts become ids."""

import dataclasses

import numpy as np
import pytest
import tokenizers

from lora_jax import errors, methods, models, tasks
from lora_jax.batches import causal, classification, encoder_decoder
from lora_jax.inference import evaluate, generate, members
from lora_jax.model import transformer
from tests.test_generate import BOS, EOS, byte_tokenizer

SAID = "token '<turn>' has id 258, but the embedding has 258 rows: resize the model's embedding or remove the token"
SIZES = dict(batch_size=2, seq_len=16)
START = {causal: {}, classification: {}, encoder_decoder: {"start": 0}}


def tokenizer(rows=258, **kw):
  return dataclasses.replace(byte_tokenizer(), rows=rows, **kw)


def task(prompt="a", response="b", labels=("b", "c")):
  form = lambda e: tasks.Formatted(prompt, response)
  target = (lambda e: 0) if labels else None
  return tasks.Task("toy", None, form, None, labels, None, lambda e: (prompt,), target, tasks.accuracy)


def train(kind, tok, **kw):
  return next(kind.train_iterator(task(**kw), [{}] * 4, tok, **SIZES, **START[kind]))


def test_the_tokenizer_of_a_model_knows_the_rows_of_its_embedding():
  config = transformer.Config(258, 8, 1, 2, 2, 4, 8)
  model = models.Model("m", config, {}, byte_tokenizer(), {})
  assert model.tokenizer.rows == 258 and model.tokenizer.encode("a") == [97]
  for prompt in ("a<turn>", [97, 258]):
    with pytest.raises(errors.UserError, match="258"):
      generate.generate(model, [prompt])
  with pytest.raises(errors.UserError, match=SAID):
    methods.prepare({"name": "prompt_tuning", "text": "a<turn>"}, model.tokenizer)


@pytest.mark.parametrize("kind", START)
def test_batches_to_train_on(kind):
  with pytest.raises(errors.UserError, match=SAID):
    train(kind, tokenizer(), prompt="a<turn>")
  whole = train(kind, tokenizer(300))
  assert all(np.array_equal(whole[k], x) for k, x in train(kind, tokenizer()).items()), "more rows than tokens"


@pytest.mark.parametrize("kind", START)
def test_batches_to_evaluate(kind):
  with pytest.raises(errors.UserError, match=SAID):
    list(kind.eval_batches(task(prompt="a<turn>"), [{}], tokenizer(), **SIZES))


def test_labels_and_general_texts():
  with pytest.raises(errors.UserError, match=SAID):
    causal.eval_batches(task(labels=("b", "<turn>")), [{}], tokenizer(), **SIZES)
  config = transformer.Config(258, 8, 1, 2, 2, 4, 8)
  with pytest.raises(errors.UserError, match=SAID):
    evaluate.text_losses(config, members.one({}), tokenizer(), ["a<turn>"]).run()


@pytest.mark.parametrize("kind", [causal, encoder_decoder])
def test_the_token_that_ends_a_text(kind):
  with pytest.raises(errors.UserError, match="'</s>' has id 257, but the embedding has 257 rows"):
    train(kind, tokenizer(257), labels=None)


def test_what_begins_an_empty_prompt_and_what_frames_a_text():
  with pytest.raises(errors.UserError, match="'<s>' has id 256"):
    train(causal, tokenizer(256, eos_id=None), prompt="")
  framed = tokenizer(256)
  framed.backend.post_processor = tokenizers.processors.TemplateProcessing("<s> $0", special_tokens=[("<s>", BOS)])
  with pytest.raises(errors.UserError, match="'<s>' has id 256"):
    train(classification, framed)


@pytest.mark.parametrize("kind", START)
def test_padding_is_a_token_of_the_model(kind):
  batch = train(kind, tokenizer(pad_id=258))
  assert (batch["tokens"][batch["segment_ids"] == 0] == EOS).all() and batch["tokens"].shape[1] > 4


def test_the_start_of_an_encoder_decoder():
  config = transformer.Config(258, 8, 1, 2, 2, 4, 8, encoder_layers=1)
  model = models.Model("m", config, {}, byte_tokenizer(), {"decoder_start_token_id": 258})
  with pytest.raises(errors.UserError, match="token 258, but the embedding has 258 rows"):
    generate.start_id(model)
