"""Eq 10 against a loop written from the paper, and cases counted by hand.

Mutations seen to fail here: `>` to `>=`; dropping `valid`; dropping the response mask; using the
index rule for n == 1.
"""

import jax
import numpy as np
import pytest

from spct_jax.algos import outcome


def eq10(scores, valid, label, exists):
  """One sample. `scores` and `exists` per response."""
  if not valid:
    return False
  present = [i for i in range(len(exists)) if exists[i]]
  if len(present) == 1:
    return bool(label >= 0 and scores[present[0]] == label)
  if label not in present:
    return False
  for i in present:
    if i != label and not scores[int(label)] > scores[i]:
      return False
  return True


def loop(scores, valid, label, response_mask):
  items, samples, _ = scores.shape
  out = np.zeros((items, samples), bool)
  for b in range(items):
    for k in range(samples):
      out[b, k] = eq10(scores[b, k].tolist(), valid[b, k], label[b].item(), response_mask[b])
  return out


def one(scores, label, exists=None, valid=True):
  exists = [True] * len(scores) if exists is None else exists
  got = outcome.correct(
      np.array([[scores]]), np.array([[valid]]), np.array([label]), np.array([exists], bool)
  )
  assert got.shape == (1, 1) and got.dtype == bool
  return bool(got[0, 0])


@pytest.mark.parametrize(
    'scores, label, right',
    [
        ([8, 9], 1, True),  # table 16
        ([7, 5], 1, False),  # table 18
        ([8, 8], 0, False),  # a tie with the best is wrong
        ([8, 8], 1, False),
        ([5, 7, 8, 7], 2, True),
        ([8, 7, 8, 1], 2, False),
        ([1, 1, 9, 1], 2, True),  # ties among the losers are free
        ([1], 1, True),  # single response
        ([0], 1, False),
        ([0], 0, True),
        ([7], 7, True),
        ([5, 6], -1, False),  # no label
        ([5, 6], 2, False),  # no such response
        ([0], -1, False),
        ([-128, -127], 1, True),
    ],
)
@pytest.mark.parametrize('dtype', [np.int8, np.int32, np.float32])
def test_by_hand(scores, label, right, dtype):
  assert one(np.array(scores, dtype), label) is right
  assert one(np.array(scores, dtype), label, valid=False) is False


def test_the_least_integer_still_loses():
  assert one(np.array([-127, -128], np.int8), 0) is True
  assert one(np.array([-128, -128], np.int8), 0) is False


def test_absent_responses_do_not_matter_and_cannot_win():
  assert one([5, 7, 99, 99], 1, exists=[1, 1, 0, 0]) is True
  assert one([5, 7, 99, 99], 2, exists=[1, 1, 0, 0]) is False
  assert (
      one([99, 1, 99, 99], 1, exists=[0, 1, 0, 0]) is True
  )  # n == 1 wherever the one response stands
  assert one([5, 7], 0, exists=[0, 0]) is False


def test_nan_scores_never_win():
  nan = float('nan')
  assert one(np.float32([nan, 1]), 0) is False
  assert one(np.float32([nan, 1]), 1) is False
  assert one(np.float32([nan]), 0) is False


@pytest.mark.parametrize('dtype', [np.int8, np.int32, np.float32])
@pytest.mark.parametrize('seed', range(4))
def test_against_the_loop(dtype, seed):
  rng = np.random.default_rng(seed)
  samples, responses = [(3, 4), (1, 2), (5, 1), (2, 5)][seed]
  items = 60
  scores = rng.integers(0, 4, (items, samples, responses)).astype(dtype)  # few values: many ties
  valid = rng.random((items, samples)) < 0.8
  response_mask = rng.random((items, responses)) < 0.7
  label = rng.integers(-1, responses + 1, items)
  if dtype == np.float32:
    scores = np.where(
        response_mask[:, None] & valid[..., None],
        scores,
        rng.choice([np.nan, np.inf, 1e38], scores.shape),
    )
    scores = scores.astype(dtype)
  else:
    scores = np.where(
        response_mask[:, None] & valid[..., None], scores, np.iinfo(dtype).max
    ).astype(dtype)
  expected = loop(scores, valid, label, response_mask)
  got = outcome.correct(scores=scores, valid=valid, label=label, response_mask=response_mask)
  np.testing.assert_array_equal(got, expected)
  jitted = jax.jit(outcome.correct)(scores, valid, label, response_mask)
  np.testing.assert_array_equal(jitted, expected)
  if samples > 1 and responses > 2:
    assert expected.any() and not expected.all()


def test_permuting_the_responses_changes_nothing():
  rng = np.random.default_rng(1)
  scores = rng.integers(1, 6, (50, 3, 4))
  valid, response_mask = np.ones((50, 3), bool), np.ones((50, 4), bool)
  label = rng.integers(0, 4, 50)
  shuffle = rng.permutation(4)
  moved = outcome.correct(scores[:, :, shuffle], valid, np.argsort(shuffle)[label], response_mask)
  np.testing.assert_array_equal(moved, outcome.correct(scores, valid, label, response_mask))


def test_one_device_and_eight_agree():
  rng = np.random.default_rng(2)
  scores, valid = rng.integers(1, 6, (64, 3, 4)), rng.random((64, 3)) < 0.9
  label, response_mask = rng.integers(0, 4, 64), np.ones((64, 4), bool)
  mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
  spread = [jax.device_put(x, rows) for x in (scores, valid, label, response_mask)]
  got = jax.jit(outcome.correct)(*spread)
  assert len(got.sharding.device_set) == 8
  np.testing.assert_array_equal(got, outcome.correct(scores, valid, label, response_mask))


def test_wrong_shapes_are_refused():
  with pytest.raises(Exception, match='valid'):
    outcome.correct(
        np.ones((2, 3, 4), np.int32),
        np.ones((2, 1), bool),
        np.zeros(2, np.int32),
        np.ones((2, 4), bool),
    )
