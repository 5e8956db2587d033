"""Scores of texts against several references each, as the E2E challenge measures them.

Its script (https://github.com/tuetschek/e2e-metrics) computes BLEU and NIST as mteval-v13a does, ignoring case. It
computes METEOR, ROUGE-L and CIDEr as the evaluation of MS-COCO captions does (Chen et al. 2015,
https://arxiv.org/abs/1504.00325), on words of Stanford's PTB tokenizer in lower case and without punctuation. The
tokenizer and METEOR are Java programs.
"""

import collections
import functools
import importlib.util
import itertools
import math
import operator
import pathlib
import shutil
import subprocess
from collections.abc import Sequence

from lora_jax import errors, progress

PACKAGES = ("sacrebleu", "pycocoevalcap")

Texts = Sequence[str]
References = Sequence[Sequence[str]]


def check() -> None:
  """Raises UserError if a package is missing. Prints a note if Java is missing."""
  if missing := [p for p in PACKAGES if importlib.util.find_spec(p) is None]:
    raise errors.UserError(f"metrics of texts need {' and '.join(missing)}; pip install {' '.join(missing)}")
  if not has_java():
    progress.say("no `java` on the PATH: METEOR, ROUGE-L and CIDEr are left out; apt install default-jre-headless")


def has_java() -> bool:
  """Whether METEOR, ROUGE-L and CIDEr can be computed."""
  return shutil.which("java") is not None


def scores(predictions: Texts, references: References) -> dict[str, float]:
  """All scores of a corpus.

  Args:
    references: one or more for each prediction.

  Returns:
    `bleu` in percent and `nist`; with Java also `meteor` and `rouge_l` from 0 to 1 and `cider` from 0 to 10.
  """
  check_lengths(predictions, references)
  found = {"bleu": bleu(predictions, references), "nist": nist(predictions, references)}
  if has_java():
    words = ptb_words([*predictions, *itertools.chain(*references)])
    texts, rest = words[: len(predictions)], iter(words[len(predictions) :])
    tokenized = texts, [list(itertools.islice(rest, len(refs))) for refs in references]
    found |= {"meteor": meteor(*tokenized), "rouge_l": rouge_l(*tokenized), "cider": cider(*tokenized)}
  return found


def check_lengths(predictions: Texts, references: References) -> None:
  """Raises UserError unless there are texts to score and each has a reference."""
  if not predictions or len(predictions) != len(references) or not all(references):
    raise errors.UserError(
      f"{len(predictions)} texts to score and {len(references)} lists of references, {sum(map(bool, references))} of "
      "them with any; expected one or more texts, and one or more references for each"
    )


def bleu(predictions: Texts, references: References) -> float:
  """Corpus BLEU in percent, ignoring case (Papineni et al. 2002, https://aclanthology.org/P02-1040).

  The brevity penalty uses the reference closest in length to a text, the shorter one of two that are as close.
  """
  import sacrebleu

  # `force` silences a warning about tokenised text.
  scorer = sacrebleu.BLEU(lowercase=True, tokenize="13a", force=True)
  return scorer.corpus_score(list(predictions), list(itertools.zip_longest(*references))).score


def nist(predictions: Texts, references: References, order: int = 5) -> float:
  """Corpus NIST, ignoring case (Doddington 2002, equations 2 and 3).

  As in mteval, an n-gram counts at most as often as it occurs in any one reference, and the length to reach is the mean
  over the references. `nltk` takes one reference for each n instead, and differs where there are several.
  """
  from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

  def tokenize(text):
    return Tokenizer13a()(text.lower()).split()

  texts = [tokenize(t) for t in predictions]
  refs = [[tokenize(r) for r in rs] for rs in references]
  length = sum(map(len, texts))
  wanted = sum(sum(map(len, rs)) / len(rs) for rs in refs)
  if not length or not wanted:
    return 0.0
  seen = collections.Counter({(): sum(len(r) for r in itertools.chain(*refs))})
  for r, n in itertools.product(itertools.chain(*refs), range(1, order + 1)):
    seen.update(_ngrams(r, n))
  total = 0.0
  for n in range(1, order + 1):
    information = count = 0.0
    for text, rs in zip(texts, refs, strict=True):
      have = _ngrams(text, n)
      found = have & functools.reduce(operator.or_, (_ngrams(r, n) for r in rs))
      information += sum(k * math.log2(seen[g[:-1]] / seen[g]) for g, k in found.items())
      count += have.total()
    total += information / max(count, 1)
  # Texts of two thirds of the length get half.
  return total * 0.5 ** ((math.log(min(length / wanted, 1)) / math.log(1.5)) ** 2)


def _ngrams(words: Sequence[str], n: int) -> collections.Counter:
  return collections.Counter(zip(*(words[i:] for i in range(n)), strict=False))


def ptb_words(texts: Texts) -> list[str]:
  """The words of each text in lower case, without punctuation, joined by spaces. Needs Java."""
  from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS

  lines = "".join(" ".join(t.split()) + "\n" for t in texts)
  command = [*_java("tokenizer", "stanford-corenlp-3.4.1.jar"), "edu.stanford.nlp.process.PTBTokenizer"]
  done = subprocess.run([*command, "-preserveLines", "-lowerCase"], input=lines.encode(), capture_output=True)
  rows = done.stdout.decode().split("\n")[:-1]
  if done.returncode or len(rows) != len(texts):
    raise errors.UserError(f"the PTB tokenizer failed: {_last(done.stderr) or 'it lost lines'}")
  return [" ".join(w for w in row.split(" ") if w not in PUNCTUATIONS).strip() for row in rows]


def meteor(predictions: Texts, references: References) -> float:
  """Corpus METEOR 1.5, from 0 to 1, of texts from `ptb_words`; needs Java and 2 GB of memory.

  Denkowski and Lavie 2014, https://aclanthology.org/W14-3348.
  """
  command = [*_java("meteor", "meteor-1.5.jar", "-Xmx2G"), "Meteor", "-", "-", "-stdio", "-l", "en", "-norm"]
  field = lambda text: text.replace("|||", "")
  with subprocess.Popen(
    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="utf-8"
  ) as java:

    def read():
      if not (line := java.stdout.readline().strip()):
        raise errors.UserError("METEOR stopped; it needs 2 GB of memory")
      return line

    def ask(*fields):
      print(*fields, sep=" ||| ", file=java.stdin, flush=True)
      return read()

    stats = [ask("SCORE", *map(field, rs), field(p)) for p, rs in zip(predictions, references, strict=True)]
    ask("EVAL", *stats)  # gives the score of each text, then the score of all
    return [float(read()) for _ in stats][-1]


def rouge_l(predictions: Texts, references: References) -> float:
  """Mean ROUGE-L, from 0 to 1, of texts from `ptb_words` (Lin 2004, https://aclanthology.org/W04-1013, section 3).

  It is the F measure with beta 1.2 of the best precision and the best recall over the references.
  """
  from pycocoevalcap.rouge.rouge import Rouge

  return float(Rouge().compute_score(*_coco(predictions, references))[0])


def cider(predictions: Texts, references: References) -> float:
  """Mean CIDEr-D, from 0 to 10, of texts from `ptb_words`.

  Vedantam et al. 2015, https://arxiv.org/abs/1411.5726, section 7. N-grams that are rare in the references of all
  examples weigh more, so one example alone scores 0.
  """
  from pycocoevalcap.cider.cider import Cider

  return float(Cider().compute_score(*_coco(predictions, references))[0])


def _coco(predictions: Texts, references: References) -> tuple[dict, dict]:
  return {i: list(rs) for i, rs in enumerate(references)}, {i: [p] for i, p in enumerate(predictions)}


def _java(directory: str, jar: str, *options: str) -> list[str]:
  """The beginning of a command that runs a class in a jar of pycocoevalcap."""
  package = importlib.util.find_spec("pycocoevalcap").submodule_search_locations[0]
  return ["java", *options, "-Dfile.encoding=UTF-8", "-cp", str(pathlib.Path(package, directory, jar))]


def _last(stderr: bytes) -> str:
  return (stderr.decode(errors="replace").strip().splitlines() or [""])[-1]
