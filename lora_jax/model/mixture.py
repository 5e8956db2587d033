"""Mixture of experts: routing, and matmuls grouped by expert.

Tokens are sorted by expert and cut into blocks of rows that share one; a loop multiplies each block with its expert's
matrix. Work and memory grow with the tokens that are routed, not with the number of experts.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from lora_jax import sharding, weights
from lora_jax.model import layers
from lora_jax.weights import Weight, dot

STEP_BYTES = 2**26


def route(x: jax.Array, router: Weight, k: int, normalise: bool) -> tuple[jax.Array, jax.Array]:
  """The experts of each token and how much each counts.

  Args:
    x: [M, D].
    router: [D, E].
    k: experts a token.
    normalise: whether a token's weights sum to one (Jiang et al. 2024, https://arxiv.org/abs/2401.04088, section 2.1).

  Returns:
    (int32 [M, k], float32 [M, k]).
  """
  probabilities = jax.nn.softmax(dot("MD,DE->ME", x, router, jnp.float32))
  top, experts = jax.lax.top_k(probabilities, k)
  return experts, top / top.sum(-1, keepdims=True) if normalise else top


def block_rows(rows: int, experts: int) -> int:
  """Rows of a block: at least half of an expert's even share of all, between 8 and 512, a power of two."""
  half = max(1, rows // experts // 2)
  return min(512, max(8, 1 << (half - 1).bit_length()))


def blocks(experts: jax.Array, n_experts: int) -> tuple[jax.Array, jax.Array, int]:
  """Where each row goes when rows are sorted by expert and every expert's rows are padded to whole blocks.

  Args:
    experts: int32 [R], the expert of each row.

  Returns:
    (slot of each row, int32 [R]; expert of each block, int32 [G]; rows of a block). G is enough for any routing, so
    the last blocks may be empty.
  """
  R = experts.shape[0]
  rows = block_rows(R, n_experts)
  G = min(R, R // rows + n_experts)
  sizes = jnp.bincount(experts, length=n_experts)
  counts = -(-sizes // rows)
  ends = jnp.cumsum(counts)
  order = jnp.argsort(experts, stable=True)
  first = jnp.cumsum(sizes) - sizes
  within = jnp.zeros_like(experts).at[order].set(jnp.arange(R, dtype=experts.dtype) - first[experts[order]])
  slots = (ends - counts)[experts] * rows + within
  owner = jnp.minimum(jnp.searchsorted(ends, jnp.arange(G), side="right"), n_experts - 1)
  return slots.astype(jnp.int32), owner.astype(jnp.int32), rows


@jax.custom_vjp
def grouped_dot(x: jax.Array, w: jax.Array, owner: jax.Array) -> jax.Array:
  """`x[g] @ w[owner[g]]` for every block g; sums are float32.

  Only `w` itself is kept for the backward pass, and x where `w` is differentiated.

  Args:
    x: [G, M, D].
    w: [E, D, F].
    owner: int32 [G].

  Returns:
    [G, M, F] in the dtype of x.
  """
  return _each(lambda x, w: _matmul(x, w).astype(x.dtype), x, w, owner)


def _each(fn, x, w, owner):
  """`fn(x[g], w[owner[g]])` for all blocks; as many at a time as keeps the copies of `w` within STEP_BYTES."""
  size = _at_once(w, owner)
  return jax.lax.map(lambda block: fn(block[0], w[block[1]]), (x, owner), batch_size=size)


def _at_once(w, owner):
  """Blocks that are multiplied together: 16 of large matrices, of small ones as many as STEP_BYTES hold."""
  size = max(1, STEP_BYTES // (w.nbytes // w.shape[0]))
  return min(size, 16, owner.size) if size < owner.size else owner.size


def _matmul(x, w):
  return jnp.matmul(x, w.astype(x.dtype), preferred_element_type=jnp.float32)


def _forward(x, w, owner):
  residuals = (x.value if w.perturbed else None, w.value, owner.value)
  return grouped_dot(x.value, w.value, owner.value), residuals


def _backward(residuals, g):
  x, w, owner = residuals
  if isinstance(g, jax.custom_derivatives.SymbolicZero):
    return None, None, None
  dx = _each(lambda g, w: _matmul(g, w.T).astype(g.dtype), g, w, owner)
  if x is None:
    return dx, None, None

  def add(dw, block):
    x, g, e = block
    return dw.at[e].add(_matmul(jnp.swapaxes(x, -1, -2), g)), None

  dw, blocks = jnp.zeros(w.shape, jnp.float32), (x, g, owner)
  dw = add(dw, blocks)[0] if _at_once(w, owner) == owner.size else jax.lax.scan(add, dw, blocks)[0]
  return dx, dw.astype(w.dtype), None


grouped_dot.defvjp(_forward, _backward, symbolic_zeros=True)


def expert_dot(x: jax.Array, w: Weight, owner: jax.Array, keys: tuple = ()) -> jax.Array:
  """`grouped_dot` for an array or LoRA on one, whose change goes through its factors alone.

  Args:
    x: [G, M, D].
    w: [E, D, F], in LoRA `a` [E, D, R] and `b` [E, R, F].
    owner: int32 [G].
    keys: mesh axes over which rows or columns of x are split, so that dropout differs between their devices.
  """
  if not isinstance(w, weights.LoRA):
    return grouped_dot(x, w, owner)
  y, dropped = expert_dot(x, w.base, owner, keys), x
  if w.key is not None:
    key, *rate = w.key if isinstance(w.key, tuple) else (w.key,)
    for axis in keys:
      key = jax.random.fold_in(key, jax.lax.axis_index(axis))
    dropped = weights.dropout(x, w.dropout, (key, *rate) if rate else key)
  pair = lambda x, a, b: grouped_dot(grouped_dot(x, a, owner), b * w.scale, owner)
  if w.start is None:
    return y + pair(dropped, w.a, w.b)
  # As differences, see weights.LoRA.change.
  a, b = w.start
  y += pair(dropped, w.a, w.b - b) + pair(dropped, w.a - a, b)
  return y if dropped is x else y + pair(dropped - x, a, b)


def mlp(x: jax.Array, params: Mapping, activation: str, k: int, normalise: bool) -> jax.Array:
  """The gated feed-forward layer of each token's `k` experts, weighted by the router.

  Under a mesh every device routes its own rows; it gathers the matrices over `fsdp` and keeps its part of F.

  Args:
    x: [B, T, D].
    params: router/kernel [D, E]; {gate, up}/kernel [E, D, F], down/kernel [E, F, D]. LoRA on them is never made dense.
  """
  w = {name: params[name]["kernel"] for name in ("router", "gate", "up", "down")}
  w = {name: m if name == "router" else _plain(m) for name, m in w.items()}
  run = functools.partial(_mlp, activation=activation, k=k, normalise=normalise)
  if not sharding.splits(x):
    return run(x, w)
  parts = jax.sharding.get_abstract_mesh().shape["tensor"]
  split = "tensor" if parts > 1 and w["up"].shape[2] % parts == 0 else None
  up, down = (functools.partial(_specs, inner=i, outer=o) for i, o in ((None, split), (split, None)))
  specs = (sharding.BATCH, {"router": P(), "gate": up(w["gate"]), "up": up(w["up"]), "down": down(w["down"])})

  def local(x, w):
    y = run(x, w, rows=sharding.BATCH[0], columns=(split,) if split else ())
    return y if split is None else jax.lax.psum(y, split)

  # The loops' carries start the same on all devices and then differ, which the check does not allow.
  return jax.shard_map(local, in_specs=specs, out_specs=sharding.BATCH, check_vma=False)(x, w)


def _plain(w):
  """LoRA as it is, over an array; other nodes are made dense."""
  return w.replace(base=_plain(w.base)) if isinstance(w, weights.LoRA) else weights.dense(w)


def _specs(w, inner, outer):
  """Where experts' matrices [E, in, out], and factors of LoRA on them, are split."""
  if not isinstance(w, weights.LoRA):
    return P(None, inner, outer)
  a, b = P(None, inner), P(None, None, outer)
  specs = jax.tree.map(lambda _: P(), w).replace(base=_specs(w.base, inner, outer), a=a, b=b)
  return specs if w.start is None else specs.replace(start=(a, b))


def _mlp(x, w, activation, k, normalise, rows=(), columns=()):
  flat = x.reshape(-1, x.shape[-1])
  experts, share = route(flat, w["router"], k, normalise)
  slots, owner, size = blocks(experts.reshape(-1), w["up"].shape[0])
  token = jnp.arange(slots.size) // k
  xs = jnp.zeros((owner.size * size, x.shape[-1]), x.dtype).at[slots].set(flat[token], unique_indices=True)
  xs = xs.reshape(owner.size, size, -1)
  gate, up = (expert_dot(xs, w[name], owner, rows) for name in ("gate", "up"))
  h = layers.ACTIVATIONS[activation](gate) * up
  y = expert_dot(h, w["down"], owner, (*rows, *columns)).reshape(owner.size * size, -1)
  y = y.at[slots].get(unique_indices=True).reshape(*share.shape, -1)
  return jnp.einsum("MkD,Mk->MD", y, share, preferred_element_type=jnp.float32).astype(x.dtype).reshape(x.shape)
