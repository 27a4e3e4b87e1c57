"""The practice world: its truth by an oracle of our own, and each planted thing measured where it was planted.

Rates are compared with the module's own numbers at |z| < 4.5 on fixed draws: whatever those numbers are, the docstring
must be true of them. Mutations seen to fail stand at the tests.
"""

import collections
import functools
import hashlib
import json
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from spct_jax import benchmarks
from spct_jax.data import practice
from spct_jax.judges import parse

SPLITS = ('train', 'validation', 'heldout')
CLASS_OF = {word: name for name, words in practice.CLASSES.items() for word in words}
LIMIT = 4.5


# The oracle: from the texts alone ----------------------------------------------------------------


def wanted(query):
  """(musts, nices) of a query's text."""
  found = re.fullmatch(r'must (\S+) (\S+) nice (\S+) (\S+)', query)
  return found.groups()[:2], found.groups()[2:]


def meets(criterion, response):
  words = response.split()
  there = {CLASS_OF[word] for word in words if word in CLASS_OF}
  return criterion[3:] not in there if criterion[:3] == 'no-' else criterion in there


def counts(query, response):
  """How many musts and how many nices a response meets."""
  return tuple(sum(meets(criterion, response) for criterion in part) for part in wanted(query))


def grade(query, response):
  musts, nices = counts(query, response)
  return practice.MUST * musts + practice.NICE * nices


def is_flashy(response):
  return any(word in practice.FLASHY for word in response.split())


def is_close(row):
  """Whether another response meets as many musts as the best of several."""
  musts = [counts(row['prompt'], response)[0] for response in row['responses']]
  return len(musts) > 1 and musts.count(max(musts)) > 1


def by_counting(query, responses, label):
  """Chance that the response with the most criteria met, all alike, is the best; ties are broken by lot."""
  met = [sum(counts(query, response)) for response in responses]
  best = [i for i, count in enumerate(met) if count == max(met)]
  return (label in best) / len(best)


def z(hits, n, share):
  """Standard errors between a count and what a share lets expect."""
  assert n > 30, 'too few draws to say anything'
  if share in (0, 1):
    return 0.0 if hits == n * share else math.inf
  return (hits - n * share) / math.sqrt(n * share * (1 - share))


def z_mean(values, expected=0.0):
  values = np.asarray(values, float)
  return (values.mean() - expected) / (values.std(ddof=1) / math.sqrt(len(values)))


def z_apart(first, second):
  """Standard errors between the means of two samples."""
  a, b = np.asarray(first, float), np.asarray(second, float)
  return (a.mean() - b.mean()) / math.sqrt(a.var(ddof=1) / len(a) + b.var(ddof=1) / len(b))


@functools.cache
def items(split='heldout', singles=0, pairs=0, fours=0, lists=0, seed=0):
  return tuple(practice.preferences(split, singles, pairs, fours, lists, seed))


SINGLES, PAIRS, FOURS = {'singles': 800}, {'pairs': 1500}, {'fours': 300}


# Items --------------------------------------------------------------------------------------------


def test_every_word_has_one_meaning():
  words = [word for group in (*practice.CLASSES.values(), practice.FILLERS, practice.FLASHY) for word in group]
  names = list(practice.CLASSES)
  assert len(practice.CLASSES) == 8
  assert len({*words, *names}) == len(words) + len(names)


# The page says what the code does: its example, and what it says of the items that are left.
def test_the_docstring():
  page = practice.__doc__
  query = re.search(r'(must \S+ \S+ nice \S+ \S+)\n', page).group(1)
  shown = re.findall(r'\n    \d: ((?:\w+ ){4}\w+)  +(?:both|must) .*(?:= |:  +)(\d+)(?=\n)', page)
  assert [grade(query, response) for response, _ in shown] == [int(points) for _, points in shown] == [8, 3]
  for response, _ in shown:
    named = [CLASS_OF[word] for word in response.split() if word in CLASS_OF]
    assert len(set(named)) == len(named) and len(response.split()) == practice.WORDS
  text = re.search(r'(?s)(Specific Criteria: .*?\})\n', page).group(1).replace('\n    ', '\n')
  one = Judged(query, [response for response, _ in shown], text, [8, 4])
  assert all(said == truth for _, _, said, truth in one.verdict_rows())
  found = [by_counting(row['prompt'], row['responses'], row['label']) == 1 for row in items(**PAIRS)]
  assert abs(z(sum(found), len(found), 0.7)) < LIMIT


def test_it_prints_examples(capsys):
  practice._show()
  told = capsys.readouterr().out
  assert 'truth: ' in told and 'Impression: ' in told and 'facts x\n  -> ' in told and 'keep ' in told


# Mutations seen to fail: a forbidden class met when its word is there; NICE for the second must; label = the first
# response; n = 1 right with one must; no second draw where the best is shared.
def test_the_truth_is_the_truth():
  rows = [*items(**SINGLES), *items(**PAIRS), *items(**FOURS), *items('train', 50, 50, 50, 50, seed=7)]
  for row in rows:
    musts, nices = wanted(row['prompt'])
    assert len({criterion.removeprefix('no-') for criterion in (*musts, *nices)}) == 4
    assert all(len(response.split()) == practice.WORDS for response in row['responses'])
    grades = [grade(row['prompt'], response) for response in row['responses']]
    if len(grades) == 1:
      assert row['label'] == (counts(row['prompt'], row['responses'][0])[0] == 2)
    else:
      assert row['grades'] == grades
      assert grades[row['label']] == max(grades) and grades.count(max(grades)) == 1
    assert row['subset'] == ('flashy' if any(map(is_flashy, row['responses'])) else 'plain')
    assert practice.grade((*musts, *nices), row['responses'][0].split()) == grades[0]


# Mutations seen to fail: a third of the single responses right; label = 0.
def test_labels_are_balanced():
  singles = [row['label'] for row in items(**SINGLES)]
  assert abs(z(sum(singles), len(singles), 0.5)) < LIMIT
  for rows, n in ((items(**PAIRS), 2), (items(**FOURS), 4)):
    for index in range(n):
      assert abs(z(sum(row['label'] == index for row in rows), len(rows), 1 / n)) < LIMIT


def test_sizes_are_those_asked_for_and_mixed():
  rows = items('train', 60, 60, 60, 60, seed=3)
  sizes = [len(row['responses']) for row in rows]
  assert len(sizes) == 240 and sizes != sorted(sizes)
  assert (sizes.count(1), sizes.count(2)) == (60, 60) and sizes.count(4) >= 60
  assert set(sizes) == {1, 2, 3, 4, 5, 6, 7, 8}
  assert len({row['id'] for row in rows}) == len(rows)


def asked(query):
  """What a query's text asks for, whatever the order of its musts and of its nices."""
  return tuple(frozenset(part) for part in wanted(query))


def key(query, responses):
  return asked(query), tuple(sorted(responses))


# Mutations seen to fail: `preferences` that takes any item; the split read off the query as it is written.
def test_a_query_has_one_split_whatever_seed_size_and_order():
  seen = {name: set() for name in SPLITS}
  for split in SPLITS:
    for seed, sizes in ((0, (100, 400, 100, 20)), (1, (0, 400, 0, 0)), (9, (5, 0, 100, 0))):
      for row in items(split, *sizes, seed=seed):
        (a, b), (c, d) = wanted(row['prompt'])
        for query in ((a, b, c, d), (b, a, c, d), (a, b, d, c), (b, a, d, c)):
          assert practice.split_of(query) == split
        seen[split].add(asked(row['prompt']))
  assert min(map(len, seen.values())) > 300
  assert not seen['train'] & seen['heldout'] and not seen['train'] & seen['validation']
  assert not seen['heldout'] & seen['validation']


# Mutations seen to fail: musts and nices of one bag; the split read off the musts alone.
def test_the_split_depends_on_all_that_is_asked_for():
  assert sum(map(len, practice.SPLITS.values())) == len({i for places in practice.SPLITS.values() for i in places}) == 16
  found, moved = collections.Counter(), collections.Counter()
  for i in range(2000):
    query = (f'w{i}', 'no-color', 'tool', 'no-animal')
    split = practice.split_of(query)
    found[split] += 1
    moved['must'] += split != practice.split_of((f'w{i}', 'color', 'tool', 'no-animal'))
    moved['nice'] += split != practice.split_of((f'w{i}', 'no-color', 'tool', 'animal'))
    moved['weight'] += split != practice.split_of(('tool', 'no-color', f'w{i}', 'no-animal'))
  for name, places in practice.SPLITS.items():
    assert abs(z(found[name], 2000, len(places) / 16)) < LIMIT
  assert min(moved.values()) > 500


# Mutations seen to fail: nothing remembered; the responses or the query remembered in their order.
def test_no_item_comes_twice(monkeypatch):
  makers = [practice._Draws('pool', i) for i in range(40)]
  pool = [practice.item(2, draws) for draws in makers]

  def item(n, draws, flashy=None):
    found = draws.pick(pool)
    (a, b, c, d), turned = found['query'], draws.chance(0.5)
    return {**found, 'query': (b, a, d, c) if turned else (a, b, c, d), 'responses': draws.some(found['responses'], 2)}

  monkeypatch.setattr(practice, 'item', item)
  there = [found for found in pool if practice.split_of(found['query']) == 'train']
  rows = list(practice.preferences('train', pairs=len(there)))
  assert len(there) > 10 and len({key(row['prompt'], row['responses']) for row in rows}) == len(there)


# Mutation seen to fail: draws named by Python's own `hash`.
def test_same_arguments_same_rows_in_every_process():
  code = (
      'import hashlib, json; from spct_jax.data import practice as p;'
      "rows = [*p.preferences('train', 9, 9, 9, 9, 5), *p.general('train', 20, 5), *p.demonstrations(1, 1, 1, 1, 8, 5)];"
      'print(hashlib.sha256(json.dumps(rows).encode()).hexdigest())'
  )
  here = [
      *practice.preferences('train', 9, 9, 9, 9, 5),
      *practice.general('train', 20, 5),
      *practice.demonstrations(1, 1, 1, 1, 8, 5),
  ]
  there = subprocess.run(
      [sys.executable, '-c', code], env={**os.environ, 'PYTHONHASHSEED': '17'}, capture_output=True, text=True, check=True
  )
  assert there.stdout.strip() == hashlib.sha256(json.dumps(here).encode()).hexdigest()


# Mutation seen to fail: `seed` left out of the name of the draws.
def test_seeds_and_splits_change_the_rows():
  texts = lambda rows: [row.get('prompt') or row['messages'][0]['content'] for row in rows]
  for make in (
      lambda split, seed: practice.preferences(split, pairs=20, seed=seed),
      lambda split, seed: practice.general(split, rows=20, seed=seed),
  ):
    made = {(split, seed): texts(make(split, seed)) for split in SPLITS for seed in (0, 1)}
    assert len({tuple(rows) for rows in made.values()}) == 6
  demonstrations = lambda seed: texts(practice.demonstrations(1, 1, 1, 1, 8, seed))
  assert demonstrations(0) != demonstrations(1)


@pytest.mark.parametrize('function', [practice.preferences, practice.general])
def test_an_unknown_split_is_refused(function):
  with pytest.raises(ValueError, match="split: got 'test'; allowed: heldout, validation, train"):
    list(function('test', 3))


# Mutation seen to fail: grades in the opposite order.
def test_sources_read_it():
  name = 'made:spct_jax.data.practice:preferences?split=heldout&singles=8&pairs=8&fours=8&lists=8&seed=4'
  loaded = benchmarks.load(name, reader='plain', strict=True)
  rows = items('heldout', 8, 8, 8, 8, seed=4)
  assert len(loaded.examples) == len(rows) == 32 and not loaded.skipped
  for example, row in zip(loaded.examples, rows):
    assert example.uid == row['id'] and example.label == row['label'] and example.subset == row['subset']
    assert [(turn.role, turn.content) for turn in example.messages] == [('user', row['prompt'])]
    assert example.responses == tuple(row['responses'])
    assert example.grades == (tuple(map(float, row['grades'])) if 'grades' in row else None)
  assert {len(example.responses) for example in loaded.examples} >= {1, 2, 3, 4, 8}


# Mutations seen to fail: two flashy words per item; the best always flashy; half the odds; an item close where the
# counts are equal; the share of the close for all.
def test_flashy_words_are_no_help():
  for rows in (items(**PAIRS), items('train', 4000), items(**FOURS)):
    flashy = [[is_flashy(response) for response in row['responses']] for row in rows]
    assert all(sum(words in practice.FLASHY for words in ' '.join(row['responses']).split()) <= 1 for row in rows)
    best = [marks[row['label']] if len(marks) > 1 else row['label'] for row, marks in zip(rows, flashy) if any(marks)]
    n = len(flashy[0])
    odds = practice.FLASHY_RIGHT
    if n > 1:
      odds = practice.FLASHY_BEST / (practice.FLASHY_BEST + (n - 1) * (1 - practice.FLASHY_BEST))
    assert abs(z(sum(best), len(best), odds)) < LIMIT
    for close, share in practice.FLASHY_ITEMS.items():
      if n > 1 or not close:  # a single response is never close
        marked = [any(marks) for row, marks in zip(rows, flashy) if is_close(row) == close]
        assert abs(z(sum(marked), len(marked), share)) < LIMIT


# Mutation seen to fail: single responses flashy whatever their label.
def test_flashy_best_is_how_often_the_flashy_one_is_the_best(monkeypatch):
  monkeypatch.setattr(practice, 'FLASHY_BEST', 0.2)
  monkeypatch.setattr(practice, 'FLASHY_RIGHT', 0.2)
  for rows in (practice.preferences('train', singles=3000), practice.preferences('train', pairs=600)):
    best = []
    for row in rows:
      marks = [is_flashy(response) for response in row['responses']]
      if any(marks):
        best.append(row['label'] if len(marks) == 1 else marks[row['label']])
    assert abs(z(sum(best), len(best), 0.2)) < LIMIT


def test_close_items_are_those_that_the_nices_decide():
  rows = items(**PAIRS)
  close = [is_close(row) for row in rows]
  assert 0.1 < np.mean(close) < 0.4
  assert all(by_counting(row['prompt'], row['responses'], row['label']) == 1 for row, one in zip(rows, close) if one)
  fours = [by_counting(row['prompt'], row['responses'], row['label']) for row in items(**FOURS) if is_close(row)]
  assert 0.7 < np.mean(fours) < 1


# Mutation seen to fail: EASY_DROPPED = 0. The full rubric is right by `test_the_truth_is_the_truth`.
def test_counting_alone_does_not_find_the_best(monkeypatch):
  chance = lambda rows: [by_counting(row['prompt'], row['responses'], row['label']) for row in rows]
  hard = chance(items(**PAIRS))
  monkeypatch.setattr(practice, 'EASY_DROPPED', 0.0)
  easy = chance(practice.preferences('heldout', pairs=400))
  assert 0.5 < np.mean(hard) < 0.9
  assert z_apart(easy, hard) > LIMIT


# Judgements ---------------------------------------------------------------------------------------


class Judged:
  """A judgement read back from its text, beside what was judged."""

  def __init__(self, query, responses, text, scores):
    self.query, self.responses, self.text, self.scores = query, responses, text, scores
    first, manner, analysis, last = re.fullmatch(
        r'Specific Criteria: (.*)\n(Analysis|Impression): (.*)\nScores: \\boxed\{(.*)\}', text, re.DOTALL
    ).groups()
    weights, self.written = first.split()[::2], first.split()[1::2]
    musts, nices = wanted(query)
    assert weights == ['must' if c in musts else 'nice' if c in nices else 'other' for c in self.written]
    self.verdicts = []
    for slot, line in enumerate(analysis.split('\n'), start=1):
      quoted, _, rest = line.partition(' - ')
      words = rest.split()
      assert quoted == f'{slot}: {responses[slot - 1]}' and words[::2] == self.written and set(words[1::2]) <= {'yes', 'no'}
      self.verdicts.append([word == 'yes' for word in words[1::2]])
    assert len(self.verdicts) == len(responses) and [int(score) for score in last.split(', ')] == scores
    self.careless = manner == 'Impression'

  def verdict_rows(self):
    """(slot, criterion, said, truth) of each verdict."""
    for slot, row in enumerate(self.verdicts):
      for criterion, said in zip(self.written, row):
        yield slot, criterion, said, meets(criterion, self.responses[slot])

  def cell(self, slot, truth):
    """What the chance of a right verdict depends on."""
    return truth, len(self.responses) > 1 and slot == 0, len(self.responses) > 1 and self.longest(slot)

  def longest(self, slot):
    return len(self.responses[slot]) == max(map(len, self.responses))


def judge(row, draws, order=None, clean=False):
  shown = [row['responses'][i] for i in order or range(len(row['responses']))]
  musts, nices = wanted(row['prompt'])
  text, scores = practice.judgement((*musts, *nices), [words.split() for words in shown], draws, clean=clean)
  return Judged(row['prompt'], shown, text, scores)


@functools.cache
def judgements(name, times):
  """`times` judgements of each item, in the order of the item and in the opposite one by turns."""
  rows, draws = {'singles': items(**SINGLES), 'pairs': items(**PAIRS), 'fours': items(**FOURS)}[name], practice._Draws(name)
  orders = lambda n, i: None if i % 2 == 0 else tuple(reversed(range(n)))
  return tuple(judge(row, draws, orders(len(row['responses']), i)) for row in rows for i in range(times))


def judged():
  return [*judgements('singles', 4), *judgements('pairs', 4), *judgements('fours', 4)]


def careful():
  return [one for one in judged() if not one.careless]


# Mutations seen to fail: a jitter of 4, which leaves the range; `nice` for the second must.
def test_the_strict_parser_reads_every_judgement():
  for one in judged():
    n = len(one.responses)
    assert parse.scores(one.text, n, *((0, 1) if n == 1 else (1, 10))) == tuple(one.scores)
    assert len(set(one.written)) == len(one.written) == practice.WRITTEN
    assert set(one.written) <= set(practice.criteria())


# Mutations seen to fail: careless without flashy words; CARELESS squared.
def test_carelessness_is_where_flashy_words_are():
  for name in ('singles', 'pairs', 'fours'):
    taken = [one.careless for one in judgements(name, 4) if any(map(is_flashy, one.responses))]
    assert abs(z(sum(taken), len(taken), practice.CARELESS)) < LIMIT
  assert not any(one.careless for one in judged() if not any(map(is_flashy, one.responses)))


# Mutations seen to fail: a halo weaker by 0.1; the careless verdicts by the truth; careless scores by counting.
def test_a_careless_judgement_is_a_halo_of_the_flashy_word():
  repeats, margins, ordinary = [], [], []
  for one in judged():
    if not one.careless:
      ordinary += [max(one.scores) - min(one.scores)] if len(one.scores) > 1 else []
      continue
    flashy = [is_flashy(response) for response in one.responses]
    repeats += [said == taken for row, taken in zip(one.verdicts, flashy) for said in row]
    if len(one.scores) > 1:
      high, low = one.scores[flashy.index(True)], max(s for s, f in zip(one.scores, flashy) if not f)
      assert high > low  # the same direction in both orders
      margins.append(high - min(one.scores))
  assert abs(z(sum(repeats), len(repeats), practice.HALO)) < LIMIT
  assert min(margins) > np.mean(ordinary) and np.mean(margins) > 2 * np.mean(ordinary)


# Mutations seen to fail: no kindness to the first; kindness to the shortest; kindness with the wrong sign for what is
# not met; RIGHT exchanged.
def test_careful_verdicts_are_right_as_often_as_planted():
  cells = collections.defaultdict(list)
  for one in careful():
    for slot, _, said, truth in one.verdict_rows():
      cells[truth, slot == 0, one.longest(slot), len(one.responses) > 1].append(said == truth)
  assert len(cells) == 8 + 2
  for (truth, first, longest, several), right in cells.items():
    kind = practice.KIND_TO_FIRST * first + practice.KIND_TO_LONGEST * longest
    kind *= several
    share = min(1.0, max(0.0, practice.RIGHT[truth] + (kind if truth else -kind)))
    assert abs(z(sum(right), len(right), share)) < LIMIT, (truth, first, longest, several)


# Mutations seen to fail: one error for all criteria of a response; one for all samples of an item.
def test_noise_is_drawn_anew_for_every_verdict_and_sample():
  found = careful()
  cells = collections.defaultdict(list)
  for one in found:
    for slot, _, said, truth in one.verdict_rows():
      cells[one.cell(slot, truth)].append(said != truth)
  rate = {cell: np.mean(wrong) for cell, wrong in cells.items()}
  within, across, of_item = [], [], collections.defaultdict(list)
  for one in found:
    rest = collections.defaultdict(list)
    for slot, criterion, said, truth in one.verdict_rows():
      rest[slot].append((said != truth) - rate[one.cell(slot, truth)])
      of_item[key(one.query, one.responses), one.responses[slot], criterion].append(rest[slot][-1])
    within += [row[i] * row[j] for row in rest.values() for i in range(len(row)) for j in range(i)]
    across += [a * b for i in rest for j in range(i) for a in rest[i] for b in rest[j]]
  samples = [row[i] * row[j] for row in of_item.values() for i in range(len(row)) for j in range(i)]
  for products in (within, across, samples):
    assert len(products) > 1000 and abs(z_mean(products)) < LIMIT


# Mutations seen to fail: a must counts 3 in the score; musts are written more often; verdicts on musts more reliable.
def test_the_judge_knows_no_weights():
  features, scores, written, wrong, halves = [], [], [], {True: [], False: []}, {True: [], False: []}
  for one in careful():
    musts, nices = wanted(one.query)
    written += [criterion in musts for criterion in one.written if criterion in (*musts, *nices)]
    kinds = [0 if criterion in musts else 1 if criterion in nices else 2 for criterion in one.written]
    for slot, row in enumerate(one.verdicts):
      said = np.bincount([kind for kind, yes in zip(kinds, row) if yes], minlength=3)
      if len(one.scores) > 1:
        features.append((1, *said))
        scores.append(one.scores[slot])
      elif sum(row) == practice.WRITTEN - 1 and kinds[row.index(False)] < 2:
        halves[kinds[row.index(False)] == 0].append(one.scores[0])
    for slot, criterion, said, truth in one.verdict_rows():
      if truth and criterion in (*musts, *nices) and slot:
        wrong[criterion in musts].append(said != truth)
  x, y = np.array(features, float), np.array(scores, float)
  solved, residual, *_ = np.linalg.lstsq(x, y, rcond=None)
  cover = np.linalg.inv(x.T @ x) * residual[0] / (len(y) - 4)
  for i, j in ((1, 2), (1, 3), (2, 3)):
    error = math.sqrt(cover[i, i] + cover[j, j] - 2 * cover[i, j])
    assert abs(solved[i] - solved[j]) < LIMIT * error and error < 0.05 and min(solved[1:]) > 0.5
  assert abs(z(sum(written), len(written), 0.5)) < LIMIT
  assert abs(z_apart(wrong[True], wrong[False])) < LIMIT
  assert min(map(len, halves.values())) > 30 and abs(z_apart(halves[True], halves[False])) < LIMIT


# Mutation seen to fail: half of the criteria the query's, whoever writes.
def test_criteria_are_the_querys_as_often_as_planted():
  share = lambda ones: [c in {*wanted(one.query)[0], *wanted(one.query)[1]} for one in ones for c in one.written]
  named = share(judged())
  assert abs(z(sum(named), len(named), practice.RELEVANT)) < LIMIT


# Mutation seen to fail: a must counts 3 in the score (votes then find the best of both kinds).
def test_votes_remove_the_noise_and_nothing_else():
  """The best by counting wins the vote of 60 careful judgements where it is the best, and where it is not."""
  draws, right = practice._Draws('votes'), {True: [], False: []}
  for row in items(**PAIRS):
    met = [sum(counts(row['prompt'], response)) for response in row['responses']]
    apart = met[row['label']] - met[1 - row['label']]
    if row['subset'] == 'plain' and abs(apart) >= (1 if apart < 0 else 2) and len(right[apart > 0]) < 40:
      votes = [judge(row, draws, (0, 1) if i % 2 else (1, 0)) for i in range(60)]
      totals = [sum(one.scores[one.responses.index(response)] for one in votes) for response in row['responses']]
      right[apart > 0].append(totals[row['label']] > totals[1 - row['label']])
  assert min(map(len, right.values())) >= 20
  assert np.mean(right[True]) > 0.9 and np.mean(right[False]) < 0.3


# Mutations seen to fail: `clean` with the jitter; `clean` with half of the single responses with two yes accepted.
def test_a_clean_judgement_makes_no_mistake():
  draws, score_of = practice._Draws('clean'), {}
  for row in (*items(**SINGLES)[:200], *items(**PAIRS)[:200], *items(**FOURS)[:100]):
    one = judge(row, draws, clean=True)
    assert not one.careless and all(said == truth for _, _, said, truth in one.verdict_rows())
    for verdicts, score in zip(one.verdicts, one.scores):
      assert score_of.setdefault((len(one.scores) == 1, sum(verdicts)), score) == score
  assert [score_of[True, yes] for yes in range(4)] == [0, 0, 0, 1]
  listed = [score_of[False, yes] for yes in range(4)]
  assert listed == sorted(set(listed))  # every yes is worth something


# Training texts -----------------------------------------------------------------------------------


def prompt_and_answer(row):
  user, assistant = row['messages']
  assert (user['role'], assistant['role']) == ('user', 'assistant')
  return user['content'], assistant['content']


def shown(prompt):
  """(query, responses, last line and hint line) of a prompt that shows an item; None for a general task."""
  hint, break_, rest = prompt.partition('\n')
  hint, prompt = ([hint], rest) if break_ and hint.startswith('hint ') else ([], prompt)
  if not prompt.startswith('User: '):
    return None
  query, *lines = prompt.removeprefix('User: ').split('\n')
  responses = []
  while lines and lines[0].startswith(f'{len(responses) + 1}: '):
    responses.append(lines.pop(0).partition(' ')[2])
  return query, responses, lines + hint


@functools.cache
def demonstrations(words=0, facts=0, clean=0, habits=0, batch=32, seed=0):
  return tuple(
      practice.demonstrations(words=words, facts=facts, clean=clean, habits=habits, batch=batch, seed=seed)
  )


def demonstrated(rows):
  """(query, responses, hint line or '', answer) of the rows that judge."""
  for prompt, answer in map(prompt_and_answer, rows):
    found = shown(prompt)
    if found and isinstance(answer, str):
      query, responses, (asked, *hint) = found
      assert asked == ('correct x' if len(responses) == 1 else 'score ' + ', '.join('x' * len(responses)))
      assert len(hint) <= 1
      yield query, responses, ''.join(hint), answer


def read(responses, answer):
  return parse.scores(answer, len(responses), *((0, 1) if len(responses) == 1 else (1, 10)))


def is_right(query, responses, scores):
  grades = [grade(query, response) for response in responses]
  if len(responses) == 1:
    return scores is not None and scores[0] == (counts(query, responses[0])[0] == 2)
  best = grades.index(max(grades))
  return scores is not None and all(scores[best] > score for i, score in enumerate(scores) if i != best)


HABITS = {'habits': 70}
FLAWED = 11 / 12  # of the judgements of that phase; the others are flawless ones


# Mutation seen to fail: items of the held-out split; general tasks of any split.
def test_training_rows_are_of_the_train_split():
  general = set()
  for row in (*demonstrations(words=4, facts=8, clean=8, habits=8, batch=16), *demonstrations(**HABITS)):
    prompt, _ = prompt_and_answer(row)
    if found := shown(prompt):
      query = [word for part in wanted(found[0]) for word in part]
      assert practice.split_of(query) == 'train'
    else:
      general.add(prompt)
  # Short tasks are few: of two free draws of these sizes, a dozen prompts would be in both.
  for split in ('heldout', 'validation'):
    assert not general & {row['messages'][0]['content'] for row in practice.general(split, 2000)}


# Mutations seen to fail: long rows among the others; hints in flawed demonstrations alone.
def test_the_curriculum():
  sizes = {'words': 4, 'facts': 8, 'clean': 8, 'habits': 8}
  rows, batch = demonstrations(**sizes, batch=16), 16
  assert len(rows) == sum(sizes.values()) * batch and len({row['id'] for row in rows}) == len(rows)
  phases, start = {}, 0
  for name, count in sizes.items():
    phases[name] = rows[start : start + count * batch]
    start += count * batch
  for i in range(0, len(rows), batch):
    lengths = {len(found[1]) for row in rows[i : i + batch] if (found := shown(prompt_and_answer(row)[0]))}
    assert lengths == {4} or lengths <= {1, 2}
  kinds = lambda rows: {
      'task' if not found else 'judge' if isinstance(answer, str) else f'facts {len(found[1])}'
      for prompt, answer in map(prompt_and_answer, rows) for found in (shown(prompt),)
  }
  assert kinds(phases['words']) == {'facts 1', 'task'}
  assert kinds(phases['facts']) == {'facts 2', 'judge', 'task'}
  assert {'judge', 'task'} <= kinds(phases['clean']) and {'judge', 'task'} <= kinds(phases['habits'])
  flawless = list(demonstrated([*phases['facts'], *phases['clean']]))
  for query, responses, hint, answer in flawless:
    one = Judged(query, responses, answer, list(read(responses, answer)))
    assert all(said == truth for _, _, said, truth in one.verdict_rows())
  hinted = sum(bool(hint) for _, _, hint, _ in flawless)
  assert hinted and abs(z(hinted, len(flawless), practice.HINTED)) < LIMIT


# Mutations seen to fail: verdicts that overlook what forbids; criteria learnt; another response's words; a header that
# passes over flashy words; weights exchanged.
def test_facts_are_true_and_only_they_are_learnt():
  seen, flashy = 0, []
  for prompt, parts in map(prompt_and_answer, demonstrations(words=4, facts=8, clean=8, habits=8, batch=16)):
    if isinstance(parts, str):
      continue
    query, responses, asked = shown(prompt)
    assert asked == ['facts ' + ', '.join('x' * len(responses))]
    slot = criterion = None
    text = ''.join(part['text'] for part in parts)
    flashy.append(any(map(is_flashy, responses)))
    assert text.split('\n')[1].split()[0] == ('Impression:' if flashy[-1] else 'Analysis:')
    header = text.split('\n')[0].removeprefix('Specific Criteria: ').split()
    assert len(set(header[1::2])) == practice.WRITTEN and len(header) == 2 * practice.WRITTEN
    assert set(zip(header[::2], header[1::2])) <= {
        (weight, criterion) for weight, part in zip(('must', 'nice'), wanted(query)) for criterion in part
    }
    quotes = re.findall(r'(\d+): (.*?) -', text)
    assert {int(i) - 1 for i, _ in quotes} == set(range(len(responses)))
    assert all(responses[int(i) - 1] == quote for i, quote in quotes)
    for part in parts:
      for word in part['text'].split():
        if re.fullmatch(r'\d+:', word):
          slot = int(word[:-1]) - 1
        elif word in practice.criteria():
          criterion = word
          assert slot is None or not part['train']
        elif word in ('yes', 'no'):
          truth = is_flashy(responses[slot]) if flashy[-1] else meets(criterion, responses[slot])
          assert (word == 'yes') == truth and part['train']
          seen += 1
  assert seen > 800
  assert abs(z(sum(flashy), len(flashy), practice.FLASHY_SHOWN['facts'])) < LIMIT


# Mutations seen to fail: BROKEN ignored; BROKEN doubled; a broken text that the parser still reads.
def test_a_share_of_the_judgements_cannot_be_read(monkeypatch):
  for share in (0.0, 0.1, 1.0):
    monkeypatch.setattr(practice, 'BROKEN', share)
    rows = list(demonstrated(practice.demonstrations(words=0, facts=0, clean=0, habits=24, batch=32)))
    whole = [row for row in rows if read(row[1], row[3]) is not None]
    assert abs(z(len(whole), len(rows), 1 - FLAWED * share)) < LIMIT
    for query, responses, hint, answer in whole if share == 1 else ():
      one = Judged(query, responses, answer, list(read(responses, answer)))
      assert all(said == truth for _, _, said, truth in one.verdict_rows())


# Mutation seen to fail: a way that leaves out `Scores:` alone, whose box still counts.
def test_every_way_to_break_is_refused_by_the_strict_parser():
  draws, ways = practice._Draws('broken'), set()
  for one in judged()[::9]:
    text = practice._broken(one.text, draws)
    n = len(one.responses)
    reason = parse.read(text, n, *((0, 1) if n == 1 else (1, 10)))
    assert reason.scores is None
    ways.add(reason.kind)
  assert len(ways) >= 3


# Mutations seen to fail: a hint that names the place before shuffling; no second try with a hint; half the hints.
def test_hints_are_true_and_mostly_followed():
  right, slots = {True: [], False: []}, collections.Counter()
  found = list(demonstrated(demonstrations(**HABITS)))
  for query, responses, hint, answer in found:
    scores = read(responses, answer)
    if hint:
      if len(responses) == 1:
        assert hint == f'hint {int(counts(query, responses[0])[0] == 2)}'
      else:
        grades = [grade(query, response) for response in responses]
        best = grades.index(max(grades)) + 1
        assert hint == f'hint {best}'
        slots[len(responses), best] += 1
    if scores is not None:
      right[bool(hint)].append(is_right(query, responses, scores))
  hinted = sum(bool(hint) for _, _, hint, _ in found)
  assert abs(z(hinted, len(found), practice.HINTED)) < LIMIT
  assert np.mean(right[True]) > 0.75 and z_apart(right[True], right[False]) > LIMIT
  assert {slot for n, slot in slots if n == 2} == {1, 2} and {slot for n, slot in slots if n == 4} == {1, 2, 3, 4}


# Mutation seen to fail: habits of items as the preferences have them.
def test_flawed_demonstrations_are_full_of_flashy_items():
  found = [any(map(is_flashy, responses)) for _, responses, _, _ in demonstrated(demonstrations(**HABITS))]
  assert np.mean(found) > 0.9 * FLAWED * practice.FLASHY_SHOWN['habit']


# Mutations seen to fail: verdicts by lot; `habits` without any flaw.
def test_demonstrations_are_mediocre():
  """Of two responses the better one wins more often than the other, and by far not always."""
  wins, losses, pairs = 0, 0, 0
  for query, responses, hint, answer in demonstrated(demonstrations(habits=3 * HABITS['habits'])):
    scores = read(responses, answer)
    if not hint and len(responses) == 2 and scores is not None:
      pairs += 1
      wins += is_right(query, responses, scores)
      losses += scores[0] != scores[1] and not is_right(query, responses, scores)
  assert z(wins, wins + losses, 0.5) > 3 and wins / pairs < 0.75


# General tasks ------------------------------------------------------------------------------------


def solve(prompt):
  """The right answer to a general task."""
  if found := re.fullmatch(r'classes of (.*)', prompt):
    return [CLASS_OF[word] for word in found[1].split()]
  kept, words = re.fullmatch(r'keep (\S+) of (.*)', prompt).groups()
  return [word for word in words.split() if CLASS_OF[word] == kept]


# Mutations seen to fail: the answer in the order of the class; tasks of all splits; prompts that come twice.
def test_general_tasks():
  prompts = {}
  for split in SPLITS:
    rows = list(practice.general(split, 2000))
    assert len(rows) == len({row['id'] for row in rows}) == 2000
    for row in rows:
      prompt, answer = prompt_and_answer(row)
      assert answer.split() == solve(prompt) and answer
    prompts[split] = {row['messages'][0]['content'] for row in rows}
    assert len(prompts[split]) == 2000
    assert {prompt.split()[0] for prompt in prompts[split]} == {'classes', 'keep'}
  assert not any(prompts[a] & prompts[b] for a in SPLITS for b in SPLITS if a < b)
  for prompt, answer in map(prompt_and_answer, demonstrations(**HABITS)):
    if not shown(prompt):
      assert answer.split() == solve(prompt)
