"""BitFit: only biases are trained (Ben Zaken et al. 2021, https://arxiv.org/abs/2106.10199, section 3).

It trains all biases or some groups of them. The authors find that the biases of the query and of the first feed-forward
matrix ("q,up") are nearly as good as all. Where query, key and value are one matrix (GPT-2), the query's bias is a part
of the fused bias, which is split as LoRA splits the matrix; see weights/fused.py.
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
  """Trains biases as float32 masters; a matrix of the layers without a bias gets a bias of zeros.

  Such a bias does not belong to the pretrained model, but `weights.strip`, which removes what methods add, keeps it.
  A norm without a bias does not get one, since that would turn an RMS norm into a layer norm. Experts do not either.

  Args:
    targets: "all"; "norm" for the biases of all norms; short names of matrices, of parts of fused matrices and of norms
      ("q,v"); regexes found in names such as `layers/mlp/up/bias`; or a sequence of these. A part has the name that it
      would have as a matrix of its own. A target that also matches the fused matrix selects its whole bias.

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
  """Returns the tree with a leaf at `path`."""
  return {**params, path[0]: x if len(path) == 1 else _put(params[path[0]], path[1:], x)}
