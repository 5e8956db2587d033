"""Makes the notebooks of experiments/colab from their sources: `python -m scripts.notebooks [--execute] [NAME...]`.

A source is a .py file in jupytext's percent format; the .ipynb beside it has its cells. Outputs are kept while the code
stays the same. `--execute` makes them again, each notebook in an empty directory. It needs the extra `notebooks`.
"""

import base64
import io
import os
import pathlib
import re
import sys
import tempfile

import jupytext
import nbclient
import nbformat
from absl import app, flags, logging
from ipykernel import kernelspec
from jupyter_client import kernelspec as kernelspecs, manager
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parents[1]
SOURCES = ROOT / "experiments" / "colab"
METADATA = {
  "accelerator": "GPU",
  "colab": {"gpuType": "T4", "provenance": []},
  "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
  "language_info": {"name": "python"},
}
PROGRESS = re.compile(r"^(step|evaluating \w+) [\d,]+/[\d,]+")  # lines of progress.Progress, which hold times
FOREIGN = re.compile(r"%\|.*\||Warning\b|^(WARNING|[WEI]\d{4} )")  # progress bars and logs of other libraries
MACHINE = re.compile(r"(?<![\w.:/<-])/(tmp|home|root|usr|opt|var|mnt|work|private|Users)/|site-packages|[A-Z]:\\")
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f]")
MOST_BYTES = 400_000

EXECUTE = flags.DEFINE_bool("execute", False, "Run the notebooks and keep what they show.")
TIMEOUT = flags.DEFINE_integer("timeout", 3600, "Seconds that a cell may take.")


def main(argv: list[str]) -> None:
  logging.set_verbosity(logging.WARNING)
  known = [p.stem for p in sources()]
  for name in argv[1:]:
    if name not in known:
      sys.exit(f"error: no notebook {name!r}; known: {', '.join(known)}")
  for source in sources():
    if argv[1:] and source.stem not in argv[1:]:
      continue
    path = source.with_suffix(".ipynb")
    notebook = convert(source, path)
    if EXECUTE.value:
      print(f"executing {source.stem}", flush=True)
      with tempfile.TemporaryDirectory() as directory:
        execute(notebook, directory, TIMEOUT.value)
      tidy(notebook)
    text = nbformat.writes(notebook) + "\n"
    changed = not path.exists() or path.read_text(encoding="utf-8") != text
    path.write_text(text, encoding="utf-8")
    print(f"{path.relative_to(ROOT)}: {'written' if changed else 'unchanged'}, {len(text) / 1000:.0f} KB")
    for problem in problems(notebook):
      print(f"  {problem}")


def sources() -> list[pathlib.Path]:
  """The sources of all notebooks."""
  return sorted(SOURCES.glob("*.py"))


def convert(source: pathlib.Path, old: pathlib.Path | None = None) -> nbformat.NotebookNode:
  """The notebook of a source.

  Args:
    old: a notebook that may exist. Its outputs are kept if its code is the same, except for the first cell, which
      installs the package.
  """
  notebook = jupytext.read(source, fmt="py:percent")
  before = code(nbformat.read(old, as_version=4)) if old is not None and old.exists() else []
  if before and [c.source for c in code(notebook)[1:]] == [c.source for c in before[1:]]:
    for cell, same in zip(code(notebook), before, strict=True):
      cell.outputs, cell.execution_count = same.outputs, same.execution_count
  notebook.metadata = nbformat.from_dict(METADATA)
  notebook.nbformat, notebook.nbformat_minor = 4, 5
  for i, cell in enumerate(notebook.cells):
    cell.id = f"{source.stem}-{i}"
    cell.metadata = nbformat.from_dict({k: v for k, v in cell.metadata.items() if k == "tags"})
  return notebook


def code(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
  """The cells with code."""
  return [c for c in notebook.cells if c.cell_type == "code"]


def execute(notebook: nbformat.NotebookNode, directory: str | os.PathLike, timeout: int = 600) -> None:
  """Runs a notebook in `directory`, with this interpreter and this code, and puts the outputs into it.

  Raises:
    nbclient.exceptions.CellExecutionError: a cell raised.
  """
  with tempfile.TemporaryDirectory() as own:
    kernelspec.write_kernel_spec(os.path.join(own, "kernels", "python3"))
    known = kernelspecs.KernelSpecManager(kernel_dirs=[os.path.join(own, "kernels")])
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    quiet = {"TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore", "TRANSFORMERS_VERBOSITY": "error"}
    connection = {"connection_file": os.path.join(own, "kernel.json"), "ip": os.path.join(own, "kernel")}
    client = nbclient.NotebookClient(
      notebook,
      km=manager.AsyncKernelManager(kernel_name="python3", kernel_spec_manager=known, transport="ipc", **connection),
      timeout=timeout,
      coalesce_streams=True,
      record_timing=False,
      resources={"metadata": {"path": str(directory)}},
    )
    client.execute(cleanup_kc=True, env=os.environ | quiet | {"PYTHONPATH": path, "IPYTHONDIR": own})


def tidy(notebook: nbformat.NotebookNode) -> None:
  """Drops outputs that differ from machine to machine: progress with its times, warnings, widgets.

  Images are written with 256 colours, which is enough for plots and a third of the size.
  """
  for cell in code(notebook):
    kept = []
    for out in cell.outputs:
      if out.output_type == "stream":
        lines = [x for x in out.text.splitlines() if not (PROGRESS.search(x) or FOREIGN.search(x))]
        out.text = "\n".join(lines).strip("\n")
        kept += [out] if out.text else []
        continue
      data = out.get("data", {})
      if "image/png" in data:
        data["image/png"] = _smaller(data["image/png"])
      if "application/vnd.jupyter.widget-view+json" not in data:
        kept.append(out)
    cell.outputs = kept
  notebook.metadata = nbformat.from_dict(METADATA)


def _smaller(png: str) -> str:
  image = Image.open(io.BytesIO(base64.b64decode(png)))
  out = io.BytesIO()
  image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(out, "png", optimize=True)
  return base64.b64encode(out.getvalue()).decode()


def problems(notebook: nbformat.NotebookNode) -> list[str]:
  """What others should not see in a notebook: cells that did not run, errors, machine paths, times, too many bytes."""
  found = []
  images = 0
  for cell in code(notebook):
    if cell.execution_count is None:
      found.append(f"{cell.id} was not run")
    for out in cell.outputs:
      data = out.get("data", {})
      images += "image/png" in data
      texts = [out.get("text", ""), *(v for k, v in data.items() if k.startswith("text/"))]
      if out.output_type == "error":
        found.append(f"{cell.id} ends in {out.ename}")
      for line in "\n".join(texts).split("\n"):
        if any(p.search(line) for p in (MACHINE, PROGRESS, FOREIGN, CONTROL)):
          found.append(f"{cell.id} shows {line!r:.120}")
  if not images:
    found.append("it has no image")
  if (size := len(nbformat.writes(notebook))) > MOST_BYTES:
    found.append(f"it has {size:,} bytes of {MOST_BYTES:,}")
  return found


if __name__ == "__main__":
  app.run(main)
