"""Converts models between formats, with adapters merged in: `python scripts/convert.py --model NAME --out DIR`.

--model smollm2-135m --out DIR                      a Hugging Face directory, as transformers loads it
--model hf:org/name --adapter ADAPTER --out DIR     the same with a PEFT adapter merged
--run runs/x [--step 100] --out DIR                 the model of a run, finished or not, merged
--run runs/x --to adapter --out DIR                 its adapter in PEFT's format
--model DIR --to orbax --out DIR                    our own tree, which loads sharded without transposing
"""

import dataclasses
import os
import sys

from absl import app, flags

MODEL = flags.DEFINE_string("model", None, "Directory, .gguf file, packaged name or hf:org/name[@revision].")
ADAPTER = flags.DEFINE_string("adapter", None, "Directory of a PEFT adapter on --model, which is merged.")
RUN = flags.DEFINE_string("run", None, "Directory of a run of experiments.run, instead of --model.")
STEP = flags.DEFINE_integer("step", None, "Which checkpoint of --run; the newest by default.")
TO = flags.DEFINE_enum("to", "hf", ["hf", "orbax", "adapter"], "What is written.")
DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float16", "float32"], "Of the weights of --model.")
HEAD = flags.DEFINE_string("head", None, "lm, mlm, classification or none; the model's own by default.")
OUT = flags.DEFINE_string("out", None, "Directory to write; it must not hold anything.", required=True)


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected argument {argv[1]!r}")
  if (MODEL.value is None) == (RUN.value is None):
    raise app.UsageError("give --model or --run")
  from absl import logging

  from lora_jax import errors, experiment, models, weights
  from lora_jax.formats import peft

  logging.set_verbosity(logging.WARNING)
  try:
    if os.path.isdir(OUT.value) and os.listdir(OUT.value):
      raise errors.UserError(f"{OUT.value} is not empty")
    if RUN.value:
      model = experiment.trained(RUN.value, STEP.value)
    else:
      model = models.load(MODEL.value, dtype=DTYPE.value, head=HEAD.value)
    if ADAPTER.value:
      model = dataclasses.replace(model, params=peft.load(model, ADAPTER.value))
    if TO.value == "adapter":
      peft.save(model, model.params, OUT.value, trained=model.head_leaves)
    else:
      merged = dataclasses.replace(model, params=weights.merge(model.params))
      models.save(merged, OUT.value, form=TO.value)
  except errors.UserError as e:
    sys.exit(f"error: {e}")
  print(f"wrote {OUT.value}")


if __name__ == "__main__":
  app.run(main)
