"""What the trackers count, by hand; and regexes that cannot be meant.

Mutations seen to fail here: lists compared in place of sets; the share of repeats over all judgements; an item without
principles counted as 0 sets; case not folded; all samples looked at whatever `samples` says; the separator's groups
kept as principles.
"""

import importlib.util
import pathlib

import pytest
from ml_collections import ConfigDict

from spct_jax import types
from spct_jax.stages import trackers

_PAGE = pathlib.Path(__file__).resolve().parents[2] / 'configs' / 'spct_small.py'


def section(**changes):
  fields = ConfigDict()
  fields.principles, fields.separator, fields.samples = r'Criteria:(.*?)\n', r'\s*(?:\(\d+%\))?\s*(?:,|$)', 8
  fields.patterns = {'careless': 'at a glance', 'both': r'first.*second'}
  fields.update(changes)
  return fields


def said(text):
  return types.Trajectory(
      uid='u', sample=0, visit=0, order=(0, 1), hinted=False, prompt_ids=(1,), token_ids=(2,), logp=(0.0,), text=text,
      scores=None, parse='no_box',
  )


def groups(*items):
  return [[said(text) for text in item] for item in items]


A_B = 'Criteria: Accuracy (60%), Tone (40%)\nAnalysis: the first, then the second'
B_A = 'Criteria: tone (50%),  ACCURACY (50%)\nAnalysis: at a glance'
A_A = 'Criteria: Accuracy (50%), accuracy (50%)\n'
C = 'Criteria: Careful  Reading\n'
NONE = 'I like it, at a glance.'


def test_by_hand():
  measured = trackers.measure(
      trackers.compiled(section()), groups([A_B, B_A, A_A, NONE], [C, C, A_B, A_B], [NONE, NONE, 'x', 'y'])
  )
  assert measured == {
      'pattern_both': 3 / 12,
      'pattern_careless': 4 / 12,
      'principles_found': 7 / 12,
      'principles_repeated': 1 / 7,
      'principle_sets': (2 + 2) / 2,  # the third item names none
      'principle_sets_of': 4,
  }
  assert list(measured)[:2] == ['pattern_both', 'pattern_careless']  # by name: the config's order means nothing


def test_principles_are_read_up_to_case_and_white_space():
  watch = trackers.compiled(section())
  assert trackers.principles_of(watch, B_A) == ['tone', 'accuracy']
  assert trackers.principles_of(watch, C) == ['careful reading']
  assert trackers.principles_of(watch, 'Criteria: , ,\n') == []
  assert trackers.principles_of(watch, NONE) is None
  optional = trackers.compiled(section(principles=r'Criteria:(?:.*)$|By (\w+)'))
  assert trackers.principles_of(optional, 'Criteria: one') is None  # the group took no part


def test_sets_are_counted_among_the_first_samples():
  item = [A_B, B_A, C, A_A]
  count = lambda samples: trackers.measure(trackers.compiled(section(samples=samples)), groups(item))
  assert [count(k)['principle_sets'] for k in (1, 2, 3, 4, 9)] == [1, 1, 2, 3, 3]
  assert [count(k)['principle_sets_of'] for k in (1, 2, 4, 9)] == [1, 2, 4, 4]
  assert count(1)['principles_found'] == 1  # of all that were drawn


def test_nothing_to_see_is_none():
  watch = trackers.compiled(section())
  nothing = trackers.measure(watch, [[], []])
  assert set(nothing) == {
      'pattern_both', 'pattern_careless', 'principles_found', 'principles_repeated', 'principle_sets', 'principle_sets_of'
  }
  assert set(nothing.values()) == {None}
  unread = trackers.measure(watch, groups([NONE], ['']))
  assert unread['principles_found'] == 0 and unread['pattern_careless'] == 0.5
  assert unread['principles_repeated'] is None and unread['principle_sets'] is None
  off = trackers.compiled(section(principles='', patterns={'careless': '', 'both': ''}))
  assert trackers.measure(off, groups([A_B])) == {} and trackers.sentence({}) is None
  for measured in (nothing, unread):
    assert trackers.sentence(measured)


def test_the_sentence():
  measured = trackers.measure(trackers.compiled(section()), groups([A_B, B_A, A_A, NONE]))
  assert trackers.sentence(measured) == (
      'principles in 75.0 % of the judgements, one of them repeated in 33.3 % of these, 2.00 distinct sets of principles '
      'per item among 4 samples, both in 25.0 %, careless in 50.0 %'
  )


@pytest.mark.parametrize(
    'changes, words',
    [
        ({'principles': '(a'}, ('trackers.principles', "'(a'", 'unterminated')),
        ({'principles': 'Criteria:.*'}, ('trackers.principles', '0 groups', 'exactly one')),
        ({'principles': '(a)(b)'}, ('trackers.principles', '2 groups', 'exactly one', '(?:...)')),
        ({'separator': ''}, ('trackers.separator', "''", 'at least one character')),
        ({'separator': ',?'}, ('trackers.separator', "',?'", 'at least one character')),
        ({'separator': '(,)'}, ('trackers.separator', "'(,)'", 'without groups')),
        ({'separator': '['}, ('trackers.separator', "'['", 'unterminated')),
        ({'patterns': {'careless': '*'}}, ('trackers.patterns.careless', "'*'", 'nothing to repeat')),
        ({'samples': 0}, ('trackers.samples', 'got 0', 'at least 1')),
    ],
)
def test_a_regex_that_cannot_be_meant_is_refused(changes, words):
  with pytest.raises(ValueError) as caught:
    trackers.compiled(section(**changes))
  for word in words:
    assert word in str(caught.value)


@pytest.mark.parametrize(
    'text, wanted',
    [
        ('Specific Criteria: Accuracy (60%), Clear  tone (40%)\nAnalysis: x', ['accuracy', 'clear tone']),
        ('Specific Criteria:\n1. Accuracy (Weight: 60%)\n2. Tone (40%)\n\nAnalysis: x', ['accuracy', 'tone']),
        ('Specific Criteria: accuracy; tone\nAnalysis: x', ['accuracy', 'tone']),
        ('Specific Criteria: accuracy, tone', None),  # cut off
        ('Analysis: x', None),
    ],
)
def test_the_regexes_of_the_small_page(text, wanted):
  spec = importlib.util.spec_from_file_location('page', _PAGE)
  page = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(page)
  assert trackers.principles_of(trackers.compiled(page.get_config('smoke').trackers), text) == wanted
