"""The transformer: one forward for every family.

Letters: B batch, T query length, S key length, D model, N heads, K kv heads, H head size, F feed-forward, V vocabulary,
L layers, R rank. Parameters are nested dicts; layers are stacked, with a leading L:

  embed/kernel [V, D]            layers/attn_norm/scale [L, D]        layers/mlp_norm/scale [L, D]
  layers/attn/{q,k,v}/kernel [L, D, N or K, H]                        layers/attn/o/kernel [L, N, H, D]
  layers/mlp/{gate,up}/kernel [L, D, F]                               layers/mlp/down/kernel [L, F, D]
  norm/scale [D]                 head/kernel [D, V], absent when the head is tied to the embedding
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import layers, sharding, tree, weights
from lora_jax.weights import dot


@dataclasses.dataclass(frozen=True)
class Config:
  """Choices that define a model, and how it is run.

  Fields:
    rope_scaling: None or the items of the scaling dict as a tuple, see `layers.rope_frequencies`.
    tied: whether the head is the transposed embedding.
    dtype: of activations and frozen matrices; norms, softmax and loss are float32 whatever it is.
    scan: whether layers run as one scanned body (compiles fast) or unrolled (runs faster, needs less memory).
    remat: whether activations of a layer are recomputed in the backward pass instead of kept.
    attention: "auto", "xla" or "cudnn".
  """

  vocab_size: int
  d_model: int
  n_layers: int
  n_heads: int
  n_kv_heads: int
  head_dim: int
  d_ff: int
  norm_eps: float = 1e-5
  activation: str = "silu"
  rope_theta: float = 10_000.0
  rope_scaling: tuple | None = None
  max_seq_len: int = 2048
  tied: bool = False
  dtype: str = "bfloat16"
  scan: bool = True
  remat: bool = False
  attention: str = "auto"


def shapes(config: Config) -> dict:
  """The parameter tree as `jax.ShapeDtypeStruct`s: matrices in `config.dtype`, norm scales float32."""
  c = config
  L, D, N, K, H, F = c.n_layers, c.d_model, c.n_heads, c.n_kv_heads, c.head_dim, c.d_ff

  def kernel(*shape):
    return {"kernel": jax.ShapeDtypeStruct(shape, jnp.dtype(c.dtype))}

  def scale(*shape):
    return {"scale": jax.ShapeDtypeStruct(shape, jnp.float32)}

  params = {
    "embed": kernel(c.vocab_size, D),
    "layers": {
      "attn_norm": scale(L, D),
      "attn": {
        "q": kernel(L, D, N, H),
        "k": kernel(L, D, K, H),
        "v": kernel(L, D, K, H),
        "o": kernel(L, N, H, D),
      },
      "mlp_norm": scale(L, D),
      "mlp": {"gate": kernel(L, D, F), "up": kernel(L, D, F), "down": kernel(L, F, D)},
    },
    "norm": scale(D),
  }
  return params if c.tied else params | {"head": kernel(D, c.vocab_size)}


def in_axes(name: str) -> int:
  """How many axes of a matrix are contracted with its input, after the layer axis; 0 where `name` is no matrix."""
  if not name.endswith("/kernel") or name.startswith("embed/"):
    return 0
  return 2 if name.endswith("attn/o/kernel") else 1


def init(config: Config, key: jax.Array) -> dict:
  """Random parameters: normal with standard deviation 0.02, norm scales one. Each leaf's key follows from its name."""

  def leaf(k, s):
    if k.endswith("/scale"):
      return jnp.ones(s.shape, s.dtype)
    return (0.02 * jax.random.normal(tree.fold(key, k), s.shape)).astype(s.dtype)

  return tree.map_named(leaf, shapes(config))


def init_cache(config: Config, batch: int, length: int) -> dict:
  """An empty key/value cache: `k` and `v` [L, B, S, K, H]; slot s holds position s."""
  shape = (config.n_layers, batch, length, config.n_kv_heads, config.head_dim)
  return {"k": jnp.zeros(shape, config.dtype), "v": jnp.zeros(shape, config.dtype)}


def _attend(config, params, x, positions, mask, cache):
  frequencies = layers.rope_frequencies(config.head_dim, config.rope_theta, dict(config.rope_scaling or ()))
  q = layers.rope(dot("BTD,DNH->BTNH", x, params["q"]["kernel"]), positions, frequencies)
  k = layers.rope(dot("BTD,DKH->BTKH", x, params["k"]["kernel"]), positions, frequencies)
  v = dot("BTD,DKH->BTKH", x, params["v"]["kernel"])
  if cache is not None:
    rows = jnp.arange(x.shape[0])[:, None]
    cache = {"k": cache["k"].at[rows, positions].set(k), "v": cache["v"].at[rows, positions].set(v)}
    k, v = cache["k"], cache["v"]
  y = layers.attention(q, k, v, mask=mask, implementation=config.attention)
  return dot("BTNH,NHD->BTD", y, params["o"]["kernel"]), cache


def _layer(config, params, x, positions, mask, cache):
  h = layers.rms_norm(x, params["attn_norm"]["scale"], config.norm_eps)
  y, cache = _attend(config, params["attn"], h, positions, mask, cache)
  x = x + y
  h = layers.rms_norm(x, params["mlp_norm"]["scale"], config.norm_eps)
  return x + layers.gated_mlp(h, params["mlp"], config.activation), cache


def hidden(
  config: Config,
  params: dict,
  tokens: jax.Array,
  *,
  positions: jax.Array | None = None,
  segment_ids: jax.Array | None = None,
  cache: dict | None = None,
) -> tuple[jax.Array, dict | None]:
  """The states before the head, [B, T, D] in `config.dtype`, and the updated cache.

  Args:
    tokens: int [B, T]. Padding belongs on the right, where no real token sees it.
    positions: int [B, T]; 0..T-1 if None. With a cache they are also the slots that the new keys are written to.
    segment_ids: int [B, T]; attention stays within equal ids. None: each row is one sequence.
    cache: of `init_cache`; a query at position p sees the slots 0..p.
  """
  B, T = tokens.shape
  if positions is None:
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
  mask = None
  if cache is not None:
    mask = jnp.arange(cache["k"].shape[2]) <= positions[:, :, None]
  elif segment_ids is not None:
    mask = (segment_ids[:, :, None] == segment_ids[:, None, :]) & jnp.tri(T, dtype=bool)
  x = sharding.constrain(weights.take(params["embed"]["kernel"], tokens).astype(config.dtype))

  def body(x, layer):
    x, kv = _layer(config, layer[0], x, positions, mask, layer[1])
    return sharding.constrain(x), kv

  if config.remat:
    body = jax.checkpoint(body, prevent_cse=not config.scan)
  x, cache = jax.lax.scan(body, x, (params["layers"], cache), unroll=1 if config.scan else config.n_layers)
  return layers.rms_norm(x, params["norm"]["scale"], config.norm_eps), cache


def head(params: dict) -> tuple[str, Any]:
  """The output projection as (einsum spec, weight): `dot(spec, x, weight)` maps [B, T, D] to logits [B, T, V]."""
  if "head" in params:
    return "BTD,DV->BTV", params["head"]["kernel"]
  return "BTD,VD->BTV", params["embed"]["kernel"]


def logits(params: dict, x: jax.Array) -> jax.Array:
  """float32 logits [B, T, V] of hidden states [B, T, D]."""
  spec, w = head(params)
  return dot(spec, x, w, jnp.float32)


def apply(config: Config, params: dict, tokens: jax.Array, **kw) -> jax.Array:
  """float32 logits [B, T, V]; keywords as in `hidden`. Materialises all of them: for evaluation and tests."""
  return logits(params, hidden(config, params, tokens, **kw)[0])
