"""VeRA: vector-based random matrix adaptation (Kopiczko et al. 2023, https://arxiv.org/abs/2310.11454).

`W x + b * (B (d * (A x)))`, equation 2: A and B are random, frozen, and the same for all matrices; each matrix trains
the vectors b and d alone, and uses the first columns of A and rows of B, as many as it has inputs and outputs.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from lora_jax import architecture, errors, families, transformer, tree, weights
from lora_jax.methods import _peft, _targets
from lora_jax.values import Count, Probability


@struct.dataclass
class VeRA(weights.Additive):
  """`W + A diag(d) B diag(b)`, A applied first.

  Stacked over layers every field but `shared` has a leading L.

  Fields:
    base: the adapted weight [*in, *out], an array or a node.
    d: float32 [R].
    b: float32 [*out].
    scale: float32 []; 1, or 0 in layers that are not adapted.
    key: random key []; present only in a training forward, where it switches dropout on.
    shared: (A [R, max in], B [max out, R]), float32, present after `weights.bind`.
    dropout: probability that an input element is dropped before A.
  """

  base: weights.Weight
  d: jax.Array
  b: jax.Array
  scale: jax.Array
  key: jax.Array | None = None
  shared: tuple[jax.Array, jax.Array] | None = None
  dropout: float = struct.field(pytree_node=False, default=0.0)

  def bind(self, shared: Mapping) -> "VeRA":
    """The node with A and B of `params["shared"]`."""
    return self.replace(shared=(shared["vera"]["a"], shared["vera"]["b"]))

  def _factors(self) -> tuple[jax.Array, jax.Array]:
    """A [*in, R], and B with b in it [R, *out], of a node that is not stacked."""
    if self.shared is None:
      raise ValueError("a VeRA node computes only after weights.bind(params)")
    a, b = self.shared
    inner, outer = self.shape[: -self.b.ndim], self.b.shape
    b = self.scale * self.b.reshape(-1) * b[: math.prod(outer)].T
    return a[:, : math.prod(inner)].T.reshape(*inner, -1), b.reshape(-1, *outer)

  def change(self, spec: str, x: jax.Array, dtype: Any = None) -> jax.Array:
    """`b * (B (d * (A dropout(x))))`; b multiplies B, so that its gradient needs no output to be kept."""
    spec_a, spec_b = weights.split_spec(spec)
    a, b = self._factors()
    h = weights.dot(spec_a, weights.dropout(x, self.dropout, self.key), a, jnp.float32)
    return weights.dot(spec_b, (h * self.d).astype(x.dtype), b, dtype)

  def layer_delta(self) -> jax.Array:
    """What is added to a weight that is not stacked, float32."""
    a, b = self._factors()
    return jnp.tensordot(a * self.d, b, 1, precision="highest")

  def delta(self) -> jax.Array:
    """What is added to the weight, float32, in the shape of `base`."""
    axes = jax.tree.map(lambda _: 0, self).replace(shared=None if self.shared is None else (None, None))
    return jax.vmap(VeRA.layer_delta, (axes,))(self) if self.scale.ndim else self.layer_delta()

  def n_padding(self, mask: "VeRA") -> int:
    """How many trained numbers belong to layers that are not adapted."""
    layers = int(np.sum(np.asarray(self.scale) == 0))
    each = (self.d.size * mask.d + self.b.size * mask.b) // max(self.scale.size, 1)
    return layers * each


def init(
  key: jax.Array,
  params: Any,
  *,
  rank: Count = 256,
  dropout: Probability = 0.0,
  targets: str | Sequence[str] = "q,v",
  d_init: float = 0.1,
) -> tuple[Any, Any]:
  """Wraps the target matrices in `VeRA`; b starts at zero, so the model does not change.

  Args:
    key: of A and B, uniform within Kaiming's bound sqrt(6 / fan in), as in PEFT.
    params: a model's tree; the adapted weights may be arrays or nodes.
    rank: R, of all matrices.
    dropout: probability of dropping an input element of A in training.
    targets: as those of `lora.init`.
    d_init: what d starts at.

  Returns:
    (params, mask): True at the leaves `d` and `b`, float32; `params["shared"]["vera"]` holds A and B.
  """
  if not 0 <= dropout < 1 or rank < 1:
    raise errors.UserError(f"VeRA needs rank >= 1 and 0 <= dropout < 1, not rank={rank}, dropout={dropout}")
  if "vera" in params.get("shared", {}):
    raise errors.UserError("VeRA is there already; its random matrices cannot be shared by a second one")
  params = _targets.split(params, targets)
  linear = _targets.matrices(params)
  chosen = _targets.select(targets, linear, "config.method.targets")
  most = [max(math.prod(s[i]) for k in chosen if (s := _split(k, linear[k]))) for i in (0, 1)]

  def uniform(name, shape):
    bound = math.sqrt(6 / shape[1])
    return jax.random.uniform(tree.fold(key, f"shared/vera/{name}"), shape, jnp.float32, -bound, bound)

  def node(k, w, layers):
    d = jnp.full((*layers.shape, rank), d_init, jnp.float32)
    b = jnp.zeros((*layers.shape, *_split(k, w)[1]), jnp.float32)
    return VeRA(w, d, b, jnp.asarray(layers, jnp.float32), dropout=float(dropout))

  arrays = {"a": uniform("a", (rank, most[0])), "b": uniform("b", (most[1], rank))}
  params = _targets.wrap(params, chosen, node)
  params = params | {"shared": params.get("shared", {}) | {"vera": arrays}}
  return params, _targets.mask(params, VeRA, ("d", "b"))


def _split(k: str, w: weights.Weight) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """Input and output axes of a matrix for one layer."""
  shape = w.shape[int(transformer.stacked(k)) :]
  return shape[: transformer.in_axes(k)], shape[transformer.in_axes(k) :]


PEFT_TYPE = "VERA"
PEFT_SHARED = ("vera_A", "vera_B")  # tensors of the whole model, not of a module
FIELDS = {"b": "vera_lambda_b", "d": "vera_lambda_d"}


def to_peft(
  params: Any, keys: Sequence[families.Key], trained: Collection[str] = ()
) -> tuple[dict, dict[str, np.ndarray]] | None:
  """(adapter config, tensors by Hugging Face module name) of the VeRA nodes in `params`; None if it has none.

  `vera_lambda_b` is [out], `vera_lambda_d` [r], and once `vera_A` [r, max in] and `vera_B` [max out, r].
  """
  nodes = _peft.nodes(params, keys, VeRA)
  if not nodes:
    return None
  shared = {k: np.asarray(params["shared"]["vera"][k.lower()[-1]]) for k in PEFT_SHARED}
  tensors, adapted = {}, {}
  for key, node in nodes.items():
    stack = node.scale.ndim
    _check_order(key, node.shape[stack:])
    sizes, pattern = key.sizes(node.shape[stack:]), _peft.reverse(key.low_rank()[1])
    d, b = (np.asarray(x).reshape(-1, *x.shape[stack:]) for x in (node.d, node.b))
    for i in np.flatnonzero(np.atleast_1d(node.scale)):
      module = key.module.format(i)
      adapted[module] = d.shape[1]
      tensors[f"{module}.{FIELDS['b']}"] = _peft.rearrange(b[i][None], pattern, sizes)[:, 0]
      tensors[f"{module}.{FIELDS['d']}"] = d[i]
  first = next(iter(nodes.values()))
  config = {
    "peft_type": PEFT_TYPE,
    "r": len(shared["vera_A"]),
    "vera_dropout": first.dropout,
    "target_modules": _peft.target_modules(adapted, keys, tree.flatten(params, is_leaf=weights.is_node)),
    "save_projection": True,
    "bias": "none",
    "fan_in_fan_out": any(key.transposed for key in nodes),
  }
  return config, tensors | shared


def _check_order(key: families.Key, shape: Sequence[int]) -> None:
  """Raises UserError where Hugging Face orders inputs or outputs otherwise: the first rows of B would be others."""
  n = transformer.in_axes(key.path)
  for pattern, axes, r in zip(key.low_rank(), (shape[:n], shape[n:]), (-1, 0), strict=True):
    numbers = np.expand_dims(np.arange(math.prod(axes)).reshape(axes), r)
    if np.any(np.diff(_peft.rearrange(numbers, _peft.reverse(pattern), key.sizes(shape)).ravel()) < 0):
      raise errors.UserError(f"VeRA in PEFT's form does not fit {key.module}, whose heads are stored in another order")


def from_peft(
  params: Any, keys: Sequence[families.Key], config: Mapping, left: dict[str, np.ndarray], wrong: list[str]
) -> Any:
  """The inverse of `to_peft`: `params` with VeRA nodes; see formats/peft.py."""
  rank, flat = config.get("r", 256), tree.flatten(params, is_leaf=weights.is_node)
  a, b = shared = [left.pop(k, None) for k in PEFT_SHARED]
  if missing := [k for k, x in zip(PEFT_SHARED, shared, strict=True) if x is None]:
    wrong.append(
      f"no {', '.join(missing)}, which would follow from torch's random numbers; save with save_projection=True"
    )
  elif a.ndim != 2 or b.ndim != 2 or not a.shape[0] == rank == b.shape[1]:
    wrong.append(f"vera_A is {a.shape} and vera_B {b.shape}, expected [r, in] and [out, r] with r={rank}")
    a = b = None
  for key in keys:
    modules = [key.module.format(i) for i in range(flat[key.path].shape[0] if "{}" in key.hf else 1)]
    found = [any(f"{m}.{s}" in left for s in FIELDS.values()) for m in modules]
    if not any(found) or not transformer.in_axes(key.path) or architecture.stack_axes(key.path) > 1:
      continue
    w = flat[key.path]
    inner, outer = _split(key.path, w)
    with errors.listed(wrong):
      _check_order(key, (*inner, *outer))
    if not (a is None or b is None) and (math.prod(inner) > a.shape[1] or math.prod(outer) > len(b)):
      wrong.append(f"vera_A {a.shape} or vera_B {b.shape} is too small for {modules[0]}")
    values = {"d": np.zeros((len(modules), rank), np.float32), "b": np.zeros((len(modules), *outer), np.float32)}
    for i in np.flatnonzero(found):
      for f, s in FIELDS.items():
        view = values[f][i]  # the order is that of our axes
        view[...] = _peft.take(left, wrong, f"{modules[i]}.{s}", (view.size,)).reshape(view.shape)
    stack = slice(None) if "{}" in key.hf else 0
    d, lambda_b, scale = (jnp.asarray(np.float32(x)[stack]) for x in (values["d"], values["b"], found))
    flat[key.path] = VeRA(w, d, lambda_b, scale, dropout=float(config.get("vera_dropout") or 0))
  params = tree.map_named(lambda k, _: flat[k], params, is_leaf=weights.is_node)
  vera = {k: jnp.asarray(x, jnp.float32) for k, x in zip("ab", shared, strict=True) if x is not None}
  return params | {"shared": params.get("shared", {}) | {"vera": vera}}
