"""When a vote may stop: the exact rule against all completions, the statistical one against its promise.

Mutations seen to fail here: the margin compared with >=; a spread of high instead of high - low; a tie decided; votes
that nobody cast decided; with n == 1 the others at high alone looked at; one sample too few or too many; samples
beyond the known ones looked at; the test without its union over the responses or over the sides of the threshold, and
bets on a mean of 0 (as if samples came from a stream without an end).
"""

import functools
import itertools

import jax
import numpy as np
import pytest

from spct_jax.algos import early, voting


def outcome(totals, voters, threshold):
  """Who wins, or None where nobody voted; a single response is above, below or on the threshold."""
  if not voters:
    return None
  if len(totals) == 1:
    return np.sign(np.float32(totals[0]) / np.float32(voters) - np.float32(threshold))
  return tuple(i for i, total in enumerate(totals) if total == max(totals))


@functools.cache
def reachable(n, low, high, remaining):
  """Every (number of voters, totals) that `remaining` more votes can add."""
  if not remaining:
    return frozenset({(0, (0,) * n)})
  votes = [(0, (0,) * n)] + [(1, scores) for scores in itertools.product(range(low, high + 1), repeat=n)]
  return frozenset(
      (voted + more, tuple(map(sum, zip(totals, scores))))
      for voted, totals in reachable(n, low, high, remaining - 1) for more, scores in votes
  )


def is_decided(totals, voters, remaining, low, high, threshold):
  outcomes = {
      outcome(tuple(map(sum, zip(totals, more))), voters + voted, threshold)
      for voted, more in reachable(len(totals), low, high, remaining)
  }
  return len(outcomes) == 1


CASES = [  # n, low, high, threshold, voters at most, remaining at most
    (1, 0, 1, 0.5, 4, 4), (1, 1, 10, 5.5, 4, 3), (1, 1, 10, 3.3, 4, 3), (1, 2, 4, 4.0, 3, 3), (1, 3, 3, 3.0, 2, 2),
    (2, 0, 1, 0.5, 4, 4), (2, 1, 10, 5.5, 4, 2), (3, 1, 3, 0.5, 4, 3), (4, 0, 1, 0.5, 4, 3), (2, 4, 4, 0.5, 2, 2),
]


@pytest.mark.parametrize('n, low, high, threshold, most, rest', CASES)
def test_decided_exactly_when_no_completion_changes_the_outcome(n, low, high, threshold, most, rest):
  rng = np.random.default_rng(n * 100 + high)
  rows = []
  for _ in range(40):
    voters = int(rng.integers(0, most + 1))
    # Some items nearly all of one mind, so that both answers come up.
    votes = rng.integers(low, high + 1, (voters, n)) if rng.random() < 0.4 else np.where(
        np.arange(n) == rng.integers(n), high - rng.integers(0, 2) * (high > low), low
    )[None].repeat(voters, axis=0)
    rows.append((tuple(votes.sum(axis=0).tolist()), voters, int(rng.integers(0, rest + 1))))
  want = [is_decided(*row, low, high, threshold) for row in rows]
  totals = np.full((40, n + 1), -np.inf, np.float32)  # one response is absent, as where n is mixed
  totals[:, :n] = [row[0] for row in rows]
  exists = np.arange(n + 1)[None].repeat(40, axis=0) < n
  voters, remaining = (np.array([row[i] for row in rows]) for i in (1, 2))
  got = voting.decided(totals, voters, remaining, exists, low, high, threshold)
  assert isinstance(got, np.ndarray)
  np.testing.assert_array_equal(got, want)
  traced = jax.jit(voting.decided)(totals, voters, remaining, exists, low, high, threshold)
  np.testing.assert_array_equal(traced, want)
  assert 0 < sum(want) < 40


def test_items_of_several_sizes_and_ranges_mix():
  totals = np.array([[10, 1], [10, 1], [2, -np.inf], [3, -np.inf]], np.float32)
  exists = np.array([[1, 1], [1, 1], [1, 0], [1, 0]], bool)
  voters, remaining = np.array([1, 1, 2, 3]), np.array([1, 1, 1, 3])
  got = voting.decided(totals, voters, remaining, exists, np.array([1, 2, 0, 0]), np.array([10, 10, 1, 1]))
  np.testing.assert_array_equal(got, [False, True, True, False])


def needed_by_hand(scores, valid, low, high, threshold):
  K = len(scores)
  for t in range(K + 1):
    seen = [row for row, counts in zip(scores[:t].tolist(), valid[:t]) if counts]
    totals = tuple(map(sum, zip(*seen))) if seen else (0,) * scores.shape[1]
    if is_decided(totals, len(seen), K - t, low, high, threshold):
      return t
  raise AssertionError('the last vote decides')


@pytest.mark.parametrize('n, low, high, threshold', [(1, 0, 1, 0.5), (2, 0, 1, 0.5), (2, 1, 3, 0.5), (1, 1, 4, 2.5)])
def test_a_vote_stops_with_the_first_sample_that_decides_it(n, low, high, threshold):
  rng = np.random.default_rng(n + high)
  B, K = 30, 5
  alike = np.linspace(low, high, n).round()
  scores = np.where(rng.random((B, 1, 1)) < 0.5, rng.integers(low, high + 1, (B, K, n)), alike)
  valid = rng.random((B, K)) < 0.8
  exists, everything = np.ones((B, n), bool), np.full(B, K)
  want = [needed_by_hand(s, v, low, high, threshold) for s, v in zip(scores.astype(int), valid)]
  got = early.votes_needed(scores, valid, everything, exists, low, high, threshold)
  np.testing.assert_array_equal(got, want)
  assert len(set(want)) > 1
  # What is known in part says the same as soon as it is enough, and K until then; what lies beyond it is not read.
  known = rng.integers(0, K + 1, B)
  hidden = np.where(np.arange(K)[None, :, None] < known[:, None, None], scores, 99)
  partly_valid = np.where(np.arange(K) < known[:, None], valid, True)
  partly = early.votes_needed(hidden, partly_valid, known, exists, low, high, threshold)
  np.testing.assert_array_equal(partly, np.where(got <= known, got, K))


def judges(seed, B, K, n, kind):
  """Exchangeable votes of 1..10: `kind` says how much of them says the same."""
  rng = np.random.default_rng(seed)
  if kind == 'noise':
    scores = rng.integers(1, 11, (B, K, n))
  elif kind == 'even':  # +9 or -9 with equal chance: the full vote is a coin flip
    first = rng.random((B, K, 1)) < 0.5
    scores = np.where(np.arange(n) == 0, np.where(first, 10, 1), np.where(first, 1, 10))
  elif kind == 'rare':  # one wide vote in six against many narrow ones: the sum is at 0 on average
    wide = rng.random((B, K, 1)) < 1 / 6
    scores = np.where(np.arange(n) == 0, np.where(wide, 1, 6), np.where(wide, 6, 5))
  else:
    quality = rng.normal(0, 0.5, (B, 1, n))
    scores = np.clip(np.round(5.5 + quality + rng.normal(0, 2.5, (B, K, n))), 1, 10)
  return scores.astype(int), rng.random((B, K)) < 0.95


def capital(margins, floor):
  """The mean of the bettors' capitals after each vote, from the equations, in float64."""
  K, shares = len(margins), (0.1, 0.3, 0.5, 0.7, 0.9)
  held, out = [1.0] * 5, [1.0]
  for k, d in enumerate(margins):
    m = -sum(margins[:k]) / (K - k)
    if m + floor < 0 or (m + floor == 0 and d > m):
      return out + [np.inf] * (K - k)
    if m + floor > 0:
      held = [C * (1 + c * (d - m) / (m + floor)) for C, c in zip(held, shares)]
    out.append(np.mean(held))
  return out


@pytest.mark.parametrize('n, kind', [(1, 'near'), (2, 'near'), (3, 'near'), (3, 'rare'), (2, 'even')])
def test_the_test_names_who_leads_with_the_capital_that_is_needed(n, kind):
  alpha, threshold, B, K = 0.2, 5.5, 12, 14
  scores, valid = judges(n + 20, B, K, n, kind)
  scores = np.clip(scores + 2 * (np.arange(n) == 0), 1, 10)
  got = early.surely(scores, valid, np.ones((B, n), bool), 1, 10, threshold, alpha)
  for b in range(B):
    voted = np.where(valid[b][:, None], scores[b], 0)
    if n == 1:
      over = np.where(valid[b], scores[b, :, 0] - threshold, 0)
      pairs = {0: [(over, 4.5)], 1: [(-over, 4.5)]}
    else:
      pairs = {i: [(voted[:, i] - voted[:, j], 9) for j in range(n) if j != i] for i in range(n)}
    want = np.zeros(K + 1, bool)
    for rivals in pairs.values():
      held = [np.array(capital(margins.tolist(), floor)) >= max(n, 2) / alpha for margins, floor in rivals]
      ahead = [np.concatenate([[0], np.cumsum(margins)]) > 0 for margins, _ in rivals]
      want |= np.all(held + ahead, axis=0)
    np.testing.assert_array_equal(got[b], want)
  assert 0 < got.sum() < got.size


# The share found is far below alpha: most items are easier than the hardest that the promise covers.
@pytest.mark.parametrize('n', [1, 2, 4])
@pytest.mark.parametrize('kind', ['noise', 'even', 'rare', 'near'])
def test_the_share_of_changed_winners_stays_below_alpha(n, kind):
  B, K, alpha, threshold = 3000, 16, 0.1, 5.5
  scores, valid = judges(n, B, K, n, kind)
  exists = np.ones((B, n), bool)
  needed = early.votes_needed(scores, valid, np.full(B, K), exists, 1, 10, threshold, alpha)
  def says(number):
    weights = valid & (np.arange(K) < number[:, None])
    totals, voters = np.asarray(voting.vote(scores, weights, exists)), weights.sum(axis=1)
    if n == 1:
      return np.sign(totals[:, 0] - threshold * voters)
    tops = totals == totals.max(axis=1, keepdims=True)
    return np.where(tops.sum(axis=1) == 1, tops.argmax(axis=1), -1)
  changed = (says(needed) != says(np.full(B, K))).mean()
  exact = early.votes_needed(scores, valid, np.full(B, K), exists, 1, 10, threshold)
  assert changed < alpha and (needed <= exact).all()
  assert (says(exact) == says(np.full(B, K))).all()


def test_the_statistical_rule_saves_more_and_the_traced_one_says_the_same():
  scores, valid = judges(7, 200, 32, 3, 'near')
  exists, known = np.ones((200, 3), bool), np.full(200, 32)
  exact = early.votes_needed(scores, valid, known, exists, 1, 10)
  wide = np.clip(scores + np.array([3, 0, 0]), 1, 10)
  loose = early.votes_needed(wide, valid, known, exists, 1, 10, 0.5, 0.05)
  assert loose.mean() < 0.8 * early.votes_needed(wide, valid, known, exists, 1, 10).mean()
  run = jax.jit(early.votes_needed, static_argnames=('threshold', 'alpha'))
  np.testing.assert_array_equal(run(scores, valid, known, exists, 1, 10), exact)
  same = np.asarray(run(wide, valid, known, exists, 1, 10, 0.5, 0.05)) == loose
  assert same.mean() > 0.99  # float32 of two libraries on the edge


@pytest.mark.parametrize('alpha', [0.0, 1.0, -1.0, float('nan')])
def test_a_chance_outside_0_to_1_is_refused(alpha):
  with pytest.raises(ValueError, match='alpha'):
    both = np.ones((1, 2), bool)
    early.votes_needed(np.ones((1, 2, 2)), both, np.ones(1, int), both, 0, 1, 0.5, alpha)
