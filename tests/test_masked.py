"""Masked statistics against plain loops, and their gradients under every mask.

Mutations seen to fail here: `_shown` multiplying by a mask of numbers (by one of bools the compiler
makes it a selection again); `var` without the second mask on the centred values; `std` without the
inner `where`; `max` filled with 0 instead of the least value.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spct_jax import masked

NAN, INF = float('nan'), float('inf')


def loop_stats(values, mask, ddof=0):
  shown = [float(v) for v, m in zip(values, mask) if m]
  n = len(shown)
  if not n:
    return dict(count=0, sum=0.0, mean=0.0, var=0.0, std=0.0, max=0.0, min=0.0)
  mean = math.fsum(shown) / n
  var = math.fsum((v - mean) ** 2 for v in shown) / (n - ddof) if n > ddof else 0.0
  return dict(
      count=n,
      sum=math.fsum(shown),
      mean=mean,
      var=var,
      std=var**0.5,
      max=max(shown),
      min=min(shown),
  )


def test_the_example_of_the_docstring():
  x = np.array([3, 1, NAN, 4, 1e30, 5], np.float32)
  mask = np.array([1, 1, 0, 1, 0, 1], bool)
  assert float(masked.mean(x, mask)) == 3.25
  assert (float(masked.max(x, mask)), float(masked.min(x, mask)), float(masked.sum(x, mask))) == (
      5,
      1,
      13,
  )


@pytest.mark.parametrize('axis', [None, 0, -1])
@pytest.mark.parametrize('dtype', [np.float32, np.int8, np.bool_])
def test_against_loops(dtype, axis):
  @jax.jit
  def everything(x, mask):
    names = ('sum', 'mean', 'var', 'std', 'max', 'min')
    found = {name: getattr(masked, name)(x, mask, axis=axis) for name in names}
    return found | {
        'count': masked.count(mask, axis=axis),
        'var1': masked.var(x, mask, axis=axis, ddof=1),
        'std1': masked.std(x, mask, axis=axis, ddof=1),
    }

  rng = np.random.default_rng(0)
  for _ in range(40):
    x = (rng.normal(size=(3, 4)) * 5).astype(dtype)
    mask = rng.random((3, 4)) < rng.choice([0.0, 0.3, 0.7, 1.0], (3, 1))
    clean = x.astype(np.float32)
    if dtype == np.float32:
      x = np.where(mask, x, rng.choice([NAN, INF, -INF, 1e38], size=x.shape)).astype(dtype)
    lines = {None: [(clean.ravel(), mask.ravel())], 0: zip(clean.T, mask.T), -1: zip(clean, mask)}[
        axis
    ]
    expected = [
        loop_stats(v, m) | {f'{n}1': loop_stats(v, m, ddof=1)[n] for n in ('var', 'std')}
        for v, m in lines
    ]
    for name, got in everything(x, mask).items():
      got = np.asarray(got, np.float32).ravel()
      np.testing.assert_allclose(
          got, [e[name] for e in expected], rtol=2e-5, atol=2e-5, err_msg=name
      )


def test_kept_dimensions():
  x, mask = np.ones((2, 3), np.float32), np.array([[1, 1, 0], [0, 0, 0]], bool)
  np.testing.assert_array_equal(masked.mean(x, mask, axis=1, keepdims=True), [[1], [0]])


def test_negative_values_keep_their_maximum():
  assert int(masked.max(np.array([-3, -7, 5], np.int8), np.array([True, True, False]))) == -3
  assert int(masked.min(np.array([3, 7, -5], np.int32), np.array([True, True, False]))) == 3


def test_bfloat16_is_averaged_in_float32():
  x = jnp.ones(1000, jnp.bfloat16)
  assert masked.mean(x, jnp.ones(1000, bool)).dtype == jnp.float32
  assert float(masked.sum(x, jnp.ones(1000, bool))) == 1000.0  # bfloat16 would stop at 256


@pytest.mark.parametrize('name', ['sum', 'mean', 'var', 'std', 'max', 'min'])
@pytest.mark.parametrize('garbage', [NAN, INF, -INF, 3e38])
def test_finite_gradients_under_every_mask(name, garbage):
  statistic = jax.jit(jax.grad(lambda x, mask: getattr(masked, name)(x, mask)))
  for mask in itertools.product([False, True], repeat=4):
    mask = np.array(mask)
    for visible in ([1.0, 2.0, -1.0, 0.5], [2.0] * 4):  # equal values: a deviation of 0
      x = np.where(mask, np.float32(visible), np.float32(garbage))
      gradient = np.asarray(statistic(x, mask))
      assert np.isfinite(gradient).all(), (name, mask, visible)
      assert (gradient[~mask] == 0).all(), (name, mask, visible)


def test_shapes_must_agree():
  with pytest.raises(Exception, match='mask'):
    masked.mean(np.ones((2, 3), np.float32), np.ones((2, 1), bool))
