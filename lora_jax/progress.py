"""Status lines and progress bars on standard error."""

import sys
import time

import tqdm


def say(text: str) -> None:
  """Prints a status line to standard error, above the progress bar if there is one."""
  tqdm.tqdm.write(text, file=sys.stderr)


class Progress:
  """Shows the progress of long work on standard error: a bar on a terminal, plain lines elsewhere."""

  def __init__(self, total: int, label: str = "step", start: int = 0):
    self.total = total
    self.label = label
    self._first = None
    self._last_line = time.monotonic()
    self._bar = None
    if sys.stderr.isatty():
      layout = "{desc} {n_fmt}/{total_fmt} |{bar}| time left {remaining}{postfix}"
      self._bar = tqdm.tqdm(
        total=total, initial=start, desc=label, bar_format=layout, smoothing=0.1, dynamic_ncols=True
      )

  def update(self, done: int, text: str = "") -> None:
    """Shows that `done` of `total` steps are done.

    Without a terminal this prints a line whenever there is `text`, and otherwise every 10 seconds.
    """
    now = time.monotonic()
    self._first = self._first or (done, now)
    if self._bar is not None:
      if text:
        self._bar.set_postfix_str(text, refresh=False)
      self._bar.update(done - self._bar.n)
    elif text or now - self._last_line > 10:
      self._last_line = now
      parts = [f"{self.label} {done:,}/{self.total:,}", text]
      if done > self._first[0]:
        left = (self.total - done) * (now - self._first[1]) / (done - self._first[0])
        parts.append(f"time left {tqdm.tqdm.format_interval(left)}")
      say("  ".join(filter(None, parts)))

  def close(self) -> None:
    """Ends the bar, which stays on the terminal."""
    if self._bar is not None:
      self._bar.close()
