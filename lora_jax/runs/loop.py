"""The one loop: trains what is made real, evaluates between, saves, goes on from a checkpoint, writes what is left.

What it trains is an `experiment.Experiment`, a run by itself, or a `group.Group`, several as one program. Both have
`members`, {name: Experiment}; `mesh`; `steps`, of the longest; `stepper`; and

  advance() -> metrics            one step, [] or [P]
  change(step)                    what methods do after so many steps
  done() -> int, alive() -> [P]   steps that are done; which members go on
  subject() -> scores.Subject     the members as they are now
  save(saved, step), restore(saved, step)
  on_host()                       itself without what is no longer needed on devices, for `member`
  member(i) -> Experiment         member i as a run by itself
"""

import concurrent.futures
import contextlib
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lora_jax import errors, progress
from lora_jax.formats import checkpoint
from lora_jax.runs import artifacts, config as config_lib, scores
from lora_jax.training import metrics, step_log


def train(
  run: Any,
  directories: Sequence[pathlib.Path],
  checkpoints: pathlib.Path,
  *,
  before: Callable[[], scores.Scores] | None = None,
  strict: bool = True,
  command: str = "",
  more: Mapping[str, Any] | None = None,
) -> list[dict]:
  """Trains, scores and writes what is left to do of a run; the summaries of the members that it wrote.

  Args:
    directories: of the members; those that have their results are left alone.
    checkpoints: a directory for those of the run.
    before: gives the scores of the pretrained model, where they are known; else the run does.
    strict: whether a loss that is not finite is an error. If not, the member is frozen and reported; others go on.
    command: for reports.
    more: further entries of summaries.
  """
  started, members = time.perf_counter(), list(run.members.values())
  _say_cut(members)
  for exp, directory in zip(members, directories, strict=True):
    config_lib.finished(exp.config, directory)
    if jax.process_index() == 0:
      metrics.write_json(directory / "config.json", exp.config.to_dict())
  with contextlib.ExitStack() as stack:
    stack.enter_context(jax.set_mesh(run.mesh))
    saved = stack.enter_context(checkpoint.Checkpoints(checkpoints))
    start = saved.latest_step() or 0
    if start:
      run.restore(saved, start)
      progress.say(f"going on from the checkpoint of step {start}")
    outs = [stack.enter_context(metrics.Metrics(d, start)) for d in directories]
    earlier = sum(v for row in outs[0].history() for k, v in row.items() if k.endswith("seconds"))
    _score(run, outs, [0] * len(outs), "before", "test", before or run.before)
    run.pretrained = None  # a step needs the memory
    compiling = scores.compile_ahead(run.subject(), "test")
    failed = fit(run, outs, saved, strict)
    concurrent.futures.wait([compiling])
    last = [None if i in failed else exp.config.train.steps for i, exp in enumerate(members)]
    _score(run, outs, last, "after", "test")
    run, summaries = run.on_host(), []
    for i, directory in enumerate(directories):
      if (directory / "summary.json").exists():
        continue
      if i in failed:
        summaries.append(artifacts.write_error(failed[i], directory, more or {}))
        continue
      seconds = earlier + time.perf_counter() - started
      alone = len(directories) == 1
      how = {"command": command, "more": more or {}, "plot": alone}
      summaries.append(artifacts.write(run.member(i), directory, outs[i].history(), seconds, **how))
    return summaries


def _say_cut(members: Sequence[Any]) -> None:
  """Says how many training examples are too long, of each choice of them."""
  seq_len = members[0].config.data.seq_len
  for examples, cut in sorted({(exp.batches.examples, exp.batches.truncated) for exp in members}):
    if cut:
      progress.say(f"cut to config.data.seq_len={seq_len}: {cut:,} of {examples:,} training examples")


def fit(run: Any, outs: Sequence[metrics.Metrics], saved: checkpoint.Checkpoints, strict: bool) -> dict[int, str]:
  """Trains to the last step of the longest run; logs, evaluates and saves on the way.

  Args:
    strict: as in `train`.

  Returns:
    {member: what went wrong}.
  """
  members, failed, start = list(run.members.values()), {}, run.done()
  settings, every = members[0].config.train, members[0].config.eval.every
  steps = [exp.config.train.steps for exp in members]
  bar = progress.Progress(run.steps, "step", start)

  def diverged(step, i, values):
    fault = step_log.not_finite(step, values)
    if strict:
      good = saved.latest_step()
      kept = f"the checkpoint of step {good} is kept" if good else "there is no checkpoint yet"
      raise errors.UserError(f"{fault}; {kept}. {step_log.ADVICE}")
    failed[i] = f"{fault}. {step_log.ADVICE}"
    progress.say(f"{list(run.members)[i]}: {failed[i]}; it is left as it was, the others go on")

  def shown(step, loss=None, tokens_per_second=None):
    mean = "mean " if len(members) > 1 else ""
    if jax.process_index() == 0:
      bar.update(step, "" if loss is None else f"{mean}loss {loss:.3f}  {tokens_per_second:,.0f} tokens/s")

  log = step_log.Log(outs, run.stepper, steps, settings.log_every, diverged, shown)
  for i in np.flatnonzero(~run.alive()).tolist():
    failed[i] = f"its loss was not finite before step {start}. {step_log.ADVICE}"
    log.stop(i)
  for step in range(start + 1, run.steps + 1):
    # Before the next step, so that a run that was cut off between a checkpoint and its validation makes up for it.
    if every and step > 1 and (step - 1) % every == 0:
      log.flush()
      since = time.perf_counter()
      _score(run, outs, [step - 1 if step - 1 <= n else None for n in steps], "validation", "validation")
      log.skip(time.perf_counter() - since)
    values = run.advance()
    run.change(step)
    log.add(step, values)
    if step == run.steps or step % settings.checkpoint_every == 0:
      log.flush(write=True)
      run.save(saved, step)
  bar.close()
  return failed


def _score(
  run: Any,
  outs: Sequence[metrics.Metrics],
  steps: Sequence[int | None],
  prefix: str,
  split: str,
  known: Callable[[], scores.Scores] | None = None,
) -> None:
  """Logs `prefix/metric` of each member at its step, unless that is None or the log has them already.

  Args:
    known: gives the scores of every member in place of an evaluation.
  """
  has = lambda row, step: row["step"] == step and any(k.startswith(f"{prefix}/") for k in row)
  lacks = lambda out, step: step is not None and not any(has(row, step) for row in out.history())
  lacking = [i for i, (out, step) in enumerate(zip(outs, steps, strict=True)) if lacks(out, step)]
  if not lacking:
    return
  start = time.perf_counter()
  found = [known()] * len(outs) if known else scores.find(run.subject(), prefix, split)
  for i in lacking:
    scores.record(outs[i], steps[i], prefix, found[i], seconds=time.perf_counter() - start)
  if len(outs) == 1:
    progress.say(scores.said(prefix, found[0]))
