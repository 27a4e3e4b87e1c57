"""An evaluation whose votes stop: the accuracy of the full vote from fewer samples, resumed or not, and by the engine.

Mutations seen to fail here: samples that were not drawn counted as parse failures; a chunk of stopped votes taken for
another plan's; votes that stop before they are decided.
"""

import importlib.util
import json
import pathlib

import numpy as np
import pytest

from spct_jax import records, sharding, stages
from spct_jax.stages import results, workdir
from spct_jax.testing.scripted import verdict

CONFIGS = pathlib.Path(__file__).resolve().parents[2] / 'configs'


class Killed(BaseException):
  pass


def script(info):
  """Items e0 and e3 are soon decided, e1 is close, e2 does not parse at times."""
  rng = np.random.default_rng([int(info.uid[1:]), info.sample])
  if info.uid == 'e2' and info.sample % 3 == 0:
    return 'I would rather not say.'
  scores = rng.integers(1, 4, len(info.order)) + (0 if info.uid == 'e1' else 6) * (np.arange(len(info.order)) == 0)
  return verdict(info, tuple(map(int, scores)))


@pytest.fixture
def config(small_config):
  config = small_config
  config.evaluate.samples, config.evaluate.ks, config.evaluate.meta = 12, (12,), ''
  config.evaluate.models = ('base',)
  config.judge.rows, config.judge.chunk_tasks, config.judge.chunk_prompts = 12, 24, 16
  return config


def rows_of(path):
  rows = json.loads((path / 'results.json').read_text())
  return {(row['subset'], row['n']): row for row in rows if row['temperature'] > 0}


def test_rows_hold_the_accuracy_of_the_full_vote_and_what_was_saved(run, config, capsys):
  full = rows_of(run(script, 'evaluate', 'full'))
  config.evaluate.early = 'exact'
  path = run(script, 'evaluate', 'early')
  early = rows_of(path)
  drawn = list(records.read_trajectories(path / 'evaluate' / 'base.jsonl'))
  assert early.keys() == full.keys()
  for name, row in early.items():
    for field in ('accuracy', 'stderr', 'low', 'high', 'items', 'ties', 'accuracy_judged'):
      assert row[field] == full[name][field], (name, field)
    assert row['auc'] is None and row['order_flip'] is None and 'votes_saved' not in full[name]
  row = early['all', None]
  assert row['votes_saved'] == pytest.approx(1 - len(drawn) / 48) and row['votes_saved'] > 0.1
  assert row['parse_failure'] == pytest.approx(sum(t.scores is None for t in drawn) / len(drawn))
  count = {uid: sum(t.uid == uid for t in drawn) for uid in ('e0', 'e1', 'e2', 'e3')}
  assert count['e0'] < count['e1'] == 12
  said = capsys.readouterr().out
  assert 'votes saved' in said and results.percent(early['all', 3]['votes_saved']) in said
  assert 'votes stopped once they were decided (exact) and saved' in (path / 'report.md').read_text()


def test_a_killed_run_ends_in_the_same_files(run, config):
  config.evaluate.early, config.judge.chunk_tasks = 'exact', 12
  whole = run(script, 'evaluate', 'whole')
  for after in (15, 30):
    calls = []

    def dies(info):
      calls.append(info)
      if len(calls) > after:
        raise Killed
      return script(info)

    with pytest.raises(Killed):
      run(dies, 'evaluate', 'killed')
  again = run(script, 'evaluate', 'killed')
  for name in ('evaluate/base.jsonl', 'evaluate/examples.jsonl', 'results.json'):
    assert (again / name).read_bytes() == (whole / name).read_bytes(), name
  assert len(list(records.read_trajectories(whole / 'evaluate' / 'base.jsonl'))) < 48


def test_chunks_that_hold_other_samples_are_refused(run, config):
  config.evaluate.early, config.judge.chunk_tasks = 'exact', 12
  path = run(script, 'evaluate', 'w') / 'evaluate' / 'base.jsonl'
  rows = path.read_text().splitlines()
  (path.parent / 'DONE.json').unlink()
  path.write_text('\n'.join(row for row in rows if '"sample": 3,' not in row) + '\n')
  with pytest.raises(ValueError, match='that are not the 48 of the plan'):
    run(script, 'evaluate', 'w')


# The bar, with a trained judge through the compiled engine: all votes on one device, stopped ones on eight.
def test_a_trained_judge_gives_the_same_winners_from_fewer_votes(tmp_path, compiled_quickly):
  found = {}
  for early, mesh in (('none', dict(data=1)), ('exact', dict(data=4, tensor=2))):
    config = page()
    config.evaluate.early = early
    config.mesh.update(mesh)
    with workdir.open_workdir(tmp_path / early, config) as opened:
      stages.RUN['evaluate'](config, opened, sharding.make_mesh(mesh))
    examples = list(records.read_jsonl(tmp_path / early / 'evaluate' / 'examples.jsonl'))
    found[early] = [row['best'] for row in examples], rows_of(tmp_path / early)['all', 2]
  (best, full), (early_best, early) = found['none'], found['exact']
  assert early_best == best and early['accuracy'] == full['accuracy']
  assert full['parse_failure'] < 0.5 and early['votes_saved'] > 0


def page():
  """The quickstart's page with the trained base of test_learning, on few pairs."""
  spec = importlib.util.spec_from_file_location('quickstart', CONFIGS / 'quickstart.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config('seed=0')
  config.model.path = str(pathlib.Path(__file__).parent / 'practice_base')
  pairs = 'made:spct_jax.data.practice:preferences'
  config.data.path, config.data.eval_path = f'{pairs}?split=train&pairs=10&seed=0', f'{pairs}?split=heldout&pairs=24'
  config.data.validation_limit = config.grpo.validate_every = 0
  config.evaluate.models = config.evaluate.names = ('base',)
  config.evaluate.meta = config.evaluate.instructions = ''
  config.evaluate.samples, config.evaluate.ks, config.evaluate.greedy = 8, (8,), False
  config.judge.buckets, config.judge.max_new_tokens = (32,), 46  # of pairs alone
  config.judge.rows, config.judge.chunk_prompts, config.judge.chunk_tasks = 24, 48, 192
  config.logging.tensorboard = False
  return config
