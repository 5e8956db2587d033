"""Texts that ship in a Python package, prepared once as array_record files and read by index.

Splits depend on the text alone, not on the order of a file or the size of a dataset.
"""

import collections
import contextlib
import dataclasses
import hashlib
import importlib.util
import io
import pathlib
import shutil
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lora_jax import errors, files, tasks

Row = tuple[str | None, tuple[str, ...], dict]  # split, or None for `split_of`; texts that identify it; example

# Increase it when the same source is prepared in another way.
FORMAT = 1


def package_path(module: str, package: str, *parts: str) -> pathlib.Path:
  """A file or directory inside an installed package, found without importing it."""
  spec = importlib.util.find_spec(module)
  if spec is None or not spec.submodule_search_locations:
    raise errors.UserError(
      f"the Python package {package!r}, which has the data, is not installed; pip install {package}"
    )
  path = pathlib.Path(spec.submodule_search_locations[0], *parts)
  if not path.exists():
    raise errors.UserError(
      f"the installed package {package!r} has no {'/'.join(parts)}; pip install --force-reinstall {package}"
    )
  return path


def digest(*texts: str) -> str:
  """A hash of texts: 128 bits in hexadecimal, equal for texts that differ only in case, Unicode form or white space."""
  normal = ["\x1f".join(unicodedata.normalize("NFKC", t).casefold().split()) for t in texts]
  return hashlib.blake2b("\x1e".join(normal).encode(), digest_size=16).hexdigest()


def split_of(digest: str, names: Sequence[str] = tasks.SPLITS) -> str:
  """The split of a text by its `digest`: 80% train, 10% validation, 10% test. Splits not in `names` become train."""
  u = int(digest[:8], 16) / 2**32
  split = "train" if u < 0.8 else "validation" if u < 0.9 else "test"
  return split if split in names else "train"


def fingerprint(paths: Iterable[pathlib.Path]) -> str:
  """A hash of the contents and last two path components of `paths` and of FORMAT: 64 bits in hexadecimal."""
  h = hashlib.blake2b(f"format {FORMAT}".encode(), digest_size=8)
  for path in paths:
    data = path.read_bytes()
    h.update(f"\0{path.parent.name}/{path.name}\0{len(data)}\0".encode())
    h.update(data)
  return h.hexdigest()


@dataclasses.dataclass(frozen=True)
class Examples(Sequence):
  """A tfds data source as a sequence of plain dicts of str, int and float."""

  source: Any

  def __len__(self) -> int:
    return len(self.source)

  def __getitem__(self, index):
    index = range(len(self))[index]
    return self._read(index) if isinstance(index, range) else self._read([index])[0]

  def __iter__(self) -> Iterator[dict]:
    for start in range(0, len(self), 1024):
      yield from self[start : start + 1024]

  def _read(self, indices: Sequence[int]) -> list[dict]:
    return [{k: _plain(v) for k, v in row.items()} for row in self.source.__getitems__(list(indices))]


def load(
  name: str,
  split: str,
  *,
  fields: Mapping[str, type],
  rows: Callable[[], Iterable[Row]],
  fingerprint: str,
) -> Examples:
  """One split of a dataset, which is prepared the first time.

  Args:
    name: name of the dataset, lower case with underscores.
    split: "train", "validation" or "test".
    fields: type of each value of an example: str, int or float.
    rows: all examples. Those with a split come first and are kept as they are. The others go to the remaining splits by
      the digest of their text; they are dropped if an earlier row has the same text.
    fingerprint: hash of the source; each has its own files.
  """
  import tensorflow_datasets as tfds

  path = files.cache("tfds") / f"{name}-{fingerprint}"
  name = f"lora_jax_{name}"  # tfds has no dataset of this name
  if not path.is_dir():
    files.publish(path, lambda work: _prepare(work, name, fields, rows()))
  if not list(path.glob(f"{name}/*/dataset_info.json")):
    raise errors.UserError(f"{path} is damaged; delete it, and it will be prepared again")
  return Examples(tfds.data_source(name, split=split, data_dir=path, download=False))


def _assign(rows: Iterable[Row]) -> dict[str, list[tuple[str, dict]]]:
  """The examples of each split, `{split: [(unique key, example)]}`. tfds orders a split by a hash of the key."""
  splits, seen = collections.defaultdict(list), collections.Counter()
  free = list(tasks.SPLITS)
  for split, texts, example in rows:
    d = digest(*texts)
    if split in free:
      free.remove(split)
    if split or not seen[d]:
      splits[split or split_of(d, free)].append((f"{d}-{seen[d]}", example))
      seen[d] += 1
  return splits


def _prepare(directory: pathlib.Path, name: str, fields: Mapping[str, type], rows: Iterable[Row]) -> None:
  """Writes `directory/name/1.0.0` with tfds, quietly."""
  import tensorflow_datasets as tfds

  features = {str: tfds.features.Text(), int: np.int64, float: np.float32}
  splits = _assign(rows)

  class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
      return tfds.core.DatasetInfo(
        builder=self, features=tfds.features.FeaturesDict({k: features[t] for k, t in fields.items()})
      )

    def _split_generators(self, dl_manager):
      return {k: self._generate_examples(v) for k, v in splits.items()}

    def _generate_examples(self, rows):
      yield from rows

  Builder.name = name
  with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    Builder(data_dir=directory).download_and_prepare(file_format="array_record", download_dir=directory / "downloads")
  shutil.rmtree(directory / "downloads", ignore_errors=True)


def _plain(value: Any) -> str | int | float:
  if isinstance(value, bytes):
    return value.decode()
  return value.item() if isinstance(value, np.generic) else value
