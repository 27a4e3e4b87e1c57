"""The report: rounding to the digit, what stands beside every accuracy, and the empty and odd cases."""

import json
import math
import re

import numpy as np
import pytest

from spct_jax import types
from spct_jax.stages import console, exhibit, figures, report, results


def _row(**changes):
  row = {
    'stage': 'rft',
    'benchmark': 'own',
    'subset': 'all',
    'n': 2,
    'temperature': 0.5,
    'k': 4,
    'guided': False,
    'accuracy': 0.625,
    'stderr': 0.05,
    'items': 8,
    'parse_failure': 0.125,
    'ties': 0.0625,
    'low': 0.51,
    'high': 0.73,
    'order_flip': 0.25,
  }
  return row | changes


def _extras(**changes):
  values = dict(
    title='Judges on own',
    commit='abc123',
    config={'seed': 0},
    baselines=(),
    skipped={},
    figures={},
    notes=(),
    instructions=(),
    exhibits=(),
  )
  return report.Extras(**(values | changes))


def _report(tmp_path, rows, **changes):
  report.write_report(tmp_path / 'report.md', rows, _extras(**changes))
  return (tmp_path / 'report.md').read_text()


def _lines(text, start):
  return [line for line in text.splitlines() if line.startswith(start)]


@pytest.mark.parametrize('share, places, expected', [
    # Seen to catch: f'{100 * share:.1f}', halves to even, no 12 digits first, '-0.0'.
    (0.1235, 1, '12.4'), (0.0005, 1, '0.1'), (0.3 - 0.0195, 1, '28.1'),  # 0.28049999999999997
    (0.2855, 1, '28.6'),
    (218 / 350, 2, '62.29'), (218 / 350, 1, '62.3'), (1 / 3, 1, '33.3'), (2 / 3, 1, '66.7'),
    (0.0, 1, '0.0'), (-1e-9, 1, '0.0'), (1.0, 1, '100.0'), (1, 0, '100'), (0.99949, 1, '99.9'), (0.9995, 1, '100.0'),
    (np.float32(0.1235), 1, '12.4'), (None, 1, '–'), (math.nan, 1, '–'),
])  # fmt: skip
def test_percent_is_right_to_the_digit(share, places, expected):
  assert results.decimals(share, places) == expected


def test_percent_and_count_in_words():
  assert report.percent(0.5) == '50.0 %' and report.percent(None) == '–'
  assert [report.count(n, 'item') for n in (0, 1, 2)] == ['0 items', '1 item', '2 items']


def test_results_are_flat_rows_that_read_back(tmp_path):
  rows = [
    _row(),
    _row(guided='hard', k_meta=2),
    _row(k=1, temperature=0.0, accuracy=np.float32(0.5), auc=math.nan),
  ]
  report.write_results(tmp_path / 'results.json', rows)
  found = json.loads((tmp_path / 'results.json').read_text())
  assert [row['guided'] for row in found] == [False, 'hard', False]
  assert found[2]['accuracy'] == 0.5 and found[2]['auc'] is None and found[1]['k_meta'] == 2
  assert report.read_results(tmp_path / 'results.json') == found
  assert 'NaN' not in (tmp_path / 'results.json').read_text()


@pytest.mark.parametrize('changes, message', [
    ({'accuracy': 62.5}, 'accuracy is 62.5'), ({'guided': True}, 'guided is True'), ({'k': 0}, 'k is 0'),
    ({'k': True}, 'k is True'), ({'items': 2.5}, 'items is 2.5'), ({'stage': ''}, "stage is ''"),
    ({'ties': -0.1}, 'ties is -0.1'), ({'temperature': None}, 'temperature is None'), ({'order_flip': 1.5}, 'order_flip'),
])  # fmt: skip
def test_a_wrong_row_is_refused_and_nothing_is_written(tmp_path, changes, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    report.write_results(tmp_path / 'results.json', [_row(k=1), _row(**changes)])
  assert not (tmp_path / 'results.json').exists()


def test_missing_fields_and_double_rows_are_named():
  row = _row()
  del row['ties'], row['stderr']
  with pytest.raises(ValueError, match='results row 0 .*lacks stderr, ties'):
    results.validated([row])
  with pytest.raises(ValueError, match='results row 1 .* is there twice'):
    results.validated([_row(), _row(accuracy=0.1)])


def test_interval_is_the_rows_own_or_from_its_standard_error():
  assert results.interval(_row()) == (0.51, 0.73)
  low, high = results.interval(_row(low=None, high=None))
  assert low == pytest.approx(0.625 - 1.96 * 0.05, abs=1e-4) and high == pytest.approx(
    0.625 + 1.96 * 0.05, abs=1e-4
  )
  assert results.interval(_row(accuracy=0.99, low=None))[1] == 1.0
  assert results.interval(_row(items=0)) is None


def test_every_accuracy_has_its_interval_and_its_rates_beside_it(tmp_path):
  # Seen to catch: parse failures and ties swapped; a headline vote not of the largest k.
  text = _report(tmp_path, [
      _row(k=1, temperature=0.0, accuracy=0.5, low=0.4, high=0.6), _row(k=2, accuracy=0.6), _row(),
      _row(guided='hard', accuracy=0.6875), _row(guided='soft', accuracy=0.65, order_flip=None),
  ])  # fmt: skip
  table = [line for line in _lines(text.split('## Accuracy by')[0], '|')]
  assert table == [
    '| stage | judgement | accuracy, % | 95 % interval | parse failures, % | ties, % | order flips, % | items |',
    '| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |',
    '| rft | greedy | 50.0 | 40.0 to 60.0 | 12.5 | 6.3 | 25.0 | 8 |',
    '| rft | vote of 4 | 62.5 | 51.0 to 73.0 | 12.5 | 6.3 | 25.0 | 8 |',
    '| rft | vote of 4, guided | 68.8 | 51.0 to 73.0 | 12.5 | 6.3 | 25.0 | 8 |',
    '| rft | vote of 4, guided softly | 65.0 | 51.0 to 73.0 | 12.5 | 6.3 | – | 8 |',
  ]
  assert 'Best: rft, vote of 4, guided: **68.8 %** [51.0, 73.0] of 8 items' in text
  assert 'sampled at temperature 0.5.' in text and '`abc123`' in text
  assert len([line for line in _lines(text, '| rft | vote of 2')]) == 1  # only in the table by k
  for line in _lines(text, '| rft'):
    assert line.count('|') == table[0].count('|')


def test_a_guided_row_shows_its_gain_on_the_plain_vote(tmp_path):
  # Seen to catch: the interval's ends swapped; no sign before a gain; a gain outside -1..1 let pass.
  gain = {'gain': 0.0625, 'gain_stderr': 0.05, 'gain_low': -0.0355, 'gain_high': 0.1605}
  text = _report(tmp_path, [_row(), _row(guided='hard', accuracy=0.6875) | gain])
  plain, guided = _lines(text, '| rft')
  assert plain.split('|')[-3:-1] == [' – ', ' 8 '] and '| gain on plain, points | items |' in text
  assert guided.split('|')[-3:-1] == [' +6.3 [-3.6, +16.1] ', ' 8 ']
  assert 'Gain: accuracy minus that of the plain vote' in text
  assert 'Gain:' not in _report(tmp_path, [_row()])
  with pytest.raises(ValueError, match='gain is 6.25; allowed: a difference in -1..1'):
    results.validated([_row(guided='hard') | gain | {'gain': 6.25}])


@pytest.mark.parametrize('gain, words', [
  (0.0123, '+1.2'), (-0.5, '-50.0'), (0.0, '0.0'), (-1e-9, '0.0'), (1.0, '+100.0'), (0.0004, '0.0'), (None, '–'),
])  # fmt: skip
def test_points_have_a_sign(gain, words):
  assert results.points(gain) == words


def test_general_instruction_data_has_a_table_of_its_own(tmp_path):
  told = [
    {'stage': 'sft|x', 'exact': 0.25, 'low': 0.1, 'high': 0.5, 'nll': 0.33335, 'tokens': 77, 'items': 8},
    {'stage': 'rft', 'exact': 0.0, 'low': 0.0, 'high': 0.3, 'nll': None, 'tokens': 77, 'items': 8},
  ]
  text = _report(tmp_path, [_row()], instructions=told)
  table = _lines(text.partition('## General instruction data')[2], '|')
  assert table[2] == '| sft\\|x | 25.0 | 10.0 to 50.0 | 0.3333 | 77 | 8 |'
  assert table[3] == '| rft | 0.0 | 0.0 to 30.0 | – | 77 | 8 |'
  assert '## General' not in _report(tmp_path, [_row()])


def test_the_console_has_a_line_per_stage():
  # Seen to catch: greedy taken for k = 1; the guided column at the largest k; the mixed rows where n is mixed.
  rows = []
  for stage, shift in (('base', 0.0), ('SPCT', 0.1)):
    rows.append(_row(stage=stage, k=1, temperature=0.0, accuracy=0.5 + shift))
    for k in (1, 2, 4, 8, 16, 32):
      rows.append(_row(stage=stage, k=k, accuracy=0.5 + shift + k / 1000))
      rows.append(_row(stage=stage, k=k, guided='hard', accuracy=0.6 + shift + k / 1000))
  assert console.table(rows) == [
    '',
    'own, accuracy in % on 8 items of 2 responses',
    'stage  parse failures  greedy  k = 1  k = 8  k = 32  k = 8, guided',
    'base           12.5 %    50.0   50.1   50.8    53.2           60.8',
    'SPCT           12.5 %    60.0   60.1   60.8    63.2           70.8',
  ]
  mixed = [_row(n=None, items=9), _row(n=1, items=1), _row(n=4, k=1), _row(n=4)]
  told = console.table(mixed + [_row(subset='part', n=7)])
  assert [line for line in told if 'own' in line] == [
    'own, accuracy in % on 1 item of 1 response', 'own, accuracy in % on 8 items of 4 responses'
  ]
  assert told[2] == 'stage  parse failures  k = 4' and told[-2] == 'stage  parse failures  k = 1  k = 4'
  assert console.table([_row(n=None)])[1] == 'own, accuracy in % on 8 items'
  assert console.table([_row(k=1, temperature=0.0)])[2] == 'stage  parse failures  greedy'
  assert console.table([]) == [] and console.instructions([]) == []


# One item by every stage


def _said(text, scores, order=(1, 0)):
  return types.Trajectory(
    uid='u', sample=0, visit=0, order=order, hinted=False, prompt_ids=(1,), token_ids=(2,), logp=(0.0,), text=text,
    scores=scores, parse='ok' if scores else 'no scores',
  )  # fmt: skip


def _exhibit(**changes):
  example = types.Example(
    'u', (types.Message('user', 'Which?'),), ('a ``` b', 'two\x1b[2J'), label=1, grades=(0.25, 1.0), **changes
  )
  judgements = {'base': _said('no ````idea', None), 'SPCT': _said('better', (9, 3)), 'late': None}
  return exhibit.Exhibit(example, judgements, {'base': False, 'SPCT': True, 'late': False})


def test_an_item_is_shown_with_every_stages_judgement():
  # Seen to catch: scores in the order shown; a fence of three beside quoted backticks; gold on the wrong response.
  text = exhibit.markdown(_exhibit())
  assert 'Response 1 (grade 0.25):\n\n````text\na ``` b\n````' in text
  assert 'Response 2 (the best, grade 1):\n\n```text\ntwo\x1b[2J\n```' in text
  where = '(it read the responses in the order 2, 1)'
  assert f'**base** is wrong {where}; no score could be read (no scores):\n\n`````text\nno ````idea\n`````' in text
  assert f'**SPCT** is right {where}; scores: response 1: 3, response 2: 9:\n\n```text\nbetter\n```' in text
  assert '**late** has no judgement of it.' in text and 'user:\n\n```text\nWhich?\n```' in text


def test_the_console_obeys_nothing_in_a_text_and_cuts_long_ones():
  told = exhibit.console(_exhibit())
  assert '\x1b' not in told and 'two\ufffd[2J' in told
  long = _exhibit(reference=None)
  long = exhibit.Exhibit(long.example, {'base': _said('word\n' * 100, (1, 2))}, {'base': True})
  assert exhibit.console(long).count('word') == 40 and '[... 301 more characters in report.md]' in exhibit.console(long)
  assert exhibit.markdown(long).count('word') == 100
  single = types.Example('s', (types.Message('user', 'Q'),), ('only',), label=0)
  told = exhibit.markdown(exhibit.Exhibit(single, {'base': _said('x', (7,), order=(0,))}, {'base': False}))
  assert 'Response 1 (gold label 0)' in told and '**base** is wrong; scores: response 1: 7' in told


def test_the_item_shown_is_one_that_training_changed():
  # Seen to catch: single responses and over-long items chosen; last and first swapped.
  sizes = [1, 2, 2, 2, 3]
  examples = [types.Example(str(i), (), ('r',) * n, label=0) for i, n in enumerate(sizes)]
  wrong_first = {
    'base': np.array([False, True, False, False, False]),
    'mid': np.array([False] * 5),
    'SPCT': np.array([True, False, True, True, True]),
  }
  judged = np.array([True, True, False, True, True])
  choose = lambda correct, show: exhibit.choose(examples, correct, judged, show=show)
  assert choose(wrong_first, 1) == [3] and choose(wrong_first, 3) == [3, 4, 0] and choose(wrong_first, 0) == []
  assert choose({'base': wrong_first['base']}, 2) == [0, 1]  # nothing changed: the first items
  assert exhibit.choose(examples, wrong_first, np.zeros(5, bool), show=2) == []


def test_baselines_stand_below_the_judges(tmp_path):
  names = ('longest', 'shortest', 'first', 'random')
  baselines = [
    {
      'benchmark': 'own',
      'subset': 'all',
      'n': 2,
      'name': name,
      'accuracy': 0.5,
      'stderr': 0.1,
      'items': 8,
      'low': 0.3,
      'high': 0.7,
    }
    for name in names
  ]
  lines = _lines(_report(tmp_path, [_row()], baselines=baselines), '| baseline')
  assert [line.split('|')[2].strip() for line in lines] == list(names)
  assert lines[0] == '| baseline | longest | 50.0 | 30.0 to 70.0 | – | – | – | 8 |'


def test_subsets_and_mixed_numbers_of_responses_have_their_own_table(tmp_path):
  # Seen to catch: 'Best' taken from a part instead of the whole.
  rows = [
    _row(n=None),
    _row(n=1, accuracy=0.9),
    _row(n=4, accuracy=0.2),
    _row(subset='math|x', items=1),
  ]
  text = _report(tmp_path, rows)
  assert '**62.5 %**' in text
  whole, parts = text.split('## By part')
  assert len(_lines(whole, '| rft')) == 1
  assert _lines(parts, '| all | rft') == [
    '| all | rft | vote of 4 | 1 | 90.0 | 51.0 to 73.0 | 12.5 | 6.3 | 25.0 | 8 |',
    '| all | rft | vote of 4 | 4 | 20.0 | 51.0 to 73.0 | 12.5 | 6.3 | 25.0 | 8 |',
  ]
  assert len(_lines(parts, '| math\\|x | rft')) == 1


def test_skipped_items_are_counted_and_named(tmp_path):
  text = _report(
    tmp_path,
    [_row()],
    skipped={'tied gold': ['a:1'], 'over the limit': [f'f:{i}' for i in range(25)], 'none': []},
  )
  assert '26 items left out' in text
  assert '- tied gold: 1 item: a:1\n' in text
  assert (
    '- over the limit: 25 items: f:0, ' in text
    and 'f:19, and 5 more' in text
    and '- none' not in text
  )
  assert len(json.loads((tmp_path / 'skipped.json').read_text())['over the limit']) == 25
  assert '## Skipped items\n\nNone.' in _report(tmp_path / '.', [_row()])


def test_odd_cases_say_what_is_the_matter(tmp_path):
  assert 'there are no rows' in _report(tmp_path, [])
  assert 'No judgement parsed' in _report(tmp_path, [_row(accuracy=0.0, parse_failure=1.0)])
  text = _report(tmp_path, [_row(items=0, accuracy=None, stderr=None)], commit=None)
  assert 'No item could be judged' in text and 'commit is unknown' in text
  assert '| rft | vote of 4 | – | – |' in text
  assert ' of 1 item, ' in _report(tmp_path, [_row(items=1)])


def test_several_temperatures_are_told_apart(tmp_path):
  text = _report(tmp_path, [_row(), _row(temperature=1.0)])
  assert 'vote of 4, temperature 0.5' in text and 'vote of 4, temperature 1 ' in text


def test_figures_are_linked_relative_to_the_report(tmp_path):
  text = _report(
    tmp_path, [_row()], figures={'Accuracy': tmp_path / 'figures' / 'a.png'}, notes=['one', 'two']
  )
  assert '![Accuracy](figures/a.png)' in text and '- one\n- two' in text


def test_figures_are_drawn_or_say_that_there_is_nothing(tmp_path):
  ks = [_row(k=k, guided=guided) for k in (1, 2, 4) for guided in (False, 'hard')]
  chance = [
    {
      'benchmark': 'own',
      'subset': 'all',
      'n': 2,
      'name': 'random',
      'accuracy': 0.5,
      'stderr': 0.0,
      'items': 8,
    }
  ]
  metrics = [
    {'stage': 'grpo', 'step': i, 'reward': None if i == 0 else 0.1 * i, 'counts': [1, 2]}
    for i in range(4)
  ]
  drawn = [
    figures.accuracy_vs_k(tmp_path / 'a.png', ks, baselines=chance),
    figures.accuracy_vs_k(
      tmp_path / 'zero.png', [_row(accuracy=0.0, low=0.0, high=0.0)], baselines=()
    ),
    figures.score_histogram(tmp_path / 'b.png', {'rft': {7: 3, 8: 1}, 'grpo': {}}),
    figures.training_curves(tmp_path / 'c.png', metrics),
  ]
  assert drawn == [True] * 4
  for name in ('a', 'zero', 'b', 'c'):
    assert (tmp_path / f'{name}.png').read_bytes().startswith(b'\x89PNG')
  assert not figures.accuracy_vs_k(tmp_path / 'd.png', [_row(temperature=0.0, k=1)], baselines=())
  assert not figures.score_histogram(tmp_path / 'd.png', {})
  assert not figures.training_curves(
    tmp_path / 'd.png', [{'stage': 'grpo', 'step': 0, 'counts': [1]}]
  )
  assert not (tmp_path / 'd.png').exists()


def _drawn(monkeypatch, draw):
  """The figure that `draw` would save."""
  import matplotlib.figure

  kept = []
  monkeypatch.setattr(matplotlib.figure.Figure, 'savefig', lambda self, path, **how: kept.append(self))
  assert draw()
  return kept[0]


def test_mixed_numbers_of_responses_have_a_line_of_panels_each(monkeypatch):
  # Seen to catch: the mixed rows drawn for every n; one chance line for all.
  rows = [
    _row(k=k, n=n, guided=guided, accuracy=0.1 * (n or 5), items=n or 7)
    for k in (1, 4)
    for n in (None, 4, 1, 2)
    for guided in (False, 'soft')
  ]
  chance = [
    {'benchmark': 'own', 'subset': 'all', 'n': n, 'name': 'random', 'accuracy': 1 / (n or 2), 'items': 8}
    for n in (None, 1, 2, 4)
  ]
  figure = _drawn(monkeypatch, lambda: figures.accuracy_vs_k('x', rows, baselines=chance))
  axes = figure.get_axes()
  assert [one.get_title(loc='left') for one in axes[::2]] == [
    f'own, {n} response{"s" * (n > 1)}: plain votes' for n in (1, 2, 4)
  ]
  for n, one in zip((1, 2, 4), axes[::2]):
    curve, line = one.get_lines()
    assert curve.get_ydata().tolist() == pytest.approx([10 * n, 10 * n])
    assert line.get_ydata()[0] == pytest.approx(100 / n)
  many = [_row(n=n, k=k, items=100 - n if n else 9) for n in (None, *range(2, 12)) for k in (1, 2)]
  figure = _drawn(monkeypatch, lambda: figures.accuracy_vs_k('x', many, baselines=()))
  assert [one.get_title(loc='left') for one in figure.get_axes()] == [
    'own, all items: plain votes', *(f'own, {n} responses: plain votes' for n in (2, 3, 4))
  ]


def test_a_sweep_shows_one_metric_per_panel_and_one_run_per_curve(monkeypatch, tmp_path):
  # Seen to catch: rows of other stages drawn; a gap averaged in; a window over logged values instead of steps.
  def run(scale):
    rows = [{'stage': 'grpo', 'step': i, 'kl': scale * i, 'accuracy': 0.5 if i % 2 else None} for i in range(4)]
    return [{'stage': 'rft', 'step': 0, 'kl': 99.0}, *rows]

  runs = {'beta 0': run(2.0), 'beta 1': run(1.0), 'no rows': []}
  names = ('accuracy', 'kl', 'never logged')
  draw = lambda window: figures.sweep('x', runs, stage='grpo', names=names, window=window)
  accuracy, kl = _drawn(monkeypatch, lambda: draw(1)).get_axes()
  assert [line.get_label() for line in kl.get_lines()] == ['beta 0', 'beta 1']
  assert [line.get_ydata().tolist() for line in kl.get_lines()] == [[0, 2, 4, 6], [0, 1, 2, 3]]
  assert accuracy.get_title(loc='left') == 'accuracy'
  np.testing.assert_array_equal(accuracy.get_lines()[0].get_ydata(), [np.nan, 0.5, np.nan, 0.5])
  monkeypatch.undo()
  accuracy, kl = _drawn(monkeypatch, lambda: draw(3)).get_axes()
  assert kl.get_lines()[0].get_ydata().tolist() == [0, 1, 2, 4]
  np.testing.assert_array_equal(accuracy.get_lines()[0].get_ydata(), [np.nan, 0.5, np.nan, 0.5])
  monkeypatch.undo()
  seldom = {'a': [{'stage': 'grpo', 'step': i, 'kl': float(i)} for i in (0, 10, 20, 21)]}
  figure = _drawn(monkeypatch, lambda: figures.sweep('x', seldom, stage='grpo', names=('kl',), window=3))
  assert figure.get_axes()[0].get_lines()[0].get_ydata().tolist() == [0, 10, 20, 20.5]
  monkeypatch.undo()
  assert figures.sweep(tmp_path / 's.png', runs, stage='grpo', names=names, window=2)
  assert (tmp_path / 's.png').read_bytes().startswith(b'\x89PNG')
  assert not figures.sweep(tmp_path / 'd.png', runs, stage='sft', names=names, window=1)
  assert not (tmp_path / 'd.png').exists()
  with pytest.raises(ValueError, match='window: got 0; allowed: 1'):
    draw(0)


def test_the_curves_show_the_rows(monkeypatch):
  # Seen to catch: a curve through unsorted k; guided rows in the plain panel; a band from stderr
  # where low, high are given.
  import matplotlib.figure

  figure = matplotlib.figure.Figure()
  axes = figure.add_subplot()
  rows = [
    _row(k=4, accuracy=0.7, low=0.6, high=0.8),
    _row(k=1, accuracy=0.5),
    _row(k=2, accuracy=0.6),
    _row(guided='hard'),
  ]
  figures._curves(axes, rows, False, ['rft'])
  (line,) = axes.get_lines()
  assert line.get_xdata().tolist() == [1, 2, 4]
  assert line.get_ydata().tolist() == pytest.approx([50, 60, 70])
  band = axes.collections[0].get_paths()[0].vertices
  at_four = band[band[:, 0] == 4][:, 1]
  assert at_four.min() == pytest.approx(60) and at_four.max() == pytest.approx(80)
