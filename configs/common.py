"""What experiments share; a config file changes what its experiment needs. docs/config.md lists all keys."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """LoRA on SmolLM2-135M-Instruct, without a task; a base for the other configs."""
  return ConfigDict(
    {
      "model": {"name": "smollm2-135m"},
      "method": {"name": "lora", "rank": 8, "alpha": 16.0, "targets": "all-linear"},
      "task": {"name": ""},
      "objective": {"name": "causal_lm"},
      "data": {"batch_size": 32, "seq_len": 512},
      "optim": {"name": "adamw", "learning_rate": 2e-4},
      "train": {"steps": 200},
      "mesh": {},
      "eval": {"batch_size": 64, "seq_len": 512},
    }
  )


def get_sweep(size: str = "") -> ConfigDict:
  """A base for tables: all members at once, spread over the devices.

  Args:
    size: "smol", SmolLM2-135M on sentences from a package; or "", SmolLM2-1.7B on MNLI, both from a hub.
  """
  if size not in ("", "smol"):
    raise KeyError(f"unknown size {size!r}; known: smol, or none")
  config = get_config()
  config.mesh.population = -1
  config.mesh.data = 1
  config.objective.prompt_loss_weight = 0.0
  config.method.targets = "q,v"
  config.model.remat = True  # with many members, activations fill the memory, and moving them takes the time
  if size == "smol":
    config.task.name = "rotten_tomatoes"
    config.data.seq_len = 128
    config.data.share_rows = True
    config.train.log_every = 20
    config.train.checkpoint_every = 200
    config.eval.examples = 850
    config.eval.batch_size = 512
    config.eval.seq_len = 128
    config.eval.same_length = True
    return config
  config.model.name = "hf:HuggingFaceTB/SmolLM2-1.7B-Instruct"
  config.task = {"name": "glue", "subset": "mnli"}
  config.data.seq_len = 256
  config.train.steps = 6000
  config.train.log_every = 50
  config.train.checkpoint_every = 1000
  config.eval.examples = 9815
  return config


def text(method: dict) -> str:
  """A method as the text of a value in a table's rows or columns, so that it can have a label."""
  return ",".join(f"{k},{v:g}" if isinstance(v, float) else f"{k},{v}" for k, v in sorted(method.items()))
