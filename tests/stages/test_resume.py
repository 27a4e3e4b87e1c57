"""A run that is killed and started again ends where an uninterrupted one ends, file by file.

Kills are exceptions in the scripted engine or in the training loop, at several moments; `test_processes.py` kills
a real process. Mutations seen to fail: metrics not truncated on resume; the optimizer's state not restored.
"""

import numpy as np
import pytest

from spct_jax import records
from spct_jax.stages import fit
from spct_jax.testing.scripted import verdict


class Killed(BaseException):
  """Not an Exception: nothing in the product may catch it."""


def script(info):
  """Depends on everything that names a sample, so a sample drawn under another name would show."""
  mark = (len(info.uid) * 7 + int(info.uid[1:]) * 3 + info.sample * 5 + info.visit * 11) % 10 + 1
  return verdict(info, tuple((mark + 3 * i) % 10 + 1 for i in range(len(info.order))))


def killing(after: int):
  calls = {'n': 0}

  def run(info):
    calls['n'] += 1
    if calls['n'] > after:
      raise Killed
    return script(info)

  return run


def content(workdir):
  """What must be equal: records and deterministic metrics, byte by byte."""
  names = [
      'sample/trajectories.jsonl', 'sample/hinted.jsonl', 'rft/kept.jsonl', 'meta_rm/trajectories.jsonl',
      'evaluate/base.jsonl', 'evaluate/grpo.jsonl', 'evaluate/grpo-meta.jsonl', 'evaluate/examples.jsonl',
      'results.json', 'metrics.jsonl',
  ]
  return {name: (workdir / name).read_bytes() for name in names}


@pytest.fixture
def config(config):
  config.grpo.steps, config.grpo.checkpoint_every = 3, 2
  config.rft.steps, config.rft.checkpoint_every = 3, 2
  config.judge.chunk_tasks = 8
  return config


@pytest.mark.slow
def test_killed_anywhere_it_ends_in_the_same_files(run, monkeypatch):
  whole = content(run(script, folder='whole'))

  # While sampling: in the second chunk, then among the hinted ones.
  for after in (11, 14):
    with pytest.raises(Killed):
      run(killing(after), folder='killed')

  # While RFT trains, after its first checkpoint: the third update never comes back.
  real = fit.flush
  state = {'n': 0}

  def dying(writer, progress, pending):
    if pending is not None:
      state['n'] += 1
      if state['n'] == 3:
        raise Killed
    return real(writer, progress, pending)

  monkeypatch.setattr(fit, 'flush', dying)
  with pytest.raises(Killed):
    run(script, folder='killed')
  monkeypatch.setattr(fit, 'flush', real)

  # While GRPO samples its third step; one checkpoint of step 2 is there.
  grpo_calls = {'n': 0}

  def dies_in_grpo(info):
    if info.uid.startswith('t'):
      grpo_calls['n'] += 1
      if grpo_calls['n'] > 2 * 16 + 5:
        raise Killed
    return script(info)

  with pytest.raises(Killed):
    run(dies_in_grpo, folder='killed')

  # After GRPO's last row is written and before the checkpoint that covers it.
  save = fit.Session.save

  def dies_before_saving(session, step, state):
    if session.stage == 'grpo' and step == 3:
      raise Killed
    return save(session, step, state)

  monkeypatch.setattr(fit.Session, 'save', dies_before_saving)
  with pytest.raises(Killed):
    run(script, folder='killed')
  monkeypatch.setattr(fit.Session, 'save', save)
  resumed = content(run(script, folder='killed'))
  for name, expected in whole.items():
    assert resumed[name] == expected, name


def test_a_half_written_chunk_is_drawn_again(run):
  whole = run(script, stage='sample', folder='one')
  with pytest.raises(Killed):
    run(killing(12), stage='sample', folder='two')
  folder = next((whole.parent / 'two' / 'sample').glob('*.chunks'))
  (folder / '.000001.jsonl.part').write_text('{"schema": "trajec')
  again = run(script, stage='sample', folder='two')
  for name in ('trajectories.jsonl', 'hinted.jsonl'):
    assert (again / 'sample' / name).read_bytes() == (whole / 'sample' / name).read_bytes()
  assert not list((again / 'sample').glob('*.chunks'))
  rows = list(records.read_jsonl(again / 'sample' / 'trajectories.jsonl'))
  assert len(rows) == 18 and np.isfinite([p for row in rows for p in row['logp']]).all()


def test_inputs_that_changed_are_not_resumed(run, files):
  run(script, stage='sample', folder='w')
  path = files / 'train.jsonl'
  rows = path.read_text().splitlines()
  path.write_text('\n'.join(rows[:-1]) + '\n')
  again = run(script, stage='sample', folder='w')
  assert len(list(records.read_jsonl(again / 'sample' / 'trajectories.jsonl'))) == 15
  assert (again / 'sample.old1' / 'trajectories.jsonl').exists()  # nothing is lost
