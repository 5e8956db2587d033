"""Configs of experiments: what is in them, and whether a directory belongs to one.

A config is nested dicts of plain values. What each section takes follows from the signatures of the functions that
it is passed to; those hold the defaults too.
"""

import json
import pathlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from lora_jax import classify, errors, methods, objectives, optim, seq2seq, sharding, tasks, transformer
from lora_jax.formats import hf

SWEEP = ("sweep", "table")  # sections of a sweep alone
SECTIONS = ("model", "method", "task", "objective", "data", "optim", "train", "mesh", "eval")


def check(config: Mapping) -> None:
  """Raises UserError for a section or key that no part of the code takes, before anything is loaded."""
  for k in config:
    errors.choose(k, dict.fromkeys(SECTIONS), "section config.")
  for k in SECTIONS:
    if k not in config:
      raise errors.UserError(f"config has no section {k!r}; it needs {', '.join(SECTIONS)}")
    if k != "method" and not isinstance(config[k], Mapping):
      raise errors.UserError(f"config.{k} is a section with keys, not {config[k]!r}")
  for k in ("model", "task", "objective", "optim"):
    if not config[k].get("name"):
      raise errors.UserError(f"config.{k} needs a name")
  objective = errors.choose(config["objective"]["name"], objectives.OBJECTIVES, "objective")
  for k in config["model"]:
    errors.choose(k, dict.fromkeys(("name", "dtype", "head", "n_labels", *transformer.RUNTIME)), "key config.model.")
  methods.check(config["method"])
  own = config["objective"].keys() - {"name", "prompt_loss_weight"}
  errors.check_keywords(objective, own, "config.objective", ("forward", "params", "batch", "most"))
  errors.check_keywords(optim.make, config["optim"].keys(), "config.optim", ("steps", "direction", "wrap"))
  errors.check_keywords(sharding.make_mesh, config["mesh"].keys(), "config.mesh")
  errors.check_keywords(train_settings, config["train"].keys(), "config.train")
  errors.check_keywords(eval_settings, config["eval"].keys(), "config.eval")
  # That of encoder-decoders takes all that one of decoders does; which it is only the model tells.
  check_data(config, classify if config["objective"]["name"] == "classification" else seq2seq)


def check_data(config: Mapping, batches: ModuleType) -> None:
  """Raises UserError for a key of `config.data` that `batches.train_iterator` does not take."""
  own = ("start", "prompt_loss_weight", "process_index", "process_count", "multiple", "soft")
  given = ("task", "examples", "tokenizer", *own)
  errors.check_keywords(batches.train_iterator, config["data"].keys() - {"train_examples"}, "config.data", given)


def train_settings(
  *,
  steps: int,
  seed: int = 0,
  accumulate: int = 1,
  log_every: int = 10,
  checkpoint_every: int = 100,
  init_from: str = "",
) -> dict:
  """`config.train`.

  `accumulate` splits each batch into that many micro-batches.
  `init_from` is the directory of an adapter, or `hf:org/name`, whose values training starts from; see warm_start.py.
  """
  if steps < 1 or accumulate < 1 or log_every < 1 or checkpoint_every < 1:
    raise errors.UserError("config.train: steps, accumulate, log_every and checkpoint_every are at least 1")
  return dict(locals())


def eval_settings(
  *,
  examples: int = 500,
  every: int = 0,
  batch_size: int = 32,
  seq_len: int = 256,
  same_length: bool = False,
  max_new_tokens: int | None = None,
  beams: int = 1,
  length_penalty: float = 1.0,
  no_repeat_ngram: int = 0,
  early_stopping: bool | str = False,
  general: str = "",
  general_examples: int = 200,
) -> dict:
  """`config.eval`: of the test split before and after, and of the validation split each `every` steps (0: never).

  `same_length` pads all prompts to the longest: where compiling takes longer than padding does, as on accelerators.
  `beams` and what follows it say how texts are generated, see `evaluate.Search`.
  `general` names a task whose test texts show what a language model forgets: `general_loss` is its loss on them.
  """
  if general:
    tasks.get(general)
  if general_examples < 1:
    raise errors.UserError("config.eval.general_examples is at least 1")
  if examples < 1 or batch_size < 1 or seq_len < 1 or every < 0:
    raise errors.UserError("config.eval: examples, batch_size and seq_len are at least 1, every at least 0")
  if max_new_tokens is not None and max_new_tokens < 0:
    raise errors.UserError("config.eval.max_new_tokens is at least 0, or None")
  if beams < 1 or no_repeat_ngram < 0 or early_stopping not in (True, False, "never"):
    raise errors.UserError(
      "config.eval: beams is at least 1, no_repeat_ngram at least 0, and early_stopping True, False or 'never'"
    )
  return dict(locals())


def prompt_loss_weight(config: Mapping, task: tasks.Task) -> float:
  """What the config says, else what suits the task, else 0.1."""
  value = config["objective"].get("prompt_loss_weight")
  value = task.prompt_loss_weight if value is None else value
  return 0.1 if value is None else float(value)


def finished(config: Mapping, workdir: pathlib.Path) -> bool:
  """Whether `workdir` holds this run complete; UserError if it holds anything else than a run of this config."""
  if workdir.exists() and not workdir.is_dir():
    raise errors.UserError(f"{workdir} is a file, expected a directory; give another --workdir")
  if not workdir.exists() or all(p.suffix == ".tmp" for p in workdir.iterdir()):  # what is being written, or never was
    return False
  if not (workdir / "config.json").exists():
    raise errors.UserError(f"{workdir} is not empty and holds no run (no config.json); give another --workdir")
  theirs, ours = (_leaves(c) for c in (hf.read_json(workdir / "config.json"), json.loads(json.dumps(dict(config)))))
  differ = [k for k in sorted(theirs.keys() | ours.keys()) if theirs.get(k) != ours.get(k)]
  if differ:
    shown = "; ".join(f"{k} was {theirs.get(k)!r}, now {ours.get(k)!r}" for k in differ[:5])
    raise errors.UserError(f"{workdir} belongs to another config ({shown}); give another --workdir")
  return (workdir / "summary.json").exists()


def _leaves(config: Mapping, prefix: str = "") -> dict[str, Any]:
  """{"section.key": value} of a nested config."""
  out = {}
  for k, v in config.items():
    out |= _leaves(v, f"{prefix}{k}.") if isinstance(v, Mapping) and v else {f"{prefix}{k}": v}
  return out
