"""The E2E challenge: describe a restaurant in a sentence or two (Novikova et al. 2017, https://arxiv.org/abs/1706.09254).

The challenge's CSV files have 50,000 sentences for 6,000 meaning representations such as `name[The Vaults],
eatType[pub]`. `tensorflow_datasets` has only the cleaned data of Dušek et al. 2019, also as `gem/e2e_nlg`; scores on it
do not compare with papers on the challenge.
"""

import csv
import pathlib
import re
from collections.abc import Iterator, Sequence

from lora_jax import errors, tasks
from lora_jax.tasks import text_metrics

LABELS = None
PROMPT_LOSS_WEIGHT = 0.0
FILES = {"train": "trainset.csv", "validation": "devset.csv", "test": "testset_w_refs.csv"}
# Names of attributes in the files of Li and Liang 2021 (https://arxiv.org/abs/2101.00190), which LoRA uses.
NAMES = {"eatType": "Type", "priceRange": "price", "familyFriendly": "family friendly"}

_URL = "https://github.com/tuetschek/e2e-dataset/releases/download/v1.0.0/e2e-dataset.zip"


def load(split: str, *, path: str = "") -> Sequence[dict]:
  """Examples `{"mr": str, "references": [str, ...]}`: one for each sentence in training, else one for each `mr`.

  Args:
    path: the directory that holds FILES.
  """
  if not path:
    raise errors.UserError(f"task e2e_nlg needs the challenge's files: unpack {_URL}, and set task.path to where it is")
  if split != "train":
    text_metrics.check()
  rows = list(_rows(pathlib.Path(path) / FILES[split]))
  if split == "train":
    return [{"mr": mr, "references": [ref]} for mr, ref in rows]
  groups = {}
  for mr, ref in rows:
    groups.setdefault(mr, []).append(ref)
  return [{"mr": mr, "references": refs} for mr, refs in groups.items()]


def format(example: dict, *, separator: str = "\n") -> tasks.Formatted:
  """`name : The Vaults | Type : pub` and the separator, then the first reference.

  Args:
    separator: text between the two. LoRA uses GPT-2's `<|endoftext|>`, and tokenised texts: `£ 30 .` for `£30.`
  """
  described = " | ".join(f"{NAMES.get(k, k)} : {v}" for k, v in attributes(example["mr"]))
  return tasks.Formatted(described + separator, " " + example["references"][0])


def score(example: dict, text: str) -> dict[str, float]:
  """`exact_match`: 1 if the generated sentence is one of the references, else 0."""
  return {"exact_match": float(sentence(text) in example["references"])}


def corpus(texts: Sequence[str], examples: Sequence[dict]) -> dict[str, float]:
  """`bleu`, `nist`, `meteor`, `rouge_l` and `cider` of generated texts, see `text_metrics.scores`."""
  return text_metrics.scores([sentence(t) for t in texts], [e["references"] for e in examples])


def sentence(text: str) -> str:
  """The part of a generated text that is scored: its first paragraph, as in LoRA."""
  return text.strip().split("\n\n")[0].strip()


def attributes(mr: str) -> list[tuple[str, str]]:
  """`[(attribute, value), ...]` of a meaning representation; empty for any other text."""
  found = [re.fullmatch(r"\s*([^][]+)\[([^][]*)\]\s*", part) for part in re.split(r"(?<=\]),", mr)]
  return [m.groups() for m in found] if all(found) else []


def _rows(path: pathlib.Path) -> Iterator[tuple[str, str]]:
  """The columns (mr, ref) of each row of a file."""
  try:
    with path.open(encoding="utf-8-sig", newline="") as f:
      reader = csv.DictReader(f)
      names = {k.lower(): k for k in reader.fieldnames or ()}
      if not {"mr", "ref"} <= names.keys():
        raise errors.UserError(f"{path}: expected the columns mr,ref, found {','.join(names) or 'nothing'}")
      for row in reader:
        mr, ref = (row[names[k]] or "" for k in ("mr", "ref"))
        if not attributes(mr) or not ref.strip():
          found = f"found {mr!r:.80} and {ref!r:.80}"
          raise errors.UserError(f"{path}:{reader.line_num}: expected `name[...], food[...]` and a sentence, {found}")
        yield mr.strip(), ref.strip()
  except (OSError, UnicodeDecodeError, csv.Error) as e:
    raise errors.UserError(f"cannot read {path}: {e}; the challenge's files are in {_URL}") from e
