"""LoHa: the Hadamard product of two low-rank matrices (Hyeon-Woo et al. 2022, https://arxiv.org/abs/2108.06098).

`W + s (A1 B1) o (A2 B2)`, proposition 1: with 2 R (in + out) numbers, the rank can reach R^2. The paper calls it
FedPara; LyCORIS (Yeh et al. 2024, https://arxiv.org/abs/2309.14859, section 3.2) and PEFT call it LoHa.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct

from lora_jax import errors, tree, weights
from lora_jax.methods import lycoris, targeting
from lora_jax.model import transformer
from lora_jax.values import Probability, Size

KIND = "low rank"
INITS = ("peft", "lycoris")
FACTORS = ("a1", "b1", "a2", "b2")


@struct.dataclass
class LoHa(weights.Additive):
  """`W + scale * (a1 b1) o (a2 b2)`.

  Stacked over layers, every field has a leading L. A layer whose rank is below R has zero columns in a1 and a2 and zero
  rows in b1 and b2; their gradient is zero.

  Fields:
    base: the adapted weight [*in, *out].
    a1, a2: float32 [*in, R].
    b1, b2: float32 [R, *out].
    scale: float32 []; alpha / rank.
    rank: int32 []; how many of the R columns are in use.
    key: random key []; present only in a training forward, where it switches dropout on.
    dropout: probability that an output's part of the change is dropped, which PEFT calls `rank_dropout`.
  """

  base: Any
  a1: jax.Array
  b1: jax.Array
  a2: jax.Array
  b2: jax.Array
  scale: jax.Array
  rank: jax.Array
  key: jax.Array | None = None
  dropout: float = struct.field(pytree_node=False, default=0.0)

  TRAINABLE = FACTORS

  def change(self, spec: str, x: jax.Array, dtype: Any = None) -> jax.Array:
    """Returns `x` times the change of the weight.

    The change equals A B, where a row of A [in, R^2] holds all products of an entry of a1 with an entry of a2, and B
    likewise. If A B is less work, the change [in, out] is not formed; otherwise it is, and again in the backward pass.
    """
    b1 = self.b1 * lycoris.output_mask(self.key, self.dropout, self.b1.shape[1:], True)
    a1, a2, b2 = self.a1, self.a2, self.b2
    inner, outer, r = math.prod(a1.shape[:-1]), math.prod(b1.shape[1:]), b1.shape[0]
    if r * r * (inner + outer) < inner * outer:
      a = (a1[..., :, None] * a2[..., None, :]).reshape(*a1.shape[:-1], r * r)
      b = (self.scale * b1[:, None] * b2[None]).reshape(r * r, *b1.shape[1:])
      spec_a, spec_b = weights.split_spec(spec)
      return weights.dot(spec_b, weights.dot(spec_a, x, a), b, dtype)
    product = lambda x, *factors: weights.dot(spec, x, hadamard(*factors), dtype)
    return jax.checkpoint(product)(x, a1, b1, a2, b2, self.scale)

  def layer_delta(self) -> jax.Array:
    """Returns `scale * (a1 b1) o (a2 b2)`, float32, in the shape of a `base` that is not stacked."""
    return hadamard(self.a1, self.b1, self.a2, self.b2, self.scale)

  def clean(self) -> "LoHa":
    """Returns the node with the columns beyond each layer's rank set to zero."""
    axes = dict(a1=-1, b1=self.rank.ndim, a2=-1, b2=self.rank.ndim)
    return self.replace(**{f: lycoris.within(getattr(self, f), self.rank, axis) for f, axis in axes.items()})

  def n_padding(self, mask: "LoHa") -> int:
    """Returns how many trained numbers are in columns beyond a layer's rank."""
    return sum(
      lycoris.unused(getattr(self, f), self.rank, self.b1.shape[self.rank.ndim]) for f in FACTORS if getattr(mask, f)
    )


def hadamard(a1: jax.Array, b1: jax.Array, a2: jax.Array, b2: jax.Array, scale: jax.Array) -> jax.Array:
  """Returns `scale * (a1 b1) o (a2 b2)`, float32."""
  first, second = (jnp.tensordot(a, b, 1, precision="highest") for a, b in ((a1, b1), (a2, b2)))
  return scale * first * second


def init(
  key: jax.Array,
  params: Any,
  *,
  rank: Size = 8,
  alpha: float = 8.0,
  dropout: Probability = 0.0,
  targets: str | Sequence[str] = "q,v",
  rank_pattern: Mapping[str, Size] | None = None,
  alpha_pattern: Mapping[str, float] | None = None,
  init: Literal[INITS] = "peft",
) -> tuple[Any, Any]:
  """Wraps the target matrices in `LoHa`; one factor starts at zero, so the model does not change.

  Args:
    rank, alpha, targets, rank_pattern, alpha_pattern: as in `lora.init`.
    dropout: probability of dropping an output's part of the change in training; the other parts are scaled up.
    init: "peft" draws a1 uniformly in +-1/sqrt(in) and b1, b2 in +-1/sqrt(rank), and sets a2 to zero. "lycoris" draws
      normals with standard deviation 1 for a1 and a2 and 0.1 for b1, and sets b2 to zero.

  Returns:
    (params, mask): True at the four factors, float32.
  """
  errors.choose(init, dict.fromkeys(INITS, True), "config.method.init")
  lycoris.check_dropout("LoHa", dropout)
  params, plans = lycoris.plan("LoHa", params, targets, rank, alpha, rank_pattern, alpha_pattern)

  def node(k, w, _):
    return _node(tree.fold(key, k), k, w, *plans[k], dropout, init)

  params = targeting.wrap(params, plans, node)
  return params, targeting.mask(params, LoHa, FACTORS)


def _node(key, k, w, ranks, scale, dropout, init) -> LoHa:
  stack = ranks.shape
  shape, n = w.shape[len(stack) :], transformer.in_axes(k)
  inner, outer, r = shape[:n], shape[n:], int(ranks.max())

  def factor(i, sizes, draw):
    return lycoris.columns(jax.random.fold_in(key, i), ranks, math.prod(sizes), draw)

  per_rank = jax.lax.rsqrt(jnp.maximum(ranks.reshape(-1, 1, 1), 1).astype(jnp.float32))
  if init == "peft":
    a1, a2 = factor(0, inner, lycoris.uniform) / math.sqrt(math.prod(inner)), jnp.zeros((ranks.size, *inner, r))
    b1, b2 = factor(1, outer, lycoris.uniform) * per_rank, factor(2, outer, lycoris.uniform) * per_rank
  else:
    a1, a2 = factor(0, inner, jax.random.normal), factor(2, inner, jax.random.normal)
    b1, b2 = 0.1 * factor(1, outer, jax.random.normal), jnp.zeros((ranks.size, math.prod(outer), r))
  return LoHa(
    base=w,
    a1=a1.reshape(*stack, *inner, r),
    b1=b1.swapaxes(1, 2).reshape(*stack, r, *outer),
    a2=a2.reshape(*stack, *inner, r),
    b2=b2.swapaxes(1, 2).reshape(*stack, r, *outer),
    scale=jnp.asarray(scale, jnp.float32),
    rank=jnp.asarray(ranks, jnp.int32),
    dropout=float(dropout),
  )
