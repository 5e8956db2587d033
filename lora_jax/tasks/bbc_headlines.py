"""BBC headlines: write the first line of an article from the rest of it.

The articles come from bbc_news.py. Some articles and some headlines occur twice. Only the first of each is kept, so
splits have nothing in common.
"""

from collections.abc import Iterator, Sequence

from lora_jax import tasks
from lora_jax.tasks import bbc_news, packaged, text_metrics
from lora_jax.values import Count

LABELS = None
PROMPT_LOSS_WEIGHT = 0.0


def load(split: str) -> Sequence[dict]:
  """Examples `{"headline": str, "article": str}` of a split."""
  if split != "train":
    text_metrics.check()
  files = bbc_news.files()
  return packaged.load(
    "bbc_headlines",
    split,
    fields={"headline": str, "article": str},
    rows=lambda: _rows(bbc_news.articles(files)),
    fingerprint=packaged.fingerprint(files),
  )


def format(example: dict, *, max_words: Count | None = 100) -> tasks.Formatted:
  """`Article: <the first words>`, then the headline.

  Args:
    max_words: number of words to keep; None keeps all.
  """
  article = " ".join(example["article"].split()[:max_words])
  return tasks.Formatted(f"Article: {article}\nHeadline:", f" {example['headline']}")


def score(example: dict, text: str) -> dict[str, float]:
  """No metrics: `corpus` scores all texts at once."""
  return {}


def corpus(texts: Sequence[str], examples: Sequence[dict]) -> dict[str, float]:
  """`bleu`, `nist`, `meteor`, `rouge_l` and `cider` of the first lines of texts, see `text_metrics.scores`."""
  return text_metrics.scores([text.strip().partition("\n")[0] for text in texts], [[e["headline"]] for e in examples])


def _rows(articles: Iterator[tuple[str, str]]) -> Iterator[packaged.Row]:
  seen = set()
  for text, _ in articles:
    headline, _, article = (part.strip() for part in text.partition("\n"))
    digests = {packaged.digest(headline), packaged.digest(article)}
    if not seen & digests:
      yield None, (headline, article), {"headline": headline, "article": article}
    seen |= digests
