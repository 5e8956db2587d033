"""Model families: each module maps a Hugging Face config to `transformer.Config` and names to names.

A family module has `config(hf: dict) -> transformer.Config` and `KEYS`, a tuple of `Key`s used for import and export.
"""

import dataclasses
import importlib
import pkgutil
from collections.abc import Iterable, Mapping
from types import ModuleType

from lora_jax import errors


@dataclasses.dataclass(frozen=True)
class Key:
  """One row of a family's table.

  Fields:
    path: name of the leaf in our tree; under `layers/` it is stacked and `hf` has a `{}` for the layer.
    hf: name of the tensor in Hugging Face's layout.
    pattern: einops pattern from their axes to ours for one layer, `out in -> ...`; `h` is the head size.
  """

  path: str
  hf: str
  pattern: str

  @property
  def reverse(self) -> str:
    """The pattern from our axes to theirs."""
    left, right = self.pattern.split("->")
    return f"{right.strip()} -> {left.strip()}"


def get(model_type: str) -> ModuleType:
  """The module of a family by the `model_type` of its Hugging Face config."""
  table = {m.name: m.name for m in pkgutil.iter_modules(__path__)}
  return importlib.import_module(f"{__name__}.{errors.choose(model_type, table, 'model family')}")


def check_config(hf: Mapping, handled: Iterable[str], default: Mapping, ignored: Iterable[str]) -> None:
  """Raises UserError listing every key of an HF config that is neither understood nor known to have no effect.

  Args:
    handled: keys that the family reads.
    default: keys that are understood only at the given value.
    ignored: keys that do not change the forward pass.
  """
  handled, ignored = set(handled), set(ignored)
  bad = [f"{k}={hf[k]!r} (only {v!r} is supported)" for k, v in default.items() if k in hf and hf[k] not in (v, None)]
  bad += [f"{k}={hf[k]!r} (unknown)" for k in sorted(hf.keys() - handled - default.keys() - ignored)]
  if bad:
    raise errors.UserError(f"config.json of a {hf.get('model_type')} model: " + "; ".join(bad))


# Keys of any config.json that say how a model was saved or is served, not what it computes.
BOOKKEEPING = frozenset(
  (
    "_name_or_path architectures attention_dropout bos_token_id eos_token_id pad_token_id dtype torch_dtype "
    "initializer_range model_type transformers_version transformers.js_config use_cache name_or_path "
    "is_llama_config rope_interleaved unsloth_version unsloth_fixed auto_map"
  ).split()
)
