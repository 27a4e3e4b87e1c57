"""Progress: lines in a log that are few and tell the time left; a bar on a terminal; silence where none is wanted."""

import io

import pytest

from spct_jax.stages import progress


@pytest.fixture
def clock(monkeypatch):
  now = [100.0]
  monkeypatch.setattr(progress.time, 'monotonic', lambda: now[0])
  return now


def test_a_log_gets_few_lines_with_the_time_left(clock):
  # Seen to catch: the time left from all units instead of this run's; a line per update.
  out = io.StringIO()
  with progress.Progress(1000, 'grpo', start=500, file=out) as shown:
    for _ in range(250):
      clock[0] += 1
      shown.update(2, metrics={'loss': 0.5})
  lines = out.getvalue().splitlines()
  assert lines[0] == 'grpo: 600/1000, 50 s elapsed, 3 min 20 s left | loss 0.5'
  assert len(lines) == 5 and lines[-1] == 'grpo: 1000/1000, 4 min 10 s elapsed | loss 0.5'


def test_slow_work_speaks_once_a_minute(clock):
  out = io.StringIO()
  with progress.Progress(100_000, 'sft', file=out) as shown:
    for _ in range(120):
      clock[0] += 5
      shown.update(1)
  assert len(out.getvalue().splitlines()) == 10  # ten minutes; the end was said in the last


def test_quick_work_says_one_line_and_disabled_work_none(clock):
  out = io.StringIO()
  shown = progress.Progress(3, 'x', file=out)
  for _ in range(3):
    shown.update(1)
  shown.close()
  shown.close()
  assert out.getvalue() == 'x: 3/3, 0 s elapsed\n'
  with progress.Progress(3, 'x', False, file=out) as silent:
    silent.update(3)
  assert len(out.getvalue().splitlines()) == 1


def test_other_processes_are_silent(monkeypatch):
  monkeypatch.setattr(progress.processes.jax, 'process_index', lambda: 1)
  out = io.StringIO()
  with progress.Progress(1, 'x', file=out) as shown:
    shown.update(1)
  assert out.getvalue() == ''


def test_a_terminal_gets_a_bar():
  class Terminal(io.StringIO):
    def isatty(self):
      return True

  out = Terminal()
  with progress.Progress(4, 'sample', file=out) as shown:
    shown.update(4, metrics={'parsed': 0.25})
  assert 'sample' in out.getvalue() and '4/4' in out.getvalue()


def test_work_of_unknown_or_no_size(clock):
  out = io.StringIO()
  progress.Progress(0, 'nothing', file=out).close()
  assert out.getvalue() == 'nothing: 0/0, 0 s elapsed\n'


def test_words_for_numbers():
  assert progress.summary({'loss': 0.693147, 'kl': 1.25e-5, 'step': 3, 'auc': None}) == (
    'loss 0.6931  kl 1.25e-05  step 3  auc None'
  )
  assert [progress.duration(s) for s in (0, 59.4, 59.6, 125, 7625)] == [
    '0 s',
    '59 s',
    '1 min 00 s',
    '2 min 05 s',
    '2 h 07 min',
  ]
