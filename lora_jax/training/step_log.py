"""The log of training steps, of one run or of the members of a population."""

import time
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from lora_jax.training import metrics, train

ADVICE = "Lower config.optim.learning_rate, or clip with config.optim.clip_norm"


def not_finite(step: int, values: Mapping[str, float]) -> str:
  """What is wrong with a step whose loss or gradient is not finite."""
  return f"step {step}: loss {values['loss']:.4g}, gradient norm {values['grad_norm']:.4g}: not finite"


class Log:
  """Reads the metrics of a step only when the next one runs, and writes their mean every `log_every` steps.

  At a checkpoint it writes too, since what is not written would be lost to a run that goes on from there.
  """

  def __init__(
    self,
    outs: Sequence[metrics.Metrics],
    stepper: train.Stepper,
    steps: Sequence[int],
    log_every: int,
    diverged: Callable[[int, int, dict], None],
    progress: Callable,
  ):
    """A log of one run, or of the members of a population.

    Args:
      outs: of each member.
      steps: how many each member trains for.
      diverged: called with (step, member, metrics) when a loss or gradient is not finite; nothing more is logged of
        the member after that.
      progress: called with each step, and where a row is written with the mean loss and the tokens a second of all.
    """
    self._outs, self._stepper, self._steps, self._every = outs, stepper, np.array(steps), log_every
    self._diverged, self._progress = diverged, progress
    self._alive = np.ones(len(outs), bool)
    self._pending, self._rows = None, []
    # What has been compiled already is of the first row.
    self._since, self._compiled = time.perf_counter() - stepper.compile_seconds, 0.0

  def skip(self, seconds: float) -> None:
    """Leaves out of the next row's time what was no training."""
    self._since += seconds

  def stop(self, member: int) -> None:
    """Logs nothing more of a member."""
    self._alive[member] = False

  def add(self, step: int, values: dict) -> None:
    """Takes a step's metrics, which may still be being computed, and reads those of the step before."""
    self._pending, before = (step, values), self._pending
    if before:
      self._read(*before)

  def flush(self, write: bool = False) -> None:
    """Reads what is pending, and writes a row of what is read if there is any."""
    if self._pending:
      self._read(*self._pending)
      if write and self._rows:
        self._write()
    self._pending = None

  def _read(self, step: int, values: dict) -> None:
    values = {k: np.array(v, float).reshape(-1) for k, v in jax.device_get(values).items()}
    finite = values.pop("finite")
    for i in np.flatnonzero(self._alive & (step <= self._steps)):
      if not finite[i]:
        row = {k: v[i] for k, v in values.items()}
        self._outs[i].log(step, row)
        self._alive[i] = False
        self._diverged(step, int(i), row)
    self._rows.append((step, values))
    if step == 1 or step % self._every == 0 or step in self._steps:
      self._write()
    else:
      self._progress(step)

  def _write(self) -> None:
    compiling = self._stepper.compile_seconds - self._compiled
    seconds = time.perf_counter() - self._since - compiling
    table = {k: np.stack([v[k] for _, v in self._rows]) for k in self._rows[0][1]}  # [rows, P]
    at = np.array([step for step, _ in self._rows])
    shown = []
    for i in np.flatnonzero(self._alive & (at[0] <= self._steps)):
      used = at <= self._steps[i]
      row = {k: v[used, i].mean() for k, v in table.items()}
      row |= {"steps": int(used.sum()), "tokens": table["tokens"][used, i].sum(), "seconds": seconds}
      row |= {"compile_seconds": compiling, "tokens_per_second": row["tokens"] / seconds}
      row["learning_rate"] = table["learning_rate"][used, i][-1]
      self._outs[i].log(at[used][-1], row)
      shown.append(row)
    if shown:
      loss = sum(r["loss"] for r in shown) / len(shown)
      self._progress(int(at[-1]), loss, sum(r["tokens_per_second"] for r in shown))
    self._rows = []
    self._restart()

  def _restart(self) -> None:
    self._since, self._compiled = time.perf_counter(), self._stepper.compile_seconds
