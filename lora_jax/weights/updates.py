"""Sums of parameters and updates, for bfloat16 with stochastic rounding."""

from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import tree


def round_stochastically(x: jax.Array, key: jax.Array) -> jax.Array:
  """float32 to bfloat16: up or down with the probabilities that make the expected value x.

  An update smaller than half a step of bfloat16 is not lost then, only seldom seen (Gupta et al. 2015,
  https://arxiv.org/abs/1502.02551, section 3).
  """
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
  cut = jnp.where(jnp.isfinite(x), (bits + noise) & jnp.uint32(0xFFFF0000), bits)
  return jax.lax.bitcast_convert_type(cut, jnp.float32).astype(jnp.bfloat16)


def add(params: Any, updates: Any, key: jax.Array) -> Any:
  """`params + updates`; the sum for bfloat16 parameters is rounded stochastically."""

  def leaf(name, p, u):
    if p.dtype != jnp.bfloat16:
      return (p + u).astype(p.dtype)
    return round_stochastically(p.astype(jnp.float32) + u, tree.fold(key, name))

  return tree.map_named(leaf, params, updates)
