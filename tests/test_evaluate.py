"""Scores against naive full forwards, transformers' greedy generation, and a Markov chain computed by hand."""

import concurrent.futures
import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from lora_jax import errors, models, tasks, tokenizer as tokenizer_lib, tree
from lora_jax.inference import decode, evaluate, generate, members
from lora_jax.model import transformer
from lora_jax.runs import config as config_lib
from tests.test_models import reference
from tests.test_train import adapted

CONFIG = transformer.Config(47, 16, 2, 4, 2, 4, 24, dtype="float32", tied=True)
NO_LABELS = (np.zeros((4, 0, 1), np.int32), np.zeros((4, 0), np.int32))
LENGTHS = np.array([5, 9, 1, 12], np.int32)
NEVER = 46  # used as eos where none should end


@pytest.fixture(scope="module")
def params():
  return adapted(CONFIG, "full")[0]


def prompts(pad=0):
  tokens = np.random.default_rng(1).integers(1, 45, (4, 12), dtype=np.int32)
  return np.where(np.arange(12) < LENGTHS[:, None], tokens, pad).astype(np.int32)


@jax.jit
def full_logits(params, ids):
  return models.apply(CONFIG, params, ids)


def naive_logits(params, ids):
  """Logits [n, V] of one sequence without a cache; padded to one shape, which causality allows."""
  return np.asarray(full_logits(params, np.pad(np.asarray(ids, np.int32), (0, 24 - len(ids)))[None])[0, : len(ids)])


def naive_greedy(params, prompt, new, eos):
  ids = list(prompt)
  for _ in range(new):
    ids.append(int(naive_logits(params, ids)[-1].argmax()))
    if ids[-1] == eos:
      break
  out = ids[len(prompt) :]
  return out + [eos] * (new - len(out))


@pytest.mark.slow
def test_scores_equal_full_forwards(params):
  """Each prompt has labels of its own."""
  label_lengths = np.array([[3, 1, 2], [1, 2, 3], [2, 2, 2], [3, 3, 1]], np.int32)
  labels = np.random.default_rng(2).integers(1, 45, (4, 3, 3), dtype=np.int32)
  labels = np.where(np.arange(3) < label_lengths[..., None], labels, 0)
  want = np.zeros((4, 3))
  for i, (row, n) in enumerate(zip(prompts(), LENGTHS, strict=True)):
    for j, (label, u) in enumerate(zip(labels[i], label_lengths[i], strict=True)):
      lp = np.asarray(jax.nn.log_softmax(naive_logits(params, [*row[:n], *label[:u]])))
      want[i, j] = sum(lp[n - 1 + k, label[k]] for k in range(u))
  got, _ = evaluate.score(CONFIG, params, prompts(), LENGTHS, labels, label_lengths, 2, (NEVER,))
  np.testing.assert_allclose(got, want, atol=1e-5)
  filled = np.where(labels == 0, 9, labels)
  again, _ = evaluate.score(CONFIG, params, prompts(pad=8), LENGTHS, filled, label_lengths, 2, (NEVER,))
  np.testing.assert_array_equal(got, again)


@pytest.mark.slow
def test_greedy_equals_a_loop_without_cache(params):
  first = [naive_greedy(params, row[:n], 6, NEVER) for row, n in zip(prompts(), LENGTHS, strict=True)]
  eos = first[0][2]
  for end in (NEVER, eos):
    want = [naive_greedy(params, row[:n], 6, end) for row, n in zip(prompts(), LENGTHS, strict=True)]
    for pad in (0, 8):
      _, got = evaluate.score(CONFIG, params, prompts(pad), LENGTHS, *NO_LABELS, 6, (end,))
      np.testing.assert_array_equal(got, want)
  assert got[0].tolist() == [*first[0][: first[0].index(eos)], *[eos] * (6 - first[0].index(eos))]


SEARCHES = [
  evaluate.Search(beams=3),
  evaluate.Search(beams=4, length_penalty=0.0, early_stopping="never"),
]


@pytest.mark.slow
@pytest.mark.parametrize("search", SEARCHES)
def test_search_equals_beam_search(params, search):
  """That of `decode`, where nothing is banned, and whatever the padding is."""
  how = dataclasses.asdict(search)
  eos = naive_greedy(params, prompts()[0][: LENGTHS[0]], 6, NEVER)[2]
  mask = np.arange(12) < LENGTHS[:, None]
  for end in (NEVER, eos):
    want = decode.beam_search(CONFIG, params, prompts(), mask, max_new_tokens=6, end=(end,), **how)[0][:, 0]
    want = np.pad(want, [(0, 0), (0, 6 - want.shape[1])], constant_values=end)
    labels = np.array([[[3, 4, 5]]] * 4, np.int32), np.array([[3]] * 4, np.int32)
    for pad in (0, 8):
      args = CONFIG, params, prompts(pad), LENGTHS, *labels, 6, (end,), None
      totals, got = evaluate.score(*args, search)
      np.testing.assert_array_equal(got, want)
      greedy_totals, greedy = evaluate.score(*args)
      np.testing.assert_allclose(totals, greedy_totals, atol=1e-5)
  assert (greedy != got).any()


@pytest.mark.slow
@pytest.mark.parametrize("beams", [1, 3])
def test_no_ngram_occurs_twice_in_a_text_but_may_be_in_the_prompt(params, beams):
  """A model that only ever says 2 3 1 2 3 1 ... has to say something else where it is done once."""
  config, params, _, _ = chain()
  table = jnp.full((8, 7), -9.0).at[jnp.arange(1, 4), jnp.array([2, 3, 1])].set(9.0).at[1:4, 4].set(1.0)
  params["head"]["kernel"] = table.at[4, 4].set(9.0).at[4, 5].set(1.0)
  prompt = np.array([[1, 2, 3, 1, 2, 3, 1]], np.int32)
  args = config, params, prompt, np.array([7], np.int32), *(x[:1] for x in NO_LABELS), 8, (0,), None
  assert evaluate.score(*args, evaluate.Search(beams))[1].tolist() == [[2, 3, 1, 2, 3, 1, 2, 3]]
  (text,) = evaluate.score(*args, evaluate.Search(beams, no_repeat_ngram=3))[1].tolist()
  assert text[:6] == [2, 3, 1, 2, 3, 4] and len(set(zip(text, text[1:], text[2:], strict=False))) == 6


@pytest.mark.parametrize("search", [evaluate.Search(), evaluate.Search(beams=3, early_stopping=True)])
def test_texts_equal_those_of_transformers(tmp_path, search):
  """With one token that ends a text, and with two of which either does."""
  torch = pytest.importorskip("torch")
  ref = reference(tmp_path, num_key_value_heads=2)
  model = models.load(str(tmp_path), dtype="float32")

  def theirs(*end):
    out = np.full((4, 8), end[0])
    for i, n in enumerate(LENGTHS):
      ids = torch.tensor(prompts()[i : i + 1, :n].astype(np.int64))
      kw = dict(max_new_tokens=8, do_sample=False, eos_token_id=list(end), pad_token_id=end[0])
      kw |= dict(num_beams=search.beams, early_stopping=search.early_stopping) if search.beams > 1 else {}
      new = ref.generate(ids, attention_mask=torch.ones_like(ids), **kw)[0, n:].numpy()
      out[i, : len(new)] = new
    return out

  free = theirs(96)
  a, b = int(free[1, 3]), int(free[0, 2])
  for end in ((96,), (a,), (a, b)):
    _, ours = evaluate.score(model.config, model.params, prompts(), LENGTHS, *NO_LABELS, 8, end, None, search)
    np.testing.assert_array_equal(ours, theirs(*end))
  assert (ours == a).any(1).sum() > (theirs(a) == a).any(1).sum(), "what the second ends is filled up by the first"


@pytest.mark.parametrize("search", [evaluate.Search(), evaluate.Search(beams=2)])
def test_an_evaluation_ends_texts_where_generation_does(search):
  """At "no" by generation_config.json, at "<eos>" by the tokenizer."""
  config, params, tok, _ = chain()
  model = models.Model("chain", config, params, tok, {}, generation={"eos_token_id": [WORDS.index("no")]})
  texts = []
  toy = dataclasses.replace(task(None), corpus=lambda found, _: texts.extend(found) or {})
  how = dict(batch_size=4, seq_len=16, max_new_tokens=4, search=search)
  evaluate.run(config, params, model.tokenizer, toy, examples(), **how)
  prompts = [e["text"] for e in examples()]
  assert texts == generate.generate(model, prompts, max_new_tokens=4, beams=search.beams)
  assert texts[0] == "yes" and texts[3] == ""


def test_until_end():
  assert generate.until_end(np.array([4, 5, 2, 6, 2]), (2,)) == [4, 5]
  assert generate.until_end(np.array([2, 4]), (3, 2)) == []
  assert generate.until_end(np.array([4, 5]), (2,)) == [4, 5]


# A model without layers' influence whose next token depends on the last one alone: a Markov chain.
WORDS = ["<eos>", "cat", "dog", "bird", "yes", "no", "way"]
# Logits of the next word; rows and columns are WORDS, missing ones -9.
CHAIN = {
  "cat": {"yes": 3.0, "no": 1.0},  # says "yes", prefers "yes"
  "dog": {"no": 3.0, "yes": 2.5},  # says "no", but "no way" is less likely than "yes"
  "bird": {"no": 3.0, "yes": -3.0},  # says "no", prefers "no way"
  "yes": {"<eos>": 5.0},
  "no": {"<eos>": 2.0, "way": 0.0},
  "way": {"<eos>": 5.0},
}
EXAMPLES = [("cat", 0), ("dog", 0), ("dog", 1), ("bird", 1), ("cat", 0)]
LABELS = (" yes", " no way")


def chain():
  """(config, params, tokenizer, float64 logits [V, V])"""
  V = len(WORDS)
  table = np.full((V, V), -9.0)
  for a, row in CHAIN.items():
    for b, x in row.items():
      table[WORDS.index(a), WORDS.index(b)] = x
  config = transformer.Config(V, 8, 1, 2, 2, 4, 8, dtype="float32", norm_eps=1e-12)
  params = jax.tree.map(lambda s: jnp.zeros(s.shape), transformer.shapes(config))
  params["norm"]["scale"] = jnp.full(8, 8**-0.5)  # the norm of a one-hot vector multiplies it by sqrt(8)
  params["embed"]["kernel"] = jnp.eye(V, 8)
  params["head"]["kernel"] = jnp.zeros((8, V)).at[:V].set(table)
  backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, "<eos>"))
  backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  backend.add_special_tokens(["<eos>"])
  return config, params, tokenizer_lib.Tokenizer(backend, eos_id=0), table


def task(labels=LABELS):
  def form(e):
    return tasks.Formatted(e["text"], LABELS[e["label"]])

  def score(e, text):
    return tasks.exact_match(LABELS[e["label"]], text) | {"words": len(text.split())}

  def target(e):
    return labels.index(LABELS[e["label"]]) if LABELS[e["label"]] in labels else -1

  found = target if labels else None
  metrics = tasks.accuracy if labels else lambda p, r: {}
  return tasks.Task("toy", lambda split: [], form, score, labels, None, lambda e: (e["text"],), found, metrics)


def examples():
  return [{"text": t, "label": y} for t, y in EXAMPLES]


def test_chain_is_what_it_says():
  config, params, _, table = chain()
  got = models.apply(config, params, np.arange(1, 7)[None])[0]
  np.testing.assert_allclose(got, table[1:], atol=1e-4)


@pytest.mark.slow
def test_run_scores_the_corpus_in_the_order_of_examples():
  """Greedily it says "yes" of cats and "no" of others, though of dogs "yes" is likelier as a whole."""
  config, params, tok, table = chain()
  w = WORDS.index
  table[w("no"), w("way")] = 1.9
  params["head"]["kernel"] = params["head"]["kernel"].at[:7].set(table)
  lp = np.asarray(jax.nn.log_softmax(table))
  of = lambda *words: sum(lp[w(a), w(b)] for a, b in itertools.pairwise(words))
  assert of("dog", "no", "<eos>") < of("dog", "yes", "<eos>")
  seen = []
  corpus = lambda texts, examples: seen.append((texts, examples)) or {"bleu": 7.0}
  toy = dataclasses.replace(task(None), corpus=corpus)
  rows = [*examples()[:3], {"text": "cat dog bird", "label": 1}, examples()[4]]  # the longest is the first to be run
  run = functools.partial(evaluate.run, config, params, tok, toy, rows, batch_size=2, seq_len=16)
  got = run()
  assert got["bleu"] == 7.0 and list(got) == ["bleu", "exact_match", "words"]
  assert seen.pop() == (["yes", "no", "no", "no", "yes"], rows)
  run(search=evaluate.Search(beams=3, length_penalty=0.0))
  assert seen.pop() == (["yes", "yes", "yes", "no", "yes"], rows)


@pytest.mark.slow
def test_members_search_as_each_alone():
  config, params, tok, _ = chain()
  seen = []
  toy = dataclasses.replace(task(None), corpus=lambda texts, _: seen.append(texts) or {})
  other = params["head"]["kernel"][:, np.array([0, 1, 2, 3, 5, 4, 6])]
  mask = jax.tree.map(lambda x: x is params["head"]["kernel"], params)
  trainable, frozen = tree.split(params, mask)
  stacked = jax.tree.map(lambda x: jnp.stack([x, other]), trainable)
  how = dict(batch_size=4, seq_len=16, search=evaluate.Search(beams=2, no_repeat_ngram=2))
  evaluate.answers(config, members.Members(frozen, stacked, n=2), tok, toy, examples(), **how).run()
  for kernel in (params["head"]["kernel"], other):
    evaluate.run(config, params | {"head": {"kernel": kernel}}, tok, toy, examples(), **how)
  assert seen[0] == seen[2] and seen[1] == seen[3] and seen[0] != seen[1]


@pytest.mark.slow
def test_what_is_compiled_ahead_is_what_runs():
  """Of members whose own arrays are not there any more, in another thread."""
  config, params, tok, _ = chain()
  params = jax.device_put(params, jax.devices()[0])  # as on a mesh, where all parameters have a place
  mask = jax.tree.map(lambda x: x is params["head"]["kernel"], params)
  trainable, shared = tree.split(params, mask)
  both = members.Members(shared, jax.tree.map(lambda x: jnp.stack([x, x + 1.0]), trainable), n=2)
  single = members.one(jax.tree.map(jnp.copy, params))
  how = dict(batch_size=4, seq_len=16)
  compiled, found = [], []

  def listen(event, seconds, **kw):
    compiled.append(event) if event.endswith("backend_compile_duration") else None

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    scored = functools.partial(evaluate.answers, config, tokenizer=tok, task=task(), examples=examples(), **how)
    for several in (both, single):
      compiled.clear()
      given_away = dataclasses.replace(several, shared=jax.tree.map(jnp.copy, several.shared))
      ahead = scored(given_away.shapes())
      jax.tree.map(lambda x: x.delete(), given_away.shared)
      with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pool.submit(ahead.compile).result()
      assert compiled
      compiled.clear()
      found.append(scored(several).run())
      assert not compiled, several.n
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  assert len(found[0]) == 2 and found[0][0] == found[1][0]


@pytest.mark.parametrize("batch_size", [1, 4, 8])
def test_run_on_a_toy_task(batch_size):
  """By hand: of five, "no way" is right and preferred once (bird), "yes" thrice (cat, dog, cat), dog/"no way" is wrong.

  "yes" is generated for the cats, "no" for all others. Filler rows of the last batch count nowhere.
  """
  config, params, tok, table = chain()
  lp = np.asarray(jax.nn.log_softmax(table))
  w = WORDS.index
  prefers_yes = [lp[w(t), w("yes")] > lp[w(t), w("no")] + lp[w("no"), w("way")] for t, _ in EXAMPLES]
  assert prefers_yes == [True, True, True, False, True]
  done = []
  kw = dict(batch_size=batch_size, seq_len=16, progress=lambda n, total: done.append((n, total)))
  got = evaluate.run(config, params, tok, task(), examples(), **kw, max_new_tokens=4)
  assert got == pytest.approx({"accuracy": 4 / 5, "exact_match": 2 / 5, "words": 1.0})
  assert done[-1] == (5, 5) and len(done) == -(-5 // batch_size)
  del kw["progress"]
  assert evaluate.run(config, params, tok, task(), examples(), **kw, same_length=True) == {"accuracy": 4 / 5}


def test_run_without_labels_generates_up_to_the_limit():
  config, params, tok, table = chain()
  w = WORDS.index
  params["head"]["kernel"] = params["head"]["kernel"].at[w("yes")].set(jnp.full(7, -9.0).at[w("yes")].set(5.0))
  got = evaluate.run(config, params, tok, task(None), examples(), batch_size=4, seq_len=16, max_new_tokens=6)
  assert got == pytest.approx({"exact_match": 0.0, "words": (6 + 1 + 1 + 1 + 6) / 5})
  with pytest.raises(errors.UserError, match="task 'toy' has none"):
    evaluate.run(config, params, tok, task(None), examples(), max_new_tokens=0)


def test_hidden_labels_are_left_out():
  """An example whose label is hidden (-1) counts in no accuracy."""
  config, params, tok, _ = chain()
  hidden = task((" yes", " way"))
  got = evaluate.run(config, params, tok, hidden, examples()[:1] + examples()[2:4], batch_size=4, seq_len=16)
  assert got["accuracy"] == 1.0


def test_run_gives_the_metrics_of_all_examples_at_once():
  """The prediction of a regression is the number in the text: none in "yes", and 3 once "no" is spelled so."""
  config, params, tok, _ = chain()
  seen = []
  metrics = lambda *args: seen.append(args) or {"n": 1.0}
  labelled = dataclasses.replace(task(), metrics=metrics)
  got = evaluate.run(config, params, tok, labelled, examples(), batch_size=2, seq_len=16)
  assert seen.pop() == ([0, 0, 0, 1, 0], [0, 0, 1, 1, 0]) and got["n"] == 1.0
  backend = tokenizers.Tokenizer.from_str(tok.backend.to_str().replace('"no"', '"3.5"'))
  regression = dataclasses.replace(task(None), target=lambda e: e["label"] - 1.5, metrics=metrics)
  tok = tokenizer_lib.Tokenizer(backend, eos_id=0)
  got = evaluate.run(config, params, tok, regression, examples()[:2], batch_size=2)
  assert list(got) == ["n", "exact_match", "words"], "that of the task first, by which it is judged"
  predictions, references = seen.pop()
  assert math.isnan(predictions[0]) and predictions[1] == 3.5 and references == [-1.5, -1.5]


class Table(members.Members):
  """Members whose head is a function of the batch, which stands in the place of the parameters."""

  def run(self, call):
    (batch,) = call.arrays
    return self.shared(batch)[None]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_run_classifier(batch_size):
  """The head's outputs are read off a table by the word of the row; row -1 is a filler's."""
  _, _, tok, _ = chain()
  prefers = np.array([[0, 9]] + [[0, 1], [1, 0], [0, 2], [0, 0], [0, 0], [0, 0]], np.float32)  # cat 1, dog 0, bird 1
  done, placed = [], []

  def predict(batch):
    assert set(batch) >= {"tokens", "segment_ids", "token_types", "positions", "lengths", "labels", "weights"}
    return jnp.asarray(prefers[batch["tokens"][:, 0]])

  kw = dict(batch_size=batch_size, seq_len=16, progress=lambda n, total: done.append((n, total)))
  kw["place"] = lambda batch: placed.append(1) or batch
  run = lambda *args: evaluate.outputs(None, Table(predict), tok, *args, **kw).run()
  assert run(task(), examples()) == [{"accuracy": 2 / 5}]
  assert done[-1] == (5, 5) and len(done) == len(placed) == -(-5 // batch_size)
  hidden = dataclasses.replace(task(), target=lambda e: -1 if e["text"] == "cat" else e["label"])
  assert run(hidden, examples()) == [{"accuracy": 2 / 3}]
  assert run(hidden, examples()[:1]) == [{}]


def test_run_classifier_on_a_regression():
  _, _, tok, _ = chain()
  stsb = tasks.get("glue", subset="stsb")
  pairs = [{"sentence1": w, "sentence2": "no way", "label": y} for w, y in (("cat", 1.0), ("dog", 5.0), ("bird", 3.0))]
  predict = lambda batch: jnp.float32(batch["tokens"][:, :1] * np.float32([1, 2]))[:, :1]
  (got,) = evaluate.outputs(None, Table(predict), tok, stsb, pairs, batch_size=2, seq_len=16).run()
  assert got == pytest.approx({"pearson": 0.5, "spearman": 0.5})  # of (1, 2, 3) and (1, 5, 3)


@pytest.mark.parametrize("wrong", [dict(beams=0), dict(no_repeat_ngram=-1), dict(early_stopping="maybe")])
def test_settings_of_a_search(wrong):
  given = dict(beams=10, length_penalty=0.8, no_repeat_ngram=4, early_stopping="never")
  assert dataclasses.asdict(config_lib.section("eval", given)).items() >= given.items()
  (k,) = wrong
  with pytest.raises(errors.UserError, match=f"config.eval.{k}=.*expected"):
    config_lib.section("eval", wrong)
