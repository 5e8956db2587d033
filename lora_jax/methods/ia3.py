"""IA3: trained vectors that scale keys, values and hidden units (Liu et al. 2022, https://arxiv.org/abs/2205.05638).

`softmax(q (l_k o k)^T / sqrt(d)) (l_v o v)` in every attention, also to an encoder, and `(l_ff o act(W1 x)) W2`
(section 3.3, equation 1 and what follows): d_k + d_v + d_ff numbers a layer, and d_k + d_v for attention to an encoder.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import errors, tree, weights
from lora_jax.methods import targeting
from lora_jax.model import architecture
from lora_jax.weights import fused

KIND = "scales and biases"
OPTIM = {"name": "adafactor", "learning_rate": 3e-3, "schedule": "linear", "warmup": 0.06}  # the paper's appendix B

INPUT, OUTPUT = weights.SCALES


def init(
  key: jax.Array, params: Any, *, targets: str | Sequence[str] = "k,v", feedforward: str | Sequence[str] = "down"
) -> tuple[Any, Any]:
  """Vectors of ones beside matrices: `output_scale` after the targets, `input_scale` before the feed-forward ones.

  In a gated layer, `down(act(gate(x)) o up(x))`, scaling the input of `down` is the same as scaling the output of `up`,
  as the authors' code does. k and v of a matrix that is q, k and v have one vector, [L, 2K, H].

  Args:
    targets, feedforward: as `targets` of `lora.init`, in all layers; "" is none. Of a fused matrix the last parts can
      be scaled: "k,v", "v" or "q,k,v" of q, k and v, "up" or "gate,up" of gate and up.

  Returns:
    (params, mask): True at the vectors, float32.
  """
  del key
  linear = matrices(params)
  shapes = {}
  for name, chosen in ((OUTPUT, targets), (INPUT, feedforward)):
    for k, heads in _chosen(params, linear, chosen, name).items():
      stack = architecture.stack_axes(k)
      ends = stack + architecture.in_axes(k)
      shape = linear[k].shape
      outer = shape[ends:] if heads is None else (*shape[ends:-2], heads, shape[-1])
      place = k.removesuffix("/kernel")
      shapes.setdefault(place, {})[name] = shape[:ends] if name == INPUT else (*shape[:stack], *outer)
  if not shapes:
    raise errors.UserError("IA3 scales nothing: config.method.targets and config.method.feedforward are empty")
  if twice := [k for k, s in shapes.items() if len(s) > 1]:
    raise errors.UserError(f"IA3 scales the output or the input of a matrix, not both: {', '.join(twice)}")
  mask = jax.tree.map(lambda _: False, params)
  for place, new in shapes.items():
    params = put(params, place.split("/"), {name: jnp.ones(shape, jnp.float32) for name, shape in new.items()})
    mask = put(mask, place.split("/"), dict.fromkeys(new, True))
  return params, mask


def matrices(params: Any) -> dict[str, Any]:
  """Matrices that `layers.linear` multiplies by, and the parts that fused ones have, whether or not they are split."""
  linear = {k: w for k, w in targeting.matrices(params, experts=True).items() if k != "head/kernel"}
  return linear | {part: w for k, w in linear.items() for part in fused.part_names(k)}


def _chosen(params: Any, linear: Mapping[str, Any], targets: Any, name: str) -> dict[str, int | None]:
  """{name of a whole matrix: None, or how many of its last heads} that `targets` means."""
  what = "config.method.targets" if name == OUTPUT else "config.method.feedforward"
  out, parts = {}, {}
  for k, hit in targeting.select(targets, linear, what).items() if targets else ():
    whole = k.rpartition("/")[0]
    if "/moe/" in k:
      hint = " without them, such as ''" if name == INPUT else ""
      raise errors.UserError(f"IA3 does not scale experts and their router ({k}); choose {what}{hint}")
    if not hit.all():
      raise errors.UserError(f"IA3 has a vector in every layer, but {what} names some layers of {k} only")
    if not fused.part_names(whole):
      out[k] = None
    else:
      parts.setdefault(whole, []).append(k.rpartition("/")[2])
  for k, found in parts.items():
    order, heads = sizes(params, k)
    if name == INPUT or tuple(p for p in order if p in found) != order[-len(found) :]:
      raise errors.UserError(
        f"{what} names {', '.join(found)} of {k}; of a fused matrix IA3 scales the last outputs: "
        + " or ".join(repr(",".join(order[i:])) for i in range(len(order)))
      )
    out[k] = sum(heads[-len(found) :])
  return out


def sizes(params: Any, k: str) -> tuple[tuple[str, ...], list[int]]:
  """The parts of a fused matrix and how many heads, or rows of its axis, each has."""
  flat = tree.flatten(params, is_leaf=weights.is_node)
  group, name = k.removesuffix("/kernel").rpartition("/")[::2]
  if name != "qkv":
    return fused.PARTS[name], [1, 1]
  n, m = flat[f"{group}/o/kernel"].shape[-3], flat[k].shape[fused.AXIS]
  return fused.PARTS[name], [n, (m - n) // 2, (m - n) // 2]


def put(params: Any, path: Sequence[str], entries: Mapping[str, Any]) -> Any:
  """The tree with entries in the dict at `path`, which may not be there yet."""
  if path:
    return {**params, path[0]: put(params[path[0]], path[1:], entries)}
  if taken := entries.keys() & params.keys():
    raise errors.UserError(f"config.method: a matrix has two of {', '.join(taken)}; name IA3 once")
  return {**params, **entries}
