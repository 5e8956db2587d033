"""LoKr: a Kronecker product as the change of a matrix (LyCORIS; Yeh et al. 2024, https://arxiv.org/abs/2309.14859,
section 3.3; after Edalati et al. 2022, https://arxiv.org/abs/2212.10650).

`W + s kron(left, right)`, where the larger factor, or both, has low rank.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from lora_jax import errors, tree, weights
from lora_jax.methods import lycoris, targeting
from lora_jax.model import transformer
from lora_jax.values import Count, Probability, Size

KIND = "low rank"
INITS = ("peft", "lycoris")
Factor = Any  # jax.Array, or (a, b) of low rank


@struct.dataclass
class LoKr(weights.Additive):
  """`W + scale * kron(left, right)`, where W is [in, out] with its axes flattened.

  Stacked over layers, every field has a leading L. A factor is an array, or a pair (a [.., R], b [R, ..]) if it has low
  rank. Columns of a and rows of b beyond a layer's own rank are zero and get no gradient.

  Fields:
    base: the adapted weight [*in, *out].
    left: float32 [M, O]; the transpose of `lokr_w1` in torch.
    right: float32 [N, P]; M N is in, O P is out.
    scale: float32 []; alpha / rank.
    rank: int32 []; the R that was asked for.
    key: random key []; present only in a training forward, where it switches dropout on.
    dropout: probability that an output's part of the change is dropped, which PEFT calls `rank_dropout`.
    rescale: whether the outputs that dropout keeps are scaled up.
    factor, both: `decompose_factor` and `decompose_both` of `init`, kept for the adapter file.
  """

  base: Any
  left: Factor
  right: Factor
  scale: jax.Array
  rank: jax.Array
  key: jax.Array | None = None
  dropout: float = struct.field(pytree_node=False, default=0.0)
  rescale: bool = struct.field(pytree_node=False, default=False)
  factor: int = struct.field(pytree_node=False, default=-1)
  both: bool = struct.field(pytree_node=False, default=False)

  TRAINABLE = ("left", "right")

  def change(self, spec: str, x: jax.Array, dtype: Any = None) -> jax.Array:
    """Returns x as [.., M, N] times both factors, so that the product [in, out] is not formed."""
    operands, out = spec.replace(" ", "").split("->")
    x_axes, w_axes = operands.split(",")
    inner = "".join(c for c in w_axes if c not in out)
    outer = "".join(c for c in w_axes if c in out)
    kept = "".join(c for c in x_axes if c not in inner)
    (m, _), (n, _) = shape(self.left), shape(self.right)
    x = jnp.einsum(f"{x_axes}->{kept}{inner}", x)
    x = x.reshape(*x.shape[: len(kept)], m, n)
    specs, factors = zip(*_chain(self.left, "mro"), *_chain(self.right, "nsp"), strict=True)
    factors = [self.scale * factors[0], *factors[1:]]
    product = f"{kept}mn,{','.join(specs)}->{kept}op"
    y = jnp.einsum(product, x, *(f.astype(x.dtype) for f in factors), preferred_element_type=dtype)
    y = y * jnp.asarray(lycoris.output_mask(self.key, self.dropout, y.shape[-2:], self.rescale), y.dtype)
    sizes = dict(zip(w_axes, self.base.shape, strict=True))
    return jnp.einsum(f"{kept}{outer}->{out}", y.reshape(*y.shape[:-2], *(sizes[c] for c in outer)))

  def layer_delta(self) -> jax.Array:
    """Returns `scale * kron(left, right)`, float32, in the shape of a `base` that is not stacked."""
    return (self.scale * jnp.kron(_full(self.left), _full(self.right))).reshape(self.base.shape)

  def clean(self) -> "LoKr":
    """Returns the node with the columns beyond each layer's rank set to zero."""
    rank = self.rank

    def clean(f):
      return (lycoris.within(f[0], rank, -1), lycoris.within(f[1], rank, rank.ndim)) if isinstance(f, tuple) else f

    return self.replace(left=clean(self.left), right=clean(self.right))

  def n_padding(self, mask: "LoKr") -> int:
    """Returns how many trained numbers are in columns beyond a layer's rank or in layers that are not adapted."""
    n = 0
    for name in ("left", "right"):
      f, m = getattr(self, name), getattr(mask, name)
      pairs = zip(f, m, strict=True) if isinstance(f, tuple) else [(f, m)]
      for x, trained in pairs if any(jax.tree.leaves(m)) else ():
        columns = f[0].shape[-1] if isinstance(f, tuple) else 1
        n += lycoris.unused(x, np.minimum(np.asarray(self.rank), columns), columns) if trained else 0
    return n


def shape(f: Factor) -> tuple[int, int]:
  """Returns (rows, columns) of one layer's factor."""
  return (f[0].shape[-2], f[1].shape[-1]) if isinstance(f, tuple) else f.shape[-2:]


def _chain(f: Factor, axes: str) -> list[tuple[str, jax.Array]]:
  a, r, b = axes
  return [(a + r, f[0]), (r + b, f[1])] if isinstance(f, tuple) else [(a + b, f)]


def _full(f: Factor) -> jax.Array:
  return jnp.matmul(*f, precision="highest") if isinstance(f, tuple) else f


def factorization(size: int, factor: int = -1) -> tuple[int, int]:
  """Returns (m, size / m), where m is `factor` if that divides `size`.

  Otherwise m is the largest divisor up to `factor` and sqrt(size). With `factor=-1` the square root is the only limit.
  """
  if factor > 0 and size % factor == 0:
    return factor, size // factor
  most = math.isqrt(size) if factor == -1 else max(1, min(factor, math.isqrt(size)))
  m = max(d for d in range(1, most + 1) if size % d == 0)
  return m, size // m


def sizes(inner: int, outer: int, rank: int, factor: int, both: bool) -> dict[str, tuple[int, ...]]:
  """Returns {"left": (M, O) or (M, R, O), "right": (N, P) or (N, R, P)}; a factor of low rank has the R.

  A factor has low rank if R is less than half of its larger side; the left one only if also `both`.
  """
  (m, n), (o, p) = factorization(inner, factor), factorization(outer, factor)
  left = (m, rank, o) if both and rank < max(m, o) / 2 else (m, o)
  return {"left": left, "right": (n, rank, p) if rank < max(n, p) / 2 else (n, p)}


def init(
  key: jax.Array,
  params: Any,
  *,
  rank: Size = 8,
  alpha: float = 8.0,
  dropout: Probability = 0.0,
  rescale: bool = False,
  targets: str | Sequence[str] = "q,v",
  rank_pattern: Mapping[str, Size] | None = None,
  alpha_pattern: Mapping[str, float] | None = None,
  decompose_factor: Literal[-1] | Count = -1,
  decompose_both: bool = False,
  init: Literal[INITS] = "peft",
) -> tuple[Any, Any]:
  """Wraps the target matrices in `LoKr`; one factor starts at zero, so the model does not change.

  Args:
    rank, alpha, targets, rank_pattern, alpha_pattern: as in `lora.init`; the scale is alpha / rank even if a factor is
      so small that it is kept whole.
    dropout: probability of dropping an output's part of the change in training.
    rescale: whether the outputs that dropout keeps are scaled up.
    decompose_factor: rows and columns of the left factor, or the next smaller divisors; -1: about the square roots.
    decompose_both: whether the left factor also has low rank.
    init: "peft" starts the left factor at zero, "lycoris" the right one. The others are uniform in +-1/sqrt(columns),
      in torch's orientation.

  Returns:
    (params, mask): True at the factors, float32.
  """
  errors.choose(init, dict.fromkeys(INITS, True), "config.method.init")
  lycoris.check_dropout("LoKr", dropout)
  if decompose_factor != -1 and decompose_factor < 1:
    raise errors.UserError(f"LoKr needs config.method.decompose_factor >= 1, or -1, not {decompose_factor}")
  params, plans = lycoris.plan("LoKr", params, targets, rank, alpha, rank_pattern, alpha_pattern)
  static = dict(dropout=float(dropout), rescale=rescale, factor=int(decompose_factor), both=bool(decompose_both))

  def node(k, w, _):
    return _node(tree.fold(key, k), k, w, *plans[k], init, static)

  params = targeting.wrap(params, plans, node)
  return params, targeting.mask(params, LoKr, ("left", "right"))


def layout_of(name: str, inner: int, outer: int, ranks: Sequence[int], static: Mapping) -> dict[str, tuple[int, ...]]:
  """Returns `sizes` for the largest of the layers' ranks; UserError if a factor has low rank in some layers only."""
  each = [sizes(inner, outer, int(r), static["factor"], static["both"]) for r in sorted({int(r) for r in ranks} - {0})]
  if len({tuple(len(s[side]) for side in ("left", "right")) for s in each}) > 1:
    raise errors.UserError(
      f"LoKr: the ranks {sorted({int(r) for r in ranks})} of {name} make a factor whole in some layers only"
    )
  return each[-1]


def _node(key, k, w, ranks, scale, init, static) -> LoKr:
  stack = ranks.shape
  axes, n = w.shape[len(stack) :], transformer.in_axes(k)
  layout = layout_of(k, math.prod(axes[:n]), math.prod(axes[n:]), ranks.reshape(-1), static)
  per_rank = jax.lax.rsqrt(jnp.maximum(ranks.reshape(-1, 1, 1), 1).astype(jnp.float32))

  def factor(i, size, zero):
    """Torch's kaiming_uniform_ divides by the square root of the columns, which are the rows here."""
    side = jax.random.fold_in(key, i)
    if len(size) == 2:
      draw = lambda layer: lycoris.uniform(jax.random.fold_in(side, layer), size) / math.sqrt(size[0])
      f = jnp.zeros((ranks.size, *size)) if zero else jax.vmap(draw)(jnp.arange(ranks.size))
      return f.reshape(*stack, *size)
    a = lycoris.columns(jax.random.fold_in(side, 0), ranks, size[0], lycoris.uniform) / math.sqrt(size[0])
    b = lycoris.columns(jax.random.fold_in(side, 1), ranks, size[2], lycoris.uniform).swapaxes(1, 2) * per_rank
    a, b = (a, jnp.zeros_like(b)) if zero == "b" else (jnp.zeros_like(a), b) if zero == "a" else (a, b)
    return a.reshape(*stack, *size[:2]), b.reshape(*stack, *size[1:])

  # PEFT zeroes torch's `lokr_w1_a` of a left pair, here b. LyCORIS zeroes `lokr_w2_b` of a right pair, here a.
  return LoKr(
    base=w,
    left=factor(0, layout["left"], "b" if init == "peft" else ""),
    right=factor(1, layout["right"], "a" if init == "lycoris" else ""),
    scale=jnp.asarray(scale, jnp.float32),
    rank=jnp.asarray(ranks, jnp.int32),
    **static,
  )
