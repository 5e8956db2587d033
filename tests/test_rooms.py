"""The house: each room imports only rooms below it."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "lora_jax"
# From the ground up. A room is a package or a module of lora_jax; those on one floor do not know each other.
FLOORS = (
  ("errors",),
  ("files", "memory", "patterns", "progress", "tree", "values"),
  ("sharding",),
  ("weights",),
  ("model",),
  ("families",),
  ("methods",),
  ("formats",),
  ("bridges", "merging"),
  ("tokenizer",),
  ("models",),
  ("tasks",),
  ("batches",),
  ("training",),
  ("inference",),
  ("results",),
  ("runs",),
)
HEIGHT = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def room_of(path):
  return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path):
  """The rooms that a file imports anything of."""
  for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
    if isinstance(node, ast.ImportFrom) and node.level:
      raise AssertionError(f"{path} has a relative import")
    if isinstance(node, ast.ImportFrom) and node.module == "lora_jax":
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("lora_jax."):
      yield node.module.split(".")[1]
    elif isinstance(node, ast.Import):
      yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("lora_jax."))


def upwards(room, rooms):
  """What of `rooms` a room may not import."""
  return sorted(r for r in rooms if r != room and not r.startswith("__") and HEIGHT[r] >= HEIGHT[room])


def test_every_room_has_a_floor():
  there = {p.name.removesuffix(".py") for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
  assert there - {"__init__"} == HEIGHT.keys()


@pytest.mark.parametrize("room", HEIGHT)
def test_rooms_import_only_what_is_below(room):
  found = {path: upwards(room, imported(path)) for path in FILES if room_of(path) == room}
  assert not {str(p.relative_to(ROOT)): up for p, up in found.items() if up}


def test_an_import_upwards_is_seen(tmp_path):
  path = tmp_path / "x.py"
  path.write_text(
    "from lora_jax import errors, models\nfrom lora_jax.runs import config\nimport lora_jax.training.train\n"
  )
  assert upwards("weights", imported(path)) == ["models", "runs", "training"]


def test_readme_has_every_room():
  text = (ROOT / "README.md").read_text(encoding="utf-8")
  tree = text.partition("## What is where")[2]
  assert not [r for r in HEIGHT if f"{r}/" not in tree and f"{r}.py" not in tree]
