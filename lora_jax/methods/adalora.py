"""AdaLoRA: adaptive budget allocation (Zhang et al. 2023, https://arxiv.org/abs/2303.10512).

`W + s A diag(e) B` in the manner of a singular value decomposition: A and B are kept near orthogonal by a penalty, and
while training the entries of e that matter least to the loss are set to zero, over all matrices together.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import architecture, errors, families, transformer, tree, weights
from lora_jax.methods import _adalora, _lora_peft, _peft, _targets
from lora_jax.values import Count, NonNegative, Probability, Size

optimiser = _adalora.optimiser
SCHEDULE = ("target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight")  # PEFT's names too


def init(
  key: jax.Array,
  params: Any,
  *,
  init_r: Count = 12,
  target_r: Size = 8,
  tinit: Size = 0,
  tfinal: Size = 0,
  deltaT: Count = 1,
  beta1: Probability = 0.85,
  beta2: Probability = 0.85,
  orth_reg_weight: NonNegative = 0.5,
  alpha: float = 16.0,
  dropout: Probability = 0.0,
  targets: str | Sequence[str] = "q,v",
) -> tuple[Any, Any]:
  """Wraps the target matrices in `AdaLoRA`; e starts at zero, so the model does not change.

  Args:
    key: of the initial values: A and B are normal with deviation 0.02, as in PEFT.
    params: a model's tree; the adapted weights may be arrays or nodes.
    init_r: R, of all matrices at first.
    target_r: how many entries of e a matrix keeps, on average.
    tinit, tfinal: steps before the first pruning, and after the last.
    deltaT: steps from one pruning to the next.
    beta1, beta2: of the moving averages of an entry's sensitivity and of its deviation from that.
    orth_reg_weight: factor of the penalty.
    alpha: numerator of the scale.
    dropout: probability of dropping an input element of A in training.
    targets: as those of `lora.init`.

  Returns:
    (params, mask): True at the leaves `a`, `e` and `b`, float32.
  """
  _check(init_r, target_r, tinit, tfinal, deltaT, beta1, beta2, orth_reg_weight, dropout)
  params = _targets.split(params, targets)
  chosen = _targets.select(targets, _targets.matrices(params), "config.method.targets")
  schedule = zip(SCHEDULE, (target_r, tinit, tfinal, deltaT, beta1, beta2, orth_reg_weight), strict=True)
  schedule = tuple(schedule)

  def node(k, w, layers):
    stack = layers.shape
    shape = w.shape[len(stack) :]
    n = transformer.in_axes(k)
    normal = lambda name, *shape: 0.02 * jax.random.normal(tree.fold(key, f"{k}/{name}"), (*stack, *shape))
    return _adalora.AdaLoRA(
      base=w,
      a=normal("a", *shape[:n], init_r),
      e=jnp.zeros((*stack, init_r), jnp.float32),
      b=normal("b", init_r, *shape[n:]),
      scale=jnp.asarray(layers * _scale(alpha, init_r), jnp.float32),
      dropout=float(dropout),
      layers=tuple(map(bool, np.atleast_1d(layers))),
      schedule=schedule,
    )

  params = _targets.wrap(params, chosen, node)
  return params, _targets.mask(params, _adalora.AdaLoRA, ("a", "e", "b"))


def _scale(alpha: float, rank: int) -> float:
  return (alpha if alpha > 0 else rank) / (rank + 1e-5)


def _check(init_r, target_r, tinit, tfinal, deltaT, beta1, beta2, orth_reg_weight, dropout) -> None:
  rules = {
    f"1 <= target_r <= init_r, not {target_r} and {init_r}": 1 <= target_r <= init_r,
    f"tinit, tfinal >= 0 and deltaT >= 1, not {tinit}, {tfinal}, {deltaT}": min(tinit, tfinal, deltaT - 1) >= 0,
    f"0 < beta1, beta2 < 1, not {beta1}, {beta2}": 0 < beta1 < 1 and 0 < beta2 < 1,
    f"orth_reg_weight >= 0, not {orth_reg_weight}": orth_reg_weight >= 0,
    f"0 <= dropout < 1, not {dropout}": 0 <= dropout < 1,
  }
  if bad := [said for said, holds in rules.items() if not holds]:
    raise errors.UserError(f"AdaLoRA needs {'; '.join(bad)}")


def penalty(params: Any, *, orth_reg_weight: NonNegative = 0.5, **others: Any) -> jax.Array:
  """`orth_reg_weight` times the mean of ||A^T A - I||_F and ||B B^T - I||_F over all A and B (equation 4, as in PEFT,
  whose norms are not squared)."""
  del others
  nodes = [w.used() for w in jax.tree.leaves(params, is_leaf=_adalora.is_node) if _adalora.is_node(w)]

  def distances(gram):
    square = jnp.sum((gram - jnp.eye(gram.shape[-1])) ** 2, (-1, -2))
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)  # no gradient at 0

  found = []
  for w in nodes:
    L, R = w.e.shape
    a, b = w.a.reshape(L, -1, R), w.b.reshape(L, R, -1)
    found += [distances(jnp.einsum("LDR,LDS->LRS", a, a)), distances(jnp.einsum("LRF,LSF->LRS", b, b))]
  return orth_reg_weight * jnp.concatenate(found).mean()


PEFT_TYPE = "ADALORA"
FIELDS = {"a": "lora_A", "e": "lora_E", "b": "lora_B"}


def to_peft(
  params: Any, keys: Sequence[families.Key], trained: Collection[str] = ()
) -> tuple[dict, dict[str, np.ndarray]] | None:
  """(adapter config, tensors by Hugging Face module name) of the AdaLoRA nodes in `params`; None if it has none.

  `lora_A` is [r, in], `lora_E` [r, 1] and `lora_B` [out, r]; where anything has been pruned only what is left is
  written, and `rank_pattern` says which of the ranks that is.
  """
  nodes = _peft.nodes(params, keys, _adalora.AdaLoRA)
  if not nodes:
    return None
  kept = {key: np.asarray(w.used().e) != 0 for key, w in nodes.items()}
  some = any(k.any() for k in kept.values()) and not all(k.all() for k in kept.values())
  tensors, pattern = {}, {}
  for key, node in nodes.items():
    sizes = key.sizes(node.shape[node.scale.ndim :])
    used = node.used()
    for i, a, e, b, k in zip(np.flatnonzero(node.layers), used.a, used.e, used.b, kept[key], strict=True):
      module, k = key.module.format(i), k if some else np.ones_like(k)
      pattern[f"{module}.lora_E"] = k.tolist()
      pairs = zip("ab", (np.asarray(a)[..., k], np.asarray(b)[k]), key.low_rank(), strict=True)
      tensors |= {f"{module}.{FIELDS[f]}": _peft.rearrange(x, _peft.reverse(p), sizes) for f, x, p in pairs}
      tensors[f"{module}.lora_E"] = np.asarray(e)[k, None]
  first = next(iter(nodes.values()))
  rank, scale, schedule = first.e.shape[-1], float(np.max(np.asarray(first.scale))), dict(first.schedule)
  least = schedule.get("tinit", 0) + schedule.get("tfinal", 0) + 1  # of the steps that PEFT demands, trained or not
  modules = {k.removesuffix(".lora_E"): rank for k in pattern}
  config = {
    "peft_type": PEFT_TYPE,
    "init_r": rank,
    "lora_alpha": float(f"{scale * (rank + 1e-5):.6g}"),
    "lora_dropout": first.dropout,
    "target_modules": _peft.target_modules(modules, keys, tree.flatten(params, is_leaf=weights.is_node)),
    "rank_pattern": pattern if some else None,
    **schedule,
    "total_step": max(schedule.get("total_step", 0), least),
    "bias": "none",
    "fan_in_fan_out": any(key.transposed for key in nodes),
  }
  return config, tensors


def from_peft(
  params: Any, keys: Sequence[families.Key], config: Mapping, left: dict[str, np.ndarray], wrong: list[str]
) -> Any:
  """The inverse of `to_peft`: `params` with AdaLoRA nodes, e being zero where it was pruned; see formats/peft.py."""
  rank, pattern = config.get("init_r", 12), dict(config.get("rank_pattern") or {})
  flat = tree.flatten(params, is_leaf=weights.is_node)
  wrong += _lora_peft.unsupported(config, _lora_peft.INHERITED)
  for key in keys:
    w, n = flat[key.path], transformer.in_axes(key.path) * (architecture.stack_axes(key.path) < 2)
    modules = [key.module.format(i) for i in range(w.shape[0] if "{}" in key.hf else 1)]
    found = [any(f"{m}.{s}" in left for s in FIELDS.values()) for m in modules]
    if not n or not any(found):
      continue
    shape = w.shape["{}" in key.hf :]
    full = [(*shape[:n], rank), (rank,), (rank, *shape[n:])]
    arrays = {f: np.zeros((len(modules), *s), np.float32) for f, s in zip(FIELDS, full, strict=True)}
    patterns = dict(zip("aeb", (key.low_rank()[0], "r i -> (r i)", key.low_rank()[1]), strict=True))
    for i in np.flatnonzero(found):
      flags = pattern.pop(f"{modules[i]}.lora_E", [True] * rank)
      if len(flags) != rank:
        wrong.append(f"rank_pattern of {modules[i]} has {len(flags)} entries, expected init_r={rank}")
        flags = [True] * rank
      at, sizes = {"a": (..., flags), "e": flags, "b": flags}, key.sizes(shape) | {"i": 1}
      for f, s in FIELDS.items():
        expected = _peft.rearrange(arrays[f][i][at[f]], _peft.reverse(patterns[f]), sizes).shape
        x = _peft.take(left, wrong, f"{modules[i]}.{s}", expected)
        arrays[f][i][at[f]] = _peft.rearrange(x, patterns[f], sizes)
    stack = slice(None) if "{}" in key.hf else 0
    schedule = tuple((k, config[k]) for k in (*SCHEDULE, "total_step") if config.get(k) is not None)
    scale = np.float32(found) * np.float32(_scale(config.get("lora_alpha", 8), rank))
    arrays = {f: jnp.asarray(x[stack]) for f, x in arrays.items()}
    dropout = float(config.get("lora_dropout") or 0.0)
    flat[key.path] = _adalora.AdaLoRA(
      w, **arrays, scale=jnp.asarray(scale[stack]), dropout=dropout, layers=tuple(found), schedule=schedule
    )
  wrong += [f"rank_pattern of no adapted matrix: {sorted(pattern)}"] if pattern else []
  return tree.map_named(lambda k, _: flat[k], params, is_leaf=weights.is_node)
