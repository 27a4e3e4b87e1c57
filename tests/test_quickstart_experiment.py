"""experiments/quickstart.py: its table, its bars and its resuming, on rows made by hand; no run."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from spct_jax import types
from spct_jax.stages import measure

SCRIPT = pathlib.Path(__file__).resolve().parents[1] / 'experiments' / 'quickstart.py'


@pytest.fixture(scope='module')
def quickstart():
  spec = importlib.util.spec_from_file_location('quickstart_experiment', SCRIPT)
  module = importlib.util.module_from_spec(spec)
  sys.modules[spec.name] = module  # its dataclasses look for their module
  spec.loader.exec_module(module)
  yield module
  del sys.modules[spec.name]


EVALUATE = {'ks': [1, 2], 'single': 'binary', 'k_meta': 0, 'soft': True, 'soft_temperature': 1.0, 'temperature': 1.0}
ACCURACY = {  # stage -> (greedy, @1, @8, @32) on pairs
    'base': (0.62, 0.55, 0.70, 0.74),
    'rft': (0.66, 0.58, 0.73, 0.75),
    'spct': (0.75, 0.70, 0.74, 0.741),
}


def row(stage, n, k, accuracy, *, temperature=1.0, guided=False, **more):
  return {
      'stage': stage, 'benchmark': 'practice', 'subset': 'all', 'n': n, 'temperature': temperature, 'k': k,
      'guided': guided, 'accuracy': accuracy, 'stderr': 0.01, 'items': 4, 'parse_failure': 0.01, 'ties': 0.1, **more,
  }  # fmt: skip


def rows(shift=0.0, *, auc=(0.6, 0.7, 0.8), failures=(0.05, 0.01, 0.019)):
  out = []
  for i, (stage, (greedy, *sampled)) in enumerate(ACCURACY.items()):
    out.append(row(stage, 2, 1, greedy + shift, temperature=0.0))
    out += [row(stage, 2, k, value + shift) for k, value in zip((1, 8, 32), sampled)]
    out.append(row(stage, 2, 8, 0.9, guided='hard'))
    out += [row(stage, 4, k, 0.4 + 0.1 * i) for k in (1, 8)]
    out += [row(stage, 1, k, 0.5 + 0.1 * i, auc=auc[i]) for k in (1, 8)]
    out.append(row(stage, None, 1, 0.5, parse_failure=failures[i], pattern_careless=0.3 - 0.1 * i))
  return out


def line(uid, scores, meta, *, label=0, n=2):
  return {'uid': uid, 'n': n, 'label': label, 'scores': scores, 'meta': meta, 'overlong': False}


def run(quickstart, seed=0, shift=0.0, votes=None, **more):
  return quickstart.Run(
      seed=seed,
      rows=rows(shift, **more),
      votes=votes or {stage: [line('a', [[2, 1], [1, 2]], None)] for stage in ACCURACY},
      instructions=[{'stage': stage, 'exact': 0.9} for stage in ACCURACY],
      evaluate=EVALUATE,
      commit='abc',
  )


def record(*seconds, code=0, cold=True):
  return {'cold': cold, 'attempts': [{'seconds': s, 'peak_bytes': 2e9, 'code': code} for s in seconds]}


def test_help():
  done = subprocess.run([sys.executable, str(SCRIPT), '--help'], capture_output=True, text=True, timeout=60)
  assert done.returncode == 0 and 'experiments/quickstart.py seeds --out=' in done.stdout
  for command in ('seeds', 'beta', 'general'):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), command, '--help'], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and '--out' in done.stdout


def test_the_table_means_over_seeds_and_shows_their_range(quickstart):
  # Seen to catch: a row of guided votes taken for the plain one; the mean of the first seed alone.
  told = quickstart.summary([run(quickstart, 0), run(quickstart, 1, 0.02)], {})
  found = told['lines']['pairs, vote of 8']['rft']
  assert (found['mean'], found['low'], found['high']) == pytest.approx((0.74, 0.73, 0.75))
  assert told['lines']['pairs, greedy']['base']['mean'] == pytest.approx(0.63)
  assert told['lines']['judgements, careless']['spct']['mean'] == pytest.approx(0.1)
  text = '\n'.join(quickstart.table(told))
  assert '| pairs, vote of 8 | 71.0 (70.0 to 72.0) | 74.0 (73.0 to 75.0) | 75.0 (74.0 to 76.0) |' in text
  assert '| general tasks, reproduced | 90.0 (90.0 to 90.0) |' in text
  assert '2 training seeds (0, 1)' in text and '; temperature 1 unless greedy' in text and 'Commit abc.' in text


def test_a_gain_is_paired_by_item_with_the_credits_averaged_over_the_seeds(quickstart):
  # One block of two samples. Item a: the samples contradict each other, so plain votes tie (1/2); the meta-RM ranks
  # the right one first, so the guided vote earns 1. Item b: both right, no gain. In seed 1 the ranks of a are wrong.
  # Seen to catch: the credits of the first seed alone; items of another n left in; seeds paired whatever they judged.
  def votes(first, second):
    lines = [
        line('a', [[3, 1], [1, 3]], [first, second]),
        line('b', [[3, 1], [3, 1]], [1.0, 0.0]),
        line('four', [[3, 1, 1, 1]] * 2, [0.0, 0.0], n=4),
    ]
    return {stage: lines for stage in ACCURACY}

  good, bad = votes(1.0, 0.0), votes(0.0, 1.0)
  one = quickstart.summary([run(quickstart, 0, votes=good)], {})['gains']
  hard = {(gain['stage'], gain['k'], gain['guided']): gain for gain in one}
  assert hard['rft', 2, 'hard']['gain'] == pytest.approx(0.25)  # (1/2 + 0) / 2
  assert hard['rft', 2, 'hard']['items'] == 2  # pairs only
  assert hard['rft', 2, 'hard']['oracle'] == pytest.approx(0.25)
  assert hard['rft', 1, 'hard']['gain'] == 0
  both = quickstart.summary([run(quickstart, 0, votes=good), run(quickstart, 1, votes=bad)], {})['gains']
  found = next(gain for gain in both if (gain['stage'], gain['k'], gain['guided']) == ('rft', 2, 'hard'))
  assert found['gain'] == pytest.approx(0) and found['items'] == 2
  other = {stage: [line('z', [[3, 1], [1, 3]], [1.0, 0.0])] for stage in ACCURACY}
  with pytest.raises(ValueError, match='different held-out items'):
    quickstart.summary([run(quickstart, 0, votes=good), run(quickstart, 1, votes=other)], {})


def test_gain_and_oracle_of_one_seed_are_those_of_the_evaluation(quickstart):
  # The evaluation has the arrays, the script the lines that it wrote of them.
  # Seen to catch: a soft temperature of 1; k_meta forgotten.
  rng = np.random.default_rng(2)
  sizes = np.asarray([2, 4, 2, 2, 2, 2, 4, 2, 2, 2, 2, 2])
  examples = tuple(
      types.Example(uid=str(i), messages=(types.Message('user', 'q'),), responses=('r',) * n, label=i % 2)
      for i, n in enumerate(sizes)
  )
  items = measure.items_of(examples, np.ones(len(examples), bool))
  valid = rng.random((len(examples), 4)) < 0.8
  pool = measure.Pool(
      scores=rng.integers(1, 5, (len(examples), 4, 4)).astype(np.int32) * items.response_mask[:, None],
      valid=valid,
      order=np.full((len(examples), 4, 4), -1, np.int32),
      meta=rng.normal(size=valid.shape).astype(np.float32) * 3,
  )
  fields = EVALUATE | {'ks': [4], 'k_meta': 1, 'soft_temperature': 3.0}
  expected = measure.rows_of(
      'rft', pool, items, benchmark='b', temperature=1.0, ks=(4,), k_meta=1, soft_temperature=3.0, threshold=0.5,
  )
  lines = json.loads(json.dumps(measure.example_rows('rft', pool, items, k=4, threshold=0.5)))
  one = quickstart.Run(0, [row('rft', 2, 1, 0.5)], {'rft': lines}, (), fields, None)
  found = {gain['guided']: gain for gain in quickstart.summary([one], {})['gains']}
  pairs = {row['guided']: row for row in expected if row['n'] == 2}
  for guided in ('hard', 'soft'):
    wanted = pairs[guided]
    assert wanted['gain'] != 0
    assert [found[guided][name] for name in ('gain', 'low', 'high')] == pytest.approx(
        [wanted[name] for name in ('gain', 'gain_low', 'gain_high')]
    )
  only = lambda array: array[sizes == 2]
  part = measure.Pool(only(pool.scores), only(valid), only(pool.order), None)
  some = measure.Items((), only(items.label), only(items.response_mask), only(items.judged))
  oracle = measure.oracle_accuracy(part, some, k=4, threshold=0.5)
  assert found['hard']['oracle'] == pytest.approx(oracle - pairs[False]['accuracy'])


def test_a_sample_that_did_not_parse_has_no_vote(quickstart):
  lines = [line('a', [None, [3, 1]], [None, 1.0]), line('b', [[1, 3], [3, 1]], [0.0, 1.0])]
  told = quickstart.summary([run(quickstart, votes={stage: lines for stage in ACCURACY})], {})
  hard = next(g for g in told['gains'] if (g['stage'], g['k'], g['guided']) == ('rft', 2, 'hard'))
  assert hard['gain'] == pytest.approx(0.25)  # a: 1 both times; b: 1 against a tie


def bar(found, words):
  return next(bar for bar in found if words in bar.name)


def test_the_bars(quickstart):
  # Seen to catch: `>` in place of `>=` for 'at least', no rounding (0.58 - 0.55 is below 0.03 by an ulp), spct held
  # against base in place of rft.
  runs = {'seed-0': record(700.0), 'clock-cold': record(400.0), 'clock-warm': record(300.0)}
  found = quickstart.bars(quickstart.summary([run(quickstart)], runs))
  verdicts = {bar.name: bar.passed() for bar in found}
  assert bar(found, 'one sample, rft above base').passed() and verdicts['one sample, spct above rft']
  assert bar(found, 'spct above rft').value == pytest.approx(12)
  assert verdicts['greedy spct above base with 32 votes']
  assert bar(found, '8 votes above 1').passed() and bar(found, '32 votes above 8').passed()
  assert bar(found, 'ROC-AUC').value == pytest.approx(10)
  assert bar(found, 'parse failures').value == pytest.approx(1.9) and bar(found, 'parse failures').passed()
  assert bar(found, 'whole command').value == 400 and bar(found, 'whole command').passed()
  assert bar(found, 'warm').value == 100
  assert bar(found, 'peak').value == 2 and bar(found, 'peak').passed()
  assert bar(found, 'guided hard above').passed() is None  # no meta-RM
  assert all(bar.line().keys() == {'name', 'value', 'unit', 'higher_is_better', 'goal', 'floor'} for bar in found)
  json.dumps([bar.line() for bar in found], allow_nan=False)


def test_bars_that_are_missed(quickstart):
  # Seen to catch: a rise that looks at the last step only; `>=` in place of `>`.
  worse = quickstart.summary([run(quickstart, auc=(0.8, 0.7, 0.9), failures=(0.0, 0.0, 0.02))], {})
  found = quickstart.bars(worse)
  assert bar(found, 'ROC-AUC').passed() is False  # falls, then rises
  assert bar(found, 'parse failures').passed() is False  # 2 % is not under 2 %
  assert bar(found, 'whole command').words().endswith('not measured')
  same = dict(worse, lines={**worse['lines'], 'pairs, vote of 32': worse['lines']['pairs, vote of 8']})
  assert bar(quickstart.bars(same), '32 votes above 8').passed() is False  # not above


def test_a_gain_passes_by_the_lower_end_of_its_interval(quickstart):
  # Seen to catch: judging by the mean.
  told = quickstart.summary([run(quickstart)], {})
  gain = lambda stage, guided, low: {
      'stage': stage, 'k': 8, 'guided': guided, 'gain': 0.01, 'low': low, 'high': 0.03, 'oracle': 0.1,
  }
  told['gains'] = [gain('rft', 'hard', -0.001), gain('spct', 'hard', -0.01), gain('spct', 'soft', 0.002)]
  found = quickstart.bars(told)
  assert bar(found, 'rft, 8 votes guided').passed() is False
  assert bar(found, 'spct, 8 votes guided').passed() is True
  assert '| pairs, vote of 8 guided softly: points on plain, 95 % | – | – | +1.0 [+0.2, +3.0] |' in quickstart.table(told)


def test_an_interrupted_run_has_no_time(quickstart):
  # Seen to catch: `whole` always true.
  for begun in (record(100.0, 200.0), record(100.0, cold=False)):
    found = quickstart.bars(quickstart.summary([run(quickstart)], {'clock-cold': begun}))
    assert bar(found, 'whole command').value is None


def test_a_finished_run_is_skipped_and_a_failed_one_continued(quickstart, tmp_path):
  # Seen to catch: skipping a run that failed; skipping one that other flags made.
  fails_first = (
      'import pathlib, sys; p = pathlib.Path(sys.argv[1]); '
      'n = len(list(p.parent.glob("try*"))); (p.parent / f"try{n}").touch(); sys.exit(n == 0)'
  )
  command = [sys.executable, '-c', fails_first, str(tmp_path / 'w')]
  launch = lambda command, source='': quickstart.launch(tmp_path, 'w', command, env={}, source=source)
  with pytest.raises(ValueError, match='exit code 1; the same command continues'):
    launch(command)
  told = launch(command)
  assert [attempt['code'] for attempt in told['attempts']] == [1, 0]
  assert all(attempt['peak_bytes'] > 1e6 for attempt in told['attempts'])
  assert launch(command) == told and len(list(tmp_path.glob('try*'))) == 2
  with pytest.raises(ValueError, match='another command'):
    launch([*command, 'more'])
  with pytest.raises(ValueError, match='another source'):
    launch(command, source='retrained')


def test_the_winner_is_the_beta_that_training_leaves_best(quickstart):
  # Seen to catch: choosing by the best step.
  def curve(*accuracies):
    checked = [
        {'stage': 'grpo', 'step': 10 * i, 'validation/accuracy': a, 'validation/stderr': 0.02, 'kl': 0.1 * i}
        for i, a in enumerate(accuracies)
    ]
    return [*checked, {'stage': 'grpo', 'step': 15, 'kl': 0.3}, {'stage': 'rft', 'step': 99, 'loss': 1.0}]

  runs = {'0': curve(0.5, 0.9, 0.6), '0.04': curve(0.5, 0.7, 0.8), '0.2': curve(0.5, 0.6, 0.79)}
  text = quickstart.beta_table(runs, names=['kl', 'entropy'], window=10)
  assert 'beta 0.04; within one standard error of it: 0.2.' in text[-1]
  assert '| 0 | 50.0 | 90.0 (10) | 60.0 ± 2.0 | 0.200 | – |' in text  # kl: steps 10 and 15
  with pytest.raises(ValueError, match='nothing was validated'):
    quickstart.beta_table({'1': [{'stage': 'grpo', 'step': 0, 'kl': 0.0}]}, names=['kl'], window=10)


def test_the_general_table(quickstart):
  told = lambda exact: {'exact': exact, 'low': exact, 'high': exact, 'nll': 0.5, 'items': 7}
  runs = {
      name: quickstart.Run(0, rows(), {}, [{'stage': 'base', **told(0.9)}, {'stage': 'rft', **told(after)}], {}, None)
      for name, after in (('with', 0.88), ('without', 0.2))
  }
  text = quickstart.general_table(runs, 0.25)
  assert text[2].startswith('| base | 90.0 [90.0, 90.0] of 7 | 0.5000 | 55.0 |')
  assert text[3].startswith('| RFT with the mix (25 % of the rows) | 88.0 ')
  assert text[4].startswith('| RFT without | 20.0 ')
