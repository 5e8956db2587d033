"""Initial values of LoRA's factors: random columns, or parts of a decomposition of the weight."""

import functools
import math
import re
from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pydantic

from lora_jax import errors, tree, weights

# Names as in PEFT, except for "peft", which is True there, and "paper", which is "gaussian" there.
INITS = ("peft", "paper", "gaussian", "orthogonal", "pissa", "olora")
Init = Literal[INITS] | Annotated[str, pydantic.StringConstraints(pattern=r"^pissa_niter_\d+$")]
OVERSAMPLING = 8  # columns of a random projection beyond the rank (Halko et al. 2011, section 1.3)


class Spec(NamedTuple):
  """What factors to make for one leaf.

  Fields:
    name: name of the leaf, from which its random keys follow.
    ranks: rank of each layer.
    experts: how many matrices a layer has.
    inner, outer: size of the input and of the output.
    init: see `lora.init`; "normal" is the standard normal distribution.
  """

  name: str
  ranks: tuple[int, ...]
  experts: int
  inner: int
  outer: int
  init: str


def check(init: str) -> None:
  """Raises UserError unless `init` is one of `INITS` or "pissa_niter_N"."""
  if init not in INITS and not re.fullmatch(r"pissa_niter_\d+", str(init)):
    raise errors.UserError(f"unknown config.method.init {init!r}; {errors.nearest(init, [*INITS, 'pissa_niter_N'])}")


def decomposes(init: str) -> bool:
  """Returns whether the factors are parts of the weight, which are subtracted from it."""
  return init.startswith("pissa") or init == "olora"


def draw(key: jax.Array, specs: Sequence[Spec]) -> dict[str, tuple[jax.Array, jax.Array | None]]:
  """Returns {name: (a [layers * experts, inner, R], b [layers * experts, R, outer] or None for zeros)}.

  Except for "orthogonal", a column of `a` depends only on the key, the leaf's name, layer, expert and index.
  """
  return {s.name: _draw(tree.fold(key, s.name), s) for s in specs}


def _draw(key, spec):
  if spec.init == "orthogonal":
    return _orthogonal(key, spec._replace(name=""))
  ranks, most = np.repeat(np.array(spec.ranks, np.int32), spec.experts), max(spec.ranks)
  # Compiling takes longer than drawing, so leaves of one input size share a program for similar ranks.
  columns = 1 << max(3, (most - 1).bit_length())
  return _normal_or_uniform(key, ranks, columns=columns, inner=spec.inner, init=spec.init)[..., :most], None


@functools.partial(jax.jit, static_argnames=("columns", "inner", "init"))
def _normal_or_uniform(key, ranks, *, columns, inner, init):
  """Returns [N, inner, columns], with a key for each column; columns beyond a rank are zero."""
  if init == "peft":
    draw = lambda key: jax.random.uniform(key, (inner,), minval=-1.0, maxval=1.0) / math.sqrt(inner)
  else:
    draw = lambda key: jax.random.normal(key, (inner,))
  each = lambda i: jax.vmap(lambda j: draw(jax.random.fold_in(i, j)), out_axes=1)(np.arange(columns))
  x = jax.vmap(lambda i: each(jax.random.fold_in(key, i)))(np.arange(ranks.size))
  if init in ("paper", "gaussian"):
    x /= jnp.maximum(ranks, 1)[:, None, None]
  return jnp.where(np.arange(columns) < ranks[:, None, None], x, 0.0)


@functools.partial(jax.jit, static_argnums=1)
def _orthogonal(key, spec):
  """Returns `A = X Q_odd / 10`, `B = Q_even^T Y / 10` with X, Y normal and Q orthogonal, so that `A B` is zero.

  https://datta0.github.io/posts/rethink-lora-init/#orthogonal-initialisation
  """
  n, columns = len(spec.ranks) * spec.experts, max(spec.ranks)
  a, b = jnp.zeros((n, spec.inner, columns)), jnp.zeros((n, columns, spec.outer))

  def pair(i, r):
    keys = jax.random.split(jax.random.fold_in(key, i), 3)
    q = jnp.linalg.qr(jax.random.normal(keys[0], (r, r)))[0]
    x, y = jax.random.normal(keys[1], (spec.inner, r // 2)), jax.random.normal(keys[2], (r // 2, spec.outer))
    product = functools.partial(jnp.matmul, precision="highest")
    return product(x, q[0::2]) / 10, product(q[1::2].T, y) / 10

  for r in sorted(set(spec.ranks) - {0}):
    at = jnp.array([i for i in range(n) if spec.ranks[i // spec.experts] == r])
    x, y = jax.vmap(functools.partial(pair, r=r))(at)
    a, b = a.at[at, :, :r].set(x), b.at[at, :r].set(y)
  return a, b


@functools.partial(jax.jit, static_argnames=("n_in", "columns", "init"))
def decompose(
  key: jax.Array, w: weights.Weight, ranks: jax.Array, scale: jax.Array, *, n_in: int, columns: int, init: str
) -> tuple[jax.Array, jax.Array]:
  """Returns (a [N, *in, R], b [N, R, *out]) of a weight [N, *in, *out], computed one matrix at a time in float32.

  PiSSA (Meng et al. 2024, https://arxiv.org/abs/2404.02948, equations 2 and 3): `scale a b` is the best approximation
  of W of that rank, with the singular values shared evenly. "pissa_niter_N" approximates it by N subspace iterations
  from a random start (Halko et al. 2011, https://arxiv.org/abs/0909.4061, algorithms 4.4 and 5.1). OLoRA (Büyükakyüz
  2024, https://arxiv.org/abs/2406.01775): b^T is the first columns of Q and a^T the first rows of R of `W^T = Q R`.

  Args:
    ranks: int32 [N]; further columns are zero.
    scale: float32 [N].
  """

  def one(args):
    key, w, rank, s = args
    w = weights.dense(w).astype(jnp.float32)
    inner, outer = w.shape[:n_in], w.shape[n_in:]
    w = w.reshape(math.prod(inner), math.prod(outer))
    if init == "olora":
      q, r = jnp.linalg.qr(w.T)
      a, b = r[:columns].T, q[:, :columns].T
    else:
      u, d, v = _svd(key, w, columns, init)
      root = jnp.sqrt(d / jnp.where(s == 0, 1.0, s))
      a, b = u * root, root[:, None] * v
    used = jnp.arange(columns) < rank
    return (a * used).reshape(*inner, columns), (b * used[:, None]).reshape(columns, *outer)

  return jax.lax.map(one, (jax.random.split(key, ranks.size), w, ranks, scale))


def _svd(key, w, columns, init):
  """Returns the first left singular vectors [in, R], values [R] and right vectors [R, out], exact or by iteration."""
  if init == "pissa":
    u, d, v = jnp.linalg.svd(w, full_matrices=False)
    return u[:, :columns], d[:columns], v[:columns]
  product = functools.partial(jnp.matmul, precision="highest")
  orthonormal = lambda x: jnp.linalg.qr(x)[0]
  width = min(columns + OVERSAMPLING, *w.shape)
  q = orthonormal(product(w, jax.random.normal(key, (w.shape[1], width))))
  for _ in range(int(init.rpartition("_")[2])):
    q = orthonormal(product(w, orthonormal(product(w.T, q))))
  u, d, v = jnp.linalg.svd(product(q.T, w), full_matrices=False)
  return product(q, u[:, :columns]), d[:columns], v[:columns]
