"""Measures steps a second and memory of populations of several sizes, whose members are seeds of one config.

Command: python scripts/bench_population.py --sizes 1,8,32,64 [--model NAME] [--targets q,v] [--rank 8] [--runs 8]

`--runs N` also trains N members one after the other, as runs of their own over one loaded base.
"""

import math
import time

import jax
from absl import app, flags

from configs import lora_table5
from lora_jax import memory
from lora_jax.runs import build, config as config_lib, experiment, group

SIZES = flags.DEFINE_list("sizes", ["1", "8", "32", "64"], "Populations.")
MODEL = flags.DEFINE_string("model", "smollm2-135m", "Model.")
DTYPE = flags.DEFINE_string("dtype", "bfloat16", "Of the model.")
TARGETS = flags.DEFINE_string("targets", "q,v", "Matrices that LoRA adapts.")
RANK = flags.DEFINE_integer("rank", 8, "Of LoRA.")
BATCH = flags.DEFINE_integer("batch", 32, "Rows a member.")
REMAT = flags.DEFINE_bool("remat", True, "Recompute activations.")
SHARE_ROWS = flags.DEFINE_bool("share_rows", True, "Examples share rows; else each row is one, padded.")
STEPS = flags.DEFINE_integer("steps", 30, "Timed steps.")
RUNS = flags.DEFINE_integer("runs", 0, "How many runs to train one by one too; compilation counts on both sides.")


def settings(seed: int) -> config_lib.Config:
  """The config of a member."""
  config = lora_table5.get_config("smol")
  config.model.name = MODEL.value
  config.model.dtype = DTYPE.value
  config.method.targets = TARGETS.value
  config.method.rank = RANK.value
  config.model.remat = REMAT.value
  config.data.share_rows = SHARE_ROWS.value
  config.data.batch_size = BATCH.value
  config.train.steps = STEPS.value
  config.train.seed = seed
  config = config.to_dict()
  return config_lib.resolve({k: v for k, v in config.items() if k not in config_lib.SWEEP})


def timed(size: int, task, mesh, model) -> tuple[float, float, int, float]:
  """(seconds a step, seconds to compile, bytes of a step, seconds in all) of a population.

  The first is nan if a step does not fit in memory.
  """
  began = time.perf_counter()
  built = group.build({str(i): settings(i) for i in range(size)}, task, mesh, model)
  if not group.fits(built, memory.available()):
    return math.nan, built.stepper.compile_seconds, built.stepper.memory_bytes, time.perf_counter() - began
  with jax.set_mesh(mesh):
    batch = built.next_batch()
    for i in range(STEPS.value + 2):
      if i == 2:
        jax.block_until_ready(built.state)
        start = time.perf_counter()
      built.state, _ = built.stepper(built.state, *built.arguments(batch))
    jax.block_until_ready(built.state)
  end = time.perf_counter()
  return (end - start) / STEPS.value, built.stepper.compile_seconds, built.stepper.memory_bytes, end - began


def one_by_one(task, mesh, model) -> float:
  """Seconds that `--runs` members take as runs of their own."""
  began = time.perf_counter()
  for seed in range(RUNS.value):
    exp = experiment.build(settings(seed), model)
    with jax.set_mesh(mesh):
      batch = exp.next_batch()
      for _ in range(STEPS.value + 2):
        exp.state, _ = exp.stepper(exp.state, *exp.arguments(batch))
      jax.block_until_ready(exp.state)
  return time.perf_counter() - began


def main(_) -> None:
  config = settings(0)
  task = build.check(config)
  mesh = build.make_mesh(config)
  model = build.load(config, task, mesh)
  print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {MODEL.value}, {DTYPE.value}, {TARGETS.value}")
  print("members  ms/step  member steps/s  step GiB  compile s  wall s")
  for size in map(int, SIZES.value):
    step, compiling, memory, wall = timed(size, task, mesh, model)
    row = f"{1e3 * step:7.1f}  {size / step:14.1f}  {memory / 2**30:8.2f}  {compiling:9.1f}  {wall:6.1f}"
    print(f"{size:7d}  {row}", flush=True)
  if RUNS.value:
    print(f"{RUNS.value} runs one by one: {one_by_one(task, mesh, model):.1f} s wall, compilation included")


if __name__ == "__main__":
  app.run(main)
