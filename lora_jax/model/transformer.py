"""The transformer: one forward for every family, over the parameters that model/architecture.py describes.

Letters: B batch, T query length, S key length; the others are those of model/architecture.py.
"""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import errors, sharding, weights
from lora_jax.model import layers, mixture
from lora_jax.model.architecture import (
  RUNTIME,  # noqa: F401, names of users
  Config,  # noqa: F401, names of users
  in_axes,  # noqa: F401, names of users
  init,  # noqa: F401, names of users
  init_leaf,  # noqa: F401, names of users
  shapes,  # noqa: F401, names of users
  stacked,  # noqa: F401, names of users
)
from lora_jax.model.layers import linear
from lora_jax.weights import dot


def init_cache(config: Config, batch: int, length: int, source: int = 0, prefix: int = 0) -> dict:
  """An empty key/value cache: `k` and `v` [L, B, S, K, H]; slot s holds position s, of `length` and a `prefix` of keys.

  An encoder-decoder has `cross_k` and `cross_v` of the `source` tokens besides, and which of them are seen.
  """
  shape = (config.n_layers, batch, prefix + length, config.n_kv_heads, config.head_dim)
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
  if "prefix" in params:
    k, v = (_before(params["prefix"][name], a, cache) for name, a in (("k", k), ("v", v)))
  if cache is not None:
    cache = cache | {"k": k, "v": v}
  y = _attend(c, q, k, v, ctx, local)
  return linear("BTNH,NHD->BTD", y, params["o"]), cache


def _before(prefix, a, cache):
  """Keys or values [B, S, K, H] with a prefix [P, K, H]: before them, or in the first slots of a cache."""
  if cache is not None:
    return a.at[:, : len(prefix)].set(prefix.astype(a.dtype))
  # Cast last, so that its gradient is summed over the batch in float32.
  return jnp.concatenate([jnp.broadcast_to(prefix, (len(a), *prefix.shape)).astype(a.dtype), a], axis=1)


def _attend(c, q, k, v, ctx, local):
  """Attention under the layer's mask; without one the window is static, so that a fused kernel can be used."""
  how = dict(bias=ctx.bias, scale=c.attn_scale, softcap=c.attn_softcap, implementation=c.attention, members=c.members)
  if ctx.mask != (None, None):
    return layers.attention(q, k, v, mask=_select(local, ctx.mask), **how)
  window = c.window if c.window is not None and c.window < k.shape[1] else None
  # Queries for the prefix, whose outputs are dropped, make causality and window those of a longer text.
  dropped = k.shape[1] - q.shape[1] if c.causal else 0

  def run(w):
    extended = lambda q: jnp.pad(q, [(0, 0), (dropped, 0), (0, 0), (0, 0)]) if dropped else q
    return lambda q, k, v: layers.attention(extended(q), k, v, causal=c.causal, window=w, **how)[:, dropped:]

  if window is None or isinstance(local, bool):
    return run(window if local is True else None)(q, k, v)
  return jax.lax.cond(local, run(window), run(None), q, k, v)


def _cross_attention(c, params, x, ctx, cache):
  q = linear("BTD,DNH->BTNH", x, params["q"])
  if ctx.encoded is None:
    k, v = cache["cross_k"], cache["cross_v"]
  else:
    k, v = (linear("BTD,DKH->BTKH", ctx.encoded, params[name]) for name in "kv")
    if "prefix" in params:
      k, v = (_before(params["prefix"][name], a, None) for name, a in (("k", k), ("v", v)))
    cache = None if cache is None else cache | {"cross_k": k, "cross_v": v}
  prefix = k.shape[1] - ctx.seen.shape[1]
  seen = jnp.pad(ctx.seen, [(0, 0), (prefix, 0)], constant_values=True)
  mask = jnp.broadcast_to(seen[:, None], (*q.shape[:2], k.shape[1]))
  y = layers.attention(q, k, v, mask=mask, scale=c.attn_scale, implementation=c.attention, members=c.members)
  return linear("BTNH,NHD->BTD", y, params["o"]), cache


def _feed_forward(c, params, x):
  if c.n_experts:
    return mixture.mlp(x, params["moe"], c.activation, c.experts_per_token, c.norm_topk)
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


def _key_positions(positions, cache, before):
  """Positions [B or 1, S] of the keys: the slots of a cache, or those of a prefix and of the text."""
  if cache is not None:
    return jnp.arange(cache["layers"]["k"].shape[2])[None]
  prefix = jnp.broadcast_to(jnp.arange(before), (len(positions), before))
  return jnp.concatenate([prefix, positions], axis=1) if before else positions


def _masks(c, positions, segment_ids, cache, plain, before) -> tuple:
  """(global, local) masks [B, T, S], or None where causality and a static window say it all."""
  if plain:
    return None, None
  distance = positions[:, :, None] - _key_positions(positions, cache, before)[:, None, :]
  if cache is not None:
    mask = distance >= 0
  else:
    T = positions.shape[1]
    mask = jnp.tri(T, dtype=bool)[None] if c.causal else jnp.ones((1, T, T), bool)
    if segment_ids is not None:
      mask &= segment_ids[:, :, None] == segment_ids[:, None, :]
    mask = jnp.pad(mask, [(0, 0), (0, 0), (before, 0)], constant_values=True)
    mask = jnp.broadcast_to(mask, distance.shape)
  return mask, mask if c.window is None else mask & (distance < c.window)


def _context(c, params, positions, plain, default, segment_ids, cache, encoded, seen, length, before) -> _Context:
  rotation = (None, None)
  if c.position == "rope":
    dim, scaling = c.rope_dim or c.head_dim, dict(c.rope_scaling or ())
    far = layers.rope_frequencies(dim, c.rope_theta, scaling, length)
    near = far if c.local_rope_theta is None else layers.rope_frequencies(dim, c.local_rope_theta)
    rotation = (far, near)
  bias = None
  if c.position == "relative":
    keys = _key_positions(positions, cache, before)
    query, keys = (positions[:1], keys[:1]) if default else (positions, keys)
    distance = keys[:, None, :] - query[:, :, None]
    bucket = layers.relative_buckets(distance, c.relative_buckets, c.relative_furthest, c.causal)
    bias = jnp.moveaxis(params["relative_bias"][bucket], -1, 1)
  if c.encoder_layers:
    if encoded is None:
      seen = cache["seen"]
    elif seen is None:
      seen = jnp.ones(encoded.shape[:2], bool)
  mask = _masks(c, positions, segment_ids, cache, plain, before)
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
  length: jax.Array | None = None,
) -> tuple[jax.Array, dict | None]:
  """The states before the head, [B, T, D or embed_dim] in `config.dtype`, and the updated cache.

  Args:
    tokens: int [B, T]. Padding belongs on the right, where no real token of a causal model sees it. Negative ids are
      soft tokens, see model/prompts.py.
    positions: int [B, T], rising within a segment; 0..T-1 if None. With a cache also the slots of the new keys. Where
      `params` has a prefix of P keys and values all of them are moved by P.
    segment_ids: int [B, T]; attention stays within equal ids. 0 is padding, which sees padding: a query that sees none
      has no softmax. None: each row is one sequence.
    token_types: int [B, T]; 0 if None.
    cache: of `init_cache`, with room for the prefix; a query at position p sees the slots 0..p.
    encoded: [B, S, D] of `encode`, for an encoder-decoder; with a cache it is needed only once.
    seen: bool [B, S], which of `encoded` are real; None is all.
    length: int [], tokens of the longest row without padding, on which LongRoPE depends; None is the last position.
  """
  c, (B, T) = config, tokens.shape
  default, stack, before, shared = positions is None, params["layers"], 0, params.get("shared")
  params = weights.bind({k: v for k, v in params.items() if k != "layers"}, shared)
  if "prefix" in params:
    prefix = params["prefix"]()
    before = prefix["attn"]["k"].shape[1]
    stack = stack | {name: stack[name] | {"prefix": x} for name, x in prefix.items()}
  if default and c.position == "learned" and c.max_seq_len < before + T:
    raise errors.UserError(
      f"{before + T} tokens are more than the {c.max_seq_len} positions that the model has learned"
    )
  if default:
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
  positions = positions + before if before else positions
  x = sharding.constrain(_embed(c, params["embed"], tokens, positions, token_types, params.get("prompt")))
  default &= cache is None
  # The bias has no rows for the queries that a prefix adds where there is no mask.
  plain = cache is None and segment_ids is None and not (before and c.position == "relative")
  length = positions.max() + 1 if length is None else length + before
  ctx = _context(c, params, positions, plain, default, segment_ids, cache, encoded, seen, length, before)
  mixed = len(set(c.local)) > 1 and c.window is not None
  flags = jnp.array(c.local) if mixed else None
  always = c.window is not None and (c.local[0] if c.local else True)

  def body(x, layer):
    params, cache, local = layer
    x, cache = _layer(c, weights.bind(params, shared), x, ctx, local if mixed else always, cache)
    return sharding.constrain(x), cache

  if c.remat:
    body = jax.checkpoint(body, prevent_cse=not c.scan)
  updated = []
  for xs in _parts((stack, None if cache is None else cache["layers"], flags)):
    x, after = jax.lax.scan(body, x, xs, unroll=not c.scan)
    updated.append(after)
  if cache is not None:
    after = jax.tree.map(lambda *ys: jnp.concatenate(ys), *updated) if len(updated) > 1 else after
    cache = {"layers": after} | ({"seen": ctx.seen} if c.encoder_layers else {})
  x = normalise(c, x, params["norm"]) if c.final_norm else x
  return (linear("BTD,DC->BTC", x, params["project"]) if c.embed_dim else x), cache


def _parts(xs: Any) -> list:
  """Runs of layers to scan one after the other: all, or more where a weight asks for cuts (partial.py)."""
  bounds = [0, *weights.cuts(xs), None]
  pick = lambda part: jax.tree.map(lambda w: weights.at(w, part), xs, is_leaf=weights.is_node)
  return [xs] if len(bounds) == 2 else [pick(slice(*pair)) for pair in itertools.pairwise(bounds)]


def _embed(c, params, tokens, positions, token_types, prompt):
  x = weights.take(params["kernel"], tokens).astype(c.dtype)
  if c.embed_scale is not None:
    x = x * jnp.asarray(c.embed_scale, x.dtype)
  if prompt is not None:
    table, soft = prompt() * (c.embed_scale or 1) if prompt.scaled else prompt(), tokens < 0
    # Looked up before it is cast, so that its gradient is summed over the batch in float32.
    rows = table.at[jnp.where(soft, -1 - tokens, len(table))].get(mode="fill", fill_value=0)
    x = jnp.where(soft[..., None], rows.astype(c.dtype), x)
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
  shared = {k: params[k] for k in ("embed", "prompt", "shared") if k in params}
  return hidden(config.encoder, {**shared, **params["encoder"]}, tokens, segment_ids=segment_ids)[0]


def head(params: dict) -> dict:
  """The part of the parameters that `logits` needs."""
  own = {"head": params["head"]} if "head" in params else {}
  own = own if "kernel" in own.get("head", {}) else own | {"embed": {"kernel": params["embed"]["kernel"]}}
  return weights.bind(own, params.get("shared"))


def logits(config: Config, params: dict, x: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
  """Logits [B, T, V] of hidden states [B, T, D]; `params` may be the part that `head` gives."""
  params = head(params)
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
  own = {k: params[k] for k in ("pooler", "classifier") if k in params}
  params = weights.bind(own, params.get("shared"))
  x = pool(config, params, x, lengths).astype(jnp.float32)
  return linear("BD,DC->BC", x, params["classifier"])


def apply(config: Config, params: dict, tokens: jax.Array, **kw) -> jax.Array:
  """float32 logits [B, T, V]; keywords as in `hidden`. Materialises all of them: for evaluation and tests."""
  return logits(config, params, hidden(config, params, tokens, **kw)[0])
