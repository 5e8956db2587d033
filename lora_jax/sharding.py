"""Where arrays live: one mesh with the axes population, data, fsdp and tensor, and rules from names to partition specs.

One device is the trivial mesh; the code is the same.
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
MESH = ("population", *AXES)  # the first spreads members that are trained together, who tell each other nothing
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
  """A mesh of `population * data * fsdp * tensor` devices; one of them may be -1: all that remain.

  Args:
    data: copies of the model, which share out the rows of a batch.
    fsdp: devices that the weights are spread over; they share out rows too.
    tensor: devices that heads and hidden units are spread over.
    population: devices that the members of a sweep are spread over.
  """
  sizes, n = dict(zip(MESH, (population, data, fsdp, tensor), strict=True)), jax.device_count()
  known = math.prod(s for s in sizes.values() if s > 0)
  if list(sizes.values()).count(-1) > 1 or any(s == 0 or s < -1 for s in sizes.values()):
    raise errors.UserError(f"config.mesh: sizes are positive, at most one is -1; got {sizes}")
  if -1 in sizes.values() and known <= n and n % known:
    raise errors.UserError(f"config.mesh: {known} does not divide the {n} devices that -1 shares out")
  shape = tuple(n // known if s == -1 else s for s in sizes.values())
  if math.prod(shape) > n or 0 in shape:
    raise errors.UserError(f"config.mesh asks for {known} devices at least, there are {n} ({jax.default_backend()})")
  return jax.make_mesh(shape, MESH, axis_types=(AxisType.Auto,) * len(MESH), devices=jax.devices()[: math.prod(shape)])


class Placer:
  """A function from a weight's name and shape to its sharding.

  A mesh axis that does not divide its dimension (3 kv heads over 2 devices) is dropped there: that dimension is
  replicated.
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
  """`place` for leaves [P, ...] of a population; P has to be a multiple of the mesh's population axis."""

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
  """The tree with every leaf where `place` says; of what each process has for itself all have the same."""
  return jax.tree.map(put_leaf, params, shardings(params, place))


def put_leaf(x: jax.Array | np.ndarray, where: jax.sharding.Sharding) -> jax.Array:
  """An array on the devices of a sharding; if each process has one for itself, all have the same."""
  if where.is_fully_addressable or not _is_here(x):
    return jax.device_put(x, where)
  # From an array of one process alone to all of them device_put returns one that cannot be read.
  if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    return jax.random.wrap_key_data(put_leaf(jax.random.key_data(x), where), impl=jax.random.key_impl(x))
  return jax.make_array_from_callback(x.shape, where, np.asarray(x).__getitem__)


def put_batch(batch: dict[str, np.ndarray], mesh: jax.sharding.Mesh, stack: int = 0) -> dict[str, jax.Array]:
  """This process's rows of a global batch, split over data and fsdp; `stack` axes may precede that of the rows."""
  s = NamedSharding(mesh, P(*(None,) * stack, *BATCH))
  return {k: jax.make_array_from_process_local_data(s, x) for k, x in batch.items()}


def replicate(batch: dict[str, np.ndarray], mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
  """A batch that every process has whole, split over data and fsdp where its rows divide, else on all devices."""

  def put(x):
    spec = BATCH if x.shape[0] % batch_divisor(mesh) == 0 else P()
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda index: x[index])

  return {k: put(np.asarray(x)) for k, x in batch.items()}


def to_host(params: Any) -> Any:
  """The tree as arrays that this process can read whole; gathers what is spread over processes."""
  if all(map(_is_here, jax.tree.leaves(params))):
    return params
  from jax.experimental import multihost_utils

  gather = lambda x: multihost_utils.process_allgather(x, tiled=True)
  return jax.tree.map(lambda x: x if _is_here(x) else gather(x), params)


def _is_here(x) -> bool:
  """Whether this process has all of an array; what each has for itself would be gathered n times."""
  return getattr(x, "is_fully_addressable", True)


def batch_divisor(mesh: jax.sharding.Mesh) -> int:
  """What the batch size has to be a multiple of."""
  return mesh.shape["data"] * mesh.shape["fsdp"]


def splits(x: jax.Array) -> bool:
  """Whether a mesh of ours is set whose data and fsdp axes divide the rows of `x` [B, ...]."""
  mesh = jax.sharding.get_abstract_mesh()
  return not mesh.empty and all(a in mesh.shape for a in AXES) and x.shape[0] % batch_divisor(mesh) == 0


def constrain(x: jax.Array) -> jax.Array:
  """Keeps activations [B, ...] split over data and fsdp; nothing where no mesh is set."""
  return jax.lax.with_sharding_constraint(x, BATCH) if splits(x) else x
