"""The RFT filter against a loop written from the paper, over every small case.

Mutations seen to fail here: too easy counting hinted samples; hinted samples dropped with an easy
item; an item with hinted samples only called too easy.
"""

import itertools

import jax
import numpy as np
import pytest

from spct_jax.algos import rft


def loop(correct, hinted):
  kept = []
  for right, hint in zip(correct, hinted):
    plain = [r for r, h in zip(right, hint) if not h]
    easy = len(plain) > 0 and sum(plain) == len(plain)
    row = []
    for r, h in zip(right, hint):
      if not r:
        row.append(False)
      elif h:
        row.append(True)
      else:
        row.append(not easy)
    kept.append(row)
  return np.array(kept, bool)


@pytest.mark.parametrize('samples', [1, 2, 3, 4])
def test_every_case(samples):
  cases = list(itertools.product([False, True], repeat=2 * samples))
  correct = np.array([c[:samples] for c in cases])
  hinted = np.array([c[samples:] for c in cases])
  expected = loop(correct.tolist(), hinted.tolist())
  np.testing.assert_array_equal(rft.keep(correct, hinted), expected)
  np.testing.assert_array_equal(jax.jit(rft.keep)(correct=correct, hinted=hinted), expected)


def test_by_hand():
  correct = np.array([[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]], bool)
  hinted = np.array([[0, 0, 0, 1]] * 5, bool)
  keep = np.array([[0, 0, 0, 1], [0, 0, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]], bool)
  np.testing.assert_array_equal(rft.keep(correct, hinted), keep)
  np.testing.assert_array_equal(rft.too_easy(correct, hinted), [True, True, False, False, False])


def test_hinted_samples_alone_are_not_too_easy():
  assert not rft.too_easy(np.ones((1, 2), bool), np.ones((1, 2), bool))[0]


def test_padding_as_documented_keeps_no_item_from_being_too_easy():
  correct, hinted = np.array([[1, 1, 0, 0]], bool), np.array([[0, 0, 1, 1]], bool)
  assert rft.too_easy(correct, hinted)[0] and not rft.keep(correct, hinted).any()
