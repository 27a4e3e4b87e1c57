"""Accuracy at k with its interval, rates and baselines, against loops in exact arithmetic.

Mutations seen to fail here: all samples of a block voting under guidance; ddof 0; blocks counted as
items in the standard error; items that did not parse left out; ties half in `roc_auc` dropped; a
score of +inf counting the rows that are no negatives; single responses counted by slot; pairs of
one order counted as flips.
"""

import fractions
import itertools
import math

import jax
import numpy as np
import pytest

from spct_jax.algos import metrics

NAN, INF = float('nan'), float('inf')
F = fractions.Fraction


def block_credit(scores, voters, label, present):
  """(credit, tied) of one vote. scores[j][i]; voters: sample -> weight."""
  if not voters:
    return F(0), False
  totals = {i: sum(w * F(scores[j][i]) for j, w in voters.items()) for i in present}
  if len(present) == 1:
    mean = totals[present[0]] / sum(voters.values())
    says = F(1) if mean > F(1, 2) else F(1, 2) if mean == F(1, 2) else F(0)
    return (says if label == 1 else 1 - says if label == 0 else F(0)), mean == F(1, 2)
  top = max(totals.values())
  winners = [i for i in present if totals[i] == top]
  return (F(1, len(winners)) if label in winners else F(0)), len(winners) > 1


def loop_accuracy(scores, valid, label, response_mask, k, meta_score=None, k_meta=None):
  credits, ties, cast = [], 0, 0
  for b in range(len(scores)):
    present = [i for i in range(len(response_mask[b])) if response_mask[b][i]]
    gold = label[b]
    if gold < 0 or (len(present) > 1 and gold not in present) or not present:
      continue
    earned = []
    start = 0
    while start + k <= len(valid[b]):
      samples = [j for j in range(start, start + k) if valid[b][j]]
      if meta_score is not None:
        samples.sort(key=lambda j: -meta_score[b][j])  # Python's sort is stable
        samples = samples[: max(1, k // 2) if k_meta is None else k_meta]
      value, tied = block_credit(scores[b], {j: F(1) for j in samples}, gold, present)
      earned.append(value)
      ties += tied
      cast += bool(samples)
      start += k
    credits.append(sum(earned, F(0)) / len(earned))
  mean = sum(credits, F(0)) / len(credits)
  variance = sum((c - mean) ** 2 for c in credits) / (len(credits) - 1)
  return dict(
      accuracy=float(mean), stderr=math.sqrt(variance / len(credits)), items=len(credits),
      ties=ties / cast, credit=[float(c) for c in credits],
  )  # fmt: skip


def random_items(seed, items=40, samples=7, responses=4):
  rng = np.random.default_rng(seed)
  response_mask = np.arange(responses)[None] < rng.integers(1, responses + 1, (items, 1))
  single = response_mask.sum(1) == 1
  scores = rng.integers(1, 4, (items, samples, responses))
  scores[single] = rng.integers(0, 2, (single.sum(), samples, responses))
  valid = rng.random((items, samples)) < 0.7
  valid[0] = False
  label = rng.integers(-1, responses, items)
  scores = np.where(response_mask[:, None] & valid[..., None], scores, 99)
  meta = rng.integers(-2, 3, (items, samples)).astype(np.float32)  # few values: many ties
  return scores, valid, label, response_mask, meta


@pytest.mark.parametrize('k', [1, 2, 3, 7])
@pytest.mark.parametrize('guide', ['no', 'half', 'one'])
def test_accuracy_against_the_loop(k, guide):
  scores, valid, label, response_mask, meta = random_items(k)
  guided = {'no': {}, 'half': {'meta_score': meta}, 'one': {'meta_score': meta, 'k_meta': 1}}[guide]
  expected = loop_accuracy(
      *(x.tolist() for x in (scores, valid, label, response_mask)), k, **guided
  )
  got = metrics.accuracy_at_k(scores, valid, label, response_mask, k, **guided)
  for name in ('accuracy', 'stderr', 'ties', 'items'):
    assert got[name] == pytest.approx(expected[name], rel=1e-6), name
  np.testing.assert_allclose(got['credit'][got['counted']], expected['credit'], rtol=1e-6)
  assert got['blocks'] == 7 // k
  used = valid[got['counted'], : k * (7 // k)]
  assert got['parse_failure'] == pytest.approx(1 - used.mean())
  assert 0 <= got['low'] <= got['accuracy'] <= got['high'] <= 1


def test_accuracy_by_hand():
  # Pool of 5, k = 2: blocks (0, 1) and (2, 3); sample 4 is the remainder, and would be right.
  scores = np.array([[[5, 5], [5, 5], [9, 1], [1, 2], [9, 1]], [[1, 9]] * 5, [[9, 1]] * 5])
  valid = np.ones((3, 5), bool)
  valid[2, :2] = False  # nobody votes in the first block of item 2
  got = metrics.accuracy_at_k(scores, valid, np.array([0, 0, 0]), np.ones((3, 2), bool), 2)
  np.testing.assert_array_equal(got['credit'], [(0.5 + 1) / 2, 0, (0 + 1) / 2])
  assert got['accuracy'] == pytest.approx(1.25 / 3)
  assert got['ties'] == pytest.approx(1 / 5) and got['parse_failure'] == pytest.approx(2 / 12)
  spread = np.std([0.75, 0, 0.5], ddof=1)
  assert got['stderr'] == pytest.approx(spread / math.sqrt(3))


def test_items_to_leave_out():
  scores = np.array([[[9, 1]], [[1, 9]], [[9, 1]]])
  keep = np.array([True, True, False])
  args = scores, np.array([[True], [True], [False]]), np.zeros(3, int), np.ones((3, 2), bool), 1
  judged = metrics.accuracy_at_k(*args, row_mask=keep)
  assert (judged['accuracy'], judged['items'], judged['parse_failure']) == (0.5, 2, 0.0)
  every = metrics.accuracy_at_k(*args)
  assert every['accuracy'] == pytest.approx(1 / 3) and every['items'] == 3
  nothing = metrics.accuracy_at_k(*args, row_mask=np.zeros(3, bool))
  assert (nothing['accuracy'], nothing['low'], nothing['high'], nothing['items']) == (0, 0, 1, 0)


def test_a_soft_guide_weighs_by_the_logit():
  scores = np.array([[[9, 1], [1, 8]]])
  args = scores, np.ones((1, 2), bool), np.array([0]), np.ones((1, 2), bool), 2
  low, high = np.float32([[-3, 3]]), np.float32([[3, -3]])
  assert metrics.accuracy_at_k(*args, meta_score=high, temperature=1)['accuracy'] == 1
  assert metrics.accuracy_at_k(*args, meta_score=low, temperature=1.0)['accuracy'] == 0
  # 9a + b > a + 8b as soon as 8a > 7b: an almost even weighing votes for response 0
  assert metrics.accuracy_at_k(*args, meta_score=low, temperature=1e6)['accuracy'] == 1


def test_impossible_demands_are_refused():
  scores, valid, label, response_mask, meta = random_items(0)
  args = scores, valid, label, response_mask
  for k in (0, 8):
    with pytest.raises(ValueError, match=r'k must be in 1\.\.7'):
      metrics.accuracy_at_k(*args, k)
  for k_meta in (0, 4):
    with pytest.raises(ValueError, match=r'k_meta .* 1\.\.3'):
      metrics.accuracy_at_k(*args, 3, meta_score=meta, k_meta=k_meta)
  with pytest.raises(ValueError, match='meta_score'):
    metrics.accuracy_at_k(*args, 3, k_meta=1)
  with pytest.raises(ValueError, match='hard .* or soft'):
    metrics.accuracy_at_k(*args, 3, meta_score=meta, k_meta=1, temperature=1.0)


def test_the_interval_at_the_edges_and_against_known_values():
  # Wilson, 10 of 10 and 0 of 10: 0.7225 and 0.2775; 8 of 10: 0.4902 to 0.9433
  right = metrics.summary(np.ones(10), np.ones(10, bool), votes=4)
  assert (right['accuracy'], right['stderr'], right['high']) == (1, 0, 1)
  assert right['low'] == pytest.approx(0.7225, abs=5e-5)
  wrong = metrics.summary(np.zeros(10), np.ones(10, bool))
  assert wrong['low'] == 0 and wrong['high'] == pytest.approx(0.2775, abs=5e-5)
  low, high = metrics.wilson(0.8, 10)
  assert (low, high) == (pytest.approx(0.4902, abs=5e-5), pytest.approx(0.9433, abs=5e-5))
  lone = metrics.summary(np.array([0.75]), np.array([True]))
  assert lone['stderr'] == 0 and lone['low'] < 0.2 and lone['high'] > 0.95


def test_the_interval_of_one_vote_an_item_is_the_binomial_one():
  credit = np.array([1.0] * 30 + [0.0] * 20)
  got = metrics.summary(credit, np.ones(50, bool))
  low, high = metrics.wilson(0.6, 49)  # ddof 1 costs one trial
  assert (got['low'], got['high']) == (pytest.approx(low), pytest.approx(high))


@pytest.mark.parametrize('truth', [0.5, 0.9])
def test_the_interval_covers(truth):
  rng = np.random.default_rng(0)
  hits = 0
  for _ in range(1000):
    # Items differ (a beta law) and each gives 4 votes: independent items, dependent votes.
    item = rng.beta(truth * 2, (1 - truth) * 2, 60)
    got = metrics.summary(rng.binomial(4, item) / 4, np.ones(60, bool), votes=4)
    hits += got['low'] <= truth <= got['high']
  assert 0.925 <= hits / 1000 <= 0.98


def test_accuracies_are_written_as_they_are():
  got = metrics.summary(np.float32([1] * 7 + [0] * 3), np.ones(10, bool))
  assert repr(got['accuracy']) == '0.7' and type(got['stderr']) is float


def loop_verdict(scores, present):
  top = max(scores[i] for i in present)
  return frozenset(i for i in present if scores[i] == top)


def test_flips_against_the_loop():
  rng = np.random.default_rng(3)
  scores, valid, _, response_mask, _ = random_items(3, items=30, samples=5)
  order = np.full((30, 5, 4), -1, np.int32)
  for b, j in itertools.product(range(30), range(5)):
    n = response_mask[b].sum()
    order[b, j, :n] = rng.permutation(n)
  rates = {True: [], False: []}
  for b in range(30):
    present = np.nonzero(response_mask[b])[0]
    if len(present) < 2:
      continue
    for differ in (True, False):
      changed = [
          loop_verdict(scores[b, i], present) != loop_verdict(scores[b, j], present)
          for i, j in itertools.combinations(range(5), 2)
          if valid[b, i] and valid[b, j] and (tuple(order[b, i]) != tuple(order[b, j])) is differ
      ]
      if changed:
        rates[differ].append(sum(changed) / len(changed))
  args = scores, valid, response_mask, order
  np.testing.assert_allclose(metrics.order_flip_rate(*args), np.mean(rates[True]), rtol=1e-6)
  np.testing.assert_allclose(
      jax.jit(metrics.resample_flip_rate)(*args), np.mean(rates[False]), rtol=1e-6
  )


def test_flips_by_hand():
  order = np.array([[[0, 1], [1, 0]]])
  rate = lambda first, second, orders=order: float(
      metrics.order_flip_rate(
          np.array([[first, second]]), np.ones((1, 2), bool), np.ones((1, 2), bool), orders
      )
  )
  assert rate([9, 1], [8, 2]) == 0
  assert rate([9, 1], [1, 9]) == 1
  assert rate([9, 1], [5, 5]) == 1
  assert rate([5, 5], [3, 3]) == 0
  assert rate([9, 1], [1, 9], order[:, [0, 0]]) == 0  # one order only: no pair


def test_rates_of_ties_and_failures_by_hand():
  scores = np.array([[[8, 8, 9], [7, 6, 7]], [[3, 3, 3], [1, 1, 1]]])
  valid = np.array([[True, True], [True, False]])
  response_mask = np.array([[1, 1, 0], [1, 0, 0]], bool)
  assert (
      float(metrics.tie_rate(scores, valid, response_mask)) == 0.5
  )  # the single response cannot tie
  assert float(metrics.parse_failure_rate(valid)) == 0.25
  assert float(
      metrics.parse_failure_rate(valid, np.array([[True, True], [False, True]]))
  ) == pytest.approx(1 / 3)
  assert float(metrics.tie_rate(scores, np.zeros((2, 2), bool), response_mask)) == 0


@pytest.mark.parametrize('dtype', [np.int8, np.float32])
def test_the_histogram_counts_what_is_shown(dtype):
  scores, valid, _, response_mask, _ = random_items(4)
  expected = [0] * 11
  for b, j, i in itertools.product(*map(range, scores.shape)):
    if valid[b, j] and response_mask[b, i]:
      expected[scores[b, j, i]] += 1
  if dtype == np.float32:
    scores = np.where(scores == 99, np.float32(NAN), scores)
  np.testing.assert_array_equal(
      metrics.score_histogram(scores.astype(dtype), valid, response_mask), expected
  )


def test_accuracy_by_slot_against_the_loop():
  rng = np.random.default_rng(5)
  _, valid, label, response_mask, _ = random_items(5)
  correct = rng.random(valid.shape) < 0.5
  order = np.full((40, 7, 4), -1, np.int32)
  right, number = [0] * 4, [0] * 4
  for b, j in itertools.product(range(40), range(7)):
    n = int(response_mask[b].sum())
    order[b, j, :n] = rng.permutation(n)
    if n > 1 and 0 <= label[b] < n and valid[b, j]:
      slot = order[b, j].tolist().index(label[b])
      number[slot] += 1
      right[slot] += correct[b, j]
  got, counted = metrics.accuracy_by_slot(correct, order, label, response_mask, sample_mask=valid)
  np.testing.assert_array_equal(counted, number)
  np.testing.assert_allclose(got, np.array(right) / np.array(number), rtol=1e-6)


def loop_auc(score, positive, row_mask):
  pairs = [
      1.0 if p > n else 0.5 if p == n else 0.0
      for p, a, m in zip(score, positive, row_mask) if a and m
      for n, b, l in zip(score, positive, row_mask) if l and not b
  ]  # fmt: skip
  return sum(pairs) / len(pairs)


@pytest.mark.parametrize('seed', range(10))
def test_auc_against_all_pairs(seed):
  rng = np.random.default_rng(seed)
  score = rng.choice([-INF, -2.0, 0.0, 1.0, 1.5, 9.0, INF], 50).astype(np.float32)
  positive, row_mask = rng.random(50) < 0.4, rng.random(50) < 0.8
  dirty = np.where(row_mask, score, rng.choice([NAN, INF, 1e38], 50)).astype(np.float32)
  got = metrics.roc_auc(dirty, positive, row_mask)
  np.testing.assert_allclose(got, loop_auc(score.tolist(), positive, row_mask), rtol=1e-6)


def test_auc_against_scikit_learn():
  sklearn = pytest.importorskip('sklearn.metrics')
  rng = np.random.default_rng(0)
  score, positive = rng.integers(1, 11, 5000), rng.random(5000) < 0.3
  np.testing.assert_allclose(
      metrics.roc_auc(score, positive), sklearn.roc_auc_score(positive, score), rtol=1e-6
  )


def test_auc_by_hand():
  auc = lambda score, positive: float(metrics.roc_auc(np.float32(score), np.array(positive, bool)))
  assert auc([1, 2, 3, 4], [0, 0, 1, 1]) == 1
  assert auc([1, 2, 3, 4], [1, 1, 0, 0]) == 0
  assert auc([5, 5, 5, 5], [0, 1, 0, 1]) == 0.5
  assert auc([1, 2, 2, 3], [0, 1, 0, 1]) == 0.875
  assert math.isnan(auc([1, 2], [1, 1])) and math.isnan(auc([1, 2], [0, 0]))


def test_baselines_by_hand():
  lengths = np.array([[10, 30, 30], [5, 5, 99], [7, 0, 0], [4, 9, 2], [4, 9, 2]])
  response_mask = np.array([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 1]], bool)
  got = metrics.trivial_baselines(lengths, np.array([2, 0, 1, 0, -1]), response_mask)
  expected = {
      'longest': [0.5, 0.5, 0.5, 0, 0],
      'shortest': [0, 0.5, 0.5, 0, 0],
      'first': [0, 1, 0.5, 1, 0],
      'random': [1 / 3, 0.5, 0.5, 1 / 3, 0],
  }
  assert set(got) == set(expected)
  for name, credit in expected.items():
    np.testing.assert_allclose(got[name], credit, rtol=1e-6, err_msg=name)


def test_paired_gains_go_item_by_item():
  # Seen to catch: the standard errors of both added as if unpaired; ddof 0; uncounted items in the mean.
  credit, other = np.array([1.0, 0.5, 1.0, 0.0, 0.0]), np.array([0.5, 0.5, 0.0, 0.25, 1.0])
  counted = np.array([True, True, True, True, False])
  differences = [0.5, 0.0, 1.0, -0.25]
  mean = sum(differences) / 4
  stderr = math.sqrt(sum((d - mean) ** 2 for d in differences) / 3 / 4)
  got = metrics.paired(credit, other, counted)
  assert got['gain'] == pytest.approx(mean) and got['stderr'] == pytest.approx(stderr) and got['items'] == 4
  assert got['low'] == pytest.approx(mean - 1.96 * stderr, abs=1e-4)
  assert got['high'] == pytest.approx(min(1, mean + 1.96 * stderr), abs=1e-4)
  assert metrics.paired(other, credit, counted)['gain'] == -got['gain']


def test_paired_gains_that_are_all_alike_are_not_certain():
  same = np.full(100, 0.5)
  got = metrics.paired(same, same, np.ones(100, bool))
  bound = metrics.wilson(0.0, 100)[1]
  assert (got['gain'], got['stderr']) == (0, 0) and got['high'] == -got['low'] == pytest.approx(bound) and bound < 0.04
  assert metrics.paired(same, same, np.zeros(100, bool)) == {'gain': 0, 'stderr': 0, 'low': -1, 'high': 1, 'items': 0}
  assert metrics.paired(np.ones(2), np.zeros(2), np.ones(2, bool))['high'] == 1
