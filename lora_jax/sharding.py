"""Places arrays on devices: one mesh with the axes population, data, fsdp and tensor, and rules from names to specs.

A single device is a trivial mesh and needs no other code.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from lora_jax import errors, tree
from lora_jax.values import Count

AXES = ("data", "fsdp", "tensor")
MESH = ("population", *AXES)  # `population` spreads members that train together without communication
BATCH = P(("data", "fsdp"))
Axis = Literal[-1] | Count

# Megatron's split of heads and hidden units over `tensor`, the other matrix axis over `fsdp`; the leading None is
# L, and the next one E. A rule is for a weight, which itself says how its tensors are split.
KERNEL = "kernel(/(q|k|v|gate|up))?(/(base|lower|upper))*$"  # a matrix or a part of a fused one, in adapters or not
RULES = (
  (rf"embed/{KERNEL}", P("tensor", "fsdp")),
  (rf"head/{KERNEL}", P("fsdp", "tensor")),
  (rf"(attn|cross)/(q|k|v|qkv)/{KERNEL}", P(None, "fsdp", "tensor", None)),
  (rf"(attn|cross)/o/{KERNEL}", P(None, "tensor", None, "fsdp")),
  (rf"mlp/(gate|up)/{KERNEL}", P(None, "fsdp", "tensor")),
  (rf"mlp/gate_up/{KERNEL}", P(None, "fsdp", None, "tensor")),
  (rf"mlp/down/{KERNEL}", P(None, "tensor", "fsdp")),
  (rf"moe/(gate|up)/{KERNEL}", P(None, None, "fsdp", "tensor")),
  (rf"moe/down/{KERNEL}", P(None, None, "tensor", "fsdp")),
)


def make_mesh(data: Axis = -1, fsdp: Axis = 1, tensor: Axis = 1, population: Axis = 1) -> jax.sharding.Mesh:
  """A mesh of `population * data * fsdp * tensor` devices. One size may be -1: all remaining devices.

  Args:
    data: number of copies of the model, which share the rows of a batch.
    fsdp: number of devices that the weights are spread over; they share the rows too.
    tensor: number of devices that heads and hidden units are spread over.
    population: number of devices that the members of a sweep are spread over.
  """
  sizes = dict(zip(MESH, (population, data, fsdp, tensor), strict=True))
  n = jax.device_count()
  known = math.prod(s for s in sizes.values() if s > 0)
  if list(sizes.values()).count(-1) > 1 or any(s == 0 or s < -1 for s in sizes.values()):
    raise errors.UserError(f"config.mesh: sizes are positive, at most one is -1; got {sizes}")
  if -1 in sizes.values() and known <= n and n % known:
    raise errors.UserError(f"config.mesh: {known} does not divide the {n} devices, of which -1 takes the rest")
  shape = tuple(n // known if s == -1 else s for s in sizes.values())
  if math.prod(shape) > n or 0 in shape:
    raise errors.UserError(f"config.mesh asks for at least {known} devices, there are {n} ({jax.default_backend()})")
  return jax.make_mesh(shape, MESH, axis_types=(AxisType.Auto,) * len(MESH), devices=jax.devices()[: math.prod(shape)])


class Placer:
  """A function from a weight's name and shape to its sharding.

  Where a mesh axis does not divide a dimension (3 kv heads over 2 devices), that dimension is replicated.
  """

  def __init__(self, mesh: jax.sharding.Mesh, rules: Sequence[tuple[str, P]] = RULES):
    self.mesh = mesh
    self.spec = tree.first_match(rules, P())

  def __call__(self, name: str, shape: tuple[int, ...]) -> NamedSharding:
    return self.fit(self.spec(name), shape)

  def fit(self, spec: P, shape: tuple[int, ...]) -> NamedSharding:
    """The sharding of an array for a spec whose axes may not divide all of its dimensions."""
    return fit(self.mesh, spec, shape)


def fit(mesh: jax.sharding.Mesh, spec: P, shape: tuple[int, ...]) -> NamedSharding:
  """The sharding of an array; dimensions that the axes of `spec` do not divide are replicated."""
  pairs = zip(spec[: len(shape)], shape, strict=False)
  return NamedSharding(mesh, P(*(s if s is not None and n % _axis_size(mesh, s) == 0 else None for s, n in pairs)))


def stacked(place: Callable[[str, tuple], NamedSharding]) -> Callable[[str, tuple], NamedSharding]:
  """`place` for leaves [P, ...] of a population. P must be a multiple of the mesh's population axis."""

  def each(name, shape):
    sharding = place(name, shape[1:])
    return NamedSharding(sharding.mesh, P("population", *sharding.spec))

  return each


def _axis_size(mesh, axes) -> int:
  return math.prod(mesh.shape[a] for a in ([axes] if isinstance(axes, str) else axes))


def shardings(params: Any, place: Callable[[str, tuple], NamedSharding]) -> Any:
  """The tree of shardings of a tree of arrays or shapes."""
  return tree.map_named(lambda k, x: place(k, x.shape), params)


def put(params: Any, place: Callable[[str, tuple], NamedSharding]) -> Any:
  """The tree with every leaf placed by `place`. Leaves that each process holds for itself must be equal."""
  return jax.tree.map(put_leaf, params, shardings(params, place))


def put_leaf(x: jax.Array | np.ndarray, where: jax.sharding.Sharding) -> jax.Array:
  """The array on the devices of a sharding. If each process holds its own array, all must be equal."""
  if where.is_fully_addressable or not _is_here(x):
    return jax.device_put(x, where)
  # From a single process's array to all processes, device_put returns an array that cannot be read.
  if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    return jax.random.wrap_key_data(put_leaf(jax.random.key_data(x), where), impl=jax.random.key_impl(x))
  return jax.make_array_from_callback(x.shape, where, np.asarray(x).__getitem__)


def put_batch(batch: dict[str, np.ndarray], mesh: jax.sharding.Mesh, stack: int = 0) -> dict[str, jax.Array]:
  """The global batch, split over data and fsdp, from this process's rows; `stack` axes precede the axis of rows."""
  s = NamedSharding(mesh, P(*(None,) * stack, *BATCH))
  return {k: jax.make_array_from_process_local_data(s, x) for k, x in batch.items()}


def replicate(batch: dict[str, np.ndarray], mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
  """A batch that every process holds whole: split over data and fsdp if they divide its rows, else on all devices."""

  def put(x):
    spec = BATCH if x.shape[0] % batch_divisor(mesh) == 0 else P()
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda index: x[index])

  return {k: put(np.asarray(x)) for k, x in batch.items()}


def to_host(params: Any) -> Any:
  """The tree with arrays that this process can read whole. Gathers arrays that are spread over processes."""
  if all(map(_is_here, jax.tree.leaves(params))):
    return params
  from jax.experimental import multihost_utils

  gather = lambda x: multihost_utils.process_allgather(x, tiled=True)
  return jax.tree.map(lambda x: x if _is_here(x) else gather(x), params)


def _is_here(x) -> bool:
  """Whether this process can read all of an array. Gathering such an array would give n copies."""
  return getattr(x, "is_fully_addressable", True)


def batch_divisor(mesh: jax.sharding.Mesh) -> int:
  """The number that must divide the batch size."""
  return mesh.shape["data"] * mesh.shape["fsdp"]


def splits(x: jax.Array) -> bool:
  """Whether the current mesh is one of ours and its data and fsdp axes divide the rows of `x` [B, ...]."""
  mesh = jax.sharding.get_abstract_mesh()
  return not mesh.empty and all(a in mesh.shape for a in AXES) and x.shape[0] % batch_divisor(mesh) == 0


def constrain(x: jax.Array) -> jax.Array:
  """The activations [B, ...], kept split over data and fsdp; unchanged without a mesh."""
  return jax.lax.with_sharding_constraint(x, BATCH) if splits(x) else x
