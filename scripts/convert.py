"""Converts models between formats, with adapters merged in: `python scripts/convert.py --model NAME --out DIR`.

--model smollm2-135m --out DIR                      a Hugging Face directory, as transformers loads it
--model hf:org/name --adapter ADAPTER --out DIR     the same with a PEFT adapter merged
--run runs/x [--step 100] --out DIR                 the model of a run, finished or not, merged
--run runs/x --to adapter --out DIR                 its adapter, in PEFT's format if that has a place for it
--run runs/x --to adapter --rank 8 --out DIR        the same as plain LoRA, whatever it is; --variance 0.9 finds ranks
--model DIR --to orbax --out DIR                    our own tree, which loads sharded without transposing
"""

import contextlib
import dataclasses
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Iterator

from absl import app, flags

MODEL = flags.DEFINE_string("model", None, "Directory, .gguf file, packaged name or hf:org/name[@revision].")
ADAPTER = flags.DEFINE_string("adapter", None, "Adapter on --model, which is merged: a directory or hf:org/name.")
RUN = flags.DEFINE_string("run", None, "Directory of a run of experiments.run, instead of --model.")
STEP = flags.DEFINE_integer("step", None, "Which checkpoint of --run; the newest by default.")
TO = flags.DEFINE_enum("to", "hf", ["hf", "orbax", "adapter"], "What is written.")
RANK = flags.DEFINE_integer(
  "rank",
  None,
  "With --to=adapter: converts it to plain LoRA of this rank at most, and prints the errors.",
  lower_bound=1,
)
VARIANCE = flags.DEFINE_float(
  "variance", None, "Instead of --rank: how much of each matrix's squared singular values the smallest rank explains."
)
DTYPE = flags.DEFINE_enum(
  "dtype", None, ["bfloat16", "float16", "float32"], "Of the weights of --model; as they are by default."
)
HEAD = flags.DEFINE_string(
  "head", None, "lm, mlm, classification or none; by default what the adapter is for, else the model's own."
)
N_LABELS = flags.DEFINE_integer(
  "n_labels", None, "Outputs of a classifier; by default as many as the adapter or the model has.", lower_bound=1
)
OUT = flags.DEFINE_string("out", None, "Directory to write; it must not hold anything.", required=True)


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected argument {argv[1]!r}")
  import safetensors
  from absl import logging

  from lora_jax import errors

  logging.set_verbosity(logging.WARNING)
  try:
    check_flags()
    with whole(pathlib.Path(OUT.value)) as directory:
      run(directory)
  except (errors.UserError, OSError, safetensors.SafetensorError) as e:
    sys.exit(f"error: {e}")
  except KeyboardInterrupt:
    sys.exit(130)
  print(f"wrote {OUT.value}")


def check_flags() -> None:
  """Raises UserError for flags that would do nothing."""
  from lora_jax import errors

  if (MODEL.value is None) == (RUN.value is None):
    raise errors.UserError("give --model or --run")
  idle = {"with --run": "head n_labels dtype adapter"} if RUN.value else {"without --run": "step"}
  idle |= {"with --to=adapter": "dtype"} if TO.value == "adapter" else {"without --to=adapter": "rank variance"}
  for when, names in idle.items():
    if wrong := [f"--{k}" for k in names.split() if flags.FLAGS[k].value is not None]:
      raise errors.UserError(f"{', '.join(wrong)} would do nothing {when}")


@contextlib.contextmanager
def whole(out: pathlib.Path) -> Iterator[pathlib.Path]:
  """A directory to fill, whose content moves to `out` at the end, or goes if that is not reached."""
  from lora_jax import errors

  if out.exists() and not out.is_dir():
    raise errors.UserError(f"{out} is no directory")
  if out.is_dir() and any(out.iterdir()):
    raise errors.UserError(f"{out} is not empty")
  new = not out.exists()
  out.mkdir(parents=True, exist_ok=True)
  work = pathlib.Path(tempfile.mkdtemp(prefix=".incomplete-", dir=out))
  try:
    yield work
    # The config makes a directory a model or an adapter, so it comes last.
    for path in sorted(work.iterdir(), key=lambda p: p.name in ("config.json", "adapter_config.json")):
      os.rename(path, out / path.name)
  finally:
    shutil.rmtree(work, ignore_errors=True)
    if new:
      with contextlib.suppress(OSError):  # it holds what was written
        out.rmdir()


def run(directory: pathlib.Path) -> None:
  """Loads, merges and writes what the flags name."""
  from lora_jax import errors, experiment, lowrank, models, tree, weights
  from lora_jax.formats import adapter, peft

  if RUN.value:
    model, mask, method, steps = experiment.restored(RUN.value, STEP.value)
    trained = {k for k, m in tree.flatten(mask).items() if m}
  else:
    model, changed = load()
    trained = {*model.head_leaves, *changed}
  if RANK.value is not None or VARIANCE.value is not None:
    params, report = lowrank.to_lora(model.params, RANK.value, VARIANCE.value)
    print(lowrank.table(report))
    peft.save(model, params, directory, trained, method={"name": "lora"})
  elif TO.value == "adapter" and RUN.value:
    adapter.save(model, model.params, mask, method, directory, steps)
  elif TO.value == "adapter":
    try:
      peft.save(model, model.params, directory, trained)
    except peft.NoForm as e:
      raise errors.UserError(f"{e}; --rank or --variance converts what changes weights to LoRA") from None
  else:
    models.save(dataclasses.replace(model, params=weights.merge(model.params)), directory, form=TO.value)


def load():
  """(--model with --adapter on it, leaves of the model that the adapter has instead).

  Says on standard error which weights are neither's.
  """
  from lora_jax import errors, models, tree, weights
  from lora_jax.formats import adapter, peft

  how = peft.head(ADAPTER.value) if ADAPTER.value else {}
  how |= {k: v for k, v in {"head": HEAD.value, "n_labels": N_LABELS.value}.items() if v is not None}
  model = models.load(MODEL.value, dtype=DTYPE.value, **how)
  if N_LABELS.value and model.config.head != "classification":
    raise errors.UserError(f"--n_labels would do nothing with the head {model.config.head!r}; give --head")
  before = tree.flatten(model.params)
  if ADAPTER.value:
    model = dataclasses.replace(model, params=adapter.load(model, ADAPTER.value))
  after = tree.flatten(weights.strip(model.params))
  if fresh := [k for k in model.fresh if after[k] is before[k]]:
    print(f"warning: {MODEL.value} has no {', '.join(fresh)}: written at random", file=sys.stderr)
  return model, [k for k in before if after[k] is not before[k]] if ADAPTER.value else []


if __name__ == "__main__":
  app.run(main)
