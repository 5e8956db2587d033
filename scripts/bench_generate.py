"""Times generation: prompt tokens a second, new tokens a second, by batch size; greedy, sampled and with beams.

Command: python scripts/bench_generate.py [--model smollm2-135m] [--dtype float32] [--batch 1,8]
"""

import time

import jax
import numpy as np
from absl import app, flags, logging

MODEL = flags.DEFINE_string("model", "smollm2-135m", "A name that models.load takes.")
DTYPE = flags.DEFINE_string("dtype", "bfloat16", "Of weights and activations.")
BATCH = flags.DEFINE_list("batch", ["1", "8", "64"], "Batch sizes.")
PROMPT = flags.DEFINE_integer("prompt", 128, "Tokens of a prompt.")
NEW = flags.DEFINE_integer("new", 128, "Tokens to add.")


def best(fn, repeat=3) -> float:
  """Seconds of the fastest of several calls, after one that compiles."""
  fn()
  times = []
  for _ in range(repeat):
    start = time.perf_counter()
    fn()
    times.append(time.perf_counter() - start)
  return min(times)


def main(argv):
  logging.set_verbosity(logging.WARNING)
  from lora_jax import models
  from lora_jax.batches import rows
  from lora_jax.inference import decode

  model = models.load(MODEL.value, dtype=DTYPE.value)
  config = model.config
  params = model.params
  rng = np.random.default_rng(0)
  print(f"{MODEL.value} on {jax.devices()[0].device_kind}, jax {jax.__version__}, {DTYPE.value}, ", end="")
  print(f"prompts of {PROMPT.value} tokens, {NEW.value} new ones; tokens a second")
  print(f"{'batch':>6} {'prompt':>10} {'greedy':>10} {'top-p 0.9':>10} {'4 beams':>10}")
  for batch in map(int, BATCH.value):
    tokens = rng.integers(10, config.vocab_size, (batch, PROMPT.value)).astype(np.int32)
    lengths = np.full(batch, PROMPT.value, np.int32)
    slots = rows.bucket(PROMPT.value + NEW.value, 1 << 30)
    ready = lambda: jax.block_until_ready(decode.run_prompts(config, params, tokens, lengths, slots=slots, start=None))
    run = lambda **how: list(decode.continuations(config, params, tokens, max_new_tokens=NEW.value, **how))
    prompt = best(ready)
    seconds = [best(run), best(lambda: run(temperature=1.0, top_p=0.9))]
    seconds.append(best(lambda: decode.beam_search(config, params, tokens, beams=4, max_new_tokens=NEW.value)))
    rates = [batch * PROMPT.value / prompt] + [batch * NEW.value / (s - prompt) for s in seconds]
    print(f"{batch:6} " + " ".join(f"{r:10.0f}" for r in rates), flush=True)


if __name__ == "__main__":
  app.run(main)
