"""The meta-RM's loss and its choice of voters, against loops and every small pattern.

Mutations seen to fail here: ties to the later sample; invalid samples taking a place; NaN left in
the ranking; `softplus` of the wrong sign; soft weights without the common factor.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spct_jax.algos import meta_rm

NAN, INF = float('nan'), float('inf')


def chosen(meta_score, valid, k_meta):
  """One item: take the best remaining sample, the earlier one among equals, k_meta times."""
  left = [j for j in range(len(valid)) if valid[j]]
  score = [-INF if math.isnan(s) else s for s in meta_score]
  votes = [False] * len(valid)
  for _ in range(k_meta):
    if not left:
      break
    best = left[0]
    for j in left:
      if score[j] > score[best]:
        best = j
    votes[best] = True
    left.remove(best)
  return votes


def loop(meta_score, valid, k_meta):
  return np.array([chosen(s, v, k_meta) for s, v in zip(meta_score.tolist(), valid.tolist())])


def one(meta_score, valid, k_meta):
  got = meta_rm.top_k(np.float32([meta_score]), np.array([valid], bool), k_meta)
  return [j for j, votes in enumerate(np.asarray(got)[0]) if votes]


def test_the_example_of_the_docstring():
  score, valid = [0.3, 1.7, NAN, 1.7, 0.3], [1, 1, 1, 0, 1]
  assert one(score, valid, 1) == [1]
  assert one(score, valid, 2) == [0, 1]
  assert one(score, valid, 3) == [0, 1, 4]
  assert one(score, valid, 4) == one(score, valid, 5) == [0, 1, 2, 4]


def test_by_hand():
  assert one([-15.78, 1.31, 1.67], [1, 1, 1], 2) == [1, 2]  # the paper's logits
  assert one([1, 1, 1, 1], [1, 1, 1, 1], 2) == [0, 1]
  assert one([5, 4, 3, 2], [0, 0, 0, 1], 2) == [3]
  assert one([5, 4], [0, 0], 2) == []
  assert one([NAN, NAN, -1e30], [1, 1, 1], 1) == [2]
  assert one([NAN, -INF, NAN], [1, 1, 1], 2) == [0, 1]
  assert one([INF, 1e30, INF], [1, 1, 1], 2) == [0, 2]


@pytest.mark.parametrize('samples', [1, 4, 40])  # 40: more than one unrolled stretch
def test_against_the_loop(samples):
  rng = np.random.default_rng(samples)
  choices = np.float32([NAN, -INF, -1.5, 0.0, 0.5, 2.0, INF])
  score = rng.choice(choices, (120, samples))
  valid = rng.random((120, samples)) < rng.random((120, 1))
  traced = jax.jit(meta_rm.top_k)
  for k_meta in sorted({1, max(1, samples // 2), samples}):
    expected = loop(score, valid, k_meta)
    np.testing.assert_array_equal(
        meta_rm.top_k(meta_score=score, valid=valid, k_meta=k_meta), expected
    )
    np.testing.assert_array_equal(traced(score, valid, jnp.int32(k_meta)), expected)
    integers = rng.integers(-2, 3, score.shape)
    np.testing.assert_array_equal(
        meta_rm.top_k(integers, valid, np.int64(k_meta)),
        loop(integers.astype(float), valid, k_meta),
    )


@pytest.mark.parametrize('k_meta', [0, -1, 4, 99])
def test_an_impossible_k_meta_is_refused(k_meta):
  score, valid = np.zeros((1, 3), np.float32), np.ones((1, 3), bool)
  with pytest.raises(ValueError, match=r'k_meta is .*1\.\.3'):
    meta_rm.top_k(score, valid, k_meta)
  with pytest.raises(ValueError, match=r'1\.\.3'):
    meta_rm.top_k(score, valid, jnp.int32(k_meta))


def test_half():
  assert [meta_rm.half(k) for k in (1, 2, 3, 8, 9, 32)] == [1, 1, 1, 4, 4, 16]


def test_the_loss_is_binary_cross_entropy():
  rng = np.random.default_rng(0)
  logit = (rng.normal(size=200) * 8).astype(np.float32)
  target, row_mask = rng.random(200) < 0.5, rng.random(200) < 0.7
  expected = 0.0
  for x, t, m in zip(logit.tolist(), target, row_mask):
    if m:
      p = 1 / (1 + math.exp(-x))
      expected -= math.log(p) if t else math.log1p(-p) if p < 0.5 else -x - math.log1p(math.exp(-x))
  dirty = np.where(row_mask, logit, np.float32(NAN))
  total, count = meta_rm.loss(dirty, target, row_mask)
  np.testing.assert_allclose(float(total), expected, rtol=1e-5)
  assert float(count) == row_mask.sum()


def test_the_loss_of_extreme_logits_by_hand():
  one_row = lambda x, t: float(meta_rm.loss(np.float32([x]), np.array([t]), np.array([True]))[0])
  assert one_row(0.0, True) == pytest.approx(math.log(2))
  assert one_row(1000.0, True) == 0.0
  assert one_row(1000.0, False) == 1000.0
  assert one_row(-1000.0, True) == 1000.0


@pytest.mark.parametrize('garbage', [NAN, INF, -INF, 3e38])
def test_finite_gradients_under_every_mask(garbage):
  gradient = jax.jit(jax.grad(lambda x, t, m: meta_rm.loss(x, t, m)[0]))
  logit, target = np.float32([0.0, 300.0, -300.0, 1.0]), np.array([True, False, True, False])
  for pattern in itertools.product([False, True], repeat=4):
    mask = np.array(pattern)
    got = np.asarray(gradient(np.where(mask, logit, np.float32(garbage)), target, mask))
    expected = np.where(mask, 1 / (1 + np.exp(-logit.astype(np.float64))) - target, 0)
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_soft_weights_are_sigmoids_up_to_a_factor():
  rng = np.random.default_rng(1)
  score = (rng.normal(size=(30, 6)) * 4).astype(np.float32)
  valid = rng.random((30, 6)) < 0.7
  valid[0] = False
  for temperature in (0.5, 1, 3.0):
    got = np.asarray(meta_rm.soft_weights(score, valid, temperature))
    for row, scores, parsed in zip(got, score.tolist(), valid.tolist()):
      sigmoid = [1 / (1 + math.exp(-s / temperature)) if v else 0.0 for s, v in zip(scores, parsed)]
      top = max(sigmoid) or 1.0
      np.testing.assert_allclose(row, [s / top for s in sigmoid], rtol=2e-5, atol=1e-30)


def test_soft_weights_of_hopeless_and_broken_logits():
  weights = lambda score, valid: np.asarray(
      meta_rm.soft_weights(np.float32([score]), np.array([valid], bool), 1.0)
  )[0].tolist()
  np.testing.assert_allclose(
      weights([-1000, -1001, -2000], [1, 1, 1]), [1, math.exp(-1), 0], rtol=1e-5
  )
  assert weights([NAN, 0.0, 5.0], [1, 1, 0]) == [0, 1, 0]
  assert weights([NAN, -INF, 5.0], [1, 1, 0]) == [1, 1, 0]
  assert weights([INF, NAN], [1, 1]) == [1, 0]
  assert weights([NAN, NAN], [0, 0]) == [0, 0]


@pytest.mark.parametrize('temperature', [0, -1.0, float('nan')])
def test_an_impossible_temperature_is_refused(temperature):
  with pytest.raises(ValueError, match='above 0'):
    meta_rm.soft_weights(np.zeros((1, 2), np.float32), np.ones((1, 2), bool), temperature)
