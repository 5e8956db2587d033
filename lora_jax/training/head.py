"""Functions of the head's logits, computed in chunks of positions: the logits of a whole batch never exist.

A function of logits gets those of one chunk, float32 [B, C, V], of one model or of several for the same positions, and
slices [B, C, ...] of arrays such as targets. There are two ways to put chunks together:

  sums    of the chunks' scalars. Each chunk's gradient is computed while its logits exist, so that the backward pass
          only scales it.
  values  a position, [B, T]. The backward pass computes a chunk's logits again, so that any gradient of the values
          works, as of a loss that is not linear in the log-likelihood of a row.

Positions that are not used are moved behind the others in their row and skipped. Gradients reach the states, the
head's leaves and the arrays only where they are being differentiated.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from lora_jax import tree


@struct.dataclass
class Projection:
  """What logits are made of.

  Fields:
    x: [B, T, D] states.
    w: the parameters of the head.
    project: `(w, x, dtype)` to logits [B, T, V].
  """

  x: jax.Array
  w: Any
  project: Callable = struct.field(pytree_node=False)

  def logits(self) -> jax.Array:
    """float32 [B, T, V]."""
    return self.project(self.w, self.x, jnp.float32)


def sums(
  fn: Callable,
  projections: Sequence[Projection],
  arrays: Sequence[jax.Array],
  used: jax.Array,
  *,
  chunk: int,
  most: jax.Array | None = None,
) -> tuple[Any, Any]:
  """Sums over chunks of what `fn` gives.

  Args:
    fn: `(*logits, *arrays)` of a chunk to (losses, metrics), two trees of float32 []. Metrics have no gradient. A chunk
      may have positions that are not used, which `fn` has to give no weight.
    projections: of the same positions.
    arrays: [B, T, ...].
    used: bool [B, T], which positions count.
    chunk: about how many positions are in one chunk; a chunk is at least 8 columns of the batch.
    most: int32 [], no fewer positions than any row uses; None counts them. Under `jax.vmap` one number for all spares
      them asking each other, and from device to device, whether the loop has ended.
  """
  columns, chunks, order = _layout(used, chunk, most)
  return _sums(fn, columns, chunks, *_arranged(order, columns, (tuple(projections), tuple(arrays))))


def values(
  fn: Callable,
  projections: Sequence[Projection],
  arrays: Sequence[jax.Array],
  used: jax.Array,
  *,
  chunk: int,
  most: jax.Array | None = None,
) -> Any:
  """What `fn` gives a position: a tree of float32 [B, T], 0 at positions that are not used.

  Args:
    fn: `(*logits, *arrays)` of a chunk to a tree of float32 [B, C].
    projections, arrays, used, chunk, most: as in `sums`.
  """
  columns, chunks, order = _layout(used, chunk, most)
  found = _values(fn, columns, chunks, *_arranged(order, columns, (tuple(projections), tuple(arrays))))
  back = jnp.argsort(order, axis=1)
  return jax.tree.map(lambda v: jnp.where(used, jnp.take_along_axis(v[:, : used.shape[1]], back, axis=1), 0), found)


def _layout(used: jax.Array, chunk: int, most: jax.Array | None) -> tuple[int, jax.Array, jax.Array]:
  """(columns of a chunk, how many chunks the fullest row needs, the order of positions with the used ones first)."""
  B, T = used.shape
  columns = min(T, max(8, chunk // B))
  chunks = ((jnp.count_nonzero(used, axis=1).max() if most is None else most) + columns - 1) // columns
  return columns, chunks, jnp.argsort(~used, axis=1, stable=True)


def _arranged(order: jax.Array, columns: int, given: tuple) -> tuple:
  """Projections and arrays in the order of positions, padded to whole chunks."""
  projections, arrays = given

  def arrange(a):
    a = jnp.take_along_axis(a, order.reshape(*order.shape, *(1,) * (a.ndim - 2)), axis=1)
    return jnp.pad(a, [(0, 0), (0, -order.shape[1] % columns)] + [(0, 0)] * (a.ndim - 2))

  return tuple(p.replace(x=arrange(p.x)) for p in projections), tuple(map(arrange, arrays))


def _cut(given: tuple, i: jax.Array, columns: int) -> tuple:
  """Chunk i of projections and arrays."""
  cut = lambda a: jax.lax.dynamic_slice_in_dim(a, i * columns, columns, axis=1)
  projections, arrays = given
  return tuple(p.replace(x=cut(p.x)) for p in projections), tuple(map(cut, arrays))


def _evaluate(fn: Callable, given: tuple) -> Any:
  """`fn` of a chunk."""
  projections, arrays = given
  return fn(*(p.logits() for p in projections), *arrays)


class _Pull:
  """Gradients of a chunk with respect to what is trained of it."""

  def __init__(self, fn: Callable, given: tuple, trained: tuple, has_aux: bool):
    projections, arrays = given
    learned, others = tree.split(arrays, trained[1])
    logits = tuple(p.logits() for p in projections)
    self.value, self._pull, *self.aux = jax.vjp(
      lambda logits, learned: fn(*logits, *tree.join(learned, others)), logits, learned, has_aux=has_aux
    )
    self._projections, self._trained = projections, trained[0]

  def __call__(self, cotangents: Any) -> tuple:
    """(projections, arrays) of gradients, None in the places of what is not trained."""
    dlogits, darrays = self._pull(cotangents)
    return tuple(map(self._head, self._projections, self._trained, dlogits)), darrays

  @staticmethod
  def _head(projection, trained, dlogits):
    learned, others = tree.split(projection, trained)
    if not jax.tree.leaves(learned):
      return learned

    def logits(learned):
      p = tree.join(learned, others)
      return p.project(p.w, p.x, p.x.dtype)

    return jax.vjp(logits, learned)[1](dlogits.astype(projection.x.dtype))[0]


def _zeros(given: tuple, trained: tuple) -> tuple:
  """What gradients are gathered in: those of positions as they are, those of the head's leaves in float32."""
  (projections, arrays), _ = tree.split(given, trained)
  wide = lambda p: p.replace(
    x=jax.tree.map(jnp.zeros_like, p.x), w=jax.tree.map(lambda v: jnp.zeros(v.shape, jnp.float32), p.w)
  )
  return tuple(map(wide, projections)), jax.tree.map(jnp.zeros_like, arrays)


def _gather(total: tuple, found: tuple, i: jax.Array, columns: int) -> tuple:
  """The gradients of chunk i put with those of others."""
  put = lambda a, b: jax.lax.dynamic_update_slice_in_dim(a, b, i * columns, axis=1)
  projections = tuple(
    p.replace(x=jax.tree.map(put, p.x, q.x), w=jax.tree.map(lambda a, b: a + b, p.w, q.w))
    for p, q in zip(total[0], found[0], strict=True)
  )
  return projections, jax.tree.map(put, total[1], found[1])


def _like(gradients: tuple, given: tuple) -> tuple:
  """Gradients in the dtypes of what they are of."""
  of = lambda g, x: None if g is None else g.astype(x.dtype)
  return jax.tree.map(of, gradients, given, is_leaf=lambda g: g is None)


def _primals(*given: Any) -> tuple[tuple, tuple]:
  """(values, which are trained) of what a forward rule gets."""
  primal = lambda x: hasattr(x, "perturbed")
  return tuple(jax.tree.map(lambda p: getattr(p, name), given, is_leaf=primal) for name in ("value", "perturbed"))


def _is_zero(cotangent: Any) -> bool:
  return isinstance(cotangent, jax.custom_derivatives.SymbolicZero)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sums(fn, columns, chunks, projections, arrays):
  given = projections, arrays
  step = lambda i, total: jax.tree.map(jnp.add, total, _evaluate(fn, _cut(given, i, columns)))
  shapes = jax.eval_shape(lambda: _evaluate(fn, _cut(given, jnp.int32(0), columns)))
  return jax.lax.fori_loop(0, chunks, step, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes))


def _sums_forward(fn, columns, chunks, projections, arrays):
  (chunks, *given), (_, *trained) = _primals(chunks, projections, arrays)
  given, trained = tuple(given), tuple(trained)
  shapes = jax.eval_shape(lambda: _evaluate(fn, _cut(given, jnp.int32(0), columns)))
  leaves, structure = jax.tree.flatten(shapes[0])
  units = [structure.unflatten([jnp.float32(i == k) for i in range(len(leaves))]) for k in range(len(leaves))]

  def step(i, carry):
    total, gradients = carry
    pull = _Pull(fn, _cut(given, i, columns), trained, has_aux=True)
    total = jax.tree.map(jnp.add, total, (pull.value, *pull.aux))
    return total, [_gather(g, pull(unit), i, columns) for g, unit in zip(gradients, units, strict=True)]

  start = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes), [_zeros(given, trained) for _ in leaves]
  total, gradients = jax.lax.fori_loop(0, chunks, step, start)
  return total, [_like(g, given) for g in gradients]


def _sums_backward(fn, columns, gradients, cotangents):
  del fn, columns
  flat = jax.tree.leaves(cotangents[0], is_leaf=_is_zero)
  kept = [(c, g) for c, g in zip(flat, gradients, strict=True) if not _is_zero(c)]
  if not kept:
    return None, *jax.tree.map(lambda _: None, gradients[0])
  scaled = lambda *gs: sum(c * g for (c, _), g in zip(kept, gs, strict=True)).astype(gs[0].dtype)
  return None, *jax.tree.map(scaled, *(g for _, g in kept))


_sums.defvjp(_sums_forward, _sums_backward, symbolic_zeros=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _values(fn, columns, chunks, projections, arrays):
  given, n = (projections, arrays), projections[0].x.shape[1]
  shapes = jax.eval_shape(lambda: _evaluate(fn, _cut(given, jnp.int32(0), columns)))

  def step(i, found):
    put = lambda a, b: jax.lax.dynamic_update_slice_in_dim(a, b, i * columns, axis=1)
    return jax.tree.map(put, found, _evaluate(fn, _cut(given, i, columns)))

  empty = jax.tree.map(lambda s: jnp.zeros((s.shape[0], n), s.dtype), shapes)
  return jax.lax.fori_loop(0, chunks, step, empty)


def _values_forward(fn, columns, chunks, projections, arrays):
  (chunks, *given), (_, *trained) = _primals(chunks, projections, arrays)
  return _values(fn, columns, chunks, *given), (chunks, *map(tuple, (given, trained)))


def _values_backward(fn, columns, residuals, cotangents):
  chunks, given, trained = residuals
  full = lambda c: jnp.zeros(c.shape, c.dtype) if _is_zero(c) else c
  cotangents = jax.tree.map(full, cotangents, is_leaf=_is_zero)

  def step(i, total):
    cut = lambda a: jax.lax.dynamic_slice_in_dim(a, i * columns, columns, axis=1)
    pull = _Pull(fn, _cut(given, i, columns), trained, has_aux=False)
    return _gather(total, pull(jax.tree.map(cut, cotangents)), i, columns)

  return None, *_like(jax.lax.fori_loop(0, chunks, step, _zeros(given, trained)), given)


_values.defvjp(_values_forward, _values_backward, symbolic_zeros=True)
