"""Measures how long loading a large checkpoint takes and how much host memory it needs beyond the parameters.

It writes a random Llama checkpoint of about 2 GB (bfloat16, sharded safetensors) to --directory unless that has one,
and loads it. Then it prints the peak of resident memory, in bytes and in units of the largest tensor: beyond what the
process had after it loaded a tiny model, which brings the compiler into memory, and without parameters on the host.

Command: python scripts/bench_load.py [--dtype float32] [--fsdp 4]
"""

import pathlib
import tempfile
import threading
import time

import jax
import ml_dtypes
import numpy as np
from absl import app, flags, logging

DIRECTORY = flags.DEFINE_string("directory", "/tmp/lora_jax_bench_load", "Where the checkpoint is, or is written.")
DTYPE = flags.DEFINE_string("dtype", "bfloat16", "What it is loaded as.")
FSDP = flags.DEFINE_integer("fsdp", 1, "Devices that the parameters are split over.")
CONFIG = dict(
  model_type="llama",
  architectures=["LlamaForCausalLM"],
  vocab_size=32000,
  hidden_size=2048,
  intermediate_size=5632,
  num_hidden_layers=20,
  num_attention_heads=32,
  num_key_value_heads=4,
  tie_word_embeddings=False,
  torch_dtype="bfloat16",
)


TINY = CONFIG | dict(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2)


def tensors(config):
  """(name, array) of a random model, one at a time."""
  from lora_jax import families, tree
  from lora_jax.model import transformer

  family = families.get("llama")
  shapes = tree.flatten(transformer.shapes(family.config(config)))
  rng = np.random.default_rng(0)
  for key in families.keys(family, family.config(config), bare=False):
    if key.path in shapes:
      n = key.hf.count("{}")
      shape = shapes[key.path].shape
      stack = shape[:n]
      shape = key.hf_shape(shape[n:])
      for index in np.ndindex(stack):
        bits = rng.integers(0, 2**13, shape, dtype=np.int16)  # no NaN among them
        yield key.hf.format(*index), bits.view(ml_dtypes.bfloat16)


def resident() -> int:
  """Resident bytes of this process, mapped files included."""
  return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4096


class Peak(threading.Thread):
  """The largest `resident()` while it runs, looked at every 2 ms."""

  def __init__(self):
    super().__init__(daemon=True)
    self.bytes = 0
    self.running = True

  def run(self):
    while self.running:
      self.bytes = max(self.bytes, resident())
      time.sleep(0.002)


def main(argv):
  logging.set_verbosity(logging.WARNING)
  from lora_jax import models, sharding, tree
  from lora_jax.formats import hf

  directory = pathlib.Path(DIRECTORY.value)
  if not (directory / "config.json").exists():
    hf.SHARD_BYTES = 2**29
    hf.save(directory, CONFIG, tensors(CONFIG))
  place = sharding.Placer(sharding.make_mesh(data=1, fsdp=FSDP.value))
  with tempfile.TemporaryDirectory() as tiny:
    hf.save(tiny, TINY, tensors(TINY))
    models.load(tiny, dtype=DTYPE.value, sharding=place)
  before = resident()
  peak = Peak()
  start = time.perf_counter()
  peak.start()
  model = models.load(str(directory), dtype=DTYPE.value, sharding=place)
  jax.block_until_ready(model.params)
  seconds = time.perf_counter() - start
  peak.running = False
  largest = model.config.vocab_size * model.config.d_model * 2
  size = tree.nbytes(model.params)
  kept = size if jax.default_backend() == "cpu" else 0
  extra = peak.bytes - before - kept
  print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {DTYPE.value}, {FSDP.value} device(s)")
  print(f"parameters {size / 1e9:.3f} GB, largest tensor {largest / 1e6:.0f} MB, loaded in {seconds:.1f} s")
  print(f"host memory before {before / 1e6:.0f} MB, peak {peak.bytes / 1e6:.0f} MB, after {resident() / 1e6:.0f} MB")
  print(
    f"peak beyond what was there and the parameters: {extra / 1e6:.0f} MB = {extra / largest:.2f} x the largest tensor"
  )


if __name__ == "__main__":
  app.run(main)
