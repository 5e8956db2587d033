"""The architecture of a transformer: the choices in a `Config`, and the tree of parameters that follows from them.

Letters: B batch, T query length, S key length, D model, N heads, K kv heads, M = N + 2K, H head size, F feed-forward,
V vocabulary, L layers, E experts, R rank, C any other size. Parameters are nested dicts. Layers are stacked, with a
leading L. A `linear` is {kernel, bias?}, a `norm` is {scale, bias?}. Entries that a config does not use are absent:

  embed/kernel [V, D]   embed/positions [P, D]   embed/types [C, D]   embed/norm   embed/project [C, D]
  layers/attn_norm   layers/attn/{q,k,v} [L, D, N or K, H] or attn/qkv [L, D, M, H]   layers/attn/o [L, N, H, D]
  layers/attn/{q_norm,k_norm} [L, H]   layers/attn_post_norm   layers/mlp_norm   layers/mlp_post_norm
  layers/mlp/{gate,up} [L, D, F] or mlp/gate_up [L, D, 2, F]   layers/mlp/down [L, F, D]
  layers/moe/router [L, D, E]   layers/moe/{gate,up} [L, E, D, F]   layers/moe/down [L, E, F, D]
  layers/cross_norm   layers/cross/{q,k,v,o}   relative_bias [C, N]   norm   project [D, C]
  encoder/{layers/..., relative_bias, norm}: the encoder of an encoder-decoder
  head [D, V], without a kernel if it is tied to the embedding   head/{transform [D, D], norm}
  pooler [D, D]   classifier [D, C]
"""

import dataclasses
import re
from typing import Literal

import jax
import jax.numpy as jnp

from lora_jax import tree

ATTENTION = ("auto", "xla", "cudnn")


@dataclasses.dataclass(frozen=True)
class Config:
  """Choices that define a model and how it is run.

  Fields:
    norm: "rms" or "layer"; `norm_plus_one` multiplies by 1 + scale.
    norm_order: "pre", "post" (after the residual sum), or "sandwich" (before and after each sublayer).
    parallel: whether attention and feed-forward read the same input and are summed.
    gated: whether the feed-forward layer has a gate.
    fused: whether q, k and v are one matrix, and gate and up another.
    attn_bias: "none", "qkv" or "all". `mlp_bias`, `head_bias`: whether these layers have a bias.
    qk_norm: whether q and k of each head have an RMS norm.
    attn_scale: multiplies attention logits; None is 1/sqrt(head_dim). `attn_softcap`, `logit_softcap`: see
      layers.attention.
    window: number of tokens that a query of a local layer sees. `local`: which layers are local; () means all.
    causal: whether a token sees only the tokens before it.
    position: "rope", "learned", "relative" (T5) or "none". `rope_dim`: dimensions of a head to rotate; None means all.
    rope_scaling: None, or the items of the scaling dict as a tuple, see `layers.rope_frequencies`.
    local_rope_theta: theta of local layers, which then have no scaling; None means as in other layers.
    position_offset: row of position 0 in the table of positions.
    n_types: number of token types. `embed_norm`: a norm after the embedding. `embed_scale`: multiplies the embedding.
    embed_dim: width of the embedding if it is not `d_model`; a matrix follows it, and another one the last layer.
    n_experts: 0 means a dense feed-forward layer. `norm_topk`: whether a token's expert weights sum to one.
    encoder_layers: layers of the encoder in an encoder-decoder; `n_layers` counts the decoder's.
    head: "lm", "mlm" (BERT's: dense, norm, tied), "classification" or "none".
    tied: whether the head is the transposed embedding. `head_scale`: multiplies the states before the head.
    n_labels: number of outputs of a classifier.
    pooler: activation of a dense layer on the pooled state, "" for none. `pool`: "first" or "last" token.
    dtype: dtype of activations and frozen matrices; norms, biases, softmax and loss are always float32.
    scan: whether layers run as one scanned body (compiles fast) or unrolled (runs faster, needs less memory).
    remat: whether activations of a layer are recomputed in the backward pass instead of kept.
    attention: "auto", "xla" or "cudnn", see layers.attention.
    members: whether `jax.vmap` runs over the model.
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
  attention: Literal[ATTENTION] = "auto"
  members: bool = False

  @property
  def encoder(self) -> "Config":
    """The config of the encoder."""
    return dataclasses.replace(self, n_layers=self.encoder_layers, encoder_layers=0, causal=False, head="none")


RUNTIME = ("scan", "remat", "attention")  # fields that do not change what is computed


def shapes(config: Config) -> dict:
  """The tree of parameters as `jax.ShapeDtypeStruct`s: matrices in `config.dtype`, norms and biases in float32."""
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
  """The number of axes of a matrix that contract with its input, after its `stack_axes`; 0 for other leaves.

  A part of a fused matrix, such as `layers/attn/qkv/kernel/q`, is a matrix. An embedding table is not.
  """
  if not re.search(r"/kernel(/(q|k|v|gate|up))?$", name) or name == "embed/kernel":
    return 0
  return 2 if name.endswith(("attn/o/kernel", "cross/o/kernel")) else 1


def stack_axes(name: str) -> int:
  """The number of leading axes of a leaf: one for layers, and one for experts if each has its own."""
  return stacked(name) + bool(re.search(r"/moe/(gate|up|down)/", name))


def stacked(name: str) -> bool:
  """Whether a leaf has a leading layer axis."""
  return name.startswith(("layers/", "encoder/layers/"))


def init(config: Config, key: jax.Array) -> dict:
  """Random parameters: matrices are normal with standard deviation 0.02, norms are the identity, biases are zero.

  The random key of a leaf depends on its name.
  """
  return tree.map_named(lambda k, s: init_leaf(config, key, k, s), shapes(config))


def init_leaf(config: Config, key: jax.Array, name: str, shape: jax.ShapeDtypeStruct) -> jax.Array:
  """One leaf of `init`."""
  if name.endswith(("/scale", "/bias")):
    return jnp.full(shape.shape, float(name.endswith("/scale") and not config.norm_plus_one), shape.dtype)
  return (0.02 * jax.random.normal(tree.fold(key, name), shape.shape)).astype(shape.dtype)
