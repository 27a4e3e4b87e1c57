"""Masked statistics against plain loops, and their gradients under every mask.

Mutations seen to fail here: `_shown` multiplying by the mask instead of selecting; `var` without the second mask
on the centred values; `std` without the inner `where`; `max` filled with 0 instead of the least value.
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
  return dict(count=n, sum=math.fsum(shown), mean=mean, var=var, std=var**0.5, max=max(shown), min=min(shown))


def test_the_example_of_the_docstring():
  x = np.array([3, 1, NAN, 4, 1e30, 5], np.float32)
  mask = np.array([1, 1, 0, 1, 0, 1], bool)
  assert float(masked.mean(x, mask)) == 3.25
  assert (float(masked.max(x, mask)), float(masked.min(x, mask)), float(masked.sum(x, mask))) == (5, 1, 13)


@pytest.mark.parametrize('dtype', [np.float32, np.int32, np.int8, np.bool_])
@pytest.mark.parametrize('ddof', [0, 1])
def test_against_loops(dtype, ddof):
  rng = np.random.default_rng(0)
  for _ in range(30):
    rows, length = rng.integers(1, 5), rng.integers(1, 7)
    x = (rng.normal(size=(rows, length)) * 5).astype(dtype)
    mask = rng.random((rows, length)) < rng.random()
    hidden = x.astype(np.float32)
    if dtype == np.float32:
      x = np.where(mask, x, rng.choice([NAN, INF, -INF, 1e38], size=x.shape)).astype(dtype)
    for axis in (None, 0, 1, -1):
      lines = {None: [(hidden.ravel(), mask.ravel())], 0: zip(hidden.T, mask.T)}.get(axis, zip(hidden, mask))
      expected = [loop_stats(v, m, ddof) for v, m in lines]
      for name in ('count', 'sum', 'mean', 'var', 'std', 'max', 'min'):
        args = (mask,) if name == 'count' else (x, mask)
        more = {'ddof': ddof} if name in ('var', 'std') else {}
        got = np.asarray(getattr(masked, name)(*args, axis=axis, **more), np.float32).ravel()
        np.testing.assert_allclose(got, [e[name] for e in expected], rtol=2e-5, atol=2e-5, err_msg=name)


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
