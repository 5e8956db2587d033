"""What is evaluated, models that share a base and see the same batches, and what an evaluation asks of them.

An `Evaluation` says what it would run before anything does: the same calls are run, or only compiled.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax

from lora_jax import sharding, tree
from lora_jax.model import prompts, transformer
from lora_jax.training import population


@dataclasses.dataclass(frozen=True)
class Call:
  """A function of a model's parameters: `fn(config, params, *arrays, *static)`.

  Fields:
    take: gets the answers, arrays with a leading P, where the call is run.
    static: hashable.
  """

  fn: Callable
  config: transformer.Config
  arrays: tuple
  take: Callable[[Any], None]
  static: tuple = ()


@dataclasses.dataclass(frozen=True)
class Members:
  """Models of one config that are evaluated together.

  Fields:
    shared: the parameters that all have; of one model all of them.
    own: those that each has for itself [P, ...], None in the places of others; None for one model.
    soft: the soft tokens that they ask for, `prompts.of` any of them.
    n: P.
  """

  shared: Any
  own: Any = None
  soft: prompts.Soft | None = None
  n: int = 1

  def run(self, call: Call) -> Any:
    """What each member answers, arrays with a leading P, all of them in each process."""
    return sharding.to_host(self._jitted()(call.fn, call.config, call.static, self.own, self.shared, call.arrays))

  def compile(self, call: Call) -> None:
    """Compiles what `run` runs."""
    self._jitted().lower(call.fn, call.config, call.static, self.own, self.shared, call.arrays).compile()

  def _jitted(self) -> Callable:
    return _jitted(self.own is not None)

  def shapes(self) -> "Members":
    """Members to compile for, whose arrays may be given away meanwhile."""

    def shape(x):
      # An array that has no place of its own lowers to another program than a shape that has one.
      placed = getattr(x, "committed", False)
      return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding, weak_type=x.weak_type) if placed else x

    return dataclasses.replace(self, own=jax.tree.map(shape, self.own), shared=jax.tree.map(shape, self.shared))


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """What is asked of members, and what it comes to.

  Fields:
    calls: made as they are asked for.
    result: a value for each member, once all calls are run.
  """

  members: Members
  calls: Iterable[Call]
  result: Callable[[], list]

  def run(self) -> list:
    """Runs the calls; the result."""
    for call in self.calls:
      call.take(self.members.run(call))
    return self.result()

  def compile(self) -> None:
    """Compiles what `run` would run."""
    for call in self.calls:
      self.members.compile(call)


def one(params: Any) -> Members:
  """One model as `Members`."""
  return Members(params, soft=prompts.of(params))


@functools.cache
def _jitted(several: bool) -> Callable:
  """`_run`, compiled for one model or several."""
  return jax.jit(_run, static_argnums=(0, 1, 2), compiler_options=population.compiler_options() if several else None)


def _run(fn, config, static, own, shared, arrays):
  if own is None:
    return jax.tree.map(lambda x: x[None], fn(config, shared, *arrays, *static))
  each = lambda own: fn(config, tree.join(own, shared), *arrays, *static)
  return jax.vmap(each, spmd_axis_name="population")(own)
