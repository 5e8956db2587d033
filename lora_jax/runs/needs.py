"""What runs need of memory at the least, which is known before anything is loaded or compiled."""

import jax

from lora_jax import errors, memory, methods, models, tasks, tree
from lora_jax.runs.config import Config


def least_memory(config: Config, task: tasks.Task, model: models.Model, members: int = 1) -> dict[str, int]:
  """{what of the config asks for it: bytes} of memory that `members` runs on a model need, beside the model."""
  c, rows, length = model.config, config.data.batch_size // config.train.accumulate, memory.SHORTEST
  if config.data.pack:
    length = config.data.seq_len
  elif config.data.share_rows:  # how many rows they share only their lengths tell
    rows, length = 1, config.data.seq_len
  method, masks = methods.prepare(config.method, model.tokenizer, task.labels or ()), []

  def trained(params):
    params, mask = methods.init(jax.random.key(0), params, method)
    masks.append(mask)
    return params

  try:
    shapes = jax.eval_shape(trained, model.params)
  except (OverflowError, MemoryError) as e:
    raise errors.UserError(f"config.method asks for more than any memory has: {errors.line(e)}") from e
  scored = max(config.eval.batch_size // members, 1)
  need = {
    "what config.method trains": memory.size(tree.split(shapes, masks[0])[0]),
    "the states of a layer, of config.data.batch_size rows": memory.states(c, rows, length),
    "the states of a layer, of config.eval.batch_size rows": memory.states(c, scored),
  }
  if c.causal and config.eval.max_new_tokens:
    what = "the keys and values of config.eval.batch_size texts of max_new_tokens"
    what += f", each with {config.eval.beams:,} beams" if config.eval.beams > 1 else ""
    need[what] = memory.cache(c, scored * config.eval.beams, memory.SHORTEST + config.eval.max_new_tokens)
  return {k: members * n for k, n in need.items()}
