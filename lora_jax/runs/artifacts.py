"""What a member of a group or a run by itself leaves: its adapter or model, summary.json and report.md."""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np

from lora_jax import methods, models, sharding, tree, weights
from lora_jax.formats import adapter
from lora_jax.results import report, usage
from lora_jax.training import metrics


def write(
  exp: Any, directory: pathlib.Path, history: list[dict], seconds: float, *, command: str, more: dict, plot: bool
) -> dict:
  """Writes all of it, the summary last; returns that.

  Args:
    exp: an `experiment.Experiment` after its last step.
    history: the rows of its metrics.jsonl.
    seconds: that all of it took.
    command: for the report.
    more: further entries of the summary.
    plot: whether there are plots.
  """
  export(exp, directory)
  summary = summarise(exp, history, seconds) | more
  if jax.process_index() == 0:
    use = usage.section(exp.model, directory, exp.task.labels or ())
    report.write_report(directory, summary, history, exp.config.to_dict(), command, use, plot=plot)
    metrics.write_json(directory / "summary.json", summary)
  return summary


def write_error(error: str, directory: pathlib.Path, more: dict) -> dict:
  """The summary of a member that has failed."""
  summary = {"error": error} | more
  if jax.process_index() == 0:
    metrics.write_json(directory / "summary.json", summary)
  return summary


def export(exp: Any, workdir: pathlib.Path) -> None:
  """Writes `adapter/`, or the whole `model/`, see `methods.leaves_model`."""
  model = dataclasses.replace(exp.model, params=sharding.to_host(exp.params))
  if jax.process_index():
    return
  method = methods.prepare(exp.config.method, model.tokenizer, exp.task.labels or ())
  if methods.leaves_model(method):
    models.save(model, workdir / "model")
  else:
    steps = exp.config.train.steps
    adapter.save(model, model.params, exp.mask, method, workdir / "adapter", steps)


def summarise(exp: Any, history: list[dict], wall_seconds: float) -> dict:
  """The content of summary.json."""
  stripped = weights.strip(exp.params)
  base = tree.flatten(stripped)
  trainable = tree.flatten(exp.state.trainable)
  rows = [{k.removeprefix("train/"): v for k, v in row.items()} for row in history if "train/loss" in row]
  scores = {
    prefix: {
      k.removeprefix(f"{prefix}/"): v
      for row in history
      for k, v in row.items()
      if k.startswith(f"{prefix}/") and not k.endswith("/seconds")
    }
    for prefix in ("before", "after")
  }
  return report.summary(
    model=exp.model.name,
    method=methods.title(exp.config.method),
    kind=methods.kind(exp.config.method),
    task=exp.task.name,
    trainable_params=methods.size(exp.params, exp.mask),
    total_params=weights.n_params(stripped) + tree.size([x for k, x in trainable.items() if k not in base]),
    **scores,
    steps=exp.config.train.steps,
    loss_first=rows[0]["loss"],
    loss_last=rows[-1]["loss"],
    tokens_per_second=sum(r["tokens"] for r in rows) / sum(r["seconds"] for r in rows),
    compile_seconds=sum(r["compile_seconds"] for r in rows),
    step_seconds=float(np.median([r["seconds"] / r["steps"] for r in rows[1:] or rows])),
    wall_seconds=wall_seconds,
    train_examples=exp.batches.examples,
    cut=exp.batches.truncated,
    step_memory_bytes=exp.stepper.memory_bytes,
    dtype=exp.model.config.dtype,
    devices=f"{exp.mesh.size} x {jax.devices()[0].device_kind}",
  )
