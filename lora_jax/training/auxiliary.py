"""A tree beside the one that is trained, such as the reference of a preference loss; see `aux` in objectives/."""

from typing import Any

import jax
from flax import struct

from lora_jax import errors
from lora_jax.model import prompts


@struct.dataclass
class Auxiliary:
  """A tree whose leaves that are arrays of the frozen tree are not there a second time.

  Fields:
    own: the other leaves.
    places: for each leaf of the tree which leaf of the frozen tree it is, or None.
    structure: of the tree.
  """

  own: list[jax.Array]
  places: tuple[int | None, ...] = struct.field(pytree_node=False)
  structure: Any = struct.field(pytree_node=False)

  def whole(self, frozen: Any) -> Any:
    """The tree; `frozen` is the one that it was made beside."""
    leaves, own = jax.tree.leaves(frozen), iter(self.own)
    return self.structure.unflatten([next(own) if i is None else leaves[i] for i in self.places])


def beside(tree: Any, frozen: Any) -> Auxiliary:
  """The tree without copies of what `frozen` has."""
  same = lambda x: (pointer(x), x.shape, x.dtype)
  at = {same(x): i for i, x in enumerate(jax.tree.leaves(frozen)) if isinstance(x, jax.Array) and pointer(x)}
  leaves, structure = jax.tree.flatten(tree)
  places = tuple(at.get(same(x)) for x in leaves)
  return Auxiliary([x for x, i in zip(leaves, places, strict=True) if i is None], places, structure)


def resolve(aux: Any, frozen: Any) -> Any:
  """The tree of an `Auxiliary`; anything else as it is."""
  return aux.whole(frozen) if isinstance(aux, Auxiliary) else aux


def pointer(x: jax.Array) -> int | None:
  """Where an array's numbers are in memory; None for what holds none."""
  if x.size == 0 or jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
    return None
  return x.addressable_shards[0].data.unsafe_buffer_pointer()


def check_soft(soft: prompts.Soft | None, aux: Any) -> None:
  """UserError where batches have soft tokens that the model `aux` does not know: it would read other rows for them."""
  if soft and isinstance(aux, dict) and "embed" in aux and prompts.of(aux) is None:
    raise errors.UserError(
      "config.method has soft tokens in its texts, which the model that config.objective compares with does not have; "
      "train another method, such as prefix_tuning, whose prompt is not among the tokens"
    )
