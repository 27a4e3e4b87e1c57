"""Progress of long work: a bar on a terminal, a few lines in a log, with the time left."""

import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

import tqdm

from spct_jax.stages import processes

# In a log file: no line before the first interval, then one per tenth of the work, or per minute if
# that is slower.
_FIRST_SECONDS = 10.0
_QUIET_SECONDS = 60.0


class Progress:
  """Counts `total` units of work; only process 0 shows it. Use it in a `with`, or close it.

  `start` units were done by an earlier run; they count as done and not for the speed.
  """

  def __init__(
    self, total: int, desc: str, enabled: bool = True, *, start: int = 0, file: TextIO | None = None
  ):
    self._total, self._desc, self._done, self._start = total, desc, start, start
    self._file = file if file is not None else sys.stderr
    self._enabled = enabled and processes.is_writer()
    self._began = self._said = time.monotonic()
    self._said_tenth = self._tenth()
    self._last, self._said_done = '', -1
    self._bar = None
    if self._enabled and self._file.isatty():
      self._bar = tqdm.tqdm(
        total=total, desc=desc, initial=start, file=self._file, dynamic_ncols=True
      )

  def __enter__(self) -> 'Progress':
    return self

  def __exit__(self, *error: Any) -> None:
    self.close()

  def update(self, n: int, metrics: Mapping[str, Any] | None = None) -> None:
    """`n` more units are done; `metrics` are shown beside the count."""
    self._done += n
    if not self._enabled:
      return
    if metrics:
      self._last = summary(metrics)
    if self._bar is not None:
      if metrics:
        self._bar.set_postfix_str(self._last, refresh=False)
      self._bar.update(n)
      return
    since = time.monotonic() - self._said
    if since >= _QUIET_SECONDS or (since >= _FIRST_SECONDS and self._tenth() > self._said_tenth):
      self._say()

  def close(self) -> None:
    """Shows the last state; a second call does nothing."""
    if not self._enabled:
      return
    if self._bar is not None:
      self._bar.close()
    elif self._said_done != self._done:
      self._say()
    self._enabled = False

  def _tenth(self) -> int:
    return 10 * self._done // max(self._total, 1)

  def _say(self) -> None:
    now = time.monotonic()
    self._said, self._said_tenth, self._said_done = now, self._tenth(), self._done
    elapsed, worked = now - self._began, self._done - self._start
    parts = [f'{self._desc}: {self._done}/{self._total}', f'{duration(elapsed)} elapsed']
    if 0 < worked and self._done < self._total:
      parts.append(f'{duration(elapsed / worked * (self._total - self._done))} left')
    print(
      ', '.join(parts) + (f' | {self._last}' if self._last else ''), file=self._file, flush=True
    )


def summary(metrics: Mapping[str, Any]) -> str:
  """One line of names and values with four significant digits: 'loss 0.6931  kl 1.2e-05'."""
  words = []
  for name, value in metrics.items():
    words.append(
      f'{name} {value}'
      if value is None or isinstance(value, (bool, int, str))
      else f'{name} {value:.4g}'
    )
  return '  '.join(words)


def duration(seconds: float) -> str:
  """Seconds in words: '8 s', '3 min 05 s', '2 h 07 min'."""
  whole = int(seconds + 0.5)
  if whole < 60:
    return f'{whole} s'
  if whole < 3600:
    return f'{whole // 60} min {whole % 60:02d} s'
  return f'{whole // 3600} h {whole % 3600 // 60:02d} min'
