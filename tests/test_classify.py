"""Texts for a head: framing and truncation equal transformers', and the laws of the batches."""

import dataclasses
import json

import hypothesis
import numpy as np
import pytest
import tokenizers
from hypothesis import strategies as st

from lora_jax import errors, tasks, tokenizer
from lora_jax.batches import classification, rows
from tests.test_tokenizer import bytes_bpe, encoder_directory, template, wordpiece

BUILDS = {"bert": wordpiece, "distilbert": template, "roberta": bytes_bpe}
WORDS = "the quick brown fox doesn't jump over 12 lazy dogs [SEP] <mask>, says \u00fcber na\u00efve?".split()
sentence = st.lists(st.sampled_from(WORDS), max_size=14).map(" ".join)


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
  """As BERT's, with padding that is no token type."""
  path = encoder_directory(tmp_path_factory.mktemp("bert"), wordpiece(), "bert")
  return dataclasses.replace(tokenizer.from_directory(path), pad_id=7)


@pytest.fixture(scope="module", params=BUILDS)
def both(request, tmp_path_factory):
  """Our tokenizer and transformers' of the same directory."""
  transformers = pytest.importorskip("transformers")
  path = encoder_directory(tmp_path_factory.mktemp(request.param), BUILDS[request.param](), request.param)
  return tokenizer.from_directory(path), transformers.AutoTokenizer.from_pretrained(path)


@hypothesis.given(
  st.lists(st.one_of(st.tuples(sentence), st.tuples(sentence, sentence)), max_size=4), st.integers(5, 40)
)
@hypothesis.settings(deadline=None, max_examples=150)
def test_encode_equals_transformers(both, texts, seq_len):
  ours, theirs = both
  got, truncated = classification.encode(ours, texts, seq_len)
  # In lists, since transformers takes an empty second text for none otherwise.
  kw = dict(return_token_type_ids=True)
  full = [theirs(*([t] for t in x), **kw) for x in texts]
  cut = [theirs(*([t] for t in x), truncation=True, max_length=seq_len, **kw) for x in texts]
  for ours, want in zip(got, cut, strict=True):
    assert [ours["tokens"].tolist()] == want["input_ids"] and [ours["token_types"].tolist()] == want["token_type_ids"]
    assert ours["tokens"].dtype == ours["token_types"].dtype == np.int32
  assert truncated == sum(len(x["input_ids"][0]) > seq_len for x in full)


def test_both_of_a_pair_are_cut_in_every_order(both):
  ours, theirs = both
  for a in range(1, 9):
    for b in range(1, 9):
      for seq_len in range(5, 14):
        x = (" fox" * a, " dogs" * b)
        (got,), _ = classification.encode(ours, [x], seq_len)
        assert got["tokens"].tolist() == theirs(*x, truncation=True, max_length=seq_len)["input_ids"]


def test_a_frame_without_room_is_refused(both):
  ours, _ = both
  special = ours.backend.num_special_tokens_to_add(True)
  assert len(classification.encode(ours, [("fox", "dogs")], special + 1)[0][0]["tokens"]) == special + 1
  with pytest.raises(errors.UserError, match=f"seq_len={special} has no room for text beside {special} special"):
    classification.encode(ours, [("fox", "dogs")], special)


def test_decoders_have_no_frame_or_begin_a_text():
  backend = bytes_bpe()
  backend.post_processor = tokenizers.processors.ByteLevel()
  plain = tokenizer.Tokenizer(backend, pad_id=1)
  got, _ = classification.encode(plain, [("fox",), ("fox", " dogs"), ("",)], 20)
  assert [x["tokens"].tolist() for x in got] == [plain.encode("fox"), plain.encode("fox dogs"), [1]]
  assert got[2]["token_types"].tolist() == [0]
  backend.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
  (got,), _ = classification.encode(tokenizer.Tokenizer(backend, bos_id=0), [("fox",)], 20)
  assert got["tokens"].tolist() == [0, *plain.encode("fox")]


def task(targets, labels=("no", "yes")):
  """Pairs whose first text is the example's number; labels None for a regression."""
  found = tasks.Task(
    name="toy",
    load=lambda split: [],
    format=lambda e: tasks.Formatted(f"{e['i']}", ""),
    score=lambda e, text: {},
    labels=labels,
    prompt_loss_weight=None,
    texts=lambda e: (str(e["i"]), "fox " * (e["i"] % 30)),
    target=lambda e: targets[e["i"]],
    metrics=lambda predictions, references: {},
  )
  return found, [{"i": i} for i in range(len(targets))]


def numbers(tok, batch):
  """The examples in a batch, checked for the laws of its arrays."""
  B, T = batch["tokens"].shape
  real = np.arange(T) < batch["lengths"][:, None]
  assert batch["lengths"].min() >= 1 and batch["lengths"].max() <= T
  np.testing.assert_array_equal(batch["segment_ids"], real)
  np.testing.assert_array_equal(batch["positions"], np.arange(T) * real)
  assert (batch["tokens"][~real] == tok.pad_id).all() and (batch["token_types"][~real] == 0).all()
  shapes = dict.fromkeys(("tokens", "token_types", "positions", "segment_ids"), (B, T))
  shapes |= dict.fromkeys(batch.keys() - shapes.keys(), (B,))
  assert {k: v.shape for k, v in batch.items()} == shapes
  floats = {k for k, v in batch.items() if v.dtype != np.int32}
  assert all(batch[k].dtype == np.float32 for k in floats) and floats <= {"weights", "labels"}
  for row, n in zip(np.arange(B)[batch["weights"] > 0], batch["lengths"][batch["weights"] > 0], strict=True):
    tokens, types = batch["tokens"][row, :n], batch["token_types"][row, :n]
    ends = np.flatnonzero(tokens == tok.sep_id)
    assert tokens[0] == tok.cls_id and len(ends) == 2 and ends[1] == n - 1
    np.testing.assert_array_equal(types, np.arange(n) > ends[0])
    yield int(tok.decode(tokens[: ends[0]]).replace(" ", ""))


def iterator(tok, targets, labels=("no", "yes"), **kw):
  return classification.train_iterator(*task(targets, labels), tok, **{"batch_size": 4, "seq_len": 24, **kw})


def test_an_epoch_has_every_example_once_with_its_label(tok):
  targets = [i % 2 for i in range(52)]
  it, epochs = iterator(tok, targets), []
  for _ in range(2):
    epochs.append([])
    for _ in range(13):
      batch = next(it)
      assert set(batch) == set("tokens token_types positions segment_ids lengths labels weights".split())
      assert batch["tokens"].shape[1] == rows.bucket(batch["lengths"].max(), 24) and (batch["weights"] == 1).all()
      found = list(numbers(tok, batch))
      assert batch["labels"].tolist() == [targets[i] for i in found] and batch["labels"].dtype == np.int32
      epochs[-1] += found
  assert epochs[0] != epochs[1] and sorted(epochs[0]) == sorted(epochs[1]) == list(range(52))
  long = sum(len(tok.encode(str(i)) + tok.encode("fox " * (i % 30))) + 3 > 24 for i in range(52))
  assert (it.examples, it.truncated) == (52, long) and 0 < long < 52


def test_regression_has_float_labels_that_may_be_negative(tok):
  targets = [i / 2 - 3 for i in range(12)]
  batch = next(iterator(tok, targets, labels=None))
  assert batch["labels"].dtype == np.float32 and (batch["weights"] == 1).all()
  assert batch["labels"].tolist() == [targets[i] for i in numbers(tok, batch)]
  batches = classification.eval_batches(*task(targets, None), tok, batch_size=5, seq_len=24)
  assert sum(b["weights"].sum() for b in batches) == 12


def same(a, b):
  return all(x.keys() == y.keys() and all(np.array_equal(x[k], y[k]) for k in x) for x, y in zip(a, b, strict=True))


def test_state_is_restored_exactly_and_processes_share_the_batch(tok):
  targets = [i % 2 for i in range(50)]
  whole, parts = iterator(tok, targets), [iterator(tok, targets, process_index=i, process_count=2) for i in range(2)]
  for _ in range(7):
    want, got = next(whole), [next(p) for p in parts]
    assert same([{k: np.concatenate([g[k] for g in got]) for k in want}], [want])
  state = json.loads(json.dumps(whole.get_state()))
  want, fresh = [next(whole) for _ in range(20)], iterator(tok, targets)
  fresh.set_state(state)
  assert same([next(fresh) for _ in range(20)], want)
  assert not same([next(iterator(tok, targets, seed=s)) for s in (0, 1)], [next(iterator(tok, targets))] * 2)


def test_eval_batches_hold_every_example_once(tok):
  targets = [i % 2 if i != 5 else -1 for i in range(21)]
  batches = classification.eval_batches(*task(targets), tok, batch_size=4, seq_len=16)
  seen, lengths = [], []
  for batch in batches:
    index, hidden = batch["index"], batch["index"] == 5
    assert list(numbers(tok, batch)) == index[(index >= 0) & ~hidden].tolist()
    np.testing.assert_array_equal(batch["weights"], (index >= 0) & ~hidden)
    assert batch["labels"].tolist() == [targets[i] if i >= 0 else 0 for i in index]
    assert (batch["lengths"][index < 0] == 1).all()
    seen += index.tolist()
    lengths += batch["lengths"].tolist()
  assert sorted(seen) == [-1, -1, -1, *range(21)] and lengths == sorted(lengths, reverse=True)
  assert classification.eval_batches(*task([]), tok, batch_size=4, seq_len=16) == []


def test_what_cannot_be_learned_is_refused(tok):
  with pytest.raises(errors.UserError, match="'toy': .*'i': 2.* has none of the labels"):
    iterator(tok, [0, 1, -1, 0])
  with pytest.raises(errors.UserError, match="'toy' has no examples"):
    iterator(tok, [])
  with pytest.raises(errors.UserError, match="not a multiple of the number of processes, 3"):
    iterator(tok, [0, 1], process_count=3)
  text = tasks.get("jsonl", path="x")
  with pytest.raises(errors.UserError, match="'jsonl' has neither labels nor numbers"):
    classification.eval_batches(text, [{"prompt": "a", "response": "b"}], tok, batch_size=1, seq_len=8)
