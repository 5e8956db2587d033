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
from lora_jax.weights import Weight, dot, grouped


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


def mlp(x: jax.Array, params: Mapping, activation: str, k: int, normalise: bool) -> jax.Array:
  """The gated feed-forward layer of each token's `k` experts, weighted by the router.

  Under a mesh every device routes its own rows; it gathers the matrices over `fsdp` and keeps its part of F.

  Args:
    x: [B, T, D].
    params: router/kernel [D, E]; {gate, up}/kernel [E, D, F], down/kernel [E, F, D]. Adapters and packed
      weights stay what they are.
  """
  w = {name: params[name]["kernel"] for name in ("router", "gate", "up", "down")}
  run = functools.partial(_mlp, activation=activation, k=k, normalise=normalise)
  if not sharding.splits(x):
    return run(x, w)
  parts = jax.sharding.get_abstract_mesh().shape["tensor"]
  split = "tensor" if parts > 1 and w["up"].shape[2] % parts == 0 else None
  into, out = P(None, None, split), P(None, split, None)
  split_w = {"router": P(), "gate": into, "up": into, "down": out}
  split_w = {name: weights.place(w[name], spec) for name, spec in split_w.items()}

  def local(x, w):
    y = run(x, w, rows=sharding.BATCH[0], columns=(split,) if split else ())
    return y if split is None else jax.lax.psum(y, split)

  # The loops' carries start the same on all devices and then differ, which the check does not allow.
  return jax.shard_map(local, in_specs=(sharding.BATCH, split_w), out_specs=sharding.BATCH, check_vma=False)(x, w)


def _mlp(x, w, activation, k, normalise, rows=(), columns=()):
  flat = x.reshape(-1, x.shape[-1])
  experts, share = route(flat, w["router"], k, normalise)
  slots, owner, size = blocks(experts.reshape(-1), w["up"].shape[0])
  token = jnp.arange(slots.size) // k
  xs = jnp.zeros((owner.size * size, x.shape[-1]), x.dtype).at[slots].set(flat[token], unique_indices=True)
  xs = xs.reshape(owner.size, size, -1)
  gate, up = (grouped.dot(xs, w[name], owner, rows) for name in ("gate", "up"))
  h = layers.ACTIVATIONS[activation](gate) * up
  y = grouped.dot(h, w["down"], owner, (*rows, *columns)).reshape(owner.size * size, -1)
  y = y.at[slots].get(unique_indices=True).reshape(*share.shape, -1)
  return jnp.einsum("MkD,Mk->MD", y, share, preferred_element_type=jnp.float32).astype(x.dtype).reshape(x.shape)
