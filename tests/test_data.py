"""Encoding, buckets, packing, and the training iterator, with a tokenizer of bytes."""

import ast
import collections
import dataclasses
import json
import pathlib

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from lora_jax import errors, tasks
from lora_jax.batches import causal, rows as rows_lib

PAD, BOS, EOS = 7, 1, 2
T = 40


@dataclasses.dataclass(frozen=True)
class Bytes:
  """Ids are bytes + 3; "^" and "$" in a text are the special tokens."""

  bos_id: int | None = BOS
  eos_id: int | None = EOS
  pad_id: int | None = PAD
  add_bos: bool = False
  rewrites: bool = False
  chat_template = ""

  @property
  def begin(self):
    return (BOS,) if self.add_bos else ()

  @property
  def end_ids(self):
    return () if self.eos_id is None else (self.eos_id,)

  rows: int | None = None

  def check(self, rows):
    pass

  def encode(self, text, add_special_tokens=False):
    assert not add_special_tokens
    return [{"^": BOS, "$": EOS}.get(chr(b), b + 3) for b in text.encode()]

  def encode_batch(self, texts):
    return [self.encode(t) for t in texts]

  def encode_offsets(self, texts):
    for ids in self.encode_batch(texts):
      at = np.arange(len(ids))
      yield np.array(ids, np.int32), np.stack([at, at + 1], axis=1)

  def decode(self, ids, skip_special_tokens=True):
    special = {} if skip_special_tokens else {BOS: "^", EOS: "$"}
    return "".join(chr(i - 3) if i > 2 else special.get(int(i), "") for i in ids)

  def chat(self, messages, add_generation_prompt=False):
    last = len(messages) - 1
    said = [
      m["content"].replace("think", "") if self.rewrites and i < last else m["content"] for i, m in enumerate(messages)
    ]
    text = "^" + "".join(f"<{m['role'][0]}>{c}$\n" for m, c in zip(messages, said, strict=True))
    return text + "<a>" * add_generation_prompt


def task(formatted, labels=None):
  """A task whose examples are `{"i": index into formatted}`."""
  forms = lambda e: formatted[e["i"]]
  found = tasks.Task("fake", lambda s: None, forms, lambda e, t: {}, labels, None, lambda e: (), None, lambda p, r: {})
  return found, [{"i": i} for i in range(len(formatted))]


def corpus(n=53, seed=0):
  """Distinct examples of many lengths, all of which fit."""
  rng = np.random.default_rng(seed)
  return [tasks.Formatted(f"{i}:" + "p" * rng.integers(0, 20), "r" * rng.integers(1, 10)) for i in range(n)]


def iterator(formatted, tokenizer=None, **kw):
  return causal.train_iterator(*task(formatted), tokenizer or Bytes(), **{"batch_size": 4, "seq_len": T, **kw})


def examples_of(batch):
  """`[(ids, weights)]` of the examples of a batch, checked for the law of positions and targets."""
  found = []
  for row in range(len(batch["tokens"])):
    segments = batch["segment_ids"][row]
    used = segments > 0
    assert used[: used.sum()].all(), "padding is at the end"
    assert (np.diff(segments[used]) >= 0).all() and set(segments[used]) == set(range(1, segments.max() + 1))
    assert not batch["weights"][row][~used].any() and not batch["positions"][row][~used].any()
    assert (batch["tokens"][row][~used] == PAD).all() and (batch["targets"][row][~used] == PAD).all()
    for s in range(1, segments.max() + 1):
      tokens, targets, weights, positions = (
        batch[k][row][segments == s] for k in ("tokens", "targets", "weights", "positions")
      )
      assert (positions == np.arange(len(tokens))).all()
      assert (tokens[1:] == targets[:-1]).all(), "a target is the next token of its own example"
      found.append(((*tokens.tolist(), int(targets[-1])), tuple(weights.tolist())))
  return found


def originals(formatted, plw=0.1, tokenizer=None):
  """What `examples_of` has to find, written out by hand."""
  tokenizer = tokenizer or Bytes()
  out = []
  for f in formatted:
    prompt, response = tokenizer.encode(f.prompt), tokenizer.encode(f.response) + [EOS]
    weights = [np.float32(plw)] * (len(prompt) - 1) + [1.0] * len(response)
    out.append(((*prompt, *response), tuple(float(w) for w in weights)))
  return out


@pytest.mark.parametrize("seq_len", [1, 5, 32, 33, 64, 100, 1024])
def test_bucket_is_the_smallest_that_fits(seq_len):
  known = rows_lib.buckets(seq_len)
  assert known == sorted(set(known)) and known[-1] == seq_len
  for n in range(1, seq_len + 1):
    b = rows_lib.bucket(n, seq_len)
    assert n <= b <= seq_len and (b == known[0] or known[known.index(b) - 1] < n)
    assert b <= max(32, 1.5 * n)
  assert len(known) <= 2 * max(1, np.log2(seq_len / 16))


def test_encode():
  got = causal.encode(Bytes(), tasks.Formatted("ab", " c"), T, 0.25)
  assert got["tokens"].tolist() == [100, 101, 35, 102]
  assert got["targets"].tolist() == [101, 35, 102, EOS]
  assert got["weights"].tolist() == [0.25, 1, 1, 1]
  assert {k: v.dtype for k, v in got.items()} == {"tokens": np.int32, "targets": np.int32, "weights": np.float32}


@pytest.mark.parametrize(
  "formatted, kw, tokenizer, ids, weights",
  [
    (("ab", "c"), {"eos": False}, Bytes(), [100, 101, 102], [0.5, 1]),
    (("ab", "c$"), {}, Bytes(), [100, 101, 102, EOS], [0.5, 1, 1]),
    (("ab", "c$d"), {}, Bytes(), [100, 101, 102, EOS, 103, EOS], [0.5, 1, 1, 1, 1]),
    (("ab", "c"), {}, Bytes(eos_id=None), [100, 101, 102], [0.5, 1]),
    (("ab", "c"), {}, Bytes(add_bos=True), [BOS, 100, 101, 102, EOS], [0.5, 0.5, 1, 1]),
    # As in transformers, a text that spells BOS has it twice.
    (("^ab", "c"), {}, Bytes(add_bos=True), [BOS, BOS, 100, 101, 102, EOS], [0.5, 0.5, 0.5, 1, 1]),
    (("", "c"), {}, Bytes(), [BOS, 102, EOS], [1, 1]),
    (("", "c"), {}, Bytes(bos_id=None), [EOS, 102, EOS], [1, 1]),
  ],
)
def test_encode_special_tokens(formatted, kw, tokenizer, ids, weights):
  got = causal.encode(tokenizer, tasks.Formatted(*formatted), T, 0.5, **kw)
  assert [*got["tokens"], got["targets"][-1]] == ids
  assert got["weights"].tolist() == weights


def chat(*contents):
  roles = ["user", "assistant"] * len(contents)
  return tasks.Chat(tuple({"role": r, "content": c} for r, c in zip(roles, contents, strict=False)))


def test_chat_learns_every_assistant_turn():
  got = causal.encode(Bytes(add_bos=True), chat("q1", "a1", "q2", "a2"), 100, 0.0)
  assert got["tokens"][0] == BOS and BOS not in got["tokens"][1:]
  text = "<u>q1$\n<a>a1$\n<u>q2$\n<a>a2$"
  assert got["targets"].tolist() == Bytes().encode(text)
  learned = "".join(c for c, w in zip(text, got["weights"], strict=True) if w)
  assert learned == "a1$a2$"
  assert set(got["weights"]) == {0.0, 1.0}


def test_chat_template_that_rewrites_turns_gives_an_example_for_each_answer():
  (first, second), truncated = causal.encode_all(
    Bytes(rewrites=True), [chat("q1", "think a1", "q2", "think a2")], 100, 0.0
  )
  for got, asked, answer in (
    (first, "<u>q1$\n<a>", "think a1$"),
    (second, "<u>q1$\n<a> a1$\n<u>q2$\n<a>", "think a2$"),
  ):
    assert got["targets"].tolist() == Bytes().encode(asked + answer)
    assert got["weights"].tolist() == [0.0] * len(asked) + [1.0] * len(answer)
  it = iterator([chat("q1", "think a1", "q2", "think a2"), chat("q", "a")], Bytes(rewrites=True))
  assert it.examples == 3 and truncated == 0


def test_evaluation_prompt_is_a_prefix_of_the_training_ids():
  for tokenizer in (Bytes(), Bytes(add_bos=True)):
    for f in (tasks.Formatted("ab", " c"), tasks.Formatted("", "c"), chat("q1", "a1", "q2", "a2")):
      (batch,) = causal.eval_batches(*task([f]), tokenizer, batch_size=1, seq_len=100)
      n = batch["lengths"][0]
      train = causal.encode(tokenizer, f, 100, 0.0)
      assert batch["tokens"][0, :n].tolist() == train["tokens"][:n].tolist()
      assert train["weights"][n - 1] == 1 and train["weights"][n - 1 :].all()


@hypothesis.given(
  st.integers(0, 60), st.integers(1, 60), st.integers(1, 50), st.booleans(), st.booleans(), st.floats(0, 1)
)
@hypothesis.settings(max_examples=200, deadline=None)
def test_truncation_keeps_the_response(p, r, seq_len, add_bos, eos, plw):
  tokenizer = Bytes(add_bos=add_bos)
  f = tasks.Formatted("".join(chr(97 + i % 26) for i in range(p)), "".join(chr(65 + i % 26) for i in range(r)))
  (got,), truncated = causal.encode_all(tokenizer, [f], seq_len, plw, eos)
  (full,), none = causal.encode_all(tokenizer, [f], 1000, plw, eos)
  assert none == 0 and truncated == (len(full["tokens"]) > seq_len)
  assert len(got["tokens"]) == min(len(full["tokens"]), seq_len)
  response = full["targets"][len(full["targets"]) - r - eos :]
  kept = min(len(response), seq_len)
  assert got["targets"][len(got["targets"]) - kept :].tolist() == response[:kept].tolist()
  assert got["weights"].sum() == pytest.approx(kept + (len(got["weights"]) - kept) * plw, rel=1e-5, abs=1e-5)
  if add_bos:
    assert got["tokens"][0] == BOS
  if len(got["tokens"]) - kept > 1:
    end = len(full["tokens"]) - r - eos
    width = len(got["tokens"]) - kept - 1
    assert got["tokens"][1 : width + 1].tolist() == full["tokens"][end - width : end].tolist()


@pytest.mark.parametrize("seq_len", range(1, 30))
def test_truncated_chat_keeps_its_weights(seq_len):
  short, full = (causal.encode(Bytes(add_bos=True), chat("q1", "a1", "q2", "a2"), n, 0.0) for n in (seq_len, 100))
  n = len(short["tokens"])
  assert n == min(seq_len, len(full["tokens"]))
  if n > 4:
    assert short["weights"][1:].tolist() == full["weights"][len(full["weights"]) - n + 1 :].tolist()
    assert short["targets"].tolist() == full["targets"][len(full["targets"]) - n :].tolist()


def test_the_end_is_learned_after_free_text_but_not_after_a_label():
  """Unless it is asked for, or not; that of a chat template is part of its answer."""
  said, chat = (
    tasks.Formatted("ab", "c"),
    tasks.Chat(({"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"})),
  )

  def learned(formatted, labels, **kw):
    batch = next(causal.train_iterator(*task([formatted], labels), Bytes(), batch_size=1, seq_len=T, **kw))
    return batch["targets"][batch["weights"] == 1].tolist()

  ended, alone = [102, EOS], [102]
  assert learned(said, None) == learned(said, ("c", "d"), eos=True) == ended
  assert learned(said, ("c", "d")) == learned(said, None, eos=False) == alone
  assert learned(chat, None) == learned(chat, ("c", "d")) == learned(chat, None, eos=True) == ended


def test_iterator_counts_truncated_examples():
  formatted = [tasks.Formatted("p" * n, "r") for n in (10, 38, 39, 40, 41, 100)]
  it = iterator(formatted)
  assert (it.truncated, it.examples) == (3, 6)
  assert next(it)["tokens"].shape == (4, T)


def test_an_epoch_has_every_example_once():
  formatted = corpus(52)
  it = iterator(formatted)
  epochs = [[e for _ in range(13) for e in examples_of(next(it))] for _ in range(3)]
  want = originals(formatted)
  assert all(sorted(epoch) == sorted(want) for epoch in epochs)
  assert epochs[0] != epochs[1] != epochs[2] and want not in epochs, "a new order each epoch"


def test_packing_loses_and_repeats_nothing():
  formatted = corpus()
  it, counts = iterator(formatted, pack=True), collections.Counter()
  for _ in range(40):
    counts.update(examples_of(next(it)))
    assert counts.total() == it.get_state()["parent"]["next_index"]
    epochs = counts.total() // len(formatted)
    assert {counts[e] for e in originals(formatted)} <= {epochs, epochs + 1}
  assert epochs > 3 and set(counts) == set(originals(formatted))


def test_packing_fills_rows_and_padding_uses_buckets():
  it = iterator(corpus(200), pack=True, batch_size=8)
  used = [(next(it)["segment_ids"] > 0).mean() for _ in range(8)]
  assert np.mean(used) > 0.8
  it = iterator([tasks.Formatted("p" * n, "r") for n in range(1, 99)], seq_len=100, batch_size=2)
  shapes = set()
  for _ in range(60):
    batch = next(it)
    longest = (batch["segment_ids"] > 0).sum(1).max()
    assert batch["tokens"].shape == (2, rows_lib.bucket(longest, 100))
    assert all(v.shape == batch["tokens"].shape for v in batch.values())
    shapes.add(batch["tokens"].shape[1])
  assert shapes <= set(rows_lib.buckets(100)) and len(shapes) > 2


LAYOUTS = [{}, {"pack": True}, {"share_rows": True}]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_has_the_same_weights(layout):
  it = iterator(corpus(), **layout, prompt_loss_weight=0.1)
  want = dict(originals(corpus()))
  for _ in range(5):
    batch = next(it)
    assert batch["weights"].sum() == pytest.approx(sum(sum(want[ids]) for ids, _ in examples_of(batch)))
    dtypes = {k: v.dtype for k, v in batch.items()}
    assert dtypes.pop("weights") == np.float32 and set(dtypes.values()) == {np.dtype(np.int32)}
    assert set(batch) == {"tokens", "targets", "weights", "positions", "segment_ids"}


def same(a, b):
  return all(x.keys() == y.keys() and all(np.array_equal(x[k], y[k]) for k in x) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("done", [0, 1, 5, 20])
def test_state_is_restored_exactly(layout, done):
  a = iterator(corpus(), **layout)
  for _ in range(done):
    next(a)
  state = json.loads(json.dumps(a.get_state()))
  want = [next(a) for _ in range(20)]
  fresh = iterator(corpus(), **layout)
  fresh.set_state(state)
  assert same([next(fresh) for _ in range(20)], want)
  a.set_state(state)
  assert same([next(a) for _ in range(20)], want)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_order_depends_on_the_seed_alone(layout):
  a, b, c = ([next(it) for _ in range(4)] for it in (iterator(corpus(), **layout, seed=s) for s in (0, 0, 1)))
  assert same(a, b)
  assert [x["tokens"].tolist() for x in a] != [x["tokens"].tolist() for x in c]
  again = iterator(corpus(), **layout)
  next(again)
  assert same([next(again.reseeded(1))], c[:1])


@pytest.mark.parametrize("pack", [False, True])
def test_processes_share_the_global_batch(pack):
  formatted = [tasks.Formatted("p" * n, "r") for n in range(1, 99)]
  whole = iterator(formatted, pack=pack, seq_len=100)
  parts = [iterator(formatted, pack=pack, seq_len=100, process_index=i, process_count=2) for i in range(2)]
  for _ in range(30):
    want, got = next(whole), [next(p) for p in parts]
    assert same([{k: np.concatenate([g[k] for g in got]) for k in want}], [want])


def test_rows_are_shared_by_the_examples_of_the_padded_batch():
  padded, shared = iterator(corpus(), batch_size=16), iterator(corpus(), batch_size=16, share_rows=True, multiple=4)
  rows = collections.Counter()
  for _ in range(40):
    a, b = next(padded), next(shared)
    assert sorted(examples_of(a)) == sorted(examples_of(b)) and b["tokens"].shape[1] == T
    rows[len(b["tokens"])] += 1
  ((usual, n),) = rows.most_common(1)
  assert n >= 38 and set(rows) <= {usual, 2 * usual} and usual % 4 == 0 and usual < 16
  with pytest.raises(errors.UserError, match="set one of the two"):
    iterator(corpus(), pack=True, share_rows=True)


def test_a_batch_that_needs_more_rows_than_others_gets_twice_as_many():
  rows = causal.encode_all(Bytes(), corpus(16), T)[0]
  batch = rows_lib.compact(rows, slice(0, 16), T, PAD, 1)
  n = len(batch["tokens"])
  assert n in (4, 8, 16) and sorted(examples_of(batch)) == sorted(originals(corpus(16)))
  assert batch["segment_ids"][n // 2 :].any(), "half as many would do"


def test_processes_have_equally_many_rows_to_share():
  formatted = [tasks.Formatted("p" * n, "r") for n in range(1, 99)]
  how = dict(seq_len=100, share_rows=True, batch_size=8)
  whole = iterator(formatted, **how)
  parts = [iterator(formatted, process_index=i, process_count=2, **how) for i in range(2)]
  for _ in range(30):
    want, got = next(whole), [next(p) for p in parts]
    assert got[0]["tokens"].shape == got[1]["tokens"].shape
    assert sorted(examples_of(want)) == sorted(e for g in got for e in examples_of(g))


def test_batch_larger_than_the_data_and_a_single_example():
  for layout in LAYOUTS:
    batch = next(iterator(corpus(1), **layout))
    assert set(examples_of(batch)) == set(originals(corpus(1)))


def test_bad_settings():
  with pytest.raises(errors.UserError, match="not a multiple of the number of processes, 3"):
    iterator(corpus(), process_count=3)
  with pytest.raises(errors.UserError, match="at least 1"):
    iterator(corpus(), batch_size=0)
  with pytest.raises(errors.UserError, match="'fake' has no examples"):
    iterator([])


@pytest.mark.parametrize("add_bos", [False, True])
def test_eval_batches_hold_every_prompt_once(add_bos):
  formatted = corpus(21)
  tokenizer = Bytes(add_bos=add_bos)
  batches = causal.eval_batches(*task(formatted), tokenizer, batch_size=4, seq_len=16)
  index = np.concatenate([b["index"] for b in batches])
  assert sorted(index[index >= 0]) == list(range(21)) and (index < 0).sum() == 3
  lengths = []
  for b in batches:
    assert b["tokens"].shape == (4, rows_lib.bucket(b["lengths"].max(), 16)) and b["tokens"].dtype == np.int32
    for tokens, n, i in zip(b["tokens"], b["lengths"], b["index"], strict=True):
      assert n >= 1 and (tokens[n:] == PAD).all()
      if i >= 0:
        want = [BOS] * add_bos + tokenizer.encode(formatted[i].prompt)
        cut = want if len(want) <= 16 else want[:add_bos] + want[len(want) - 16 + add_bos :]
        assert tokens[:n].tolist() == cut
        lengths.append(n)
  assert lengths == sorted(lengths, reverse=True)
  one = causal.eval_batches(*task(formatted), tokenizer, batch_size=4, seq_len=60, same_length=True)
  longest = max(b["lengths"].max() for b in one)
  assert {b["tokens"].shape for b in one} == {(4, rows_lib.bucket(longest, 60))}
  other = causal.eval_batches(*task(formatted), tokenizer, batch_size=4, seq_len=60)
  assert all(np.array_equal(a["lengths"], b["lengths"]) for a, b in zip(one, other, strict=True))


def test_labels_of_each_prompt():
  formatted = [tasks.Formatted("x", " a"), chat("q", " a")]
  (batch,) = causal.eval_batches(*task(formatted, (" a", " bcd")), Bytes(), batch_size=3, seq_len=64)
  assert batch["labels"].tolist() == [[[35, 100, PAD, PAD], [35, 101, 102, 103]]] * 3, "that of a chat has no end"
  assert batch["label_lengths"].tolist() == [[2, 4]] * 3
  assert batch["labels"].dtype == batch["label_lengths"].dtype == np.int32
  (batch,) = causal.eval_batches(*task(formatted), Bytes(), batch_size=2, seq_len=64)
  assert batch["labels"].shape == (2, 0, 1) and batch["label_lengths"].shape == (2, 0)
  with pytest.raises(errors.UserError, match="label '' has no tokens after 'x'"):
    causal.eval_batches(*task(formatted, (" a", "")), Bytes(), batch_size=2, seq_len=64)


def test_the_pipeline_does_not_import_jax():
  package = pathlib.Path(causal.__file__).parents[1]
  for file in [*(package / "batches").glob("*.py"), *(package / "tasks").rglob("*.py")]:
    nodes = ast.walk(ast.parse(file.read_text()))
    names = [a.name for n in nodes if isinstance(n, ast.Import) for a in n.names]
    assert not [n for n in names if n.split(".")[0] in ("jax", "flax", "tensorflow")], file
