"""The real stages on canned judgements: filters, rewards, votes, flips, ties, intervals and report, to the digit.

Mutations seen to fail here: the order not undone; a tie credited 1; an unparsed sample counted as valid; the too-easy
rule applied to hinted samples.
"""

import json
import math

import numpy as np
import pytest

from spct_jax import records
from spct_jax.testing.scripted import verdict

NONSENSE = 'I would rather not say.'
# Per item, the scores (in the item's own order) of samples 0..3; None does not parse.
POOL = {
    'e0': [(9, 3), (8, 4), (9, 2), (7, 3)],
    'e1': [(5, 5), (6, 4), (3, 8), (4, 7)],
    'e2': [None, (8, 2), None, (8, 2)],
    'e3': [(5, 5, 5)] * 4,
}
TRAINING = {  # plain samples 0..2, then the hinted one; gold is i % 2
    't0': [(9, 1), (8, 2), (7, 3), (9, 1)],  # all right: too easy, the hinted one stays
    't1': [(2, 9), (9, 2), None, (1, 9)],  # one right, one wrong, one unreadable
    't2': [(1, 9), (5, 5), (2, 8), (9, 2)],  # only the hint helps; a tie is wrong
    't3': [(9, 1), None, None, None],  # nothing
    't4': [(6, 5), (6, 5), (5, 6), None],  # two of three
    't5': [(1, 2), (1, 2), (1, 2), (2, 1)],  # too easy, and the hinted one is wrong
}


def script(info):
  if info.uid in POOL:
    scores = POOL[info.uid][info.sample % 4]
  else:
    scores = TRAINING[info.uid][3 if info.hinted else info.sample % 3]
  return NONSENSE if scores is None else verdict(info, scores)


@pytest.fixture(scope='module')
def shared_run(request):
  return {}


@pytest.fixture
def workdir(run, tmp_path_factory, shared_run):
  """One pipeline run for all tests of this file."""
  if 'path' not in shared_run:
    import shutil
    kept = tmp_path_factory.mktemp('scripted') / 'w'
    shutil.copytree(run(script), kept)
    shared_run['path'] = kept
  return shared_run['path']


def results(workdir, **wanted):
  rows = json.loads((workdir / 'results.json').read_text())
  return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def test_the_filter_keeps_what_the_paper_keeps(workdir):
  kept = [(t.uid, t.sample, t.hinted) for t in records.read_trajectories(workdir / 'rft' / 'kept.jsonl')]
  assert kept == [
      ('t0', 0, True),
      ('t1', 0, False), ('t1', 0, True),
      ('t2', 0, True),
      ('t4', 0, False), ('t4', 1, False),
  ]
  counts = json.loads((workdir / 'rft' / 'filter.json').read_text())
  assert counts['drawn'] == 24 and counts['unparsed'] == 5 and counts['too_easy'] == 6
  assert counts['wrong'] == 24 - 5 - 6 - 6 and counts['kept'] == 6 and counts['kept_hinted'] == 3
  assert counts['items_rescued_by_hint'] == 1


def test_hints_name_the_shown_slot(workdir):
  from spct_jax.text import tokenizer
  tok = tokenizer.load('builtin:small')
  seen = set()
  for t in records.read_trajectories(workdir / 'sample' / 'hinted.jsonl'):
    gold = int(t.uid[1:]) % 2
    prompt = tok.decode(t.prompt_ids)
    assert f'The best response is: Response {t.order.index(gold) + 1}' in prompt
    seen.add(t.order)
  assert seen == {(0, 1), (1, 0)}
  for t in records.read_trajectories(workdir / 'sample' / 'trajectories.jsonl'):
    assert 'The best response is' not in tok.decode(t.prompt_ids)


ACCURACY = {
    1: [1, (0.5 + 0 + 1 + 1) / 4, 0.5, 1 / 3],
    2: [1, 0.5, 1, 1 / 3],  # e1: 11-9 wrong, 7-15 right
    4: [1, 1, 1, 1 / 3],  # e1: 18-24
}


@pytest.mark.parametrize('k', [1, 2, 4])
@pytest.mark.parametrize('stage', ['base', 'grpo'])
def test_accuracy_at_k_is_the_mean_over_blocks(workdir, k, stage):
  (row,) = results(workdir, stage=stage, k=k, guided=False, subset='all', n=None, temperature=0.5)
  credit = np.asarray(ACCURACY[k])
  assert row['accuracy'] == pytest.approx(credit.mean(), abs=1e-6)
  assert row['stderr'] == pytest.approx(credit.std(ddof=1) / math.sqrt(4), abs=1e-6)
  assert row['items'] == 4 and row['parse_failure'] == pytest.approx(2 / 16)
  # e2's two unreadable samples cast no vote at k = 1; e1 ties once, e3 always.
  ties = {1: (1 + 4) / 14, 2: (0 + 2) / 8, 4: 1 / 4}[k]
  assert row['ties'] == pytest.approx(ties, abs=1e-6)


def test_subsets_and_sizes_have_rows_of_their_own(workdir):
  (pairs,) = results(workdir, stage='base', k=4, guided=False, subset='pairs', temperature=0.5)
  (triples,) = results(workdir, stage='base', k=4, guided=False, subset='triples', temperature=0.5)
  assert (pairs['accuracy'], pairs['n'], pairs['items']) == (1.0, 2, 3)
  assert triples['accuracy'] == pytest.approx(1 / 3) and triples['n'] == 3
  (two,) = results(workdir, stage='base', k=4, guided=False, subset='all', n=2, temperature=0.5)
  assert two['accuracy'] == 1.0


def test_order_flips_are_counted_over_pairs_in_different_orders(workdir):
  (row,) = results(workdir, stage='base', k=1, guided=False, subset='all', n=None, temperature=0.5)
  shares = []
  drawn = list(records.read_trajectories(workdir / 'evaluate' / 'base.jsonl'))
  for uid, pool in POOL.items():
    orders = {t.sample: t.order for t in drawn if t.uid == uid}
    best = {
        s: {i for i, x in enumerate(scores) if x == max(scores)} for s, scores in enumerate(pool) if scores
    }
    pairs = [(a, b) for a in best for b in best if a < b and orders[a] != orders[b]]
    if pairs:
      shares.append(sum(best[a] != best[b] for a, b in pairs) / len(pairs))
  assert row['order_flip'] == pytest.approx(np.mean(shares), abs=1e-6)


def test_scores_are_stored_in_the_items_own_order(workdir):
  rows = [r for r in records.read_jsonl(workdir / 'evaluate' / 'examples.jsonl') if r['stage'] == 'base']
  for row in rows:
    wanted = [None if s is None else list(s) for s in POOL[row['uid']]]
    assert row['scores'] == wanted
  by_uid = {row['uid']: row for row in rows}
  assert by_uid['e1']['totals'] == [18, 24] and by_uid['e1']['best'] == [1]
  assert by_uid['e3']['best'] == [0, 1, 2] and by_uid['e3']['credit'] == pytest.approx(1 / 3)
  assert by_uid['e2']['voters'] == 2
  drawn = list(records.read_trajectories(workdir / 'evaluate' / 'base.jsonl'))
  assert any(t.order != tuple(range(len(t.order))) for t in drawn)  # else nothing was undone


def test_grpo_logs_what_the_script_earned(workdir):
  rows = [r for r in records.read_jsonl(workdir / 'metrics.jsonl') if r['stage'] == 'grpo']
  assert [row['step'] for row in rows] == [0, 1]
  for row in rows:
    assert row['correct'] == pytest.approx((row['reward'] + 1) / 2)
    assert 0 <= row['no_signal'] <= 1 and row['rows_too_long'] == 0
    assert sum(row['slot_count']) == 16 and len(row['scores']) == 11


def test_the_report_shows_what_results_hold(workdir):
  text = (workdir / 'report.md').read_text()
  (row,) = results(workdir, stage='base', k=4, guided=False, subset='all', n=None, temperature=0.5)
  assert row['accuracy'] == pytest.approx(10 / 12) and '83.3' in text
  for word in ('longest', 'shortest', 'first', 'random', 'accuracy_vs_k.png', 'score_histogram.png'):
    assert word in text
  assert (workdir / 'figures' / 'accuracy_vs_k.png').stat().st_size > 10_000


def test_baselines_to_the_digit(workdir):
  # lengths: good/bad 4/3, bad/good 3/4, 'good one'/bad 8/3, bad/good/ugly 3/4/4 (gold 1 ties with ugly for longest)
  text = (workdir / 'report.md').read_text()
  line = {name: next(l for l in text.splitlines() if l.startswith(f'| baseline | {name} |'))
          for name in ('longest', 'shortest', 'first', 'random')}
  assert '87.5' in line['longest'] and '| 0.0 |' in line['shortest']
  assert '50.0' in line['first'] and '45.8' in line['random']


def test_the_meta_rm_reads_the_order_that_its_sample_saw(workdir):
  data = json.loads((workdir / 'meta_rm' / 'data.json').read_text())
  total = data['trajectories'] + data['heldout_trajectories']
  assert total == 2 * 18 and 0 < data['right'] < data['trajectories']


def test_results_and_report_go_by_the_given_names(run, config, capsys):
  # Seen to catch: the models' names in examples.jsonl; files under the given names; the last sample shown.
  config.evaluate.names, config.evaluate.show, config.evaluate.meta = ('before', 'after SPCT'), 2, ''
  config.grpo.init, config.grpo.steps, config.grpo.drop_too_easy = 'base', 0, False
  config.pipeline.stages = ('grpo', 'evaluate')
  engine = {}

  def changed(info):  # e1's first sample is a tie at first, and right for the second model
    engine[info.uid, info.sample] = engine.get((info.uid, info.sample), 0) + 1
    if (info.uid, info.sample) == ('e1', 0) and engine['e1', 0] > 2:
      return verdict(info, (2, 9))
    return script(info)

  path = run(changed, folder='named')
  rows = results(path)
  assert {row['stage'] for row in rows} == {'before', 'after SPCT'}
  examples = list(records.read_jsonl(path / 'evaluate' / 'examples.jsonl'))
  assert {row['stage'] for row in examples} == {'before', 'after SPCT'}
  assert {'base.jsonl', 'grpo.jsonl', 'base-greedy.jsonl'} <= {file.name for file in (path / 'evaluate').iterdir()}
  shown = (path / 'report.md').read_text().partition('## One judgement by every stage')[2]
  assert shown.index('### Item e1') < shown.index('### Item e0') and '### Item e2' not in shown
  assert '**before** is wrong (it read' in shown and 'scores: response 1: 5, response 2: 5' in shown
  assert '**after SPCT** is right (it read' in shown and 'scores: response 1: 2, response 2: 9' in shown
  assert 'Response 2 (the best):' in shown
  told = capsys.readouterr().out
  assert 'Item e1\n' in told and 'plain, accuracy in % on 3 items of 2 responses\nstage       parse failures' in told
  (row,) = results(path, stage='after SPCT', k=4, n=2, subset='all', guided=False)
  line = next(l for l in told.splitlines() if l.startswith('after SPCT  '))
  assert line.split()[-1] == f'{100 * row["accuracy"]:.1f}'


def test_the_same_command_again_does_nothing(run, workdir, capsys):
  first = run(script, folder='again')
  before = {p: p.stat().st_mtime_ns for p in first.rglob('*') if p.is_file() and p.name != '.lock'}
  run(lambda info: pytest.fail('a finished pipeline asked for a judgement'), folder='again')
  after = {p: p.stat().st_mtime_ns for p in first.rglob('*') if p.is_file() and p.name != '.lock'}
  assert before == after


def test_a_stage_alone_and_chained_are_the_same(run, workdir):
  for stage in ('sample', 'rft'):
    path = run(script, stage=stage, folder='alone')
  assert (path / 'rft' / 'kept.jsonl').read_bytes() == (workdir / 'rft' / 'kept.jsonl').read_bytes()


@pytest.mark.parametrize('keep_hint', [False, True])
def test_a_hinted_sample_is_learnt_without_its_hint(workdir, config, keep_hint):
  # Seen to catch: the prompt as it was sampled, whatever keep_hint says.
  from spct_jax.stages import datasets, loading, rft
  tok = loading.tokenizer(config)
  settings = loading.judge_settings(config, config.sample, orders='shuffle', single='binary')
  kept = list(records.read_trajectories(workdir / 'rft' / 'kept.jsonl'))
  rows, too_long = rft._rows(kept, datasets.load(config).train, settings, tok, keep_hint, (384,))
  assert len(rows) == len(kept) == 6 and not too_long
  for row, trajectory in zip(rows, kept):
    hint = 'The best response is' in tok.decode(row.prompt_ids)
    assert hint == (trajectory.hinted and keep_hint)
    assert row.completion_ids == trajectory.token_ids
    # The same responses in the same order, hint or not.
    shown = tok.decode(trajectory.prompt_ids).partition('The best response is')[0]
    assert tok.decode(row.prompt_ids)[:200] == shown[:200]


def test_what_the_texts_say_stands_beside_one_sample_and_in_the_notes(workdir):
  # Seen to catch: trackers in every row.
  wanted = {'principles_found': 14 / 16, 'principles_repeated': 0, 'principle_sets': 1, 'principle_sets_of': 4}
  for stage in ('base', 'grpo'):
    (row,) = [row for row in results(workdir, stage=stage) if 'principle_sets' in row]
    assert (row['k'], row['guided'], row['subset'], row['n'], row['temperature']) == (1, False, 'all', None, 0.5)
    assert {name: row[name] for name in wanted} == wanted and row['pattern_format'] == 14 / 16
    assert (
        f'- {stage}: principles in 87.5 % of the judgements, one of them repeated in 0.0 % of these, 1.00 distinct sets '
        'of principles per item among 4 samples, format in 87.5 %'
    ) in (workdir / 'report.md').read_text()
