"""Products of rows that are grouped in blocks, each with the matrix of the expert that owns it."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.weights import protocol

STEP_BYTES = 2**26


def dot(x: jax.Array, w: Any, owner: jax.Array, keys: tuple[str, ...] = ()) -> jax.Array:
  """`x[g] @ w[owner[g]]` for every block g; sums are float32.

  Args:
    x: [G, M, D].
    w: [E, D, F], an array or a weight.
    owner: int32 [G].
    keys: mesh axes over which rows or columns of x are split, so that dropout differs between their devices.

  Returns:
    [G, M, F] in the dtype of x.
  """
  return w.grouped_dot(x, owner, keys) if isinstance(w, protocol.Weight) else packed_dot(x, w, owner)


@jax.custom_vjp
def packed_dot(x: jax.Array, w: Any, owner: jax.Array) -> jax.Array:
  """`dot` of an array, or of a packed weight, of which one block's expert is dense at a time.

  Only `w` itself is kept for the backward pass, and x where `w` is an array that is differentiated.
  """
  return _each(lambda x, w: _matmul(x, w).astype(x.dtype), x, w, owner)


def _each(fn, x, w, owner):
  """`fn(x[g], w[owner[g]])` for all blocks; as many at a time as keeps the copies of `w` within STEP_BYTES."""
  size = _at_once(x, w, owner)
  run = lambda block: fn(block[0], protocol.dense(protocol.at(w, block[1])))
  return jax.lax.map(run, (x, owner), batch_size=size)


def _at_once(x, w, owner):
  """Blocks that are multiplied together: 16 of large matrices, of small ones as many as STEP_BYTES hold."""
  size = max(1, STEP_BYTES // (math.prod(w.shape[1:]) * x.dtype.itemsize))
  return min(size, 16, owner.size) if size < owner.size else owner.size


def _matmul(x, w):
  return jnp.matmul(x, w.astype(x.dtype), preferred_element_type=jnp.float32)


def _is_primal(x):
  return hasattr(x, "perturbed")


def _forward(x, w, owner):
  trained = any(leaf.perturbed for leaf in jax.tree.leaves(w, is_leaf=_is_primal))
  values = jax.tree.map(lambda p: p.value, (x, w, owner), is_leaf=_is_primal)
  return packed_dot(*values), (values[0] if trained else None, *values[1:])


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
  dw = add(dw, blocks)[0] if _at_once(x, w, owner) == owner.size else jax.lax.scan(add, dw, blocks)[0]
  return dx, dw.astype(w.dtype), None


packed_dot.defvjp(_forward, _backward, symbolic_zeros=True)
