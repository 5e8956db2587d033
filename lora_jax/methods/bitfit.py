"""BitFit: only biases are trained (Ben Zaken et al. 2021, https://arxiv.org/abs/2106.10199, section 3).

All of them, or some groups: the authors find those of the query and of the first feed-forward matrix, "q,up", nearly
as good. Where query, key and value are one matrix (GPT-2) that of the query is a part of their bias, split as LoRA
splits the matrix; see weights/fused.py.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import tree, weights
from lora_jax.methods import norms, targeting
from lora_jax.model import architecture
from lora_jax.weights import fused

KIND = "scales and biases"
OPTIM = {"learning_rate": 1e-3}  # the authors' code
WHOLE = True  # trains leaves of the pretrained model


def init(key: jax.Array, params: Any, *, targets: str | Sequence[str] = "all") -> tuple[Any, Any]:
  """Trains biases as float32 masters; a matrix of the layers that has none gets one of zeros.

  Such a bias is no part of the pretrained model, but `weights.strip`, which takes off what methods add, keeps it. A
  norm without a bias stays so, as the bias is what makes a layer norm of an RMS norm; experts have none either.

  Args:
    targets: "all"; "norm", those of all norms; short names of matrices, of parts of fused ones and of norms ("q,v"),
      regexes found in names such as `layers/mlp/up/bias`, or a sequence of those. A part has the name that it would
      have alone; what means the fused matrix too means all of its bias.

  Returns:
    (params, mask).
  """
  del key
  names = tree.names(params, is_leaf=weights.is_node)
  old = {k for k in names if k.endswith("/bias")}
  new = {}
  for k, w in targeting.matrices(params).items():
    bias = k.removesuffix("kernel") + "bias"
    if k.endswith("/kernel") and architecture.stacked(k) and "/moe/" not in k and bias not in old:
      new[bias] = (w.shape[0], *w.shape[1 + architecture.in_axes(k) :])
  alone = {fused.alone(part): part for k in old | new.keys() for part in fused.part_names(k)}
  picked = norms.chosen(targets, sorted(old | new.keys() | alone.keys()), "config.method.targets")
  picked = {alone.get(k, k) for k in picked}
  picked |= {k for k in old | new.keys() if (parts := set(fused.part_names(k))) and parts <= picked}
  touched = {fused.whole(k) for k in picked}
  for k in sorted(new.keys() & touched):
    params = _put(params, k.split("/"), jnp.zeros(new[k], jnp.float32))
  params = fused.split(params, touched - picked)
  trained = lambda k: k in picked or fused.whole(k) in picked
  mask = tree.map_named(lambda k, _: trained(k), params)
  return tree.map_named(lambda k, x: x.astype(jnp.float32) if trained(k) else x, params), mask


def _put(params: Any, path: Sequence[str], x: jax.Array) -> Any:
  """The tree with a leaf at `path`."""
  return {**params, path[0]: x if len(path) == 1 else _put(params[path[0]], path[1:], x)}
