"""Models that a package ships zipped."""

import os
import zipfile

import pytest

from lora_jax import errors, files
from lora_jax.formats import archive


@pytest.fixture
def zipped(tmp_path, monkeypatch):
  """A function that writes an archive of {name: text}; the cache is tmp_path/cache."""
  monkeypatch.setenv("LORA_JAX_CACHE", str(tmp_path / "cache"))

  def write(**members):
    with zipfile.ZipFile(tmp_path / "model.zip", "w", zipfile.ZIP_DEFLATED) as file:
      for k, text in members.items():
        file.writestr(k, text)
    return tmp_path / "model.zip"

  return write


def test_unpacks_once_and_only_what_a_model_has(tmp_path, zipped):
  path = zipped(**{"config.json": "{}", "model.safetensors": "w", "../config.json": "evil", "sub/config.json": "no"})
  directory = archive.unpack(path, "tiny")
  assert directory.parent == files.cache("models") == tmp_path / "cache" / "models"
  assert {p.name: p.read_text() for p in directory.iterdir()} == {"config.json": "{}", "model.safetensors": "w"}
  assert os.listdir(files.cache("models")) == [directory.name]
  before = (directory / "config.json").stat().st_mtime_ns
  assert archive.unpack(path, "tiny") == directory
  assert (directory / "config.json").stat().st_mtime_ns == before


def test_another_version_has_its_own_directory(zipped):
  first = archive.unpack(zipped(**{"config.json": "1"}), "tiny")
  second = archive.unpack(zipped(**{"config.json": "2"}), "tiny")
  assert first != second and (first / "config.json").read_text() == "1"


@pytest.mark.parametrize(
  "damage", [lambda b: b[:-30], lambda b: b.replace(b"weights", b"WEIGHTS"), lambda b: b"no zip"]
)
def test_damaged_archives_leave_nothing(zipped, damage):
  path = zipped(**{"config.json": "{}"})
  with zipfile.ZipFile(path, "a", zipfile.ZIP_STORED) as file:
    file.writestr("model.safetensors", "weights")
  path.write_bytes(damage(path.read_bytes()))
  with pytest.raises(errors.UserError, match="model.zip could not be unpacked"):
    archive.unpack(path, "tiny")
  assert not files.cache("models").exists() or not os.listdir(files.cache("models"))
