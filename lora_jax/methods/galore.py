"""GaLore: full finetuning whose optimiser works on low-rank projections of the gradients (Zhao et al. 2024).

https://arxiv.org/abs/2403.03507, algorithm 2, with the choices of the authors' code: for a gradient G [m, n], m <= n,
of a matrix or its transpose

  R = P^T G,    G' = scale * P update(R),    P the first `rank` left singular vectors of G at every `gap`-th step.

The optimiser's moments have the shape [rank, n] of R, and are not rotated when P changes. Weight decay and learning
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
  """Trains the model as full.py does; `direction` makes of an optimiser what the other keywords say.

  Args:
    targets: the matrices whose gradients are projected, see lora.py; of all layers or of none. What else is trained
      has the optimiser as it is.
    rank: of the projection; at most the shorter side of the matrix counts.
    gap: how many steps a projection stays.
    scale: of the updates that are projected back.
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
  """Of the gradient transformation.

  Fields:
    step: int32 [].
    inner: the state of the inner transformation, on projected gradients.
    basis: {name of a projected leaf: P, float32 [stack, m, rank]}; the stack is that of the leaf's layers.
  """

  step: jax.Array
  inner: Any
  basis: dict[str, jax.Array]


# optax.contrib.scale_by_galore projects the longer side of a matrix, which leaves other updates and other sizes than
# the paper and its code, and it has no axis of layers.
def direction(
  inner: optax.GradientTransformation,
  *,
  targets: str | Sequence[str] = "all-linear",
  rank: Count = 128,
  gap: Count = 200,
  scale: Positive = 0.25,
  **_,
) -> optax.GradientTransformation:
  """`inner` in the subspaces of the leading singular vectors of the gradients; `inner` may not need the parameters."""

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
    # Adafactor asks for parameters without reading them; those of the projected space are not to be had.
    low, new = inner.update(low, state.inner, low)

    def back(k, r, g):
      return scale * _restore(k, basis[k] @ r, g.shape) if k in basis else r

    return tree.map_named(back, low, grads), State(state.step + 1, new, basis)

  return optax.GradientTransformation(start, update)


def _projected(params: Any, targets: str | Sequence[str]) -> list[str]:
  """Names of the leaves that are projected; UserError where `targets` names some layers of a stack alone, or what
  another method has made of a matrix."""
  matrices = targeting.matrices(params, experts=True)
  hits = targeting.select(targets, matrices, "config.method.targets")
  if odd := [k for k in hits if weights.is_node(matrices[k])]:
    raise errors.UserError(f"GaLore projects whole matrices, and another method has changed {odd[0]}")
  if some := [k for k, hit in hits.items() if not hit.all()]:
    raise errors.UserError(f"GaLore projects {some[0]} in all layers or in none; config.method.targets names some")
  return list(hits)


def _sides(name: str, shape: tuple[int, ...]) -> tuple[int, int, int]:
  """(matrices in the stack, inputs, outputs) of a leaf."""
  stack = architecture.stack_axes(name)
  own = stack + architecture.in_axes(name)
  return math.prod(shape[:stack]), math.prod(shape[stack:own]), math.prod(shape[own:])


def _matrices(name: str, x: jax.Array) -> jax.Array:
  """A leaf as matrices [stack, shorter side, longer side]; the input is the first of two equal ones."""
  stack, inner, outer = _sides(name, x.shape)
  x = x.reshape(stack, inner, outer)
  return x if inner <= outer else x.swapaxes(1, 2)


def _restore(name: str, x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """The inverse of `_matrices`."""
  _, inner, outer = _sides(name, shape)
  return (x if inner <= outer else x.swapaxes(1, 2)).reshape(shape)


def _basis(x: jax.Array, rank: int) -> jax.Array:
  """The first left singular vectors [stack, m, rank] of matrices [stack, m, n]."""
  # One after the other: the other factors, which are not needed, are as large as the gradient.
  return jax.lax.map(lambda m: jnp.linalg.svd(m, full_matrices=False)[0][:, :rank], x)


def _project(grads: Any, basis: dict[str, jax.Array]) -> Any:
  """float32; [stack, rank, n] in place of the leaves that have a basis."""

  def leaf(k, g):
    g = g.astype(jnp.float32)
    return basis[k].swapaxes(1, 2) @ _matrices(k, g) if k in basis else g

  return tree.map_named(leaf, grads)
