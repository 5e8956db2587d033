"""Times the grouped matmuls of a mixture of experts, forward and backward with frozen experts, against alternatives.

Rows: `blocks` is ours, `ragged_dot` is jax.lax.ragged_dot over sorted rows, `dense` runs every expert on every token.
Columns: milliseconds of one layer's forward, of forward and backward with respect to its input, and the
compiler's temporary memory of the latter. Command: python scripts/bench_moe.py [--dtype float32] [--small]
"""

import functools
import time

import jax
import jax.numpy as jnp
from absl import app, flags

DTYPE = flags.DEFINE_string("dtype", "bfloat16", "Of activations and experts.")
SMALL = flags.DEFINE_bool("small", False, "Sizes for a CPU.")
# name -> (tokens, D, F, E, experts a token)
SHAPES = {
  "Mixtral 8x7B": (8192, 4096, 14336, 8, 2),
  "Qwen3-30B-A3B": (8192, 2048, 768, 128, 8),
  "Qwen3-30B-A3B, 512 tokens": (512, 2048, 768, 128, 8),
}
SMALL_SHAPES = {"E 8, k 2": (512, 256, 512, 8, 2), "E 64, k 4": (512, 256, 128, 64, 4)}


def ragged(x, w, k):
  """Experts by `jax.lax.ragged_dot`, over rows that are sorted by expert."""
  from lora_jax.model import mixture

  flat = x.reshape(-1, x.shape[-1])
  experts, share = mixture.route(flat, w["router"]["kernel"], k, True)
  order = jnp.argsort(experts.reshape(-1))
  sizes = jnp.bincount(experts.reshape(-1), length=w["up"]["kernel"].shape[0]).astype(jnp.int32)
  dot = lambda x, name: jax.lax.ragged_dot(x, w[name]["kernel"], sizes)
  xs = flat[order // k]
  y = dot(jax.nn.silu(dot(xs, "gate")) * dot(xs, "up"), "down")
  y = jnp.zeros_like(y).at[order].set(y).reshape(*share.shape, -1)
  return (y * share[..., None]).sum(1).astype(x.dtype).reshape(x.shape)


def dense(x, w, k):
  """Every expert on every token."""
  from lora_jax.model import mixture

  flat = x.reshape(-1, x.shape[-1])
  experts, share = mixture.route(flat, w["router"]["kernel"], k, True)
  count = jnp.zeros((len(flat), w["up"]["kernel"].shape[0])).at[jnp.arange(len(flat))[:, None], experts].set(share)

  def one(y, e):
    gate, up, down, c = e
    return y + c[:, None] * ((jax.nn.silu(flat @ gate) * (flat @ up)) @ down), None

  weights = (w["gate"]["kernel"], w["up"]["kernel"], w["down"]["kernel"], count.T)
  return jax.lax.scan(jax.checkpoint(one), jnp.zeros(flat.shape), weights)[0].astype(x.dtype).reshape(x.shape)


def blocks(x, w, k):
  """Ours."""
  from lora_jax.model import mixture

  return mixture.mlp(x, w, "silu", k, True)


def measure(fn, *args):
  """(milliseconds of the fastest of five calls, MiB of temporary memory) of a jitted function."""
  compiled = jax.jit(fn).lower(*args).compile()
  jax.block_until_ready(compiled(*args))
  times = []
  for _ in range(5):
    start = time.perf_counter()
    jax.block_until_ready(compiled(*args))
    times.append(time.perf_counter() - start)
  memory = compiled.memory_analysis()
  return 1e3 * min(times), (memory.temp_size_in_bytes if memory else 0) / 2**20


def main(argv):
  device = jax.devices()[0]
  print(f"{device.device_kind}, jax {jax.__version__}, {DTYPE.value}")
  for name, (tokens, d, f, e, k) in (SMALL_SHAPES if SMALL.value else SHAPES).items():
    keys = jax.random.split(jax.random.key(0), 5)
    kernel = lambda key, *s: {"kernel": 0.02 * jax.random.normal(key, s, DTYPE.value)}
    w = {
      "router": kernel(keys[0], d, e),
      "gate": kernel(keys[1], e, d, f),
      "up": kernel(keys[2], e, d, f),
      "down": kernel(keys[3], e, f, d),
    }
    x = jax.random.normal(keys[4], (1, tokens, d), DTYPE.value)
    flops = 6 * tokens * k * d * f
    print(f"\n{name}: {tokens} tokens, D {d}, F {f}, {e} experts, {k} a token; {flops / 1e12:.2f} TFLOP forward")
    want = None
    for label, fn in {"blocks": blocks, "ragged_dot": ragged, "dense": dense}.items():
      fn = functools.partial(fn, k=k)
      try:
        y = jax.jit(fn)(x, w)
        want = y if want is None else want
        gap = float(jnp.abs(y.astype(jnp.float32) - want.astype(jnp.float32)).max() / jnp.abs(want).max())
        forward, _ = measure(fn, x, w)
        both, memory = measure(jax.grad(lambda x, w: fn(x, w).astype(jnp.float32).sum()), x, w)
        rate = flops / forward / 1e9
        print(
          f"  {label:12} {forward:9.2f} ms {both:9.2f} ms {memory:9.0f} MiB  {rate:6.1f} TFLOP/s  gap {gap:.1e}",
          flush=True,
        )
      except Exception as error:  # out of memory is a result here
        print(f"  {label:12} {str(error).splitlines()[0][:100]}", flush=True)


if __name__ == "__main__":
  app.run(main)
