"""ReLoRA: LoRA that is merged into the weights and restarted every `cycle` steps (Lialin et al. 2023).

https://arxiv.org/abs/2307.05695, algorithm 1. Low-rank changes add up to a change of high rank. Each merge prunes most
of the optimiser's moments of A and B. The learning rate should then start from zero again: use the schedule
"cosine_restarts" with the same `cycle`, see `optim.make_schedule`.
"""

import math
from collections.abc import Collection, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lora_jax import errors, tree, weights
from lora_jax.methods import lora, targeting
from lora_jax.model import architecture
from lora_jax.values import Count, Share
from lora_jax.weights import updates

KIND = "whole weights"
OPTIM = {"learning_rate": 1e-3, "schedule": "cosine_restarts"}  # the authors' README, for pretraining
MODEL = True  # a run saves the merged model

KEEP = {"random": 0.001, "magnitude": 0.1, "zero": 0.0}  # the share of the moments that pruning keeps


def init(
  key: jax.Array,
  params: Any,
  *,
  cycle: Count = 1000,
  alpha: float = 2.0,
  targets: str | Sequence[str] = "all-linear",
  also: str | Sequence[str] = (),
  prune: Literal[*KEEP] = "random",
  keep: Share | None = None,
  **kw: Any,
) -> tuple[Any, Any]:
  """Wraps the target matrices in `weights.LoRA`, as lora.py does.

  Args:
    cycle: steps between two merges.
    rank, alpha, dropout, targets, rank_pattern, alpha_pattern, rslora: as in lora.py. The default alpha / rank is 32 /
      128, as in the paper's code.
    also: regexes of other leaves to train, such as norms and embeddings, as float32 masters.
    prune: which moments of A and B a merge sets to zero: "random" ones, those of small "magnitude", or all ("zero").
    keep: the share of the moments that is kept; None means 0.001 for "random" and 0.1 for "magnitude".

  Returns:
    (params, mask).
  """
  errors.choose(prune, KEEP, "config.method.prune")
  if cycle < 1 or not 0 <= (keep or 0) <= 1:
    raise errors.UserError(f"ReLoRA needs cycle >= 1 and 0 <= keep <= 1, not cycle={cycle}, keep={keep}")
  also = [also] if isinstance(also, str) else list(also)
  beside = weights.mask(params, also, "config.method.also")
  before = params
  params, mask = lora.init(key, params, alpha=alpha, targets=targets, **kw)
  for k, w in _nodes(params).items():
    if weights.is_node(w.base) or k == "embed/kernel":
      what = f"a {type(w.base).__name__}" if weights.is_node(w.base) else "a table, which `also` can train"
      raise errors.UserError(f"ReLoRA merges only into matrices that are arrays; {k} is {what}")
  mask = weights.inherit(before, beside, params, mask)
  mask = jax.tree.map(lambda m, h: m and not h, mask, held(params))
  return jax.tree.map(lambda x, m: x.astype(jnp.float32) if m else x, params, mask), mask


init.__signature__ = targeting.signature(
  init, lora.init, without=("layers_to_transform", "init", "bias", "lora_bias", "tied")
)


def period(*, cycle: Count = 1000, **_) -> int:
  """Returns the number of steps from one `between` to the next."""
  return cycle


def held(params: Any, **_) -> Any:
  """Returns the mask of the matrices that are merged into, and of the scales and ranks that the merge needs."""
  return targeting.mask(params, weights.LoRA, ("base", "scale", "rank"))


def between(key: jax.Array, state: Any, *, prune: str = "random", keep: Share | None = None, **_) -> Any:
  """Returns the state with scale * A B merged into the weights, a new A, a zero B, and the moments of both pruned.

  The model does not change. The sum is computed in float32 and, for weights in bfloat16, rounded stochastically, so
  that small changes are not lost. The optimiser's step counts are kept.
  """
  whole = tree.join(state.trainable, state.held)

  def restart(k, w):
    if not isinstance(w, weights.LoRA):
      return w
    base = updates.add({k: w.base}, {k: w.delta()}, key)[k]
    bound = 1 / math.sqrt(math.prod(w.a.shape[architecture.stack_axes(k) : -1]))  # as lora.py draws A
    a = jax.random.uniform(tree.fold(key, f"{k}/a"), w.a.shape, minval=-bound, maxval=bound)
    return w.replace(base=base, a=a, b=jnp.zeros_like(w.b)).clean()

  new = weights.map_nodes(restart, whole)
  pick = lambda old: jax.tree.map(lambda x, y: None if x is None else y, old, new, is_leaf=lambda x: x is None)
  return state.replace(
    trainable=pick(state.trainable),
    held=pick(state.held),
    opt_state=_prune(key, state.opt_state, _nodes(whole), prune, KEEP[prune] if keep is None else keep),
  )


def _nodes(params: Any) -> dict[str, weights.LoRA]:
  """Returns {name: LoRA node}."""
  found = {}

  def note(k, w):
    if isinstance(w, weights.LoRA):
      found[k] = w
    return w

  weights.map_nodes(note, params)
  return found


def _prune(key: jax.Array, opt_state: Any, nodes: Collection[str], how: str, keep: float) -> Any:
  """Returns the optimiser's state with its arrays for A and B pruned; their names end in the names of A and B."""
  stacked = {f"/{k}/{field}": architecture.stacked(k) for k in nodes for field in "ab"}

  def leaf(k, x):
    name = next((end for end in stacked if k.endswith(end)), None)
    if name is None:
      return x
    if how == "random":
      return jnp.where(jax.random.bernoulli(tree.fold(key, k), keep, x.shape), x, 0.0)
    if how == "magnitude":
      size = jnp.abs(x).reshape(x.shape[0] if stacked[name] else 1, -1)
      kept = size > jnp.quantile(size, 1 - keep, axis=1, keepdims=True)
      return jnp.where(kept.reshape(x.shape), x, 0.0)
    return jnp.zeros_like(x)

  return tree.map_named(leaf, opt_state)
