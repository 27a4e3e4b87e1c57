"""Eq 14, the credit of a vote and the drawn winner, against loops in exact arithmetic.

Mutations seen to fail here: mean for sum; the response mask dropped; scores counted where the
weight is 0; a tie credited whole; a tie without the gold credited; the n == 1 threshold at >=;
`voted` ignored; the draw taking the first of the tied.
"""

import fractions

import jax
import numpy as np
import pytest

from spct_jax.algos import meta_rm, outcome, voting

NAN, INF = float('nan'), float('inf')


def loop_vote(scores, weights, response_mask):
  totals = []
  for item in range(len(scores)):
    row = []
    for i in range(len(response_mask[item])):
      total = fractions.Fraction(0)
      for j in range(len(weights[item])):
        if response_mask[item][i] and weights[item][j] > 0:
          total += fractions.Fraction(weights[item][j]) * fractions.Fraction(scores[item][j][i])
      row.append(float(total) if response_mask[item][i] else -INF)
    totals.append(row)
  return totals


def loop_credit(totals, label, response_mask, voted, weight_sum):
  earned = []
  for row, gold, exists, vote, weight in zip(totals, label, response_mask, voted, weight_sum):
    present = [i for i in range(len(row)) if exists[i]]
    if not vote or not present:
      earned.append(0.0)
    elif len(present) == 1:
      mean = row[present[0]] / weight
      says = 1.0 if mean > 0.5 else 0.5 if mean == 0.5 else 0.0
      earned.append(says if gold == 1 else 1 - says if gold == 0 else 0.0)
    else:
      best = max(row[i] for i in present)
      winners = [i for i in present if row[i] == best]
      earned.append(1 / len(winners) if gold in winners else 0.0)
  return earned


def random_items(seed, items=80, samples=5, responses=4, dtype=np.int8):
  rng = np.random.default_rng(seed)
  response_mask = np.arange(responses)[None] < rng.integers(1, responses + 1, (items, 1))
  single = response_mask.sum(1) == 1
  scores = rng.integers(1, 4, (items, samples, responses))
  scores[single] = rng.integers(0, 2, (single.sum(), samples, responses))
  valid = rng.random((items, samples)) < 0.6
  valid[0] = False
  label = rng.integers(-1, responses, items)
  garbage = np.array([NAN, INF, 1e38]) if np.issubdtype(dtype, np.floating) else np.array([99, -77])
  hidden = ~(response_mask[:, None] & valid[..., None])
  return (
      np.where(hidden, rng.choice(garbage, scores.shape), scores).astype(dtype),
      valid,
      label,
      response_mask,
  )


@pytest.mark.parametrize('dtype', [np.int8, np.int32, np.float32])
@pytest.mark.parametrize('seed', range(3))
def test_vote_and_credit_against_the_loop(seed, dtype):
  scores, valid, label, response_mask = random_items(seed, dtype=dtype)
  clean = np.where(response_mask[:, None] & valid[..., None], scores, 0).astype(float)
  expected = loop_vote(clean.tolist(), valid.tolist(), response_mask.tolist())
  totals = voting.vote(scores=scores, weights=valid, response_mask=response_mask)
  assert totals.dtype == np.float32
  np.testing.assert_array_equal(totals, expected)
  np.testing.assert_array_equal(jax.jit(voting.vote)(scores, valid, response_mask), expected)
  voted, weight_sum = valid.any(1), valid.sum(1)
  got = voting.credit(totals, label, response_mask, voted, weight_sum)
  earned = loop_credit(
      expected, label.tolist(), response_mask.tolist(), voted.tolist(), weight_sum.tolist()
  )
  np.testing.assert_allclose(got, earned, rtol=1e-6)
  assert {0.0, 0.5, 1.0} <= set(np.asarray(got).tolist())


def test_many_samples_add_up_exactly():
  rng = np.random.default_rng(9)
  scores = rng.integers(-128, 128, (7, 77, 3)).astype(np.int8)  # 77: past one unrolled stretch
  valid, response_mask = rng.random((7, 77)) < 0.9, np.ones((7, 3), bool)
  expected = (scores.astype(int) * valid[..., None]).sum(1)
  np.testing.assert_array_equal(voting.vote(scores, valid, response_mask), expected)


def test_weights_that_are_not_above_zero_do_not_vote():
  scores = np.float32([[[1, 2], [NAN, INF], [NAN, 5], [3, 1]]])
  weights = np.float32([[0.5, 0.0, NAN, 2.0]])
  np.testing.assert_allclose(voting.vote(scores, weights, np.ones((1, 2), bool)), [[6.5, 3.0]])
  np.testing.assert_array_equal(voting.voting_weights(np.float32([[-1, NAN, 2]])), [[0, 0, 2]])


def test_without_any_vote_all_present_are_zero():
  got = voting.vote(
      np.full((1, 2, 3), NAN, np.float32), np.zeros((1, 2), bool), np.array([[1, 1, 0]], bool)
  )
  np.testing.assert_array_equal(got, [[0, 0, -INF]])
  none = np.array([False])
  assert voting.credit(got, np.array([0]), np.array([[1, 1, 0]], bool), none, np.array([0]))[0] == 0
  assert not voting.tied(got, np.array([[1, 1, 0]], bool), none, np.array([0]))[0]


def credit_of(totals, label, exists=None, weight_sum=1):
  exists = [True] * len(totals) if exists is None else exists
  args = np.float32([totals]), np.array([exists], bool), np.array([True]), np.array([weight_sum])
  earned = voting.credit(args[0], np.array([label]), *args[1:])
  return float(earned[0]), bool(voting.tied(*args)[0])


def test_credit_by_hand():
  assert credit_of([17, 25], 1) == (1, False)
  assert credit_of([17, 25], 0) == (0, False)
  assert credit_of([8, 8], 0) == (0.5, True)  # the paper's tie at evaluation
  assert credit_of([8, 8, 3], 2) == (0, True)
  assert credit_of([4, 4, 4, 4], 3) == (0.25, True)
  assert credit_of([4, 4, 9], 0, exists=[1, 1, 0]) == (0.5, True)
  assert credit_of([1, 2], -1) == (0, False)
  assert credit_of([2, 0], 1, exists=[1, 0], weight_sum=4) == (0.5, True)  # n == 1, mean 0.5
  assert credit_of([3, 0], 1, exists=[1, 0], weight_sum=4) == (1, False)
  assert credit_of([3, 0], 0, exists=[1, 0], weight_sum=4) == (0, False)
  assert credit_of([1, 0], 0, exists=[1, 0], weight_sum=4) == (1, False)
  assert credit_of([3, 0], 7, exists=[1, 0], weight_sum=4) == (0, False)  # a vote says 0 or 1


def test_the_winner_is_drawn_evenly_among_the_tied():
  uniform = (np.arange(12000, dtype=np.float32) + 0.5) / 12000
  totals = np.tile(np.float32([[7, 9, 9, 3, 9]]), (12000, 1))
  got = np.asarray(voting.winner(totals, np.ones(totals.shape, bool), uniform))
  np.testing.assert_array_equal(np.bincount(got, minlength=5), [0, 4000, 4000, 0, 4000])


def test_the_winner_by_hand():
  totals = np.float32([[1, 2, 9], [5, 5, 1], [5, 5, 1], [5, 5, 1], [1, 1, 1]])
  exists = np.array([[1, 1, 0], [1, 1, 1], [1, 1, 1], [1, 1, 1], [0, 0, 0]], bool)
  got = voting.winner(totals, exists, np.float32([0.3, 0.49, 0.5, 1.0, 0.2]))
  np.testing.assert_array_equal(got, [1, 0, 1, 1, -1])


def test_the_mean_credit_of_winners_is_the_credit():
  scores, valid, label, response_mask = random_items(5, items=20)
  totals = voting.vote(scores, valid, response_mask)
  rows = (response_mask.sum(1) > 1) & valid.any(1)
  expected = np.asarray(voting.credit(totals, label, response_mask, valid.any(1), valid.sum(1)))
  draws = [
      np.asarray(voting.winner(totals, response_mask, np.full(20, (u + 0.5) / 12, np.float32)))
      == label
      for u in range(12)
  ]
  np.testing.assert_allclose(np.mean(draws, axis=0)[rows], expected[rows], atol=1e-6)


def test_permuting_the_responses_permutes_the_totals():
  scores, valid, _, response_mask = random_items(6)
  shuffle = np.random.default_rng(0).permutation(4)
  moved = voting.vote(scores[:, :, shuffle], valid, response_mask[:, shuffle])
  np.testing.assert_array_equal(
      moved, np.asarray(voting.vote(scores, valid, response_mask))[:, shuffle]
  )


# The vectors of section 2.9 of our notes on the paper.


def test_paper_figure_3():
  scores = np.array([[[1, 5], [5, 6], [4, 8], [7, 6]]])
  every, both = np.ones((1, 4), bool), np.ones((1, 2), bool)
  np.testing.assert_array_equal(voting.vote(scores, every, both), [[17, 25]])
  meta = meta_rm.top_k(np.float32([[2.0, -1.0, 3.0, 0.0]]), every, meta_rm.half(4))
  np.testing.assert_array_equal(meta, [[True, False, True, False]])
  np.testing.assert_array_equal(voting.vote(scores, meta, both), [[5, 13]])


def test_paper_table_17():
  shown = [(8, 8), (9, 5), (10, 7)]
  orders = [(0, 1), (1, 0), (1, 0)]
  scores = np.zeros((1, 3, 2), np.int32)
  for j, (values, order) in enumerate(zip(shown, orders)):
    for slot, response in enumerate(order):
      scores[0, j, response] = values[slot]
  np.testing.assert_array_equal(
      voting.vote(scores, np.ones((1, 3), bool), np.ones((1, 2), bool)), [[20, 27]]
  )


def test_paper_tie_is_wrong_in_training_and_half_in_evaluation():
  scores, valid, both = np.array([[[8, 8]]]), np.ones((1, 1), bool), np.ones((1, 2), bool)
  assert not outcome.correct(scores, valid, np.array([0]), both)[0, 0]
  totals = voting.vote(scores, valid, both)
  assert voting.credit(totals, np.array([0]), both, np.array([True]), np.array([1]))[0] == 0.5
