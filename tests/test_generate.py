"""Generation against transformers, loops without a cache, and chains whose text is known."""

import dataclasses
import functools
import os
import pathlib
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from lora_jax import errors, models, tokenizer as tokenizer_lib
from lora_jax.formats import peft as peft_format
from lora_jax.inference import decode, generate, sampling
from lora_jax.methods import lora
from lora_jax.model import transformer
from tests.test_models import reference

LENGTHS = np.array([5, 9, 2, 12])
RIGHT = np.arange(12) < LENGTHS[:, None]
LEFT = RIGHT[:, ::-1]
PROMPTS = np.random.default_rng(1).integers(1, 90, (4, 12), dtype=np.int32)
FULL = jax.jit(models.apply, static_argnums=0)
NEVER = 96  # a token that is no end in these tests


@functools.cache
def pair():
  """(a random transformers Llama, ours)."""
  with tempfile.TemporaryDirectory() as directory:
    ref = reference(directory, num_key_value_heads=2, num_hidden_layers=2)
    return ref, models.load(directory, dtype="float32")


def last(iterator):
  *_, x = iterator
  return x


def ours(prompts=PROMPTS, mask=RIGHT, new=8, **kw):
  model, kw = pair()[1], dict(end=(NEVER,)) | kw
  return last(decode.continuations(model.config, model.params, prompts, mask, max_new_tokens=new, **kw))


def theirs(new=8, end=(NEVER,), side="left", **kw):
  """transformers' new tokens of PROMPTS, padded on the left to one batch."""
  torch = pytest.importorskip("torch")

  ref, _ = pair()
  ids, mask = left(PROMPTS, RIGHT)
  kw = dict(do_sample=False) | kw
  with torch.no_grad():
    return ref.generate(
      torch.tensor(ids.astype(np.int64)),
      attention_mask=torch.tensor(mask.astype(np.int64)),
      max_new_tokens=new,
      eos_token_id=list(end),
      pad_token_id=end[0],
      return_dict_in_generate=True,
      output_scores=True,
      **kw,
    )


def left(tokens, mask):
  """Prompts padded on the left by 95."""
  out = np.full(tokens.shape, 95, np.int32)
  for row, x, m in zip(out, tokens, mask, strict=True):
    row[len(row) - m.sum() :] = x[m]
  return out, LEFT


def naive(prompt, new, end=(NEVER,)):
  """The greedy continuation by full forwards of one sequence."""
  model, ids = pair()[1], list(map(int, prompt))
  for _ in range(new):
    padded = np.pad(ids, (0, 32 - len(ids)))[None].astype(np.int32)
    ids.append(int(FULL(model.config, model.params, padded)[0, len(ids) - 1].argmax()))
    if ids[-1] in end:
      break
  return ids[len(prompt) :]


def test_greedy_equals_a_loop_without_cache():
  got = ours()
  for row, prompt, m in zip(got, PROMPTS, RIGHT, strict=True):
    assert row.tolist() == naive(prompt[m], 8)


@pytest.mark.parametrize("ends", [(0,), (0, 1)])
def test_rows_end_at_any_end_token(ends):
  free = ours()
  ends = tuple(int(free[i, 2 + i]) for i in ends)
  got = ours(end=ends)
  for row, prompt, m in zip(got, PROMPTS, RIGHT, strict=True):
    want = naive(prompt[m], 8, ends)
    assert row.tolist() == want + [ends[0]] * (len(row) - len(want))
    assert generate.until_end(row, ends) == [t for t in want if t not in ends]
  assert {generate.until_end(row, ends) != row.tolist() for row in got} == {True, False}


def test_padding_on_the_left_equals_transformers():
  want = theirs().sequences[:, 12:].numpy()
  np.testing.assert_array_equal(ours(*left(PROMPTS, RIGHT)), want)
  np.testing.assert_array_equal(ours(), want)


def test_ngram_ban_equals_transformers():
  torch = pytest.importorskip("torch")
  processors = pytest.importorskip("transformers.generation.logits_process")
  rng = np.random.default_rng(0)
  ids, logits = rng.integers(0, 3, (6, 14)), rng.normal(size=(6, 5)).astype(np.float32)
  for n in (1, 2, 3, 5):
    for length in (1, 2, 4, 13):
      filled = np.where(np.arange(14) < length, ids, 4).astype(np.int32)
      got = sampling.ban_repeats(jnp.array(logits), jnp.array(filled), jnp.full(6, length), n)
      process = processors.NoRepeatNGramLogitsProcessor(n)
      np.testing.assert_array_equal(got, process(torch.tensor(ids[:, :length]), torch.tensor(logits)).numpy())
  np.testing.assert_array_equal(sampling.ban_repeats(jnp.array(logits), jnp.array(ids), jnp.full(6, 9), 0), logits)


def test_greedy_without_repeats_equals_transformers():
  got = ours(new=24, no_repeat_ngram=2)
  np.testing.assert_array_equal(got, theirs(24, no_repeat_ngram_size=2).sequences[:, 12:].numpy())
  assert (got != ours(new=24)).any()


@pytest.mark.parametrize("k, p", [(0, 0.3), (0, 0.9), (3, 1.0), (1, 1.0), (200, 1.0), (5, 0.6), (0, 0.0), (4, 0.999)])
def test_filters_equal_transformers(k, p):
  torch = pytest.importorskip("torch")
  processors = pytest.importorskip("transformers.generation.logits_process")
  logits = 3 * np.random.default_rng(0).normal(size=(16, 50)).astype(np.float32)
  logits[0, 7] = logits[0].max() + 20  # crosses every top p by itself
  if p == 1:
    logits[1, :2] = np.sort(logits[1])[-3]  # ties of the top 3 are all kept
  want = torch.tensor(logits)
  if k:
    want = processors.TopKLogitsWarper(k)(None, want)
  if p < 1:
    want = processors.TopPLogitsWarper(p)(None, want)
  got = sampling.filter_logits(jnp.array(logits), jnp.int32(k), jnp.float32(p))
  np.testing.assert_array_equal(got, want.numpy())


def draw(n, temperature, top_k=0, top_p=1.0):
  logits = jnp.array([2.0, 1.0, 0.5, -1.0, -jnp.inf])
  how = sampling.Sampling(jnp.float32(temperature), jnp.int32(top_k), jnp.float32(top_p), jax.random.split(KEY, n))
  return np.bincount(jax.jit(sampling.choose)(jnp.tile(logits, (n, 1)), how, jnp.int32(3)), minlength=5) / n


KEY = jax.random.key(3)


def test_samples_follow_the_distribution():
  n, logits = 5000, np.array([2.0, 1.0, 0.5, -1.0, -np.inf])
  for temperature, kept in ((1.0, 4), (0.5, 4), (1.0, 2)):
    p = np.where(np.arange(5) < kept, np.exp(logits / temperature), 0)
    got = draw(n, temperature, 0 if kept == 4 else kept)
    np.testing.assert_allclose(got, p / p.sum(), atol=4 * (0.25 / n) ** 0.5)
  assert draw(50, 0.0)[0] == 1 and draw(50, 5.0, top_k=1)[0] == 1 and draw(50, 5.0, top_p=0.0)[0] == 1


def test_samples_depend_on_seed_and_prompt_alone():
  twice = np.concatenate([PROMPTS, PROMPTS[1:2]]), np.concatenate([RIGHT, RIGHT[1:2]])
  how = dict(temperature=2.0, top_p=0.95, new=8)
  base = ours(*twice, **how)
  np.testing.assert_array_equal(base, ours(*twice, **how))
  np.testing.assert_array_equal(base[[3, 1]], ours(PROMPTS[[3, 1]], RIGHT[[3, 1]], **how))
  np.testing.assert_array_equal(base[:4], ours(*left(PROMPTS, RIGHT), **how))
  assert (base[1] != base[4]).any() and (base[:4] != ours(seed=1, **how)).any(1).all()


def test_one_program_for_all_lengths_and_settings():
  counts = lambda: [f._cache_size() for f in (decode.run_prompts, decode._advance)]
  ours(new=3)
  before = counts()
  for i, n in enumerate((1, 7, 30)):
    tokens = np.tile(PROMPTS, (1, 3))[:, :n]
    ours(tokens, None, new=3 + i, temperature=0.3 * i, top_k=i, top_p=1 - 0.1 * i, seed=i, every=1 + i)
  assert counts() == before
  ours(np.tile(PROMPTS, (1, 20)), None, new=20)  # another number of slots
  assert counts() == [n + 1 for n in before]


def test_chunks_agree():
  chunks = list(decode.continuations(*pair_args(), PROMPTS, RIGHT, max_new_tokens=8, every=3))
  assert [x.shape[1] for x in chunks] == [3, 6, 8]
  for x in chunks:
    np.testing.assert_array_equal(x, ours()[:, : x.shape[1]])
  ended = lambda new: np.array([True, new.shape[1] >= 6, True, True])
  chunks = list(decode.continuations(*pair_args(), PROMPTS, RIGHT, max_new_tokens=8, every=3, ended=ended))
  assert [x.shape[1] for x in chunks] == [3, 6]
  np.testing.assert_array_equal(chunks[-1][1], ours()[1, :6])


def pair_args():
  model = pair()[1]
  return model.config, model.params


BEAMS = {
  "plain": (dict(num_beams=4), 0),
  "e2e": (dict(num_beams=10, length_penalty=0.9, no_repeat_ngram_size=4), 2),
  "short": (dict(num_beams=4, length_penalty=-1.0), 2),
  "long": (dict(num_beams=3, length_penalty=2.0, early_stopping="never"), 2),
  "never": (dict(num_beams=3, length_penalty=0.0, early_stopping="never"), 1),
  "early": (dict(num_beams=4, early_stopping=True), 3),
  "many_ends": (dict(num_beams=4, length_penalty=0.5), 6),
  "ngram": (dict(num_beams=3, no_repeat_ngram_size=1), 1),
}


SLOW = ("plain", "short", "ngram", "long")


@pytest.mark.parametrize("case", [pytest.param(k, marks=[pytest.mark.slow] * (k in SLOW)) for k in BEAMS])
def test_beams_equal_transformers(case):
  """All beams and their scores, of prompts of several lengths; the ends are tokens that the search comes across."""
  kw, n_ends = BEAMS[case]
  beams, new = kw["num_beams"], 12
  how = {"length_penalty": 1.0, "no_repeat_ngram_size": 0, "early_stopping": False} | kw
  how["no_repeat_ngram"] = how.pop("no_repeat_ngram_size")
  how["beams"] = how.pop("num_beams")
  end = (NEVER,)
  if n_ends:
    free = decode.beam_search(*pair_args(), PROMPTS, RIGHT, max_new_tokens=new, **how)[0]
    found = np.unique(free[:, :, 2:], return_counts=True)
    end = tuple(int(t) for t in found[0][np.argsort(-found[1], kind="stable")][:n_ends])
  got, scores = decode.beam_search(*pair_args(), PROMPTS, RIGHT, max_new_tokens=new, end=end, **how)
  want = theirs(new, end, num_return_sequences=beams, **kw)
  sequences = want.sequences[:, 12:].numpy().reshape(4, beams, -1)
  np.testing.assert_array_equal(got, sequences)
  np.testing.assert_allclose(scores, want.sequences_scores.numpy().reshape(4, beams), rtol=1e-4)
  if n_ends:
    lengths = {len(generate.until_end(row, end)) for row in got.reshape(-1, got.shape[-1])}
    assert len(lengths) > 1


def test_one_beam_is_greedy():
  got, scores = decode.beam_search(*pair_args(), PROMPTS, RIGHT, beams=1, max_new_tokens=8)
  np.testing.assert_array_equal(got[:, 0], ours())
  assert (scores < 0).all()


def test_beams_of_a_row_do_not_depend_on_the_others():
  how = dict(beams=3, max_new_tokens=10, end=(int(ours()[0, 2]),))
  together, scores = decode.beam_search(*pair_args(), PROMPTS, RIGHT, **how)
  for i in range(4):
    alone, score = decode.beam_search(*pair_args(), PROMPTS[i : i + 1], RIGHT[i : i + 1], **how)
    np.testing.assert_array_equal(alone[0], together[i][:, : alone.shape[2]])
    np.testing.assert_allclose(score[0], scores[i], rtol=1e-5)


# Text: a tokenizer of bytes, and a model whose next token follows from the last one.
BOS, EOS, TURN = 256, 257, 258
TEMPLATE = (
  "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<turn>{% endfor %}"
  "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_tokenizer(chat_template=None):
  alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
  odd = iter(chr(256 + i) for i in range(256))
  chars = [chr(b) if chr(b) in alphabet else next(odd) for b in range(256)]
  backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={c: b for b, c in enumerate(chars)}, merges=[]))
  backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  backend.decoder = tokenizers.decoders.ByteLevel()
  backend.add_special_tokens(["<s>", "</s>", "<turn>"])
  return tokenizer_lib.Tokenizer(backend, chat_template, bos_id=BOS, eos_id=EOS)


def writer(text, end=EOS, **kw):
  """A model that continues "a" by `text`, whose bytes differ, and ends."""
  config = transformer.Config(259, 259, 1, 2, 2, 4, 8, dtype="float32", norm_eps=1e-12)
  params = jax.tree.map(lambda s: jnp.zeros(s.shape), transformer.shapes(config))
  ids = [*b"a", *text.encode(), end]
  assert len(set(ids)) == len(ids)
  params["norm"]["scale"] = jnp.full(259, 259**-0.5)
  params["embed"]["kernel"] = jnp.eye(259)
  params["head"]["kernel"] = jnp.zeros((259, 259)).at[ids[:-1], ids[1:]].set(9.0).at[ids[-1], 0].set(9.0)
  return models.Model("writer", config, params, byte_tokenizer(), {}, **kw)


@functools.cache
def babbler():
  """A model that writes any bytes."""
  config = transformer.Config(259, 16, 2, 2, 2, 8, 16, dtype="float32")
  return models.Model("babbler", config, transformer.init(config, jax.random.key(0)), byte_tokenizer(), {})


@pytest.mark.slow
def test_text_and_stream_of_split_characters():
  model = writer("é🎉 ok")
  assert generate.generate(model, ["a", "say a"], max_new_tokens=20) == ["é🎉 ok"] * 2
  seen = []
  pieces = list(generate.stream(model, "a", max_new_tokens=20, progress=seen.append))
  assert pieces == ["é", "🎉", " ", "o", "k"] and seen == list(range(1, 11))
  assert generate.generate(model, ["a"], max_new_tokens=4) == ["é"]  # two bytes of the next character are there
  assert list(generate.stream(model, "a", max_new_tokens=4)) == ["é"]
  assert generate.generate(model, ["a"], beams=2, max_new_tokens=20) == ["é🎉 ok"]
  assert generate.generate(model, [list(b"a")], params=writer("no").params) == ["no"]
  assert generate.generate(model, []) == []


@pytest.mark.parametrize("stop", [["ok"], ["🎉 "], ["zzz", "ok"], ["o", "ok"], ["z", "k!"], ["é🎉 ok"]])
def test_stop_strings(stop):
  full = "é🎉 ok"
  want = min((full.partition(s)[0] for s in stop), key=len)
  model = writer(full)
  assert generate.generate(model, ["a", "b"], max_new_tokens=20, stop=stop)[0] == want
  assert generate.generate(model, ["a"], max_new_tokens=20, stop=stop, beams=2) == [want]
  pieces = list(generate.stream(model, "a", max_new_tokens=20, stop=stop))
  assert "".join(pieces) == want and all(pieces)


def test_generation_ends_soon_after_a_stop_string(monkeypatch):
  lengths = []
  run = decode.continuations

  def spy(*args, **kw):
    for rows in run(*args, **kw):
      lengths.append(rows.shape[1])
      yield rows

  monkeypatch.setattr(decode, "continuations", spy)
  generate.generate(writer("bcdef"), ["a", "a"], max_new_tokens=200, stop=["c"])
  assert lengths[-1] <= 2 * generate.STOP_EVERY


@pytest.mark.parametrize("seed", range(4))
def test_pieces_join_to_the_text(seed):
  how = dict(max_new_tokens=40, temperature=1.0, seed=seed)
  if seed % 2:
    how |= dict(stop=["x", "\n", "ab", "é"], top_p=0.6)
  want = generate.generate(babbler(), ["a", "prompt"], **how)
  assert ["".join(generate.stream(babbler(), p, **how)) for p in ("a", "prompt")] == want


def test_before_takes_the_string_that_is_complete_first():
  assert generate.before("xabcd", ["abc", "b"]) == ("xa", True)
  assert generate.before("xabcd", ["cd", "abc", "xab"]) == ("", True)
  assert generate.before("xabcd", ["z"]) == ("xabcd", False)
  assert generate.before("x", []) == ("x", False)


def test_end_tokens_of_a_model():
  model = writer("x")
  ends = lambda **kw: dataclasses.replace(model, **kw).tokenizer.end_ids
  assert ends() == (EOS,)
  assert ends(generation={"eos_token_id": [9, EOS]}) == (9, EOS)
  assert ends(generation={"eos_token_id": 9}) == (9, EOS)
  assert ends(generation={"eos_token_id": 9}, tokenizer=byte_tokenizer(TEMPLATE)) == (9, EOS, TURN)
  assert ends(tokenizer=byte_tokenizer("{{ raise_exception('no') }}")) == (EOS,)
  assert ends(tokenizer=dataclasses.replace(byte_tokenizer(), eos_id=None)) == ()
  with pytest.raises(errors.UserError, match="eos_token_id=.'x'. is not a token"):
    ends(generation={"eos_token_id": ["x"]})
  turns = dataclasses.replace(writer("x", TURN), tokenizer=byte_tokenizer(TEMPLATE))
  assert generate.generate(turns, ["a"]) == ["x"]


def test_a_decoder_goes_on_with_a_text_that_the_tokenizer_ends():
  model, single = writer("x"), "<s> $A </s>"
  framed = tokenizers.processors.TemplateProcessing(single=single, special_tokens=[("<s>", BOS), ("</s>", EOS)])
  model.tokenizer.backend.post_processor = framed
  assert generate._batch(model, model.params, ["ab"], ())["tokens"].tolist() == [[BOS, *b"ab"]]


def test_empty_prompts_begin_with_a_special_token():
  assert generate.generate(writer("x"), [""], max_new_tokens=2) == generate.generate(
    writer("x"), ["<s>"], max_new_tokens=2
  )


@pytest.mark.parametrize(
  "kw, said",
  [
    (dict(max_new_tokens=0), "max_new_tokens=0 must be at least 1"),
    (dict(top_p=1.5), "top_p=1.5"),
    (dict(temperature=-1.0), "temperature=-1.0"),
    (dict(top_k=-1, beams=0), "top_k=-1 must be at least 0; beams=0 must be at least 1"),
    (dict(beams=2, temperature=1.0), "temperature=0 or beams=1"),
    (dict(beams=2, early_stopping="maybe"), "early_stopping='maybe'"),
    (dict(stop="x"), "stop='x' must be a sequence"),
    (dict(stop=[""]), "not empty"),
  ],
)
def test_settings_out_of_range(kw, said):
  with pytest.raises(errors.UserError, match=said):
    generate.generate(babbler(), ["a"], **kw)


@pytest.mark.parametrize(
  "prompts, said",
  [
    ("abc", "sequence of texts .* not 'abc'"),
    ("", "sequence of texts"),
    ([1, 2], "sequence of texts"),
    (["a", [3, 259]], "prompt 1: 259 is not a token of babbler, which has 259"),
    ([[-1]], "prompt 0: -1 is not a token"),
    ([[2**40]], "is not a token"),
    ([[1.5]], "1.5 is not a token"),
  ],
)
def test_prompts_that_are_none(prompts, said):
  with pytest.raises(errors.UserError, match=said):
    generate.generate(babbler(), prompts)


def test_prompts_as_arrays():
  want = generate.generate(babbler(), [[0, 258]])
  assert (
    want == generate.generate(babbler(), np.array([[0, 258]])) == generate.generate(babbler(), [np.int64([0, 258])])
  )


def test_models_that_cannot_write():
  model = babbler()
  with pytest.raises(errors.UserError, match="no tokenizer"):
    generate.generate(dataclasses.replace(model, tokenizer=None), ["a"])
  with pytest.raises(errors.UserError, match="head 'classification'"):
    config = dataclasses.replace(model.config, head="classification")
    generate.generate(dataclasses.replace(model, config=config), ["a"])
  config = dataclasses.replace(model.config, position="learned", max_seq_len=40)
  learned = dataclasses.replace(model, config=config, params=transformer.init(config, jax.random.key(0)))
  with pytest.raises(errors.UserError, match="30 tokens and 11 new ones exceed the 40 positions"):
    generate.generate(learned, ["a" * 30], max_new_tokens=11)
  assert decode._fit(config, np.ones((1, 30)), None, 10)[2] == 40


@pytest.mark.slow
def test_encoder_decoder_equals_a_loop_without_cache():
  """Greedy and the likelihoods of beams, of sources of several lengths."""
  config = transformer.Config(
    53, 16, 2, 2, 2, 8, 16, dtype="float32", position="relative", encoder_layers=2, max_seq_len=64, norm_eps=1e-6
  )
  params = jax.tree.map(lambda x: 8 * x, transformer.init(config, jax.random.key(0)))
  sources, start = PROMPTS % 50, 7
  args, kw = (config, params, sources, RIGHT), dict(max_new_tokens=8, start=start)
  got = last(decode.continuations(*args, **kw))
  beams, scores = decode.beam_search(*args, **kw, beams=3, length_penalty=0.5)
  run, encode = (jax.jit(f, static_argnums=0) for f in (transformer.apply, transformer.encode))
  for i, n in enumerate(LENGTHS[:2]):
    encoded = encode(config, params, sources[i : i + 1, :n])

    def likely(ids):
      padded = np.pad(ids, (0, 9 - len(ids)))[None]
      return np.asarray(jax.nn.log_softmax(run(config, params, padded, encoded=encoded)[0, : len(ids)]))

    ids = [start]
    for _ in range(8):
      ids.append(int(likely(ids)[-1].argmax()))
    assert got[i].tolist() == ids[1:]
    for text, score in zip(beams[i], scores[i], strict=True):
      table = likely([start, *text[:-1]])
      np.testing.assert_allclose(score, table[np.arange(8), text].sum() / 8**0.5, rtol=1e-4)
    assert scores[i, 0] >= likely([start, *got[i, :-1]])[np.arange(8), got[i]].sum() / 8**0.5 - 1e-5


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  """A tiny model with a byte tokenizer and a chat template, and an adapter of it."""
  path = tmp_path_factory.mktemp("model")
  reference(path / "model", vocab_size=259, num_hidden_layers=1)
  byte_tokenizer(TEMPLATE).save(path / "model")
  model = models.load(str(path / "model"), dtype="float32")
  params, mask = lora.init(jax.random.key(0), model.params, rank=2)
  params = jax.tree.map(lambda x, m: x + 0.3 if m else x, params, mask)
  peft_format.save(model, params, path / "adapter")
  return path


@pytest.mark.parametrize("how", [dict(max_new_tokens=10**10), dict(max_new_tokens=4, beams=10**10)])
def test_what_has_no_room_is_refused(directory, how):
  model = models.load(str(directory / "model"), dtype="float32")
  with pytest.raises(errors.UserError, match="cannot fit into memory: .* GiB for the keys and values of .* texts"):
    generate.generate(model, ["ab"], **how)


def test_a_top_k_beyond_the_vocabulary_is_all(directory):
  model = models.load(str(directory / "model"), dtype="float32")
  how = dict(max_new_tokens=6, temperature=1.0, seed=3)
  assert generate.generate(model, ["ab"], top_k=2**40, **how) == generate.generate(model, ["ab"], **how)


@pytest.mark.parametrize("beams", [1, 2])
def test_a_model_that_predicts_nothing_writes_nothing(directory, beams):
  model = models.load(str(directory / "model"), dtype="float32")
  params = jax.tree.map(lambda x: x * np.nan, model.params)
  with pytest.raises(errors.UserError, match="NaN after prompt 0"):
    generate.generate(model, ["ab"], params=params, beams=beams)


def command(directory, *flags, closed=False, **kw):
  root = pathlib.Path(__file__).parents[1]
  line = [
    sys.executable,
    str(root / "scripts" / "generate.py"),
    "--model",
    str(directory / "model"),
    "--dtype=float32",
    *flags,
  ]
  shell = ["sh", "-c", 'exec "$0" "$@" <&-'] if closed else []
  env = os.environ | {"PYTHONPATH": str(root)}  # where the package is not installed
  return subprocess.run(shell + line, capture_output=True, text=True, timeout=300, env=env, **kw)


@pytest.mark.slow
def test_command_line(directory):
  """The text of `generate`, with a closed standard input; an adapter changes it, merged or not."""
  model = models.load(str(directory / "model"), dtype="float32")
  ran = command(directory, "--prompt=ab", "--max_new_tokens=6", closed=True)
  assert ran.returncode == 0, ran.stderr
  assert ran.stdout == generate.generate(model, ["ab"], max_new_tokens=6)[0] + "\n"
  assert "tokens" in ran.stderr
  adapted = generate.generate(model, ["ab"], max_new_tokens=6, params=peft_format.load(model, directory / "adapter"))
  ran = command(
    directory,
    "--prompt=ab",
    "--max_new_tokens=6",
    "--merge",
    f"--adapter={directory / 'adapter'}",
    stdin=subprocess.DEVNULL,
  )
  assert ran.stdout == adapted[0] + "\n" != generate.generate(model, ["ab"], max_new_tokens=6)[0] + "\n"


@pytest.mark.slow
def test_command_line_chat_keeps_the_history(directory):
  model = models.load(str(directory / "model"), dtype="float32")
  messages, want = [{"role": "system", "content": "s"}], ""
  for line in ("hello", "more"):
    messages.append({"role": "user", "content": line})
    ids = model.tokenizer.encode(model.tokenizer.chat(messages, add_generation_prompt=True))
    text = generate.generate(model, [ids], max_new_tokens=3)[0]
    messages.append({"role": "assistant", "content": text})
    want += text + "\n"
  ran = command(directory, "--chat", "--system=s", "--max_new_tokens=3", input="hello\n\nmore\n")
  assert (ran.returncode, ran.stdout) == (0, want), ran.stderr


@pytest.mark.parametrize(
  "flags, said",
  [
    (["--model=nowhere", "--prompt=a"], "error: unknown model 'nowhere'"),
    ([], "error: there is nothing to continue"),
    (["--beams=0", "--prompt=a"], "error: --beams=0: expected a whole number, at least 1"),
    (["--beams=2", "--top_k=3", "--seed=1"], "error: --top_k, --seed would do nothing with --beams"),
    (["--max_new_tokens=10000000000", "--prompt=a"], "error: this cannot fit into memory: it needs at least"),
    (["--adapter=", "--prompt=a"], "error: --adapter='': expected text that is not empty"),
    (["--system=x", "--prompt=a"], "error: --system would do nothing without --chat"),
    (["--merge", "--prompt=a"], "error: --merge would do nothing without --adapter"),
  ],
)
def test_command_line_errors_are_one_line(directory, flags, said):
  ran = command(directory, *flags, closed=True)
  assert ran.returncode == 1 and ran.stdout == ""
  (line,) = ran.stderr.splitlines()
  assert line.startswith(said)
