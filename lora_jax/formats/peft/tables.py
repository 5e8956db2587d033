"""LoRA on embedding tables and tied heads in the `peft` library's format.

PEFT has one adapter per module. Each module that looks up rows of a table has `lora_embedding_A` [r, V] and
`lora_embedding_B` [D, r]. A tied head has `lora_A.weight` [r, D] and `lora_B.weight` [V, r], like any matrix. It is
adapted only if it is also named, or if `ensure_weight_tying` is set.
"""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from lora_jax import families, weights
from lora_jax.formats.peft import layout

EMBED, HEAD = "embed/kernel", "head/kernel"


def can_tie(keys: Sequence[families.Key]) -> bool:
  """Returns whether PEFT can tie the adapters of table and head: only the table's own module may look rows up."""
  return any(k.path == EMBED and k.head and k.lookups == (k.module,) for k in keys)


def read(
  key: families.Key,
  w: weights.Weight,
  config: Mapping,
  left: dict[str, np.ndarray],
  wrong: list[str],
) -> weights.Weight:
  """Returns the embedding table with LoRA on the uses that the adapter adapts.

  Args:
    left: the adapter's tensors; the function removes those that it reads.
    wrong: the function appends its error messages.
  """
  head, looked = key.head or None, key.lookups
  named = lambda module: any(k.startswith(f"{module}.lora_") for k in left)
  found = {m: _node(w, m, m == head, config, left, wrong) for m in (*looked, head) if m and named(m)}
  if not found:
    return w
  same = lambda x, y: all(np.array_equal(getattr(x, f), getattr(y, f)) for f in ("a", "b", "scale"))
  present = [found.get(m) for m in looked]
  if any(present) and not all(node and same(node, present[0]) for node in present):
    wrong.append(f"the adapters of {', '.join(looked)} differ, but these share one table here")
  embed, tied = found.get(looked[0]), found.get(head)
  if config.get("ensure_weight_tying") and embed and tied and not same(embed, tied):
    wrong.append(f"ensure_weight_tying: the adapters of {looked[0]} and {head} differ")
  if head is None or (embed and tied and same(embed, tied)):
    return embed
  if config.get("ensure_weight_tying") and len(looked) == 1:
    return embed or tied
  for node, use in ((embed, "embed"), (tied, "head")):
    w = w if node is None else node.replace(base=w, use=use)
  return w


def _node(w, module, head, config, left, wrong) -> weights.LoRA:
  """Returns LoRA on a table [V, D] from the tensors of one module, which may be the tied head."""
  r, (V, D) = layout.peft_rank(config, module), w.shape
  if head:
    a, b = (layout.take(left, wrong, f"{module}.lora_{c}.weight", s) for c, s in (("B", (V, r)), ("A", (r, D))))
  else:
    a = layout.take(left, wrong, f"{module}.lora_embedding_A", (r, V)).T
    b = layout.take(left, wrong, f"{module}.lora_embedding_B", (D, r)).T
  return weights.LoRA(
    base=w,
    a=jnp.asarray(a),
    b=jnp.asarray(b),
    scale=jnp.float32(layout.peft_scale(config, module, r)),
    rank=jnp.int32(r),
    dropout=float(config.get("lora_dropout") or 0.0),
    rslora=bool(config.get("use_rslora")),
  )
