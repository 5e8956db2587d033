"""GLUE: nine tasks of language understanding and a diagnostic set (Wang et al. 2019, https://arxiv.org/abs/1804.07461).

The labels of GLUE's test sets are hidden, so `test` is the official validation set and `validation` is a tenth of the
training set. Training examples whose text is in the official validation set are dropped. `mnli` and `mnli_mismatched`
train on the same examples and are tested on matched and mismatched genres. `ax` tests models trained on MNLI; its
labels are hidden, so its responses and scores are empty. The paper's table 1 lists the metrics.
"""

import pathlib
import string
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from lora_jax import errors, files, tasks
from lora_jax.tasks import packaged
from lora_jax.values import Name

PROMPT_LOSS_WEIGHT = 0.0

_PAIR = "Sentence 1: {sentence1}\nSentence 2: {sentence2}\n"
_NLI = "Premise: {premise}\nHypothesis: {hypothesis}\nRelation:"
_NLI_LABELS = (" entailment", " neutral", " contradiction")

# Subset: a prompt with the text features of tfds, and responses in the label order of tfds; STS-B has a number.
SUBSETS = {
  "cola": ("Sentence: {sentence}\nGrammar:", (" unacceptable", " acceptable")),
  "sst2": ("Review: {sentence}\nSentiment:", (" negative", " positive")),
  "mrpc": (_PAIR + "Same meaning:", (" no", " yes")),
  "stsb": (_PAIR + "Similarity from 0 to 5:", None),
  "qqp": ("Question 1: {question1}\nQuestion 2: {question2}\nDuplicate:", (" no", " yes")),
  "mnli": (_NLI, _NLI_LABELS),
  "mnli_mismatched": (_NLI, _NLI_LABELS),
  "qnli": ("Question: {question}\nSentence: {sentence}\nAnswered:", (" yes", " no")),
  "rte": (_PAIR + "Sentence 1 entails sentence 2:", (" yes", " no")),
  "wnli": (_PAIR + "Sentence 1 entails sentence 2:", (" no", " yes")),
  "ax": (_NLI, _NLI_LABELS),
}

Subset = Literal[*SUBSETS]


def load(split: str, *, subset: Subset, data_dir: Name | None = None) -> Sequence[dict]:
  """Examples of a split: the text features of `tfds.text.Glue` as str, and `label` as int (float for STS-B).

  Args:
    split: "train", "validation" or "test"; `ax` only has "test".
    subset: a key of SUBSETS.
    data_dir: a tfds directory with the subset as array_record; by default the subset is downloaded to the cache.
  """
  prompt, labels = _subset(subset)
  if subset == "ax" and split != "test":
    raise errors.UserError(f"glue subset 'ax' has no split {split!r}: train on 'mnli', test on 'ax'")
  config = "mnli" if subset == "mnli_mismatched" else subset
  root = _downloaded(config) if data_dir is None else pathlib.Path(data_dir)
  found = sorted(root.glob(f"glue/{config}/*/dataset_info.json"))
  if not found:
    raise errors.UserError(f"no glue/{config}/<version> in {root}, where tfds prepares it; {_HOW.format(config)}")
  fields = _fields(prompt)
  return packaged.load(
    f"glue_{subset}",
    split,
    fields={**dict.fromkeys(fields, str), "label": int if labels else float},
    rows=lambda: _rows(subset, config, root, fields),
    fingerprint=packaged.fingerprint(found[-1:]),
  )


def format(example: dict, *, subset: Subset) -> tasks.Formatted:
  """The texts by name, then the label; STS-B's is rounded to the nearest 0.2 (Raffel et al. 2020, section 2.4)."""
  prompt, _ = _subset(subset)
  return tasks.Formatted(prompt.format(**example), _response(example["label"], subset))


def texts(example: dict, *, subset: Subset) -> tuple[str, ...]:
  """The sentence or the two sentences, in GLUE's order."""
  return tuple(example[k] for k in _fields(_subset(subset)[0]))


def target(example: dict, *, subset: Subset) -> int | float:
  """The label's index, or -1 if it is hidden; for STS-B the number from 0 to 5."""
  return example["label"]


def labels(*, subset: Subset) -> tuple[str, ...] | None:
  """Responses in label order; None for STS-B."""
  return _subset(subset)[1]


def score(example: dict, text: str, *, subset: Subset) -> dict[str, float]:
  """`exact_match`, and for STS-B `absolute_error`, which is 5 for a text without a number. Empty for a hidden label."""
  label = example["label"]
  if label < 0:
    return {}
  values = tasks.exact_match(_response(label, subset), text)
  if subset == "stsb":
    error = abs(tasks.number(text) - label)
    values["absolute_error"] = error if error < 5 else 5.0
  return values


def metrics(predictions: Sequence, references: Sequence, *, subset: Subset) -> dict[str, float]:
  """`matthews` for CoLA, `accuracy` and `f1` for MRPC and QQP, `pearson` and `spearman` for STS-B, else `accuracy`.

  Constant predictions have a correlation of 0. A prediction of nan in STS-B counts as the middle, 2.5.
  """
  if subset == "stsb":
    return _correlations(np.nan_to_num(np.array(predictions, float), nan=2.5, posinf=5, neginf=0), references)
  if subset == "cola":
    from sklearn.metrics import matthews_corrcoef

    constant = len(set(predictions)) < 2  # scikit-learn would warn
    return {"matthews": 0.0 if constant else float(matthews_corrcoef(references, predictions))}
  values = tasks.accuracy(predictions, references)
  if subset in ("mrpc", "qqp"):
    from sklearn.metrics import f1_score

    values["f1"] = float(f1_score(references, predictions, zero_division=0))
  return values


_HOST = "https://dl.fbaipublicfiles.com"
_HOW = (
  'get it where the network allows: `python -c "from tensorflow_datasets import text;'
  " text.Glue(config='{0}', data_dir='DIR', file_format='array_record').download_and_prepare()\"`,"
  " and set task.data_dir=DIR"
)


def _subset(name: str) -> tuple[str, tuple[str, ...] | None]:
  return errors.choose(name, SUBSETS, "glue subset")


def _fields(prompt: str) -> list[str]:
  """Names of the text features, in GLUE's order."""
  return [name for _, name, _, _ in string.Formatter().parse(prompt) if name]


def _correlations(predictions: np.ndarray, references: Sequence[float]) -> dict[str, float]:
  from scipy import stats

  if np.ptp(predictions) == 0 or np.ptp(references) == 0:
    return {"pearson": 0.0, "spearman": 0.0}
  found = {"pearson": stats.pearsonr, "spearman": stats.spearmanr}
  return {k: float(f(predictions, references).statistic) for k, f in found.items()}


def _response(label: int | float, subset: Subset) -> str:
  choices = SUBSETS[subset][1]
  if label < 0:
    return ""
  return f" {round(label * 5) / 5:.1f}" if choices is None else choices[label]


def _downloaded(config: str) -> pathlib.Path:
  """The cached tfds directory of a GLUE config; downloads it the first time."""
  path = files.cache("tfds") / f"download-glue-{config}"
  if not path.is_dir():
    files.publish(path, lambda work: _download(config, work))
  return path


def _download(config: str, directory: pathlib.Path) -> None:
  import requests
  from tensorflow_datasets import text

  builder = text.Glue(config=config, data_dir=directory, file_format="array_record")
  # Ask first, since tfds retries for minutes. Its errors (network, checksum, disk) have no common base.
  try:
    requests.head(builder.builder_config.data_url or _HOST, timeout=10)
    builder.download_and_prepare()
  except Exception as e:
    reason = f"{type(e).__name__}: {e}".splitlines()[0]
    raise errors.UserError(f"glue/{config} could not be downloaded ({reason}); {_HOW.format(config)}") from e


def _rows(subset: Subset, config: str, root: pathlib.Path, fields: Sequence[str]) -> Iterator[packaged.Row]:
  import tensorflow_datasets as tfds

  def read(split, to):
    try:
      source = tfds.data_source(f"glue/{config}", split=split, data_dir=root, download=False)
    except (NotImplementedError, ValueError) as e:
      raise errors.UserError(f"glue/{config} in {root} is not in array_record format; {_HOW.format(config)}") from e
    for example in packaged.Examples(source):
      kept = {k: example[k] for k in (*fields, "label")}
      yield to, tuple(example[k] for k in fields), kept

  official = {"mnli": "validation_matched", "mnli_mismatched": "validation_mismatched", "ax": "test"}
  yield from read(official.get(subset, "validation"), "test")
  if subset != "ax":
    yield from read("train", None)
