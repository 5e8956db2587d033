"""Populations: several adapters trained by one program over one frozen base.

`jax.vmap` runs over what members have of their own (trained leaves, optimiser states, hyperparameters, seeds, scales);
what they share is not batched, so that a product with the base is one matmul over P x B x T. Each member computes what
a run of its own would.

LoRA of smaller rank is padded with zero columns and rows; a matrix that a member does not adapt has a node of rank 0.
Both have zero gradients, so value and moments of the padding stay exactly zero.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from lora_jax import errors, tree, weights
from lora_jax.training import auxiliary, objectives, optim as optim_lib, train


@struct.dataclass
class Hyper:
  """What the members of a population set for themselves, stacked: every leaf has a leading P.

  Fields:
    learning_rates: float32 [S], by step; after the last of a member its last one.
    steps: int32 [], after which the member rests.
    seed: uint32 []; of dropout.
    optim: {keyword of `optim.transformation`: float32 []} where members differ.
    dropout: {name of a node: float32 []} where members differ.
    batch: int32 []; which of the batches of a step is the member's.
  """

  learning_rates: jax.Array
  steps: jax.Array
  seed: jax.Array
  optim: dict[str, jax.Array]
  dropout: dict[str, jax.Array]
  batch: jax.Array


@struct.dataclass
class State:
  """What training a population changes; every leaf has a leading P.

  Fields:
    members: train.State.
    alive: bool; False from the step on whose loss or gradient was not finite: such a member changes no more.
  """

  members: train.State
  alive: jax.Array


@dataclasses.dataclass(frozen=True)
class Trees:
  """The parameters of a population, apart by who has them.

  Fields:
    trainable: trained leaves [P, ...].
    own: frozen leaves that members do not share [P, ...], such as scales; None in the places of others.
    shared: the frozen leaves of all.
    held: leaves that methods change between steps [P, ...], or None.
    dropout: {node: rates of the members} where they differ.
  """

  trainable: Any
  own: Any
  shared: Any
  held: Any
  dropout: dict[str, list[float]]

  def member(self) -> Any:
    """The whole tree of any member, as shapes."""

    def whole(trainable, own, shared, held):
      one = jax.tree.map(lambda x: x[0], (trainable, own, held))
      params = tree.join(tree.join(one[0], one[1]), shared)
      return params if held is None else tree.join(params, one[2])

    return jax.eval_shape(whole, self.trainable, self.own, self.shared, self.held)


def align(members: Sequence[tuple[Any, Any]]) -> tuple[list[tuple[Any, Any]], dict[str, list[float]]]:
  """The (params, mask) of members as trees of one structure and shape, and their rates of dropout where they differ.

  Raises:
    UserError: the members differ in more than ranks and targets of LoRA or DoRA, alpha and dropout.
  """
  is_node = weights.is_node
  flat = [[dict(tree.flatten(x, is_leaf=is_node)) for x in member] for member in members]
  names = flat[0][0].keys()
  for params, _ in flat[1:]:
    if odd := sorted(names ^ params.keys()):
      raise errors.UserError(f"members of one population have the same leaves; {odd[0]} is in some of them alone")
  made = {k: _aligned(k, [(p[k], m[k]) for p, m in flat]) for k in names}
  rates = _unify_dropout(made)
  out = []
  for i, (params, mask) in enumerate(members):
    both = [tree.map_named(lambda k, _, j=j: made[k][i][j], x, is_leaf=is_node) for j, x in enumerate((params, mask))]
    out.append(tuple(both))
  return out, rates


def _aligned(name: str, pairs: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
  """Weights at one place, each with its mask, as weights of one structure."""
  adapters = [p for p in pairs if isinstance(p[0], weights.Adapter)]
  if adapters:
    like, mask = adapters[0]
    if any(type(w) is not type(like) for w, _ in adapters):
      raise errors.UserError(f"members of one population adapt {name} by weights of one kind")
    idle = lambda w, m: (like.idle(w), mask.replace(base=m))
    pairs = [p if isinstance(p[0], weights.Adapter) else idle(*p) for p in pairs]
  if not all(isinstance(w, weights.Weight) and type(w) is type(pairs[0][0]) for w, _ in pairs):
    return pairs
  pairs = _aligned_parts(name, pairs)
  columns = max(w.columns for w, _ in pairs)
  padded = [w.padded(columns) for w, _ in pairs]
  return [(w, _like(m, w)) for w, (_, m) in zip(padded, pairs, strict=True)]


def _like(mask: Any, w: Any) -> Any:
  """A mask in the structure of a weight that has forgotten what only its file needs."""
  return jax.tree.unflatten(jax.tree.structure(w), jax.tree.leaves(mask))


def _aligned_parts(name: str, pairs: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
  """Weights of one class at one place, those inside them aligned."""
  each = [(w.held(), m.held()) for w, m in pairs]
  made = {part: _aligned(f"{name}/{part}", [(w[part], m[part]) for w, m in each]) for part in each[0][0]}

  def with_parts(x, i, j):
    return x.map(lambda part, _: made[part][i][j])

  return [tuple(with_parts(x, i, j) for j, x in enumerate(pair)) for i, pair in enumerate(pairs)]


def _unify_dropout(made: Mapping[str, list[tuple[Any, Any]]]) -> dict[str, list[float]]:
  """Gives the nodes of `made` at each place one static rate of dropout, in place; returns the rates that differed."""
  found = {}
  for k, pairs in made.items():
    seen: dict[str, list[float]] = {}
    for w, _ in pairs:
      note = lambda n, v: seen.setdefault(n, []).append(v.dropout) or v
      weights.map_nodes(note, {k: w})
    differ = {n: rates for n, rates in seen.items() if len(set(rates)) > 1}
    for i, pair in enumerate(pairs if differ else ()):
      set_rate = lambda n, v: v.replace(dropout=max(differ[n])) if n in differ else v
      made[k][i] = tuple(weights.map_nodes(set_rate, {k: x})[k] for x in pair)
    found |= differ
  return found


def stack(members: Sequence[tuple[Any, Any]], held: Sequence[Any] | None = None) -> Trees:
  """The (params, mask) of members as one population; leaves that are one array in all of them are shared.

  Args:
    held: for each member the mask of frozen leaves that its method changes between steps.
  """
  aligned, rates = align(members)
  splits = [tree.split(p, m) for p, m in aligned]
  trainable, frozen = ([s[i] for s in splits] for i in (0, 1))
  structures = {jax.tree.structure(x) for x in trainable}, {jax.tree.structure(x) for x in frozen}
  if any(len(s) > 1 for s in structures):
    raise errors.UserError("members of one population differ in more than their numbers; give them groups of their own")
  for k, *shapes in zip(
    tree.names(aligned[0][0]), *([x.shape for x in jax.tree.leaves(p)] for p, _ in aligned), strict=True
  ):
    if len(set(shapes)) > 1:
      differ = " and ".join(map(str, sorted(set(shapes))))
      raise errors.UserError(f"in members of one population {k} is {differ}; give them groups of their own")
  stacked = lambda xs: jax.jit(lambda xs: jax.tree.map(lambda *leaves: jnp.stack(leaves), *xs))(xs)
  kept = None
  if held is not None:
    pairs = [tree.split(f, tree.split(h, m)[1]) for f, h, (_, m) in zip(frozen, held, aligned, strict=True)]
    kept, frozen = stacked([p[0] for p in pairs]), [p[1] for p in pairs]
  same = jax.tree.map(lambda *leaves: all(x is leaves[0] for x in leaves), *frozen)
  shared = tree.split(frozen[0], same)[0]
  own = stacked([tree.split(f, same)[1] for f in frozen])
  return Trees(stacked(trainable), own, shared, kept, rates)


def unstack(stacked: Any, i: int, like: Any) -> Any:
  """Member i's leaves of a stacked tree, without padding, in the structure and shapes of `like`."""
  flat = tree.flatten(stacked)
  return tree.map_named(lambda k, x: flat[k][(i, *(slice(n) for n in x.shape))], like)


def hyper(
  *,
  steps: Sequence[int],
  seeds: Sequence[int],
  optim: Sequence[Mapping[str, Any]],
  batches: Sequence[int],
  dropout: Mapping[str, list[float]],
) -> Hyper:
  """The hyperparameters of members; see `Hyper`.

  Args:
    optim: of each member the keywords of `optim.make`.
    dropout: as in `Trees`.
  """
  table, made = [], {}
  for n, kw in zip(steps, optim, strict=True):
    schedule = n, tuple(sorted(kw.items()))
    if schedule not in made:
      rate = optim_lib.make(steps=n, **kw)[1]
      rates = jax.jit(jax.vmap(lambda t, rate=rate: jnp.asarray(rate(t), jnp.float32)))(np.arange(n))
      made[schedule] = np.pad(np.asarray(rates), (0, max(steps) - n), mode="edge")
    table.append(made[schedule])
  return Hyper(
    learning_rates=np.stack(table),
    steps=np.array(steps, np.int32),
    seed=np.array(seeds, np.uint32),
    optim={k: np.array(v, np.float32) for k, v in _different(optim).items()},
    dropout={k: np.array(v, np.float32) for k, v in dropout.items()},
    batch=np.array(batches, np.int32),
  )


# Optimisers whose step depends on means over a leaf, which zeros for further ranks would change, and what gives ranks.
SEE_PADDING = ("adafactor",)
RANKS = ("rank", "rank_pattern")
NUMBERS = ("weight_decay", "clip_norm", "b1", "b2", "eps")  # keywords of an optimiser that may differ in a population


def _different(optim: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
  """The numbers of the optimiser in which members differ; no clipping is an infinite bound."""
  values = {k: [kw[k] for kw in optim] for k in NUMBERS}
  values["clip_norm"] = [x or np.inf for x in values["clip_norm"]]
  return {k: v for k, v in values.items() if len(set(v)) > 1}


def optimiser(hyper: Hyper, **kw: Any) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """The optimiser of one member, whose numbers are traced, and its schedule.

  Args:
    **kw: keywords of `optim.make`, of any of the members; those of the schedule are not used.
  """
  common = {k: v for k, v in kw.items() if k not in optim_lib.SCHEDULE}
  rate = lambda step: hyper.learning_rates[jnp.minimum(step, hyper.learning_rates.size - 1)]
  return optim_lib.transformation(rate, **common | hyper.optim), rate


def init_state(trees: Trees, hyper: Hyper, make_optimiser: Callable) -> State:
  """The state before the first step; `make_optimiser` as in `make_step`."""

  def member(hyper, trainable, held):
    return train.init_state(trainable, make_optimiser(hyper)[0], held)

  members = jax.jit(jax.vmap(member))(hyper, trees.trainable, trees.held)
  return State(members, jnp.ones(hyper.steps.shape, bool))


def make_step(
  forward: Callable,
  objective: objectives.Objective,
  make_optimiser: Callable[[Hyper], tuple[optax.GradientTransformation, optax.Schedule]],
  *,
  shared_batch: bool,
  accumulate: int = 1,
  penalty: Callable[[Any], jax.Array] | None = None,
) -> Callable[[State, Hyper, Any, Any, Any, dict], tuple[State, dict]]:
  """A step `(state, hyper, own, shared, aux, batch) -> (state, metrics [P])` of a whole population.

  Args:
    forward, accumulate, penalty: as in `train.make_step`.
    make_optimiser: the optimiser of one member and its schedule, see `optimiser`.
    shared_batch: whether all members learn from the same batch, whose arrays are [B, ...] then; else they are
      [K, B, ...] and a member takes the one at `hyper.batch`.
  """

  def member(state, alive, hyper, own, shared, aux, batch, common):
    optimiser, rate = make_optimiser(hyper)
    active = alive & (state.step < hyper.steps)
    step = train.make_step(
      forward,
      functools.partial(objective.loss, **common),
      optimiser,
      rate,
      seed=hyper.seed,
      accumulate=accumulate,
      penalty=penalty,
      rates=hyper.dropout,
      active=active,
    )
    batch = batch if shared_batch else jax.tree.map(lambda x: x[hyper.batch], batch)
    state, metrics = step(state, tree.join(own, shared), aux, batch)
    return state, alive & (~active | (metrics["finite"] > 0)), metrics

  run = jax.vmap(member, in_axes=(0, 0, 0, 0, None, None, None, None), spmd_axis_name="population")

  def step(state: State, hyper: Hyper, own: Any, shared: Any, aux: Any, batch: dict) -> tuple[State, dict]:
    common = {"common": objective.common(batch)} if objective.common else {}
    aux = auxiliary.resolve(aux, shared)
    members, alive, metrics = run(state.members, state.alive, hyper, own, shared, aux, batch, common)
    return State(members, alive), metrics

  return step


def compiler_options() -> dict[str, Any] | None:
  """What XLA is told about programs of members: on a GPU to leave low-rank products to cuBLAS.

  It batches them as fast as the kernels that XLA would make and time, dozens for each shape: half of all compiling.
  """
  return {"xla_gpu_enable_triton_gemm": False} if jax.default_backend() == "gpu" else None


def between(change: Callable) -> Callable[[Hyper, State], State]:
  """A method's change between steps for the members that go on after it; see `methods.between`."""

  def member(hyper, state, alive):
    key = jax.random.fold_in(jax.random.key(hyper.seed), state.step)
    goes = alive & (state.step < hyper.steps)
    return jax.tree.map(functools.partial(jnp.where, goes), change(key, state), state)

  return lambda hyper, state: state.replace(members=jax.vmap(member)(hyper, state.members, state.alive))
