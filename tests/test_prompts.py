"""Soft prompts: a table of a text's own embeddings is that text, where they go in batches, and parity with peft."""

import copy
import dataclasses
import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from lora_jax import errors, methods, models, tasks, tree
from lora_jax.batches import causal, classification, encoder_decoder, rows as rows_lib
from lora_jax.formats import adapter
from lora_jax.inference import decode, evaluate, generate, sampling
from lora_jax.methods import p_tuning, prefix_tuning, prompt_tuning
from lora_jax.model import prompts, transformer
from lora_jax.runs import experiment
from lora_jax.training import train
from tests import terms, test_classification, test_experiment, test_seq2seq
from tests.test_data import BOS, Bytes, iterator, task
from tests.test_families import TOKENS, jitted
from tests.test_prefix import CONFIGS, base, some

pytestmark = [
  pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
  pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),
]
files, config, compiled = test_experiment.files, test_experiment.config, test_experiment.compiled
classifiers = test_classification.files
KEY = jax.random.key(0)
P = 5
SOFT = -1 - np.arange(P)
close = functools.partial(np.testing.assert_allclose, atol=2e-5, rtol=1e-4)


def of_text(params, ids, **kw):
  """The soft prompt whose embeddings are those of ids."""
  kw = dict(length=len(ids), init="text", text=list(map(int, ids))) | kw
  return prompt_tuning.init(KEY, params, **kw)[0]


# A table that is scaled after it is looked up (gemma), projected (opt), and used by a head (both): see CONFIGS.
@pytest.mark.slow
@pytest.mark.parametrize("name", some(["llama", "gemma2", "opt", "gpt2"], "gemma2 opt"))
def test_a_prompt_of_a_texts_embeddings_is_that_text(name):
  c, params = CONFIGS[name], base(name)
  soft = TOKENS.copy()
  soft[:, 3 : 3 + P] = SOFT
  hard = TOKENS.copy()
  hard[:, 3 : 3 + P] = TOKENS[0, :P]
  adapted = of_text(params, TOKENS[0, :P])
  want = jitted(c, params, hard)
  close(jitted(c, adapted, soft), want)
  # In the units of what enters the layers, as peft has them.
  assert (adapted["prompt"].scaled, c.embed_scale is not None) == (True, name == "gemma2")
  close(jitted(c, prompts.unscaled(adapted, c.embed_scale), soft), want)
  _, cache = transformer.hidden(c, adapted, soft[:, :6], cache=transformer.init_cache(c, 2, TOKENS.shape[1]))
  at = np.tile(np.arange(6, TOKENS.shape[1]), (2, 1))
  x, _ = transformer.hidden(c, adapted, soft[:, 6:], positions=at, cache=cache)
  close(transformer.logits(c, adapted, x), want[:, 6:])


@pytest.mark.slow
def test_generation_and_scores_are_those_of_the_whole_text():
  """Greedy, by beams, without repetitions, and the likelihoods of labels; prompts of two lengths."""
  c, params = CONFIGS["llama"], base("llama")
  lengths = np.array([P + 7, P + 4], np.int32)
  hard, mask = TOKENS[:, : P + 7].astype(np.int32), np.arange(P + 7) < lengths[:, None]
  hard[:, 1 : 1 + P] = TOKENS[0, :P]
  soft = hard.copy()
  soft[:, 1 : 1 + P] = SOFT
  adapted, how = of_text(params, TOKENS[0, :P]), dict(max_new_tokens=8, end=(96,))
  *_, want = decode.continuations(c, params, hard, mask, **how)
  *_, got = decode.continuations(c, adapted, soft, mask, **how)
  np.testing.assert_array_equal(got, want)
  beams = (decode.beam_search(c, p, t, mask, beams=3, **how) for p, t in ((adapted, soft), (params, hard)))
  for a, b in zip(*beams, strict=True):
    close(a, b)
  labels = np.array([[[3, 4, 5], [6, 0, 0]]] * 2, np.int32), np.array([[3, 1]] * 2, np.int32)
  jax.tree.map(
    close,
    evaluate.score(c, adapted, soft, lengths, *labels, 3, (96,)),
    evaluate.score(c, params, hard, lengths, *labels, 3, (96,)),
  )


@pytest.mark.slow
def test_gradients_are_summed_in_float32():
  """The gradient of 512 equal rows is 512 times that of one, also where activations are bfloat16."""
  c = dataclasses.replace(CONFIGS["llama"], dtype="bfloat16", n_layers=1)
  params = prompt_tuning.init(KEY, transformer.init(c, KEY), length=P)[0]
  row = np.concatenate([SOFT, TOKENS[0, :2]])[None]

  def gradient(tokens):
    y = lambda prompt: transformer.hidden(c, params | {"prompt": prompt}, tokens)[0].astype(jnp.float32).sum()
    return jax.jit(jax.grad(y))(params["prompt"]).table

  one = gradient(row)
  np.testing.assert_allclose(gradient(np.tile(row, (512, 1))), 512 * one, atol=1e-2 * 512 * np.abs(one).max())


def test_soft_tokens_ban_no_token():
  """-1 is no index from the end of the vocabulary."""
  ids = jnp.array([[-1, -2, 3, 4, 3, 0]])
  banned = np.isneginf(sampling.ban_repeats(jnp.zeros((1, 6)), ids, jnp.array([5]), 1))
  assert np.flatnonzero(banned[0]).tolist() == [3, 4]
  ids = jnp.array([[3, -1, 4, 3, 0]])
  assert not np.isneginf(sampling.ban_repeats(jnp.zeros((1, 6)), ids, jnp.array([4]), 2)).any()


texts = st.text("ab", max_size=20)


@hypothesis.given(texts, texts, st.integers(P + 1, 40), st.booleans(), st.sampled_from(prompts.PLACEMENTS))
@hypothesis.settings(deadline=None, max_examples=300)
def test_soft_tokens_take_their_room_and_change_nothing_else(prompt, response, seq_len, add_bos, placement):
  tok, soft = Bytes(add_bos=add_bos), prompts.Soft(P, placement)
  formatted = [tasks.Formatted(prompt, response)]
  (plain,), cut = causal.encode_all(tok, formatted, seq_len - P, 0.25)
  (got,), cut_too = causal.encode_all(tok, formatted, seq_len, 0.25, soft=soft)
  assert cut == cut_too and len(got["tokens"]) == len(plain["tokens"]) + P <= seq_len
  at = np.flatnonzero(got["tokens"] < 0)
  assert got["tokens"][at].tolist() == SOFT.tolist() and (np.diff(at) == 1).all()
  np.testing.assert_array_equal(np.delete(got["tokens"], at), plain["tokens"])
  begins = plain["tokens"][0] == BOS
  n = len(plain["weights"]) - (plain["weights"] == 1).sum() + 1  # tokens of the prompt
  assert at[0] == {"prefix": 0, "after_bos": int(begins), "suffix": n}[placement]
  # A soft token is no target, the last one predicts what it precedes, the others what they did.
  to_soft = at - 1 if at[0] else at[:-1]
  assert not got["targets"][to_soft].any() and not got["weights"][to_soft].any()
  if at[0]:
    for k in ("targets", "weights"):
      np.testing.assert_array_equal(np.delete(got[k], to_soft), plain[k])
  else:
    assert got["targets"][P - 1] == plain["tokens"][0] and got["weights"][P - 1] == np.float32(0.25)
    np.testing.assert_array_equal(got["targets"][P:], plain["targets"])
    np.testing.assert_array_equal(got["weights"][P:], plain["weights"])


def test_a_first_token_that_a_cut_keeps_is_of_the_prompt():
  """Also where what it takes the place of was in an earlier response."""
  said = [{"role": role, "content": role[0] * 9} for role in ("user", "assistant", "user", "assistant")]
  tok = Bytes(add_bos=True)
  full = causal.encode(tok, tasks.Chat(said), 99, 0.25)
  learned = np.flatnonzero(full["weights"] == 1)[0] + 1
  for n in range(1, 9):  # tokens cut
    (got,), cut = causal.encode_all(
      tok, [tasks.Chat(said)], len(full["tokens"]) - learned - n + P, 0.25, soft=prompts.Soft(P)
    )
    assert cut == 1 and got["targets"][P - 1] == BOS and got["weights"][P - 1] == 0.25


def test_too_little_room_is_refused():
  formatted, soft = [tasks.Formatted("a", "b")], prompts.Soft(P)
  for call in (
    lambda n: causal.encode_all(Bytes(), formatted, n, soft=soft),
    lambda n: causal.eval_batches(*task(formatted), Bytes(), batch_size=1, seq_len=n, soft=soft),
    lambda n: classification.encode(test_classification.word_tokenizer(), [("a",)], n, soft),
  ):
    with pytest.raises(errors.UserError, match=f"seq_len={P} has no room for text beside {P} soft tokens"):
      call(P)


@pytest.mark.parametrize("placement", prompts.PLACEMENTS)
def test_prompts_to_continue_are_those_of_training(placement):
  """Also when they are cut."""
  formatted, soft = [tasks.Formatted("abc", "d"), tasks.Formatted("e" * 40, "f")], prompts.Soft(P, placement)
  tok = Bytes(add_bos=True)
  (batch,) = causal.eval_batches(*task(formatted), tok, batch_size=2, seq_len=20, soft=soft)
  rows = {int(i): row[:n].tolist() for i, row, n in zip(batch["index"], batch["tokens"], batch["lengths"], strict=True)}
  trained = [e["tokens"].tolist() for e in causal.encode_all(tok, formatted, 20, eos=False, soft=soft)[0]]
  assert rows[0] == trained[0] and len(rows[1]) == len(trained[1]) == 20
  assert rows[1] == trained[1]  # a response of one token is no input


@pytest.mark.parametrize("placement", prompts.PLACEMENTS)
def test_packed_rows_and_rows_apart_have_the_same_loss(placement):
  formatted = [tasks.Formatted("a" * n, "b" * (9 - n)) for n in range(1, 9)]
  c = transformer.Config(264, 16, 2, 4, 2, 4, 24, dtype="float32", tied=True)
  params = prompt_tuning.init(KEY, transformer.init(c, KEY), length=P, placement=placement)[0]
  packed = next(iterator(formatted, Bytes(add_bos=True), batch_size=2, pack=True, soft=prompts.of(params)))
  names = ("tokens", "targets", "weights")
  segments = [
    (r, packed["segment_ids"][r] == s) for r in range(2) for s in range(1, packed["segment_ids"][r].max() + 1)
  ]
  apart = rows_lib.pad([{k: packed[k][r][real] for k in names} for r, real in segments], 40, 7)
  assert len(segments) > 2 and ((apart["tokens"] == -P).sum(1) == 1).all()
  losses = [terms.sums(train.Forward(c, packed=b is packed), params, b)[:2] for b in (packed, apart)]
  jax.tree.map(close, *losses)


def test_pairs_and_types_of_tokens():
  """[CLS] a [SEP] b [SEP], as a classifier reads it; cut to what is left."""
  tok = test_classification.word_tokenizer()
  cls, sep, film, good = 2, 3, tok.encode("film")[0], tok.encode("good")[0]
  rows = {
    "prefix": ([*SOFT, cls, film, sep, good, sep], [0] * (P + 3) + [1] * 2),
    "after_bos": ([cls, *SOFT, film, sep, good, sep], [0] * (P + 3) + [1] * 2),
    "suffix": ([cls, film, sep, good, sep, *SOFT], [0] * 3 + [1] * (P + 2)),
  }
  for placement, (tokens, types) in rows.items():
    (got,), truncated = classification.encode(tok, [("film", "good good good")], 5 + P, prompts.Soft(P, placement))
    assert (got["tokens"].tolist(), got["token_types"].tolist(), truncated) == (tokens, types, 1)


def test_prompts_of_an_encoder_decoder():
  tok, soft = test_seq2seq.unigram(), prompts.Soft(P)
  formatted = [tasks.Formatted("a film", "good")]
  (got,), _ = encoder_decoder.encode_all(tok, formatted, 20, 8, 0, soft=soft)
  (plain,), _ = encoder_decoder.encode_all(tok, formatted, 20, 8, 0)
  assert got["inputs"].tolist() == [*SOFT, *plain["inputs"]] and got["targets"].tolist() == plain["targets"].tolist()


@pytest.mark.parametrize("placement", ["prefix", "after_bos"])
def test_soft_tokens_put_into_a_batch_are_those_of_the_pipeline(placement):
  params = prompt_tuning.init(KEY, transformer.init(dataclasses.replace(CONFIGS["llama"]), KEY), length=P)[0]
  params["prompt"] = params["prompt"].replace(placement=placement)
  formatted, tok = [tasks.Formatted("^abc", "d"), tasks.Formatted("^a", "bcdef")], Bytes()
  plain = rows_lib.pad(causal.encode_all(tok, formatted, 30)[0], 12, 7)
  want = rows_lib.pad(causal.encode_all(tok, formatted, 30, soft=prompts.of(params))[0], 12 + P, 7)
  got = prompts.insert_batch(params, plain)
  if placement == "prefix":  # a batch does not tell what predicting its first token counts
    want["weights"][:, P - 1] = 0
  assert got.keys() == want.keys()
  for k, x in want.items():
    np.testing.assert_array_equal(got[k], x, err_msg=k)
    assert got[k].dtype == x.dtype
  assert prompts.insert_batch(prompts.without(params), plain) == plain
  params["prompt"] = params["prompt"].replace(placement="suffix")
  with pytest.raises(errors.UserError, match="data pipeline"):
    prompts.insert_batch(params, plain)


@pytest.mark.slow
def test_initial_values():
  params = base("llama")
  rows = np.asarray(params["embed"]["kernel"])
  table = lambda **kw: np.asarray(prompt_tuning.init(KEY, params, **kw)[0]["prompt"].table)
  random = table(length=50)
  assert (
    random.dtype == np.float32
    and random.shape == (50, 32)
    and -0.5 <= random.min() < -0.48 < 0.48 < random.max() <= 0.5
  )
  found = lambda x: [int(np.flatnonzero((rows == r).all(1))[0]) for r in x]
  ids = found(table(length=10, init="vocab", top=10))
  assert sorted(ids) == list(range(10)) != ids
  assert len(found(table(length=20, init="vocab", top=10))) == 20
  assert found(table(length=5, init="text", text=[4, 9])) == [4, 9, 4, 9, 4]
  assert found(table(length=2, init="text", text=[4, 9, 8])) == [4, 9]
  got = table(length=4, init="labels", labels=[[7], [8, 9]], top=3)
  close(got[:2], [rows[7], rows[8:10].mean(0)])
  assert set(found(got[2:])) <= {0, 1, 2}
  assert found(table(length=1, init="labels", labels=[[7], [8, 9]])) == [7]
  _, mask = prompt_tuning.init(KEY, params)
  assert [k for k, m in tree.flatten(mask).items() if m] == ["prompt/table"]


def test_texts_become_ids_once():
  tok = Bytes()
  method = [{"name": "prompt_tuning", "init": "text", "text": "ab"}, {"name": "prompt_tuning", "init": "labels"}]
  ready = methods.prepare(method, tok, ["a", "bc"])
  assert ready[0]["text"] == [100, 101] and ready[1]["labels"] == [[100], [101, 102]]
  assert methods.prepare(ready) == ready


@pytest.mark.parametrize(
  "init, message",
  [
    (lambda p: prompt_tuning.init(KEY, p, init="text"), "needs text: a config.method.text"),
    (lambda p: prompt_tuning.init(KEY, p, init="text", text="no tokenizer"), "needs text"),
    (lambda p: prompt_tuning.init(KEY, p, init="text", text=[97]), "beyond the 97 tokens"),
    (lambda p: prompt_tuning.init(KEY, p, init="labels"), "needs labels: a task with labels"),
    (lambda p: prompt_tuning.init(KEY, p, init="label"), "did you mean 'labels'"),
    (lambda p: prompt_tuning.init(KEY, p, init="vocab", top=0), "top=0"),
    (lambda p: prompt_tuning.init(KEY, p, length=0), "length=0"),
    (lambda p: prompt_tuning.init(KEY, p, placement="middle"), "valid: after_bos, prefix, suffix"),
    (lambda p: prompt_tuning.init(KEY, p | {"prompt": None}), "one soft prompt"),
    (lambda p: p_tuning.init(KEY, p, encoder="lstn"), "did you mean 'lstm'"),
    (lambda p: p_tuning.init(KEY, p, hidden=0), "hidden=0"),
    (lambda p: prefix_tuning.init(KEY, p, length=0), "length=0"),
    (lambda p: prefix_tuning.init(KEY, p, hidden=0.5), "hidden=0.5"),
    (lambda p: prefix_tuning.init(KEY, p | {"prefix": None}), "one prefix"),
    (lambda p: prefix_tuning.init(KEY, p, cross=True), "cross=True is for encoder-decoders"),
    (lambda p: prefix_tuning.init(KEY, p, encoder=True), "encoder=True is for encoder-decoders"),
  ],
)
def test_bad_settings_are_refused(init, message):
  with pytest.raises(errors.UserError, match=message):
    init(base("llama"))


METHODS = {
  "prompt_tuning": {"length": P, "init": "text", "text": "Reverse:", "placement": "after_bos"},
  "p_tuning": {"length": P, "placement": "suffix"},
  "prefix_tuning": {"length": P, "mlp": True, "hidden": 16},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", some(METHODS, "prompt_tuning"))
def test_a_run(files, config, tmp_path, name):
  """Packed, with the task's own template; the adapter generates what the run's own model does."""
  settings = copy.deepcopy(config)
  settings["method"] = {"name": name} | METHODS[name]
  settings["data"] |= {"pack": True}
  settings["optim"] |= {"learning_rate": 0.1}
  summary = experiment.run(settings, tmp_path)
  assert summary["train"]["loss_last"] < summary["train"]["loss_first"]
  ours = experiment.trained(tmp_path)
  loaded = dataclasses.replace(
    ours, params=adapter.load(dataclasses.replace(ours, params=plain(ours)), tmp_path / "adapter")
  )
  asked = ["Write abc backwards:", "Write"]
  texts = generate.generate(ours, asked, max_new_tokens=6)
  assert texts == generate.generate(loaded, asked, max_new_tokens=6)
  soft, tok = prompts.of(ours.params), ours.tokenizer
  ids = prompts.insert(soft, tok.encode(asked[0]), False)
  n = len(ids)
  for _ in range(6):
    row = np.pad(ids, (0, 48 - len(ids)))[None]
    ids = np.append(ids, jitted(ours.config, ours.params, row)[0, len(ids) - 1].argmax())
  assert texts[0] == generate.complete(tok, generate.until_end(ids[n:], tok.end_ids))


def plain(model):
  return {k: v for k, v in model.params.items() if k not in ("prompt", "prefix")}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["prompt_tuning", "p_tuning_v2"])
def test_a_run_of_a_classifier(classifiers, tmp_path, name):
  """Prompt and head are trained, and saved; a prefix takes positions of the text."""
  settings = test_classification.config(classifiers)
  settings["method"] = {"name": name, "length": P}
  settings["optim"] |= {"learning_rate": 1e-2}
  summary = experiment.run(settings, tmp_path / "run")
  assert summary["train"]["loss_last"] < 0.95 * summary["train"]["loss_first"]
  ours = experiment.trained(tmp_path / "run")
  start = models.load(str(classifiers / "bert"), dtype="float32", head="classification", n_labels=2)
  saved = adapter.load(start, tmp_path / "run" / "adapter")
  jax.tree.map(np.testing.assert_array_equal, saved, ours.params)
  before = tree.flatten(start.params)
  changed = {k for k, x in tree.flatten(saved).items() if k not in before or not np.array_equal(x, before[k])}
  prompt = ["prompt/table"] if name == "prompt_tuning" else ["prefix/k", "prefix/v"]
  assert changed == {*prompt, *start.head_leaves}
  long = settings | {"data": {"batch_size": 16, "seq_len": 36}}
  if name == "p_tuning_v2":
    with pytest.raises(errors.UserError, match="seq_len=36 after a prefix of 5 is more than the 40 positions"):
      experiment.build(long)
  else:
    experiment.build(long)
