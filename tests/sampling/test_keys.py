"""A task's random numbers are named by what is sampled and by nothing else."""

import jax
import numpy as np
import pytest
import scipy.stats

from spct_jax.sampling import keys

UID = np.array([[7, 9], [7, 9], [8, 9], [7, 10]], np.uint32)


def numbers(seed=0, stage='sample', uid=UID, visit=(0, 0, 0, 0), sample=(0, 1, 0, 0), t=(0, 0, 0, 0)):
  key = keys.task_keys(seed, stage, uid, np.asarray(visit, np.int32), np.asarray(sample, np.int32))
  return np.asarray(keys.uniform(key, np.asarray(t, np.int32)))


# Seen to fail when `sample`, `visit` or either half of the uid is left out of `fold_tasks`.
def test_every_part_of_the_name_matters():
  base = numbers()
  assert len(set(base.tolist())) == 4
  for other in (
      numbers(seed=1), numbers(stage='grpo'), numbers(visit=(1, 1, 1, 1)), numbers(t=(1, 1, 1, 1)),
      numbers(sample=(2, 3, 2, 2)), numbers(uid=UID[:, ::-1]),
  ):
    assert not np.intersect1d(base, other).size


def test_a_number_does_not_depend_on_its_neighbours():
  whole = numbers()
  for i in range(4):
    one = numbers(uid=UID[i:i + 1], visit=(0,), sample=((0, 1, 0, 0)[i],), t=(0,))
    assert one[0] == whole[i]


def test_large_hashes_are_not_truncated_to_signed():
  uid = np.array([[2**32 - 1, 2**31], [2**31 - 1, 2**31]], np.uint32)
  values = numbers(uid=uid, visit=(0, 0), sample=(0, 0), t=(0, 0))
  assert values[0] != values[1]


def test_numbers_are_uniform():
  n = 20000
  uid = np.stack([np.arange(n) // 100, np.zeros(n)], axis=1).astype(np.uint32)
  key = keys.task_keys(0, 'sample', uid, np.zeros(n, np.int32), np.arange(n, dtype=np.int32) % 10)
  values = np.asarray(keys.uniform(key, np.arange(n, dtype=np.int32) % 100 // 10))
  assert values.min() >= 0 and values.max() < 1
  assert scipy.stats.kstest(values, 'uniform').pvalue > 1e-4
  assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.03


def test_the_process_wide_generator_is_ignored():
  before = numbers()
  with jax.default_prng_impl('rbg'):
    np.testing.assert_array_equal(numbers(), before)


@pytest.mark.parametrize('seed', [-1, 2**32])
def test_bad_seed(seed):
  with pytest.raises(ValueError, match='seed'):
    keys.root_key(seed, 'sample')
