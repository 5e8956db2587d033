"""Converts models between formats, with adapters merged in: `python scripts/convert.py --model NAME --out DIR`.

--model smollm2-135m --out DIR                      a Hugging Face directory, as transformers loads it
--model hf:org/name --adapter ADAPTER --out DIR     the same with a PEFT adapter merged
--run runs/x [--step 100] --out DIR                 the model of a run, finished or not, merged
--run runs/x --to adapter --out DIR                 its adapter, in PEFT's format if that has a place for it
--run runs/x --to adapter --rank 8 --out DIR        the same as plain LoRA, whatever it is; --variance 0.9 finds ranks
--model DIR --to orbax --out DIR                    our own tree, which loads sharded without transposing
"""

import argparse
import contextlib
import dataclasses
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

from annotated_types import Gt, Le

from lora_jax import errors
from lora_jax.runs import command_line, workdir
from lora_jax.values import Count, Name, Size

Flags = argparse.Namespace


def parser() -> command_line.Parser:
  """The flags."""
  p = command_line.Parser("python scripts/convert.py", "Converts models between formats, with adapters merged in.")
  p.value("--model", Name, None, "directory, .gguf file, packaged name or hf:org/name[@revision]")
  p.value("--adapter", Name, None, "adapter on --model, which is merged: a directory or hf:org/name")
  p.value("--run", Name, None, "directory of a run of experiments.run, instead of --model")
  p.value("--step", Size, None, "which checkpoint of --run; the newest by default")
  p.value("--to", Literal["hf", "orbax", "adapter"], "hf", "what is written: hf, orbax or adapter")
  p.value("--rank", Count, None, "with --to=adapter: converts it to LoRA of this rank at most, and prints the errors")
  share = "instead of --rank: how much of each matrix's squared singular values the smallest rank explains"
  p.value("--variance", Annotated[float, Gt(0), Le(1)], None, share)
  dtypes = Literal["bfloat16", "float16", "float32"]
  p.value("--dtype", dtypes, None, "of the weights of --model; as they are by default")
  heads = Literal["lm", "mlm", "classification", "none"]
  p.value(
    "--head", heads, None, "lm, mlm, classification or none; by default what the adapter is for, else the model's"
  )
  p.value("--n_labels", Count, None, "outputs of a classifier; by default as many as the adapter or the model has")
  p.add_argument("--out", required=True, help="directory to write; it must not hold anything")
  return p


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command line."""
  command_line.run(run, argv)


def run(argv: Sequence[str]) -> None:
  """What `main` runs; it raises where `main` ends in a message."""
  flags = parser().parse_args(argv)
  check_flags(flags)
  from absl import logging

  logging.set_verbosity(logging.WARNING)
  import safetensors

  try:
    with whole(workdir.check(flags.out, "--out")) as directory:
      convert(flags, directory)
  except (OSError, safetensors.SafetensorError) as e:
    raise errors.UserError(f"cannot write {flags.out}: {errors.line(e)}") from e
  print(f"wrote {flags.out}")


def check_flags(flags: Flags) -> None:
  """Raises UserError for flags that would do nothing."""
  if (flags.model is None) == (flags.run is None):
    raise errors.UserError("give --model or --run")
  idle = {"with --run": "head n_labels dtype adapter"} if flags.run is not None else {"without --run": "step"}
  idle |= {"with --to=adapter": "dtype"} if flags.to == "adapter" else {"without --to=adapter": "rank variance"}
  for when, names in idle.items():
    if wrong := [f"--{k}" for k in names.split() if getattr(flags, k) is not None]:
      raise errors.UserError(f"{', '.join(wrong)} would do nothing {when}")


@contextlib.contextmanager
def whole(out: pathlib.Path) -> Iterator[pathlib.Path]:
  """A directory to fill: its content moves to `out` at the end, or is deleted after an error."""
  if out.is_dir() and any(out.iterdir()):
    raise errors.UserError(f"{out} is not empty")
  new = not out.exists()
  out.mkdir(parents=True, exist_ok=True)
  work = pathlib.Path(tempfile.mkdtemp(prefix=".incomplete-", dir=out))
  try:
    yield work
    # A directory is a model or an adapter once it has the config, so that comes last.
    for path in sorted(work.iterdir(), key=lambda p: p.name in ("config.json", "adapter_config.json")):
      os.rename(path, out / path.name)
  finally:
    shutil.rmtree(work, ignore_errors=True)
    if new:
      with contextlib.suppress(OSError):  # it holds what was written
        out.rmdir()


def convert(flags: Flags, directory: pathlib.Path) -> None:
  """Loads, merges and writes what the flags name."""
  from lora_jax import models, tree, weights
  from lora_jax.formats import adapter, peft
  from lora_jax.merging import lowrank
  from lora_jax.runs import experiment

  if flags.run:
    model, mask, method, steps = experiment.restored(flags.run, flags.step)
    trained = {k for k, m in tree.flatten(mask).items() if m}
  else:
    model, changed = load(flags)
    trained = {*model.head_leaves, *changed}
  if flags.rank is not None or flags.variance is not None:
    params, report = lowrank.to_lora(model.params, flags.rank, flags.variance)
    print(lowrank.table(report))
    peft.save(model, params, directory, trained, method={"name": "lora"})
  elif flags.to == "adapter" and flags.run:
    adapter.save(model, model.params, mask, method, directory, steps)
  elif flags.to == "adapter":
    try:
      peft.save(model, model.params, directory, trained)
    except peft.NoForm as e:
      raise errors.UserError(f"{e}; --rank or --variance converts what changes weights to LoRA") from None
  else:
    models.save(dataclasses.replace(model, params=weights.merge(model.params)), directory, form=flags.to)


def load(flags: Flags):
  """(--model with --adapter on it, leaves of the model that the adapter replaces).

  Weights that neither of them has are named on standard error.
  """
  from lora_jax import models, tree, weights
  from lora_jax.formats import adapter, peft

  how = peft.head(flags.adapter) if flags.adapter else {}
  how |= {k: v for k, v in {"head": flags.head, "n_labels": flags.n_labels}.items() if v is not None}
  model = models.load(flags.model, dtype=flags.dtype, **how)
  if flags.n_labels and model.config.head != "classification":
    raise errors.UserError(f"--n_labels would do nothing with the head {model.config.head!r}; give --head")
  before = tree.flatten(model.params)
  if flags.adapter:
    model = dataclasses.replace(model, params=adapter.load(model, flags.adapter))
  after = tree.flatten(weights.strip(model.params))
  if fresh := [k for k in model.fresh if after[k] is before[k]]:
    print(f"warning: {flags.model} has no {', '.join(fresh)}: written at random", file=sys.stderr)
  return model, [k for k in before if after[k] is not before[k]] if flags.adapter else []


if __name__ == "__main__":
  main()
