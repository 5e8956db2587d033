"""The transformer: one forward for every family.

Letters: B batch, T query length, S key length, D model, N heads, K kv heads, M = N + 2K, H head size, F feed-forward,
V vocabulary, L layers, E experts, R rank, C whatever else. Parameters are nested dicts; layers are stacked, with a
leading L. A `linear` is {kernel, bias?}, a `norm` is {scale, bias?}; what a config does not ask for is absent:

  embed/kernel [V, D]   embed/positions [P, D]   embed/types [C, D]   embed/norm   embed/project [C, D]
  layers/attn_norm   layers/attn/{q,k,v} [L, D, N or K, H] or attn/qkv [L, D, M, H]   layers/attn/o [L, N, H, D]
  layers/attn/{q_norm,k_norm} [L, H]   layers/attn_post_norm   layers/mlp_norm   layers/mlp_post_norm
  layers/mlp/{gate,up} [L, D, F] or mlp/gate_up [L, D, 2, F]   layers/mlp/down [L, F, D]
  layers/moe/router [L, D, E]   layers/moe/{gate,up} [L, E, D, F]   layers/moe/down [L, E, F, D]
  layers/cross_norm   layers/cross/{q,k,v,o}   relative_bias [C, N]   norm   project [D, C]
  encoder/{layers/..., relative_bias, norm}: the encoder of an encoder-decoder
  head [D, V]; its kernel is absent when it is tied to the embedding   head/{transform [D, D], norm}
  pooler [D, D]   classifier [D, C]
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import layers, moe, sharding, tree, weights
from lora_jax.layers import linear
from lora_jax.weights import dot


@dataclasses.dataclass(frozen=True)
class Config:
  """Choices that define a model, and how it is run.

  Fields:
    norm: "rms" or "layer"; `norm_plus_one` multiplies by 1 + scale.
    norm_order: "pre", "post" (after the residual sum), or "sandwich" (before and after each sublayer).
    parallel: attention and feed-forward read the same input and are summed.
    gated: whether the feed-forward layer has a gate.
    fused: whether q, k and v are one matrix, and gate and up another.
    attn_bias: "none", "qkv" or "all"; `mlp_bias` and `head_bias` likewise.
    qk_norm: RMS norm of each head's q and k.
    attn_scale: of attention logits; None is 1/sqrt(head_dim). `attn_softcap`, `logit_softcap`: see layers.attention.
    window: how many tokens a query of a local layer sees; `local` says which layers are, () that all are.
    causal: whether a token sees only those before it.
    position: "rope", "learned", "relative" (T5) or "none"; `rope_dim` is how much of a head is rotated, None all.
    rope_scaling: None or the items of the scaling dict as a tuple, see `layers.rope_frequencies`.
    local_rope_theta: None, or theta of local layers, which have no scaling then.
    position_offset: row of the table of position 0.
    n_types: number of token types. `embed_norm`: a norm after the embedding. `embed_scale`: what it is multiplied by.
    embed_dim: width of the table where it is not `d_model`: a matrix follows it, and another one the last layer.
    n_experts: 0 is a dense feed-forward layer; `norm_topk` makes a token's expert weights sum to one.
    encoder_layers: of an encoder-decoder; `n_layers` are those of the decoder.
    head: "lm", "mlm" (BERT's: dense, norm, tied), "classification" or "none".
    tied: whether the head is the transposed embedding. `head_scale`: what the states are multiplied by before it.
    n_labels: outputs of a classifier.
    pooler: the activation of a dense layer on the pooled state, "" for none. `pool`: "first" or "last" token.
    dtype: of activations and frozen matrices; norms, biases, softmax and loss are float32 whatever it is.
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
  norm: str = "rms"
  norm_plus_one: bool = False
  norm_order: str = "pre"
  final_norm: bool = True
  parallel: bool = False
  gated: bool = True
  fused: bool = False
  attn_bias: str = "none"
  mlp_bias: bool = False
  head_bias: bool = False
  qk_norm: bool = False
  attn_scale: float | None = None
  attn_softcap: float | None = None
  logit_softcap: float | None = None
  window: int | None = None
  local: tuple[bool, ...] = ()
  causal: bool = True
  position: str = "rope"
  rope_dim: int | None = None
  local_rope_theta: float | None = None
  position_offset: int = 0
  relative_buckets: int = 32
  relative_furthest: int = 128
  n_types: int = 0
  embed_norm: bool = False
  embed_scale: float | None = None
  embed_dim: int | None = None
  n_experts: int = 0
  experts_per_token: int = 2
  norm_topk: bool = True
  encoder_layers: int = 0
  head: str = "lm"
  head_scale: float | None = None
  n_labels: int = 2
  pooler: str = ""
  pool: str = "first"
  dtype: str = "bfloat16"
  scan: bool = True
  remat: bool = False
  attention: str = "auto"

  @property
  def encoder(self) -> "Config":
    """The config of the encoder's layers."""
    return dataclasses.replace(self, n_layers=self.encoder_layers, encoder_layers=0, causal=False, head="none")


RUNTIME = ("scan", "remat", "attention")  # fields that do not change what is computed


def shapes(config: Config) -> dict:
  """The parameter tree as `jax.ShapeDtypeStruct`s: matrices in `config.dtype`, norms and biases float32."""
  c = config
  D, V = c.d_model, c.vocab_size
  table = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.dtype(c.dtype))
  embed = {"kernel": table(V, c.embed_dim or D)}
  if c.position == "learned":
    embed["positions"] = table(c.max_seq_len + c.position_offset, D)
  if c.n_types:
    embed["types"] = table(c.n_types, D)
  if c.embed_norm:
    embed["norm"] = _norm(c, D)
  if c.embed_dim:
    embed["project"] = _linear(c, (c.embed_dim,), (D,))
  params = {"embed": embed, **_stack_shapes(c)}
  if c.encoder_layers:
    params["encoder"] = _stack_shapes(c.encoder)
  head = {}
  if c.head in ("lm", "mlm"):
    head = {} if c.tied else _linear(c, (c.embed_dim or D,), (V,))
    if c.head_bias:
      head["bias"] = _float32(V)
  if c.head == "mlm":
    head |= {"transform": _linear(c, (D,), (D,), True), "norm": _norm(c, D)}
  if head:
    params["head"] = head
  if c.pooler and c.head != "mlm":
    params["pooler"] = _linear(c, (D,), (D,), True)
  if c.head == "classification":
    params["classifier"] = _linear(c, (c.embed_dim or D,), (c.n_labels,), c.head_bias)
  return params


def _float32(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def _linear(c, inner, outer, bias=False, lead=()):
  kernel = {"kernel": jax.ShapeDtypeStruct((*lead, *inner, *outer), jnp.dtype(c.dtype))}
  return kernel | ({"bias": _float32(*lead, *outer)} if bias else {})


def _norm(c, *shape):
  scale = {"scale": _float32(*shape)}
  return scale | {"bias": _float32(*shape)} if c.norm == "layer" else scale


def _stack_shapes(c: Config) -> dict:
  L, D, N, K, H, F, E = c.n_layers, c.d_model, c.n_heads, c.n_kv_heads, c.head_dim, c.d_ff, c.n_experts

  def attn():
    parts = {"qkv": N + 2 * K} if c.fused else {"q": N, "k": K, "v": K}
    out = {name: _linear(c, (D,), (heads, H), c.attn_bias != "none", (L,)) for name, heads in parts.items()}
    return out | {"o": _linear(c, (N, H), (D,), c.attn_bias == "all", (L,))}

  layer = {"attn_norm": _norm(c, L, D), "attn": attn()}
  if c.qk_norm:
    layer["attn"] |= {"q_norm": {"scale": _float32(L, H)}, "k_norm": {"scale": _float32(L, H)}}
  if c.encoder_layers:
    layer |= {"cross_norm": _norm(c, L, D), "cross": attn()}
  layer["mlp_norm"] = _norm(c, L, D)
  if c.norm_order == "sandwich":
    layer |= {"attn_post_norm": _norm(c, L, D), "mlp_post_norm": _norm(c, L, D)}
  if E:
    up = {"up": _linear(c, (E, D), (F,), lead=(L,)), "gate": _linear(c, (E, D), (F,), lead=(L,))}
    layer["moe"] = {"router": _linear(c, (D,), (E,), lead=(L,)), **up, "down": _linear(c, (E, F), (D,), lead=(L,))}
  else:
    names = ("gate", "up") if c.gated else ("up",)
    up = {name: _linear(c, (D,), (F,), c.mlp_bias, (L,)) for name in names}
    if c.gated and c.fused:
      up = {"gate_up": _linear(c, (D,), (2, F), c.mlp_bias, (L,))}
    layer["mlp"] = {**up, "down": _linear(c, (F,), (D,), c.mlp_bias, (L,))}
  stack = {"layers": layer}
  if c.position == "relative":
    stack["relative_bias"] = _float32(c.relative_buckets, N)
  if c.final_norm:
    stack["norm"] = _norm(c, D)
  if c.embed_dim:
    stack["project"] = _linear(c, (D,), (c.embed_dim,))
  return stack


def in_axes(name: str) -> int:
  """How many axes of a matrix are contracted with its input, after the layer axis; 0 where `name` is no matrix.

  Embedding tables and the matrices of experts, which are many in one, count as none.
  """
  if not name.endswith("/kernel") or name == "embed/kernel" or "/moe/" in name:
    return 0
  return 2 if name.endswith(("attn/o/kernel", "cross/o/kernel")) else 1


def stacked(name: str) -> bool:
  """Whether a leaf has a leading layer axis."""
  return name.startswith(("layers/", "encoder/layers/"))


def init(config: Config, key: jax.Array) -> dict:
  """Random parameters: normal with standard deviation 0.02, norms the identity, biases zero.

  Each leaf's key follows from its name.
  """
  return tree.map_named(lambda k, s: init_leaf(config, key, k, s), shapes(config))


def init_leaf(config: Config, key: jax.Array, name: str, shape: jax.ShapeDtypeStruct) -> jax.Array:
  """One leaf of `init`."""
  if name.endswith(("/scale", "/bias")):
    return jnp.full(shape.shape, float(name.endswith("/scale") and not config.norm_plus_one), shape.dtype)
  return (0.02 * jax.random.normal(tree.fold(key, name), shape.shape)).astype(shape.dtype)


def init_cache(config: Config, batch: int, length: int, source: int = 0) -> dict:
  """An empty key/value cache: `k` and `v` [L, B, S, K, H]; slot s holds position s.

  An encoder-decoder has `cross_k` and `cross_v` of the `source` tokens besides, and which of them are seen.
  """
  shape = (config.n_layers, batch, length, config.n_kv_heads, config.head_dim)
  cache = {"layers": {"k": jnp.zeros(shape, config.dtype), "v": jnp.zeros(shape, config.dtype)}}
  if config.encoder_layers:
    shape = (config.n_layers, batch, source, config.n_kv_heads, config.head_dim)
    cache["layers"] |= {"cross_k": jnp.zeros(shape, config.dtype), "cross_v": jnp.zeros(shape, config.dtype)}
    cache["seen"] = jnp.zeros((batch, source), bool)
  return cache


def normalise(config: Config, x: jax.Array, params: dict) -> jax.Array:
  """The config's norm over the last axis."""
  scale = params["scale"] + 1 if config.norm_plus_one else params["scale"]
  if "bias" in params:
    return layers.layer_norm(x, scale, params["bias"], config.norm_eps)
  return layers.rms_norm(x, scale, config.norm_eps)


@dataclasses.dataclass(frozen=True)
class _Context:
  """What all layers of one forward share: positions, and per kind of layer (global, local) rotation and mask."""

  positions: jax.Array
  rotation: tuple
  mask: tuple
  bias: jax.Array | None
  encoded: jax.Array | None
  seen: jax.Array | None


def _select(local: Any, pair: tuple) -> Any:
  """The item of (global, local) for this layer; `local` is a bool, or a traced one under scan."""
  if isinstance(local, bool) or pair[0] is pair[1]:
    return pair[bool(local) if isinstance(local, bool) else 0]
  return jax.tree.map(lambda a, b: jnp.where(local, b, a), *pair)


def _self_attention(c, params, x, ctx, local, cache):
  if "qkv" in params:
    q, k, v = jnp.split(linear("BTD,DMH->BTMH", x, params["qkv"]), (c.n_heads, c.n_heads + c.n_kv_heads), axis=2)
  else:
    q = linear("BTD,DNH->BTNH", x, params["q"])
    k, v = (linear("BTD,DKH->BTKH", x, params[name]) for name in "kv")
  if c.qk_norm:
    q, k = normalise(c, q, params["q_norm"]), normalise(c, k, params["k_norm"])
  if c.position == "rope":
    frequencies, amplitude = _select(local, ctx.rotation)
    q, k = (layers.rope(a, ctx.positions, frequencies, amplitude) for a in (q, k))
  if cache is not None:
    rows = jnp.arange(x.shape[0])[:, None]
    k, v = (cache[name].at[rows, ctx.positions].set(a) for name, a in (("k", k), ("v", v)))
    cache = cache | {"k": k, "v": v}
  y = _attend(c, q, k, v, ctx, local)
  return linear("BTNH,NHD->BTD", y, params["o"]), cache


def _attend(c, q, k, v, ctx, local):
  """Attention under the layer's mask; without one the window is static, so that a fused kernel can be used."""
  how = dict(bias=ctx.bias, scale=c.attn_scale, softcap=c.attn_softcap, implementation=c.attention)
  if ctx.mask != (None, None):
    return layers.attention(q, k, v, mask=_select(local, ctx.mask), **how)
  window = c.window if c.window is not None and c.window < q.shape[1] else None

  def run(w):
    return lambda q, k, v: layers.attention(q, k, v, causal=c.causal, window=w, **how)

  if window is None or isinstance(local, bool):
    return run(window if local is True else None)(q, k, v)
  return jax.lax.cond(local, run(window), run(None), q, k, v)


def _cross_attention(c, params, x, ctx, cache):
  q = linear("BTD,DNH->BTNH", x, params["q"])
  if ctx.encoded is None:
    k, v = cache["cross_k"], cache["cross_v"]
  else:
    k, v = (linear("BTD,DKH->BTKH", ctx.encoded, params[name]) for name in "kv")
    cache = None if cache is None else cache | {"cross_k": k, "cross_v": v}
  mask = jnp.broadcast_to(ctx.seen[:, None], (*q.shape[:2], k.shape[1]))
  y = layers.attention(q, k, v, mask=mask, scale=c.attn_scale, implementation=c.attention)
  return linear("BTNH,NHD->BTD", y, params["o"]), cache


def _feed_forward(c, params, x):
  if c.n_experts:
    return moe.mlp(x, params["moe"], c.activation, c.experts_per_token, c.norm_topk)
  return layers.mlp(x, params["mlp"], c.activation)


def _layer(c, params, x, ctx, local, cache):
  """One layer: (x, cache) after attention, cross-attention if there is an encoder, and feed-forward."""
  norm = lambda name, y: normalise(c, y, params[name])
  if c.parallel:
    y, cache = _self_attention(c, params["attn"], norm("attn_norm", x), ctx, local, cache)
    return x + y + _feed_forward(c, params, norm("mlp_norm", x)), cache

  def residual(name, x, sublayer):
    y = sublayer(x if c.norm_order == "post" else norm(f"{name}_norm", x))
    y, cache = y if isinstance(y, tuple) else (y, None)
    y = norm(f"{name}_post_norm", y) if c.norm_order == "sandwich" else y
    return (norm(f"{name}_norm", x + y) if c.norm_order == "post" else x + y), cache

  x, cache = residual("attn", x, lambda h: _self_attention(c, params["attn"], h, ctx, local, cache))
  if c.encoder_layers:
    x, cache = residual("cross", x, lambda h: _cross_attention(c, params["cross"], h, ctx, cache))
  return residual("mlp", x, lambda h: _feed_forward(c, params, h))[0], cache


def _masks(c, positions, segment_ids, cache, plain) -> tuple:
  """(global, local) masks [B, T, S], or None where causality and a static window say it all."""
  if cache is not None:
    distance = positions[:, :, None] - jnp.arange(cache["layers"]["k"].shape[2])
    mask = distance >= 0
  elif plain:
    return None, None
  else:
    distance = positions[:, :, None] - positions[:, None, :]
    T = positions.shape[1]
    mask = jnp.tri(T, dtype=bool)[None] if c.causal else jnp.ones((1, T, T), bool)
    if segment_ids is not None:
      mask &= (segment_ids[:, :, None] == segment_ids[:, None, :]) & (segment_ids > 0)[:, None]
    mask = jnp.broadcast_to(mask, distance.shape)
  return mask, mask if c.window is None else mask & (distance < c.window)


def _context(c, params, positions, plain, default, segment_ids, cache, encoded, seen) -> _Context:
  rotation = (None, None)
  if c.position == "rope":
    dim, scaling = c.rope_dim or c.head_dim, dict(c.rope_scaling or ())
    far = layers.rope_frequencies(dim, c.rope_theta, scaling, positions.max() + 1)
    near = far if c.local_rope_theta is None else layers.rope_frequencies(dim, c.local_rope_theta)
    rotation = (far, near)
  bias = None
  if c.position == "relative":
    keys = positions if cache is None else jnp.arange(cache["layers"]["k"].shape[2])[None]
    query, keys = (positions[:1], keys[:1]) if default else (positions, keys)
    distance = keys[:, None, :] - query[:, :, None]
    bucket = layers.relative_buckets(distance, c.relative_buckets, c.relative_furthest, c.causal)
    bias = jnp.moveaxis(params["relative_bias"][bucket], -1, 1)
  if c.encoder_layers:
    if encoded is None:
      seen = cache["seen"]
    elif seen is None:
      seen = jnp.ones(encoded.shape[:2], bool)
  mask = _masks(c, positions, segment_ids, cache, plain)
  return _Context(positions, rotation, mask, bias, encoded, seen)


def hidden(
  config: Config,
  params: dict,
  tokens: jax.Array,
  *,
  positions: jax.Array | None = None,
  segment_ids: jax.Array | None = None,
  token_types: jax.Array | None = None,
  cache: dict | None = None,
  encoded: jax.Array | None = None,
  seen: jax.Array | None = None,
) -> tuple[jax.Array, dict | None]:
  """The states before the head, [B, T, D or embed_dim] in `config.dtype`, and the updated cache.

  Args:
    tokens: int [B, T]. Padding belongs on the right, where no real token of a causal model sees it.
    positions: int [B, T], rising within a segment; 0..T-1 if None. With a cache also the slots of the new keys.
    segment_ids: int [B, T]; attention stays within equal ids, and 0 is seen by nobody. None: each row is one sequence.
    token_types: int [B, T]; 0 if None.
    cache: of `init_cache`; a query at position p sees the slots 0..p.
    encoded: [B, S, D] of `encode`, for an encoder-decoder; with a cache it is needed only once.
    seen: bool [B, S], which of `encoded` are real; None is all.
  """
  c, (B, T) = config, tokens.shape
  default = positions is None
  if default:
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
  x = sharding.constrain(_embed(c, params["embed"], tokens, positions, token_types))
  default &= cache is None
  plain = cache is None and segment_ids is None
  ctx = _context(c, params, positions, plain, default, segment_ids, cache, encoded, seen)
  mixed = len(set(c.local)) > 1 and c.window is not None
  flags = jnp.array(c.local) if mixed else None
  always = c.window is not None and (c.local[0] if c.local else True)

  def body(x, layer):
    params, cache, local = layer
    x, cache = _layer(c, params, x, ctx, local if mixed else always, cache)
    return sharding.constrain(x), cache

  if c.remat:
    body = jax.checkpoint(body, prevent_cse=not c.scan)
  xs = (params["layers"], None if cache is None else cache["layers"], flags)
  x, updated = jax.lax.scan(body, x, xs, unroll=1 if c.scan else c.n_layers)
  if cache is not None:
    cache = {"layers": updated} | ({"seen": ctx.seen} if c.encoder_layers else {})
  x = normalise(c, x, params["norm"]) if c.final_norm else x
  return (linear("BTD,DC->BTC", x, params["project"]) if c.embed_dim else x), cache


def _embed(c, params, tokens, positions, token_types):
  x = weights.take(params["kernel"], tokens).astype(c.dtype)
  if c.embed_scale is not None:
    x = x * jnp.asarray(c.embed_scale, x.dtype)
  if "project" in params:
    x = linear("BTC,CD->BTD", x, params["project"])
  if "positions" in params:
    x += weights.take(params["positions"], positions + c.position_offset).astype(c.dtype)
  if "types" in params:
    types = jnp.zeros_like(tokens) if token_types is None else token_types
    x += weights.take(params["types"], types).astype(c.dtype)
  return normalise(c, x, params["norm"]) if "norm" in params else x


def encode(config: Config, params: dict, tokens: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
  """The encoder's states [B, S, D] of an encoder-decoder; padding has segment id 0."""
  return hidden(config.encoder, {"embed": params["embed"], **params["encoder"]}, tokens, segment_ids=segment_ids)[0]


def head(params: dict) -> dict:
  """The part of the parameters that `logits` needs."""
  own = {"head": params["head"]} if "head" in params else {}
  return own if "kernel" in own.get("head", {}) else own | {"embed": {"kernel": params["embed"]["kernel"]}}


def logits(config: Config, params: dict, x: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
  """Logits [B, T, V] of hidden states [B, T, D]; `params` may be the part that `head` gives."""
  p = params.get("head", {})
  if "transform" in p:
    x = layers.ACTIVATIONS[config.activation](linear("BTD,DC->BTC", x, p["transform"]))
    x = normalise(config, x, p["norm"])
  if config.head_scale is not None:
    x = x * jnp.asarray(config.head_scale, x.dtype)
  if "kernel" in p:
    y = dot("BTD,DV->BTV", x, p["kernel"], dtype)
  else:
    y = dot("BTD,VD->BTV", x, params["embed"]["kernel"], dtype)
  if "bias" in p:
    y += p["bias"].astype(y.dtype)
  if config.logit_softcap is not None:
    y = config.logit_softcap * jnp.tanh(y / config.logit_softcap)
  return y


def pool(config: Config, params: dict, x: jax.Array, lengths: jax.Array | None = None) -> jax.Array:
  """One state a sequence, [B, D]: the first or the last token's, through the pooler where there is one.

  Args:
    x: [B, T, D].
    lengths: int [B], tokens without padding on the right; None is all.
  """
  if config.pool == "last" and lengths is not None:
    x = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]
  else:
    x = x[:, 0 if config.pool == "first" else -1]
  if "pooler" in params:
    x = layers.ACTIVATIONS[config.pooler](linear("BD,DC->BC", x, params["pooler"]))
  return x


def classify(config: Config, params: dict, x: jax.Array, lengths: jax.Array | None = None) -> jax.Array:
  """float32 outputs [B, C] of the classifier for hidden states [B, T, D]."""
  x = pool(config, params, x, lengths).astype(jnp.float32)
  return linear("BD,DC->BC", x, params["classifier"])


def apply(config: Config, params: dict, tokens: jax.Array, **kw) -> jax.Array:
  """float32 logits [B, T, V]; keywords as in `hidden`. Materialises all of them: for evaluation and tests."""
  return logits(config, params, hidden(config, params, tokens, **kw)[0])
