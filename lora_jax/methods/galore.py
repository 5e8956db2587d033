"""GaLore: full finetuning whose optimiser works on low-rank projections of the gradients (Zhao et al. 2024).

https://arxiv.org/abs/2403.03507, algorithm 2, with the choices of the authors' code. For a gradient G [m, n], m <= n,
of a matrix or its transpose,

  R = P^T G,    G' = scale * P update(R),    P the first `rank` left singular vectors of G at every `gap`-th step.

The optimiser's moments have the shape [rank, n] of R. They are not rotated when P changes. Weight decay and learning
rate act on the whole matrix.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lora_jax import errors, tree, weights
from lora_jax.methods import full, targeting
from lora_jax.model import architecture
from lora_jax.values import Count, Positive

KIND = "whole weights"
OPTIM = {"learning_rate": 2e-5}  # the paper's rate for SST-2, of rank 8 and scale 2
WHOLE = True
MODEL = True


def init(
  key: jax.Array,
  params: Any,
  *,
  targets: str | Sequence[str] = "all-linear",
  rank: Count = 128,
  gap: Count = 200,
  scale: Positive = 0.25,
  train: str | Sequence[str] = ".*",
  dtype: full.Dtype = "float32",
) -> tuple[Any, Any]:
  """Trains the model as full.py does; the other keywords configure `direction`.

  Args:
    targets: the matrices whose gradients are projected, as in lora.py, in all layers or in none. The optimiser updates
      the other trained leaves without projection.
    rank: rank of the projection; limited to the shorter side of the matrix.
    gap: how many steps a projection is kept.
    scale: factor of the updates that are projected back.
    train: regexes; the leaves that are trained.
    dtype: as in full.py.

  Returns:
    (params, mask).
  """
  if rank < 1 or gap < 1:
    raise errors.UserError(f"GaLore needs rank >= 1 and gap >= 1, not rank={rank}, gap={gap}")
  params, mask = full.init(key, params, targets=train, dtype=dtype)
  _projected(tree.split(params, mask)[0], targets)
  return params, mask


class State(NamedTuple):
  """State of the gradient transformation.

  Fields:
    step: int32 [], how many steps are done.
    inner: the state of the inner transformation, which sees projected gradients.
    basis: {name of a projected leaf: P, float32 [stack, m, rank]}; the stack has one entry per matrix of the leaf.
  """

  step: jax.Array
  inner: Any
  basis: dict[str, jax.Array]


# optax.contrib.scale_by_galore projects the longer side of a matrix, so its updates and sizes differ from the paper and
# its code. It does not support an axis of layers.
def direction(
  inner: optax.GradientTransformation,
  *,
  targets: str | Sequence[str] = "all-linear",
  rank: Count = 128,
  gap: Count = 200,
  scale: Positive = 0.25,
  **_,
) -> optax.GradientTransformation:
  """Returns `inner` applied in the subspaces of the gradients' leading singular vectors.

  `inner` must not depend on the parameters.
  """

  def start(params):
    flat, basis = tree.flatten(params), {}
    for k in _projected(params, targets):
      stack, *sides = _sides(k, flat[k].shape)
      basis[k] = jnp.zeros((stack, min(sides), min(rank, *sides)), jnp.float32)
    return State(jnp.zeros((), jnp.int32), inner.init(_project(params, basis)), basis)

  def update(grads, state, params=None):
    del params
    flat = tree.flatten(grads)

    def fresh():
      return {k: _basis(_matrices(k, flat[k]), p.shape[-1]) for k, p in state.basis.items()}

    basis = jax.lax.cond(state.step % gap == 0, fresh, lambda: state.basis)
    low = _project(grads, basis)
    # Adafactor requires parameters but does not read them, and there are none in the projected space.
    low, new = inner.update(low, state.inner, low)

    def back(k, r, g):
      return scale * _restore(k, basis[k] @ r, g.shape) if k in basis else r

    return tree.map_named(back, low, grads), State(state.step + 1, new, basis)

  return optax.GradientTransformation(start, update)


def _projected(params: Any, targets: str | Sequence[str]) -> list[str]:
  """Returns the names of the projected leaves.

  Raises UserError if `targets` names only some layers of a stack, or a matrix that another method has changed.
  """
  matrices = targeting.matrices(params, experts=True)
  hits = targeting.select(targets, matrices, "config.method.targets")
  if odd := [k for k in hits if weights.is_node(matrices[k])]:
    raise errors.UserError(f"GaLore projects whole matrices, and another method has changed {odd[0]}")
  if some := [k for k, hit in hits.items() if not hit.all()]:
    raise errors.UserError(f"GaLore projects {some[0]} in all layers or in none; config.method.targets names some")
  return list(hits)


def _sides(name: str, shape: tuple[int, ...]) -> tuple[int, int, int]:
  """Returns (matrices in the stack, inputs, outputs) of a leaf."""
  stack = architecture.stack_axes(name)
  own = stack + architecture.in_axes(name)
  return math.prod(shape[:stack]), math.prod(shape[stack:own]), math.prod(shape[own:])


def _matrices(name: str, x: jax.Array) -> jax.Array:
  """Returns a leaf as matrices [stack, shorter side, longer side]; if the sides are equal, the input comes first."""
  stack, inner, outer = _sides(name, x.shape)
  x = x.reshape(stack, inner, outer)
  return x if inner <= outer else x.swapaxes(1, 2)


def _restore(name: str, x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Inverts `_matrices`."""
  _, inner, outer = _sides(name, shape)
  return (x if inner <= outer else x.swapaxes(1, 2)).reshape(shape)


def _basis(x: jax.Array, rank: int) -> jax.Array:
  """Returns the first left singular vectors [stack, m, rank] of matrices [stack, m, n]."""
  # One matrix at a time, since the other factors, which are not needed, are as large as the gradient.
  return jax.lax.map(lambda m: jnp.linalg.svd(m, full_matrices=False)[0][:, :rank], x)


def _project(grads: Any, basis: dict[str, jax.Array]) -> Any:
  """Returns the gradients in float32; leaves that have a basis are projected to [stack, rank, n]."""

  def leaf(k, g):
    g = g.astype(jnp.float32)
    return basis[k].swapaxes(1, 2) @ _matrices(k, g) if k in basis else g

  return tree.map_named(leaf, grads)
