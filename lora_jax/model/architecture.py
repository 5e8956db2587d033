"""What a transformer is made of: the choices of a `Config`, and the tree of parameters that follows from them.

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
import re
from typing import Literal

import jax
import jax.numpy as jnp

from lora_jax import tree

ATTENTION = ("auto", "xla", "cudnn")


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
  """How many axes of a matrix are contracted with its input, after those of `stack_axes`; 0 where `name` is no matrix.

  A part of a fused matrix, such as `layers/attn/qkv/kernel/q`, is one too. Embedding tables count as none.
  """
  if not re.search(r"/kernel(/(q|k|v|gate|up))?$", name) or name == "embed/kernel":
    return 0
  return 2 if name.endswith(("attn/o/kernel", "cross/o/kernel")) else 1


def stack_axes(name: str) -> int:
  """How many leading axes a leaf has before its own: one of layers, and one of experts where those have their own."""
  return stacked(name) + bool(re.search(r"/moe/(gate|up|down)/", name))


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
