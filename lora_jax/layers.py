"""Layers as free functions of arrays: normalisation, rotary positions, attention, feed-forward.

Letters are those of transformer.py.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import errors
from lora_jax.weights import dot

ACTIVATIONS = {"silu": jax.nn.silu, "gelu": jax.nn.gelu, "relu": jax.nn.relu}


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
  """`x / rms(x) * scale` over the last axis, computed in float32 (Zhang & Sennrich 2019, equation 4)."""
  y = x.astype(jnp.float32)
  y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
  return (y * scale.astype(jnp.float32)).astype(x.dtype)


def rope_frequencies(head_dim: int, theta: float, scaling: Mapping | None = None) -> np.ndarray:
  """Angular frequency of each rotated pair, float32 [H/2] (Su et al. 2021, https://arxiv.org/abs/2104.09864).

  `scaling` has a `rope_type`: "linear" (divides all by `factor`; Chen et al. 2023, https://arxiv.org/abs/2306.15595),
  "llama3" (keeps wavelengths shorter than `original_max_position_embeddings / high_freq_factor`, divides those longer
  than `.../low_freq_factor` by `factor`, interpolates between), or "factors" (divides each by its own of `factors`, as
  GGUF files store them).
  """
  f = 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
  kind = scaling["rope_type"] if scaling else "default"
  if kind == "linear":
    f = f / scaling["factor"]
  elif kind == "factors":
    f = f / np.asarray(scaling["factors"], np.float64)
  elif kind == "llama3":
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * f / (2 * math.pi)
    keep = np.clip((turns - low) / (high - low), 0, 1)
    f = keep * f + (1 - keep) * f / scaling["factor"]
  elif kind != "default":
    raise errors.UserError(f"rope scaling {kind!r} is not supported; known: default, linear, llama3, factors")
  return f.astype(np.float32)


def rope(x: jax.Array, positions: jax.Array, frequencies: jax.Array) -> jax.Array:
  """Rotates pairs (i, i + H/2) of `x` [B, T, N, H] by `positions` [B, T] times `frequencies` [H/2], in float32."""
  angle = positions[..., None, None].astype(jnp.float32) * frequencies
  sin, cos = jnp.sin(angle), jnp.cos(angle)
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  mask: jax.Array | None = None,
  implementation: str = "auto",
) -> jax.Array:
  """Softmax attention of `q` [B, T, N, H] over `k`, `v` [B, S, K, H]; N is a multiple of K; scaled by 1/sqrt(H).

  Args:
    mask: [B, T, S], True where a query sees a key. None: causal, T = S.
    implementation: "xla", "cudnn", or "auto": cuDNN's fused kernel where it can run (GPU, 16 bit, no mask).
  """
  if implementation == "auto":
    fused = jax.default_backend() == "gpu" and q.dtype.itemsize == 2 and mask is None
    implementation = "cudnn" if fused and q.shape[1] % 2 == 0 and q.shape[-1] % 8 == 0 else "xla"
  if mask is not None:
    mask = mask[:, None]
  return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=mask is None, implementation=implementation)


def gated_mlp(x: jax.Array, params: Mapping, activation: str) -> jax.Array:
  """`down(act(gate(x)) * up(x))` on [B, T, D] (Shazeer 2020, https://arxiv.org/abs/2002.05202)."""
  gate = dot("BTD,DF->BTF", x, params["gate"]["kernel"])
  up = dot("BTD,DF->BTF", x, params["up"]["kernel"])
  return dot("BTF,FD->BTD", ACTIVATIONS[activation](gate) * up, params["down"]["kernel"])
