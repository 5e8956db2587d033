"""LoRA: low-rank adaptation (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

`W + (alpha / rank) A B` on chosen matrices; rsLoRA scales by alpha / sqrt(rank) instead (Kalajdzievski 2023,
https://arxiv.org/abs/2312.03732).
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import errors, methods, tree, weights
from lora_jax.methods import initial, targeting
from lora_jax.model import architecture, transformer
from lora_jax.values import Probability, Size

KIND = "low rank"
OPTIM = {"learning_rate": 2e-4, "weight_decay": 0.01}  # the paper's table 11
INITS = initial.INITS
EMBED, HEAD = "embed/kernel", "head/kernel"
BIASES = ("none", "all", "lora_only")
VARIES = ("rank", "alpha", "dropout", "targets", "rank_pattern", "alpha_pattern", "layers_to_transform", "rslora")


def init(
  key: jax.Array,
  params: Any,
  *,
  rank: Size = 8,
  alpha: float = 16.0,
  dropout: Probability = 0.0,
  targets: str | Sequence[str] = "q,v",
  rank_pattern: Mapping[str, Size] | None = None,
  alpha_pattern: Mapping[str, float] | None = None,
  layers_to_transform: Size | Sequence[Size] | None = None,
  rslora: bool = False,
  init: initial.Init = "peft",
  bias: Literal["none", "all", "lora_only"] = "none",
  lora_bias: bool = False,
  tied: bool = True,
) -> tuple[Any, Any]:
  """Wraps the target matrices in `weights.LoRA`; B starts at zero or A B is subtracted, so the model does not change.

  Args:
    key: random key of the initial values; a column of A depends only on it, the leaf's name, the layer and the index.
    params: a model's tree; the adapted weights may be arrays or nodes.
    rank: R; a matrix with rank 0 is not adapted.
    alpha: numerator of the scale.
    dropout: probability of dropping an input element of A in training.
    targets: short names ("q,v", "embed", "head"), "all-linear" (every matrix in the layers), regexes found in names
      such as `layers/attn/q/kernel` or, for single layers, `layers/3/attn/q/kernel`, or a sequence of those.
    rank_pattern, alpha_pattern: {target: value} that overrides rank or alpha; the first match wins.
    layers_to_transform: indices of the layers whose matrices are adapted; None means all layers.
    rslora: scale by alpha / sqrt(rank) rather than alpha / rank.
    init: "peft" draws A uniformly in +-1/sqrt(in), as loralib and PEFT do; "paper" or "gaussian" draws A from a normal
      with standard deviation 1/rank; "orthogonal" draws A and B with A B = 0 up to rounding (even ranks only); "pissa",
      "pissa_niter_N" and "olora" take parts of W, see `initial.decompose`. For an embedding, A is zero and B is normal
      with deviation 1.
    bias: "all" also trains every bias of the model, "lora_only" the biases of adapted matrices, "none" no bias.
    lora_bias: whether B has a bias, which starts at zero.
    tied: whether an adapter of a table that the head shares acts on both uses, or only on the targeted one.

  Returns:
    (params, mask): True at the leaves `a` and `b`, float32, and at the biases that `bias` and `lora_bias` select.
  """
  initial.check(init)
  errors.choose(bias, dict.fromkeys(BIASES), "config.method.bias")
  if not 0 <= dropout < 1 or rank < 0:
    raise errors.UserError(f"LoRA needs rank >= 0 and 0 <= dropout < 1, not rank={rank}, dropout={dropout}")
  params = targeting.split(params, targets)
  linear = _matrices(params)
  hits = _only(targeting.select(targets, linear, "config.method.targets"), layers_to_transform)
  ranks = targeting.values(rank_pattern, rank, linear, "config.method.rank_pattern")
  alphas = targeting.values(alpha_pattern, alpha, linear, "config.method.alpha_pattern")
  chosen = {k: r.astype(int) for k, hit in hits.items() if (r := np.where(hit, ranks[k], 0)).max() > 0}
  if not chosen:
    raise errors.UserError("LoRA adapts nothing: every target has rank 0")
  shared = EMBED in linear and linear.get(HEAD) is linear[EMBED]  # the head and the embedding are one table
  if shared and tied and HEAD in chosen:
    r = chosen.pop(HEAD)
    if EMBED not in chosen:
      chosen[EMBED], alphas[EMBED] = r, alphas[HEAD]
  tables = {EMBED, HEAD} if shared else {EMBED}
  specs = {k: _spec(k, linear[k], r, init, k in tables) for k, r in chosen.items()}
  _check(specs, alphas, lora_bias, tables)
  drawn = initial.draw(key, [s for s in specs.values() if not initial.decomposes(s.init)])

  def node(k, w, _):
    for name in [n for n in (EMBED, HEAD) if n in chosen] if shared and k == EMBED else [k]:
      scale = _scale(chosen[name], alphas[name], rslora)
      factors = _table(w, *drawn[name]) if name in tables else _matrix(key, w, specs[name], scale, drawn)
      use = name.partition("/")[0] if shared and not tied else ""
      w = _node(w, chosen[name], scale, factors, lora_bias, dropout=float(dropout), rslora=bool(rslora), use=use)
    return w

  adapted = targeting.wrap(params, chosen | ({EMBED: None} if shared and HEAD in chosen else {}), node)
  return methods.train_also(adapted, trainable(adapted), _biases(params, chosen, bias))


def trainable(params: Any) -> Any:
  """Returns the mask of a tree with LoRA nodes: True at their `a`, `b` and `bias`."""

  def both(w, m):  # if the two uses of a table are adapted separately, one node is in the other
    is_pair = isinstance(w, weights.LoRA) and isinstance(w.base, weights.LoRA) and w.use and w.base.use
    return m.replace(base=m.base.replace(a=True, b=True)) if is_pair else m

  mask = targeting.mask(params, weights.LoRA, ("a", "b", "bias"))
  return jax.tree.map(both, params, mask, is_leaf=weights.is_node)


def _matrices(params: Any) -> dict[str, Any]:
  """Returns {name: weight} of what can be adapted; a tied head maps to the table."""
  linear = targeting.matrices(params, experts=True)
  table = tree.flatten(params, is_leaf=weights.is_node).get(EMBED)
  if table is None:
    return linear
  return linear | {EMBED: table} | ({} if HEAD in linear or "classifier" in params else {HEAD: table})


def _only(hits: Mapping[str, np.ndarray], layers: int | Sequence[int] | None) -> dict[str, np.ndarray]:
  """Returns `hits` limited to the layers of these indices; matrices outside the layers are unaffected."""
  if layers is None:
    return dict(hits)
  layers = [layers] if isinstance(layers, int) else list(layers)
  depth = max((h.size for h in hits.values() if h.ndim), default=0)
  if bad := [i for i in layers if not isinstance(i, int) or not 0 <= i < depth]:
    raise errors.UserError(f"config.method.layers_to_transform: {bad}; the layers of the targets are 0 to {depth - 1}")
  return {k: h & np.isin(np.arange(h.size), layers) if h.ndim else h for k, h in hits.items()}


def _spec(name: str, w: Any, ranks: np.ndarray, init: str, table: bool) -> initial.Spec:
  if table:
    init = "normal" if name == EMBED else init if init in ("paper", "gaussian") else "peft"
    return initial.Spec(name, (int(ranks),), 1, w.shape[1], w.shape[0], init)
  axes = architecture.stack_axes(name)
  shape, n_in = w.shape[axes:], transformer.in_axes(name)
  experts = w.shape[1] if axes == 2 else 1
  inner, outer = int(np.prod(shape[:n_in])), int(np.prod(shape[n_in:]))
  return initial.Spec(name, tuple(map(int, ranks.reshape(-1))), experts, inner, outer, init)


def _check(specs: Mapping[str, initial.Spec], alphas: Mapping, lora_bias: bool, tables: Collection[str]) -> None:
  """Raises UserError for ranks that an initialisation does not support, and for a bias on an embedding or experts."""
  for k, s in specs.items():
    if initial.decomposes(s.init) and max(s.ranks) > min(s.inner, s.outer):
      raise errors.UserError(f"init={s.init!r}: {k} has rank at most {min(s.inner, s.outer)}, not {max(s.ranks)}")
    if initial.decomposes(s.init) and np.min(alphas[k]) <= 0:
      raise errors.UserError(f"init={s.init!r} needs alpha > 0; for {k} it is {np.min(alphas[k])}")
    if s.init == "orthogonal" and any(r % 2 for r in s.ranks):
      raise errors.UserError(f"init='orthogonal' needs even ranks; {k} has {sorted(set(s.ranks))}")
    if lora_bias and (k in tables or s.experts > 1):
      raise errors.UserError(f"lora_bias=True: {k} cannot have a bias; name other targets")


def _scale(ranks: np.ndarray, alphas: np.ndarray, rslora: bool) -> np.ndarray:
  scale = np.where(ranks > 0, alphas / np.maximum(np.sqrt(ranks) if rslora else ranks, 1), 0.0)
  return scale.astype(np.float32)


def _table(w, columns, _):
  """Returns (a, b, start) of an embedding table; a is zero."""
  return jnp.zeros((w.shape[0], columns.shape[-1])), columns[0].T, None


def _matrix(key, w, spec, scale, drawn):
  """Returns (a, b, start) of a matrix [*stack, *in, *out]."""
  axes, n_in = architecture.stack_axes(spec.name), transformer.in_axes(spec.name)
  stack, inner, outer = w.shape[:axes], w.shape[axes:][:n_in], w.shape[axes:][n_in:]
  columns = max(spec.ranks)
  if spec.name in drawn:
    a, b = drawn[spec.name]
    b = jnp.zeros((*stack, columns, *outer)) if b is None else b.reshape(*stack, columns, *outer)
    return a.reshape(*stack, *inner, columns), b, None
  each = jax.tree.map(lambda x: x.reshape(-1, *x.shape[axes:]), w)
  ranks, scale = (np.repeat(np.reshape(x, -1), spec.experts) for x in (spec.ranks, scale))
  a, b = initial.decompose(tree.fold(key, spec.name), each, ranks, scale, n_in=n_in, columns=columns, init=spec.init)
  a, b = a.reshape(*stack, *inner, columns), b.reshape(*stack, columns, *outer)
  return a, b, (jnp.copy(a), jnp.copy(b))  # copies, since training donates the buffers of a and b


def _node(w, ranks, scale, factors, lora_bias, **static) -> weights.LoRA:
  a, b, start = factors
  stack = ranks.ndim
  bias = jnp.zeros((*b.shape[:stack], *b.shape[stack + 1 :])) if lora_bias else None
  ranks = jnp.asarray(ranks, jnp.int32)
  return weights.LoRA(base=w, a=a, b=b, scale=jnp.asarray(scale), rank=ranks, start=start, bias=bias, **static)


def _biases(params: Any, chosen: Mapping[str, np.ndarray], bias: str) -> set[str]:
  """Returns the names of the pretrained model's biases that are trained."""
  flat = tree.flatten(params, is_leaf=weights.is_node)
  names = {k for k in flat if k.endswith("/bias")}
  if bias == "none":
    return set()
  if bias == "lora_only":
    beside = {k: [n for n in chosen if n.startswith(f"{k.removesuffix('bias')}kernel")] for k in names}
    names = {k for k, found in beside.items() if found}
    if some := sorted(k for k in names if not all(np.all(chosen[n]) for n in beside[k])):
      raise errors.UserError(
        f"bias='lora_only': {some} span all layers, but not all layers are adapted; use 'all' or 'none'"
      )
  if not names:
    raise errors.UserError(f"config.method.bias={bias!r} finds no biases in this model; use 'none'")
  return names
