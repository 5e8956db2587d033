"""Layers as free functions of arrays: normalisation, positions, attention, feed-forward.

Letters are as in model/architecture.py.
"""

import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import errors
from lora_jax.weights import affine

gelu_tanh = functools.partial(jax.nn.gelu, approximate=True)
ACTIVATIONS = {
  "silu": jax.nn.silu,
  "swish": jax.nn.silu,
  "gelu": functools.partial(jax.nn.gelu, approximate=False),
  "gelu_new": gelu_tanh,
  "gelu_fast": gelu_tanh,
  "gelu_pytorch_tanh": gelu_tanh,
  "relu": jax.nn.relu,
  "tanh": jnp.tanh,
}


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
  """`x / rms(x) * scale` over the last axis, computed in float32 (Zhang and Sennrich 2019, equation 4)."""
  y = x.astype(jnp.float32)
  y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
  return (y * scale.astype(jnp.float32)).astype(x.dtype)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
  """`(x - mean) / std * scale + bias` over the last axis, computed in float32 (Ba et al. 2016, equation 4)."""
  y = x.astype(jnp.float32)
  y = y - jnp.mean(y, axis=-1, keepdims=True)
  y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
  return (y * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


def linear(spec: str, x: jax.Array, params: Mapping) -> jax.Array:
  """`dot(spec, x, kernel)`, plus `bias` if there is one.

  A method may add an `adapter`: a function of the sum, whose result is added to it (Houlsby).
  """
  y = affine(spec, x, params["kernel"], params.get("bias"))
  return y + params["adapter"](y) if "adapter" in params else y


ROPE_SCALINGS = ("default", "linear", "llama3", "yarn", "longrope", "factors")


def rope_frequencies(
  rope_dim: int, theta: float, scaling: Mapping | None = None, length: jax.Array | int = 0
) -> tuple[jax.Array | np.ndarray, float]:
  """The angular frequency of each rotated pair, float32 [rope_dim / 2], and the amplitude of sine and cosine.

  Su et al. 2021, https://arxiv.org/abs/2104.09864.

  Args:
    scaling: a dict with a `rope_type`. "linear" divides all frequencies by `factor` (Chen et al. 2023,
      https://arxiv.org/abs/2306.15595). "llama3" keeps wavelengths shorter than `original_max_position_embeddings /
      high_freq_factor`, divides the frequency of those longer than `.../low_freq_factor` by `factor`, and interpolates
      between. "yarn" does the same with a ramp over the dimensions, and sharpens attention (Peng et al. 2023,
      https://arxiv.org/abs/2309.00071, section 3). "longrope" divides by `short_factor`, or by `long_factor` beyond
      `original_max_position_embeddings` (Ding et al. 2024, https://arxiv.org/abs/2402.13753). "factors" divides each
      frequency by its entry of `factors`, as GGUF files store them.
    length: number of tokens in the longest sequence; only "longrope" depends on it.
  """
  f = 1.0 / theta ** (np.arange(0, rope_dim, 2, dtype=np.float64) / rope_dim)
  kind = scaling["rope_type"] if scaling else "default"
  amplitude = 1.0
  if kind == "linear":
    f = f / scaling["factor"]
  elif kind == "factors":
    f = f / np.asarray(scaling["factors"], np.float64)
  elif kind == "llama3":
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * f / (2 * math.pi)
    keep = np.clip((turns - low) / (high - low), 0, 1)
    f = keep * f + (1 - keep) * f / scaling["factor"]
  elif kind == "yarn":
    f, amplitude = _yarn(f, rope_dim, theta, scaling)
  elif kind == "longrope":
    original, factor = scaling["original_max_position_embeddings"], scaling["factor"]
    amplitude = scaling.get("attention_factor")
    if amplitude is None:
      amplitude = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    short, long = (np.float32(f / np.asarray(scaling[k], np.float64)) for k in ("short_factor", "long_factor"))
    return jnp.where(length > original, long, short), amplitude
  elif kind != "default":
    raise errors.UserError(f"rope scaling {kind!r} is not supported; known: {', '.join(ROPE_SCALINGS)}")
  return f.astype(np.float32), amplitude


def _yarn(f: np.ndarray, rope_dim: int, theta: float, scaling: Mapping) -> tuple[np.ndarray, float]:
  factor, original = scaling["factor"], scaling["original_max_position_embeddings"]

  def dimension(turns):  # the dimension that turns this often within `original` positions
    return rope_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

  low, high = dimension(scaling.get("beta_fast") or 32), dimension(scaling.get("beta_slow") or 1)
  if scaling.get("truncate", True):
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, rope_dim - 1)
  ramp = np.clip((np.arange(rope_dim // 2) - low) / max(high - low, 0.001), 0, 1)

  def sharpened(m=1.0):
    return 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0

  amplitude = scaling.get("attention_factor")
  m, m_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
  if amplitude is None:
    amplitude = sharpened(m) / sharpened(m_all) if m and m_all else sharpened()
  return f / factor * ramp + f * (1 - ramp), amplitude


def rope(x: jax.Array, positions: jax.Array, frequencies: jax.Array, amplitude: float = 1.0) -> jax.Array:
  """`x` [B, T, N, H] with pairs (i, i + C/2) of its first C dimensions rotated; the other dimensions stay.

  Computed in float32.

  Args:
    positions: int [B, T]; the angle of a pair is its position times its frequency.
    frequencies: float32 [C/2], see `rope_frequencies`.
    amplitude: multiplies sine and cosine.
  """
  angle = positions[..., None, None].astype(jnp.float32) * frequencies
  sin, cos = amplitude * jnp.sin(angle), amplitude * jnp.cos(angle)
  half = frequencies.shape[0]
  a, b, rest = jnp.split(x.astype(jnp.float32), (half, 2 * half), axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1).astype(x.dtype)


def relative_buckets(distance: jax.Array, buckets: int, furthest: int, causal: bool) -> jax.Array:
  """T5's bucket of each distance, int32 (Raffel et al. 2020, https://arxiv.org/abs/1910.10683, section 2.1).

  Half of the buckets hold one distance each. The other half grows logarithmically up to `furthest`.

  Args:
    distance: position of the key minus position of the query, int.
    causal: False reserves half of all buckets for keys to the right.
  """
  offset = 0
  if causal:
    n = jnp.maximum(-distance, 0)
  else:
    buckets //= 2
    offset = jnp.where(distance > 0, buckets, 0)
    n = jnp.abs(distance)
  exact = buckets // 2
  log = jnp.log(jnp.maximum(n, 1).astype(jnp.float32) / exact) / math.log(furthest / exact)
  far = jnp.minimum(exact + (log * (buckets - exact)).astype(jnp.int32), buckets - 1)
  return offset + jnp.where(n < exact, n, far)


@functools.cache
def _fused_head_size() -> int:
  """The largest head size that cuDNN's attention takes on this machine; 0 without a GPU that supports it."""
  device = jax.devices()[0]
  if device.platform != "gpu" or not hasattr(device, "compute_capability"):
    return 0
  capability = float(device.compute_capability)
  return 256 if capability >= 9 else 128 if capability >= 8 else 0


def attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  causal: bool = True,
  mask: jax.Array | None = None,
  bias: jax.Array | None = None,
  window: int | None = None,
  scale: float | None = None,
  softcap: float | None = None,
  implementation: str = "auto",
  members: bool = False,
) -> jax.Array:
  """Softmax attention of `q` [B, T, N, H] over `k` and `v` [B, S, K, H], in the shape and dtype of `q`.

  N is a multiple of K.

  Args:
    causal: query t sees keys 0..t. Ignored if there is a `mask`.
    mask: bool [B, T, S], True where a query sees a key.
    bias: added to the logits, [1 or B, N, T, S].
    window: number of keys that a causal query sees, itself included. Ignored if there is a `mask`.
    scale: multiplies the logits; None is 1/sqrt(H).
    softcap: logits become `softcap * tanh(logits / softcap)` (Gemma 2, https://arxiv.org/abs/2408.00118, section 2).
    implementation: "xla", "cudnn", or "auto", which is cuDNN's fused kernel where it can run (GPU, 16 bit) and the
      texts are whole.
    members: whether `jax.vmap` runs over it; cuDNN's kernel then takes a mask for each head.
  """
  if implementation == "auto":
    whole = mask is None or q.shape[1] == k.shape[1]  # else it is a cache, and most of that is empty
    plain = whole and bias is None and softcap is None and q.dtype.itemsize == 2
    even = q.shape[1] % 2 == 0 and k.shape[1] % 2 == 0 and q.shape[-1] % 8 == 0
    implementation = "cudnn" if plain and even and q.shape[-1] <= _fused_head_size() else "xla"
  if q.dtype == jnp.float16 and jax.default_backend() == "cpu":  # CPU matmuls do not sum float16 in float32
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    how = dict(causal=causal, mask=mask, bias=bias, window=window, scale=scale, softcap=softcap)
    return attention(q, k, v, **how, implementation="xla").astype(jnp.float16)
  if softcap is not None:
    return _capped(q, k, v, causal=causal, mask=mask, bias=bias, window=window, scale=scale, softcap=softcap)
  local = (window - 1, 0) if window is not None and mask is None else None
  if mask is not None:
    mask = mask[:, None]
    if members and implementation == "cudnn":
      mask = jnp.broadcast_to(mask, (*mask.shape[:1], q.shape[2], *mask.shape[2:]))
  return jax.nn.dot_product_attention(
    q,
    k,
    v,
    bias=None if bias is None else bias.astype(q.dtype),
    mask=mask,
    is_causal=causal and mask is None,
    scale=scale,
    local_window_size=local,
    implementation=implementation,
  )


def _capped(q, k, v, *, causal, mask, bias, window, scale, softcap):
  B, T, N, H = q.shape
  S, K = k.shape[1:3]
  q = q.reshape(B, T, K, N // K, H)
  logits = jnp.einsum("BTKGH,BSKH->BKGTS", q, k, preferred_element_type=jnp.float32)
  logits = softcap * jnp.tanh(logits * (H**-0.5 if scale is None else scale) / softcap)
  if bias is not None:
    logits += bias.reshape(-1, K, N // K, T, S)
  if mask is None and causal:
    distance = jnp.arange(T)[:, None] - jnp.arange(S)
    mask = (distance >= 0) & (distance < (window or S))
    mask = mask[None]
  if mask is not None:
    logits = jnp.where(mask[:, None, None], logits, jnp.finfo(jnp.float32).min)
  p = jax.nn.softmax(logits).astype(v.dtype)
  return jnp.einsum("BKGTS,BSKH->BTKGH", p, v).reshape(B, T, N, H)


def mlp(x: jax.Array, params: Mapping, activation: str) -> jax.Array:
  """The feed-forward layer, [B, T, D] to [B, T, D]: `down(act(up(x)))`.

  With a gate it is `down(act(gate(x)) * up(x))` (Shazeer 2020, https://arxiv.org/abs/2002.05202). Gate and up may be
  one matrix [D, 2, F]. An `adapter` that a method has added runs beside the layer.
  """
  act = ACTIVATIONS[activation]
  if "gate_up" in params:
    both = linear("BTD,DCF->BTCF", x, params["gate_up"])
    h = act(both[:, :, 0]) * both[:, :, 1]
  elif "gate" in params:
    h = act(linear("BTD,DF->BTF", x, params["gate"])) * linear("BTD,DF->BTF", x, params["up"])
  else:
    h = act(linear("BTD,DF->BTF", x, params["up"]))
  y = linear("BTF,FD->BTD", h, params["down"])
  return y + params["adapter"](x) if "adapter" in params else y
