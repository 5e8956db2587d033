"""LoRA: low-rank adaptation (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

`W + (alpha / rank) A B` on chosen matrices; rsLoRA scales by alpha / sqrt(rank) instead (Kalajdzievski 2023,
https://arxiv.org/abs/2312.03732).
"""

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import errors, families, transformer, tree, weights

INITS = {"peft": "uniform", "paper": "gaussian"}


def init(
  key: jax.Array,
  params: Any,
  *,
  rank: int = 8,
  alpha: float = 16.0,
  dropout: float = 0.0,
  targets: str | Sequence[str] = "q,v",
  rank_pattern: Mapping[str, int] | None = None,
  alpha_pattern: Mapping[str, float] | None = None,
  rslora: bool = False,
  init: str = "peft",
) -> tuple[Any, Any]:
  """Wraps the target matrices in `weights.LoRA`; B starts at zero, so the model does not change.

  Args:
    key: of the initial values; each column of A follows from the leaf's name, its layer and its index alone.
    params: a model's tree; the adapted weights may be arrays or nodes.
    rank: R; 0 leaves a matrix alone.
    alpha: numerator of the scale.
    dropout: probability of dropping an input element of A in training.
    targets: short names ("q,v"), "all-linear" (every matrix in the layers), regexes found in names such as
      `layers/attn/q/kernel` or, for single layers, `layers/3/attn/q/kernel`, or a sequence of those.
    rank_pattern, alpha_pattern: {target: value} that overrides rank or alpha; first match wins.
    rslora: scale by alpha / sqrt(rank) rather than alpha / rank.
    init: of A: "peft" is uniform in +-1/sqrt(in), as loralib and PEFT do; "paper" is normal with deviation 1/rank.

  Returns:
    (params, mask): True at the leaves `a` and `b`, float32.
  """
  errors.choose(init, INITS, "config.method.init")
  if not 0 <= dropout < 1 or rank < 0:
    raise errors.UserError(f"LoRA needs rank >= 0 and 0 <= dropout < 1, not rank={rank}, dropout={dropout}")
  flat = tree.flatten(params, is_leaf=weights.is_node)
  linear = {k: w for k, w in flat.items() if transformer.in_axes(k)}
  chosen = target_layers(targets, linear, "config.method.targets")
  ranks = _values(rank_pattern, rank, linear, "config.method.rank_pattern")
  alphas = _values(alpha_pattern, alpha, linear, "config.method.alpha_pattern")

  def wrap(k, w):
    if k not in chosen:
      return w
    r = np.where(chosen[k], ranks[k], 0)
    return _node(tree.fold(key, k), k, w, r, alphas[k], dropout, rslora, init) if r.max() > 0 else w

  params = tree.map_named(wrap, params, is_leaf=weights.is_node)
  mask = trainable(params)
  if not any(jax.tree.leaves(mask)):
    raise errors.UserError("LoRA adapts nothing: every target has rank 0")
  return params, mask


def trainable(params: Any) -> Any:
  """The mask of a tree that holds LoRA nodes: True at their `a` and `b`."""

  def mask(w):
    m = jax.tree.map(lambda _: False, w)
    return m.replace(a=True, b=True) if isinstance(w, weights.LoRA) else m

  return jax.tree.map(mask, params, is_leaf=weights.is_node)


def target_layers(targets: str | Sequence[str], linear: Mapping[str, Any], what: str) -> dict[str, np.ndarray]:
  """{leaf name: bool [L], or [] where not stacked} for the matrices that `targets` names; see `init`."""
  patterns = [p for t in ([targets] if isinstance(targets, str) else targets) for p in _expand(t, linear, what)]
  hits = {k: np.zeros(n.shape[:1] if transformer.stacked(k) else (), bool) for k, n in linear.items()}
  for p in patterns:
    found = False
    for k in linear:
      hit = _hits(p, k, hits[k].shape)
      hits[k] |= hit
      found |= bool(hit.any())
    if not found:
      raise errors.UserError(f"{what} {p!r} matches nothing; {errors.nearest(p, linear)}")
  return {k: h for k, h in hits.items() if h.any()}


def _expand(target: str, linear: Mapping[str, Any], what: str) -> list[str]:
  """Regexes for one target: short names and `all-linear` are spelled out, regexes are taken as they are."""
  if target == "all-linear":
    return ["(^|/)layers/.*kernel$"]
  if not re.fullmatch(r"[\w\s,-]+", target):
    return [target]
  short = {k.split("/")[-2] for k in linear} | {"all-linear"}
  words = [w.strip() for w in target.split(",") if w.strip()]
  for w in words:
    if w not in short:
      raise errors.UserError(f"{what} {w!r} matches nothing; {errors.nearest(w, short)}")
  return [p for w in words for p in (_expand(w, linear, what) if w == "all-linear" else [f"/?{w}/kernel$"])]


def _hits(pattern: str, k: str, stack: tuple[int, ...]) -> np.ndarray:
  """Which layers of leaf `k` a pattern finds: by the stacked name all, else by the name with the layer's index."""
  search = tree.compile_pattern(pattern).search
  if search(k) or not stack:
    return np.full(stack, bool(search(k)))
  return np.array([bool(search(k.replace("layers/", f"layers/{i}/", 1))) for i in range(stack[0])])


def _values(pattern: Mapping | None, default: float, linear: Mapping, what: str) -> dict[str, np.ndarray]:
  """{leaf name: value per layer} from an ordered {target: value}."""
  values = {k: np.full(w.shape[:1] if transformer.stacked(k) else (), default, float) for k, w in linear.items()}
  for target, value in reversed(dict(pattern or {}).items()):
    for k, hit in target_layers(target, linear, what).items():
      values[k] = np.where(hit, value, values[k])
  return values


def _node(key, k, w, ranks, alphas, dropout, rslora, init) -> weights.LoRA:
  stack = ranks.shape
  shape = w.shape[len(stack) :]
  inner, outer = shape[: transformer.in_axes(k)], shape[transformer.in_axes(k) :]
  columns, fan_in = int(ranks.max()), math.prod(inner)

  def column(layer, j, r):
    kj = jax.random.fold_in(jax.random.fold_in(key, layer), j)
    if init == "peft":
      x = jax.random.uniform(kj, (fan_in,), minval=-1.0, maxval=1.0) / math.sqrt(fan_in)
    else:
      x = jax.random.normal(kj, (fan_in,)) / jnp.maximum(r, 1)
    return jnp.where(j < r, x, 0.0)

  per_layer = jax.vmap(column, (None, 0, None), out_axes=1)
  r = jnp.asarray(ranks.reshape(-1), jnp.int32)
  a = jax.vmap(per_layer, (0, None, 0))(jnp.arange(r.size), jnp.arange(columns), r)
  scale = np.where(ranks > 0, alphas / np.maximum(np.sqrt(ranks) if rslora else ranks, 1), 0.0)
  return weights.LoRA(
    base=w,
    a=a.reshape(*stack, *inner, columns),
    b=jnp.zeros((*stack, columns, *outer), jnp.float32),
    scale=jnp.asarray(scale, jnp.float32),
    rank=jnp.asarray(ranks, jnp.int32),
    dropout=float(dropout),
    rslora=bool(rslora),
  )


PEFT_TYPE = "LORA"
# Features of PEFT's LoraConfig that change the forward pass and that this module does not have.
UNSUPPORTED = (
  "use_dora lora_bias modules_to_save layer_replication trainable_token_indices target_parameters use_qalora "
  "use_bdlora alora_invocation_tokens arrow_config kasa_config monteclora_config velora_config megatron_config"
).split()
# Initialisations that leave the base as it is; the others of PEFT subtract their start from it.
PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva")


def to_peft(params: Any, keys: Sequence[families.Key]) -> tuple[dict, dict[str, np.ndarray]] | None:
  """(adapter config, tensors by Hugging Face module name) of the LoRA nodes in `params`; None if it has none.

  `lora_A.weight` is [r, in] and `lora_B.weight` [out, r], float32. The commonest rank and alpha become `r` and
  `lora_alpha`, the others patterns.
  """
  flat = tree.flatten(params, is_leaf=weights.is_node)
  nodes = {key: flat[key.path] for key in keys if isinstance(flat[key.path], weights.LoRA)}
  if not nodes:
    return None
  tensors, ranks, alphas = {}, {}, {}
  for key, node in nodes.items():
    pattern_a, pattern_b = key.low_rank()
    scale, rank, a, b = (
      np.atleast_1d(x) if x.ndim == 0 else np.asarray(x) for x in (node.scale, node.rank, node.a, node.b)
    )
    if not node.scale.ndim:
      a, b = a[None], b[None]
    modules = [key.module.format(i) for i in range(len(rank))]
    sizes = key.sizes(node.shape[node.scale.ndim :])
    for i, module in enumerate(modules):
      if r := int(rank[i]):
        tensors[f"{module}.lora_A.weight"] = _rearrange(a[i, ..., :r], _reverse(pattern_a), sizes)
        tensors[f"{module}.lora_B.weight"] = _rearrange(b[i, :r], _reverse(pattern_b), sizes)
        ranks[module] = r
        alphas[module] = float(f"{scale[i] * (math.sqrt(r) if node.rslora else r):.6g}")
  rank, rank_pattern = _commonest(ranks)
  alpha, alpha_pattern = _commonest(alphas)
  first = next(iter(nodes.values()))
  config = {
    "peft_type": PEFT_TYPE,
    "r": rank,
    "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
    "lora_dropout": first.dropout,
    "target_modules": _target_modules(ranks, keys, flat),
    "rank_pattern": rank_pattern,
    "alpha_pattern": alpha_pattern,
    "use_rslora": first.rslora,
    "bias": "none",
    "init_lora_weights": True,
    "fan_in_fan_out": any(key.transposed for key in nodes),
  }
  return config, tensors


def _target_modules(adapted: Mapping[str, int], keys: Sequence[families.Key], flat: Mapping[str, Any]) -> list[str]:
  """Last parts of the names of adapted modules, which PEFT matches from the end; whole names where others end alike."""
  stacks = {key: flat[key.path].shape[: key.hf.count("{}")] for key in keys}
  every = {key.module.format(*index) for key, stack in stacks.items() for index in np.ndindex(stack)}
  short = lambda module: module.rpartition(".")[2]
  taken = {short(module) for module in every - adapted.keys()}
  return list(dict.fromkeys(m if short(m) in taken else short(m) for m in adapted))


def from_peft(params: Any, keys: Sequence[families.Key], config: Mapping, tensors: Mapping[str, np.ndarray]) -> Any:
  """The inverse of `to_peft`: `params` with LoRA nodes; UserError lists what is not understood or does not fit."""
  bad = [f"{k}={config[k]!r}" for k in UNSUPPORTED if config.get(k)]
  bad += [f"bias={config['bias']!r}"] if config.get("bias", "none") != "none" else []
  start = config.get("init_lora_weights", True)
  bad += [] if start in PLAIN_INITS else [f"init_lora_weights={start!r}, which changes the base weights"]
  if bad:
    raise errors.UserError("this LoRA adapter uses what is not supported: " + "; ".join(bad))
  flat, left, wrong = tree.flatten(params, is_leaf=weights.is_node), dict(tensors), []
  for key in keys:
    w, in_axes = flat[key.path], transformer.in_axes(key.path)
    layers = w.shape[0] if "{}" in key.hf else 1
    modules = [key.module.format(i) for i in range(layers)]
    pairs = [[left.pop(f"{m}.lora_{c}.weight", None) for c in "AB"] for m in modules] if in_axes else []
    if not any(x is not None for pair in pairs for x in pair):
      continue
    shape = w.shape[1:] if "{}" in key.hf else w.shape
    rank = [0 if p[0] is None else p[0].shape[0] for p in pairs]
    a = np.zeros((layers, *shape[:in_axes], max(rank)), np.float32)
    b = np.zeros((layers, max(rank), *shape[in_axes:]), np.float32)
    for i, (pair, r) in enumerate(zip(pairs, rank, strict=True)):
      views = zip(pair, (a[i, ..., :r], b[i, :r]), key.low_rank(), "AB", strict=True)
      for x, view, pattern, c in views:
        expected = _rearrange(view, _reverse(pattern), key.sizes(shape)).shape
        if (x is None and r) or (x is not None and x.shape != expected):
          wrong.append(f"{modules[i]}.lora_{c}.weight is {None if x is None else x.shape}, expected {expected}")
        elif r:
          view[...] = _rearrange(x.astype(np.float32), pattern, key.sizes(shape))
    scale = [_peft_scale(config, m, r) for m, r in zip(modules, rank, strict=True)]
    stack = slice(None) if "{}" in key.hf else 0
    flat[key.path] = weights.LoRA(
      base=w,
      a=jnp.asarray(a[stack]),
      b=jnp.asarray(b[stack]),
      scale=jnp.asarray(np.float32(scale)[stack]),
      rank=jnp.asarray(np.int32(rank)[stack]),
      dropout=float(config.get("lora_dropout") or 0.0),
      rslora=bool(config.get("use_rslora")),
    )
  if left or wrong or not tensors:
    unknown = f"tensors of no matrix of this model: {sorted(left)[:10]}" if left else ""
    raise errors.UserError("; ".join(filter(None, [unknown, *wrong[:10]])) or "the adapter holds no tensors")
  return tree.map_named(lambda k, _: flat[k], params, is_leaf=weights.is_node)


def _rearrange(x: np.ndarray, pattern: str, sizes: Mapping[str, int]) -> np.ndarray:
  """`einops.rearrange` with the sizes of the axes that the pattern has."""
  return einops.rearrange(x, pattern, **{k: n for k, n in sizes.items() if k in pattern})


def _reverse(pattern: str) -> str:
  left, right = pattern.split(" -> ")
  return f"{right} -> {left}"


def _commonest(values: Mapping[str, float]) -> tuple[float, dict[str, float]]:
  """The most frequent value, and the modules that have another, by names that PEFT matches from the end."""
  most = statistics.mode(values.values())
  return most, {m.removeprefix("model."): v for m, v in values.items() if v != most}


def _peft_scale(config: Mapping, module: str, rank: int) -> float:
  """The scale that PEFT gives a module: its `alpha_pattern`'s first key that ends the name, else `lora_alpha`."""
  if not rank:
    return 0.0
  found = (v for k, v in (config.get("alpha_pattern") or {}).items() if re.match(rf"(.*\.)?({k})$", module))
  alpha = next(found, config.get("lora_alpha", 8))
  return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
