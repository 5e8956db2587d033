"""`lora` in the `peft` library's format."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import families, tree, weights
from lora_jax.formats.peft import biases, experts, layout, parts, tables
from lora_jax.methods import initial
from lora_jax.model import transformer
from lora_jax.weights import fused

TYPE = "LORA"
EMBED = tables.EMBED
# Features of PEFT's LoraConfig that change the forward pass and that we do not support. PEFT's AdaLoRA also applies
# INHERITED, but ignores the others.
INHERITED = ("layer_replication", "trainable_token_indices")
UNSUPPORTED = (
  *INHERITED,
  *"use_dora use_qalora use_bdlora alora_invocation_tokens".split(),
  *"arrow_config kasa_config monteclora_config velora_config megatron_config".split(),
)
# Initialisations that do not change the base.
PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")


def to_peft(
  params: Any, keys: Sequence[families.Key], trained: Collection[str] = ()
) -> tuple[dict, dict[str, np.ndarray]] | None:
  """Returns (config, tensors by Hugging Face module name) of the LoRA nodes in `params`; None if there are none.

  `lora_A.weight` is [r, in] and `lora_B.weight` [out, r], float32. The most common rank and alpha become `r` and
  `lora_alpha`, and the others go into patterns. A node with a `start` is written with twice the rank, as [a, a0] and
  [b, -b0].
  """
  flat = {k: parts.as_lora(w) for k, w in tree.flatten(params, is_leaf=weights.is_node).items()}
  nodes = [(key, node) for key in keys if _is_lora(flat[key.path]) for node in _nodes(flat[key.path])]
  mixed = [
    w for w in flat.values() if isinstance(w, fused.Fused) and any(weights.base(p) is not p for p in w.parts.values())
  ]
  inner = [n.base for _, n in nodes if isinstance(n.base, weights.Adapter) and not any(n.base is m for _, m in nodes)]
  if not nodes or mixed or inner:  # PEFT supports one adapter per matrix
    return None
  first, head = nodes[0][1], next((k.head for k in keys if k.path == EMBED), "")
  alpha_of = lambda scale, r: float(f"{scale * (math.sqrt(r) if first.rslora else r):.6g}")
  tensors, ranks, scales, parameters = experts.to_peft(keys, flat)
  alphas = {k: alpha_of(scales[k], r) for k, r in ranks.items()}
  for key, node in nodes:
    for module, part, r in _factors(key, node) if "/moe/" not in key.path else ():
      ranks[module], alphas[module] = r, alpha_of(float(part.scale), r)
      tensors |= _tensors(key, module, part, module == head)
  rank, rank_pattern = layout.commonest(ranks)
  alpha, alpha_pattern = layout.commonest(alphas)
  bias, trained_biases = biases.write(flat, keys, trained, ranks)
  config = {
    "peft_type": "LORA",
    "r": rank,
    "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
    "lora_dropout": 0.0 if parameters else first.dropout,  # PEFT does not support dropout for parameters
    "target_modules": layout.target_modules({k: r for k, r in ranks.items() if k not in scales}, keys, flat),
    "target_parameters": parameters or None,
    "rank_pattern": rank_pattern,
    "alpha_pattern": alpha_pattern,
    "use_rslora": first.rslora,
    "bias": bias,
    "lora_bias": any(node.bias is not None for _, node in nodes),
    "init_lora_weights": True,
    "fan_in_fan_out": any(key.transposed for key, _ in nodes if key.path != EMBED),
    "ensure_weight_tying": tables.can_tie(keys) and any(k.path == EMBED and not n.use for k, n in nodes),
  }
  return config, tensors | trained_biases


def _is_lora(w: Any) -> bool:
  return isinstance(w, weights.LoRA)


def _nodes(node: weights.LoRA) -> list[weights.LoRA]:
  """Returns the node, and the node of the table's other use if each use has its own."""
  return [node, node.base] if node.use and _is_lora(node.base) and node.base.use else [node]


def _factors(key, node) -> Iterator[tuple[str, weights.LoRA, int]]:
  """Yields (module, node of its layer, rank) for all modules that a node adapts.

  The node holds numpy arrays without padding; a `start` is part of its factors.
  """
  stack = node.scale.ndim
  parts = jax.tree.map(np.asarray, node.replace(base=None))
  for i in range(node.scale.shape[0] if stack else 1):
    part = jax.tree.map(lambda x: x[i], parts) if stack else parts
    if not (r := int(part.rank)):
      continue
    a, b = part.a[..., :r], part.b[:r]
    if part.start is not None:
      a0, b0 = part.start
      a, b, r = np.concatenate([a, a0[..., :r]], -1), np.concatenate([b, -b0[:r]], 0), 2 * r
    names = [key.module.format(i)]
    if key.path == EMBED:
      names = [*key.lookups] if node.use != "head" else []
      names += [key.head] if key.head and node.use != "embed" else []
    for name in names:
      yield name, part.replace(a=a, b=b, start=None), r


def _tensors(key, module, part, head) -> dict[str, np.ndarray]:
  """Returns the tensors of one module; `part` is a node from `_factors`."""
  if key.path == EMBED and not head:
    return {f"{module}.lora_embedding_A": part.a.T, f"{module}.lora_embedding_B": part.b.T}
  if head:
    return {f"{module}.lora_A.weight": part.b, f"{module}.lora_B.weight": part.a}
  pattern_a, pattern_b = (layout.reverse(p) for p in key.low_rank())
  sizes = key.sizes((*part.a.shape[:-1], *part.b.shape[1:]))
  tensors = {
    f"{module}.lora_A.weight": layout.rearrange(part.a, pattern_a, sizes),
    f"{module}.lora_B.weight": layout.rearrange(part.b, pattern_b, sizes),
  }
  if part.bias is not None:
    tensors[f"{module}.lora_B.bias"] = layout.rearrange(part.bias[None], pattern_b, sizes)[:, 0]
  return tensors


def from_peft(
  params: Any, keys: Sequence[families.Key], config: Mapping, left: dict[str, np.ndarray], wrong: list[str]
) -> Any:
  """Inverts `to_peft`: returns `params` with LoRA nodes; see formats/peft."""
  flat = tree.flatten(params, is_leaf=weights.is_node)
  config = experts.from_peft(keys, config, left, wrong, flat, layout.peft_scale)
  wrong += unsupported(config, UNSUPPORTED) + _odd(config)
  for key in keys:
    if key.path == EMBED:
      flat[EMBED] = tables.read(key, flat[EMBED], config, left, wrong)
    if transformer.in_axes(key.path) and "/moe/" not in key.path:
      flat[key.path] = _read_matrix(key, flat[key.path], config, left, wrong)
  return tree.map_named(lambda k, _: flat[k], params, is_leaf=weights.is_node)


def unsupported(config: Mapping, features: Sequence[str]) -> list[str]:
  """Returns an error for each of `features` that an adapter uses."""
  return [f"{k}={config[k]!r} is not supported" for k in features if config.get(k)]


def _odd(config: Mapping) -> list[str]:
  """Returns an error for each supported option with an unsupported value."""
  bad = []
  if config.get("bias", "none") not in ("none", "all", "lora_only"):
    bad.append(f"bias={config['bias']!r} is not supported")
  start = config.get("init_lora_weights", True)
  if str(start).startswith("pissa_niter"):
    bad.append(
      f"init_lora_weights={start!r}: its base lacks a random part that each load draws anew; save it in PEFT "
      "with path_initial_model_for_weight_conversion, as plain LoRA"
    )
  elif start not in (*PLAIN_INITS, "pissa", "olora"):
    bad.append(
      f"init_lora_weights={start!r}: its base has lost a part that is not in the adapter; save it in PEFT with "
      "path_initial_model_for_weight_conversion, as plain LoRA, or save the base with it"
    )
  return bad


def _read_matrix(key, w, config, left, wrong) -> Any:
  """A matrix with LoRA, or itself where the adapter has nothing for it."""
  stack, n_in = key.hf.count("{}"), transformer.in_axes(key.path)
  shape = w.shape[stack:]
  modules = [key.module.format(i) for i in range(w.shape[0] if stack else 1)]
  names = [[k for c in ("A.weight", "B.weight", "B.bias") if (k := f"{m}.lora_{c}") in left] for m in modules]
  rank = [layout.peft_rank(config, m) if found else 0 for m, found in zip(modules, names, strict=True)]
  if not max(rank):
    return w
  a = np.zeros((len(rank), *shape[:n_in], max(rank)), np.float32)
  b = np.zeros((len(rank), max(rank), *shape[n_in:]), np.float32)
  bias = np.zeros((len(rank), *shape[n_in:]), np.float32)
  sizes, (pattern_a, pattern_b) = key.sizes(shape), key.low_rank()
  for i, (m, r) in enumerate(zip(modules, rank, strict=True)):
    if r:
      for view, pattern, c in ((a[i, ..., :r], pattern_a, "A"), (b[i, :r], pattern_b, "B")):
        expected = layout.rearrange(view, layout.reverse(pattern), sizes).shape
        view[...] = layout.rearrange(layout.take(left, wrong, f"{m}.lora_{c}.weight", expected), pattern, sizes)
    if r and config.get("lora_bias"):
      x = layout.take(left, wrong, f"{m}.lora_B.bias", (bias[i].size,))
      bias[i] = layout.rearrange(x[:, None], pattern_b, sizes)[0]
  scale = np.float32([layout.peft_scale(config, m, r) for m, r in zip(modules, rank, strict=True)])
  start = _start(key, w, rank, scale, n_in, config, wrong)
  put = lambda x: jnp.asarray(x if stack else x[0])
  return weights.LoRA(
    base=w,
    a=put(a),
    b=put(b),
    scale=put(scale),
    rank=put(np.int32(rank)),
    start=None if start is None else tuple(map(put, start)),
    bias=put(bias) if config.get("lora_bias") else None,
    dropout=float(config.get("lora_dropout") or 0.0),
    rslora=bool(config.get("use_rslora")),
  )


def _start(key, w, rank, scale, n_in, config, wrong) -> tuple[jax.Array, jax.Array] | None:
  """Returns the factors [L or 1, ...] that PEFT subtracts from the base when it loads the adapter, or None."""
  init = config.get("init_lora_weights")
  if init not in ("pissa", "olora"):
    return None
  if init == "olora" and key.transposed:
    wrong.append(f"init_lora_weights='olora': PEFT decomposes the transpose of {key.module}, which is not supported")
    return None
  stack = key.hf.count("{}")
  inner, outer = math.prod(w.shape[stack:][:n_in]), math.prod(w.shape[stack:][n_in:])
  if max(rank) > min(inner, outer):
    wrong.append(f"init_lora_weights={init!r}: {key.module} has rank at most {min(inner, outer)}, not {max(rank)}")
    return None
  each = w if stack else jax.tree.map(lambda x: x[None], w)
  return initial.decompose(jax.random.key(0), each, np.int32(rank), scale, n_in=n_in, columns=max(rank), init=init)
