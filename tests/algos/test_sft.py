"""The fine-tuning loss: hand-computed, masked garbage, every mask.

Mutation seen to fail here: `logp` times a mask of numbers instead of a selection.
"""

import itertools

import jax
import numpy as np

from spct_jax.algos import sft

NAN, INF = np.float32('nan'), np.float32('inf')


def test_the_example_of_the_docstring():
  logp = np.array([[NAN, -0.5, -0.2, -0.3, NAN, -INF]], np.float32)
  total, count = sft.loss(logp, np.array([[0, 1, 1, 1, 0, 0]], bool))
  np.testing.assert_allclose(float(total), 1.0, rtol=1e-6)
  assert float(count) == 3


def test_splitting_the_batch_changes_nothing():
  rng = np.random.default_rng(0)
  logp, mask = -rng.random((6, 5)).astype(np.float32), rng.random((6, 5)) < 0.5
  whole, parts = sft.loss(logp, mask), [
      sft.loss(logp[i : i + 2], mask[i : i + 2]) for i in (0, 2, 4)
  ]
  np.testing.assert_allclose(float(whole[0]), sum(float(p[0]) for p in parts), rtol=1e-6)
  assert float(whole[1]) == sum(float(p[1]) for p in parts) == mask.sum()


def test_finite_gradients_under_every_mask():
  gradient = jax.jit(jax.grad(lambda logp, mask: sft.loss(logp, mask)[0]))
  for pattern in itertools.product([False, True], repeat=4):
    mask = np.array(pattern).reshape(2, 2)
    for garbage in (NAN, INF, -INF):
      got = np.asarray(gradient(np.where(mask, np.float32(-0.5), garbage), mask))
      np.testing.assert_array_equal(got, np.where(mask, -1.0, 0.0))
