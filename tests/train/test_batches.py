"""Learner rows: the frame, padding, buckets, and what is refused."""

import numpy as np
import pytest

from spct_jax.train import batches
from spct_jax.types import Trajectory

A, B, C, X, Y, PAD = 11, 12, 13, 21, 22, 9


def _pad(rows, **changes):
  kwargs = {'num_rows': len(rows), 'buckets': (6,), 'pad_id': PAD, 'columns': {}, **changes}
  return batches.pad(rows, **kwargs)


# The example of the module's docstring. Mutation seen: the mask one position later (the token, not its prediction).
def test_six_tokens():
  batch = _pad([batches.Row('one', (A, B, C), (X, Y), (-0.5, -0.25))])
  np.testing.assert_array_equal(batch['tokens'], [[A, B, C, X, Y, PAD]])
  np.testing.assert_array_equal(batch['lengths'], [5])
  np.testing.assert_array_equal(batch['token_mask'], [[0, 0, 1, 1, 0, 0]])
  np.testing.assert_array_equal(batch['sampler_logp'], [[0, 0, -0.5, -0.25, 0, 0]])
  np.testing.assert_array_equal(batch['row_mask'], [True])
  assert {name: array.dtype for name, array in batch.items()} == {
      'tokens': np.int32, 'lengths': np.int32, 'token_mask': bool, 'sampler_logp': np.float32, 'row_mask': bool,
  }


# Mutations seen: `learnt` ignored; `learnt` one position later.
def test_what_is_not_learnt_is_masked_out():
  rows = [
      batches.Row('parts', (A, B), (X, Y, X), learnt=(True, False, True)),
      batches.Row('all', (A,), (X, Y)),
      batches.Row('none of the end', (A,), (X, Y, X, Y), (-1.0, -2.0, -3.0, -4.0), (True, True, False, False)),
  ]
  batch = _pad(rows)
  np.testing.assert_array_equal(batch['token_mask'], [[0, 1, 0, 1, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0]])
  np.testing.assert_array_equal(batch['tokens'][0], [A, B, X, Y, X, PAD])  # read all the same
  np.testing.assert_array_equal(batch['lengths'], [5, 3, 5])
  np.testing.assert_array_equal(batch['sampler_logp'][2], [-1, -2, -3, -4, 0, 0])


def test_full_row_and_empty_completion():
  batch = _pad([batches.Row('full', (A,), (X, Y, X, Y, X)), batches.Row('silent', (A, B), ())])
  np.testing.assert_array_equal(batch['token_mask'], [[1, 1, 1, 1, 1, 0], [0] * 6])
  np.testing.assert_array_equal(batch['lengths'], [6, 2])


# Mutation seen: row_mask True for padding rows.
def test_padding_rows_and_columns():
  row = batches.Row('one', (A,), (X,))
  batch = _pad([row, row], num_rows=4, columns={'advantage': np.array([1.5, -0.5], np.float32)})
  np.testing.assert_array_equal(batch['row_mask'], [1, 1, 0, 0])
  np.testing.assert_array_equal(batch['advantage'], [1.5, -0.5, 0, 0])
  np.testing.assert_array_equal(batch['lengths'], [2, 2, 1, 1])
  assert not batch['token_mask'][2:].any()


def test_trajectory_keeps_the_sampled_tokens():
  trajectory = Trajectory(
      uid='u', sample=2, visit=0, order=(1, 0), hinted=True, prompt_ids=(A, B), token_ids=(X, Y), logp=(-1.0, -2.0),
      text='other text', scores=(1, 2), parse='ok',
  )
  row = batches.from_trajectory(trajectory)
  assert (row.prompt_ids, row.completion_ids, row.logp) == ((A, B), (X, Y), (-1.0, -2.0))
  assert 'u sample 2' in row.name
  unhinted = batches.from_trajectory(trajectory, prompt_ids=[C])
  assert (unhinted.prompt_ids, unhinted.completion_ids, unhinted.logp) == ((C,), (X, Y), None)


def test_buckets():
  assert batches.bucket_lengths(1024, 4) == (128, 256, 512, 1024)
  assert batches.bucket_lengths(100, 3) == (32, 56, 100)
  assert batches.bucket_lengths(6, 3) == (6,)
  assert [batches.bucket(n, (8, 16)) for n in (1, 8, 9, 16)] == [8, 8, 16, 16]
  rows = [batches.Row('short', (A,), (X,)), batches.Row('longer', (A,) * 5, (X,) * 4)]
  assert _pad(rows, buckets=(6, 12))['tokens'].shape == (2, 12)
  assert _pad(rows[:1], buckets=(6, 12))['tokens'].shape == (1, 6)


# Mutation seen: `<` for `<=` in `fitting`, which drops the row that just fits.
def test_over_long_rows_are_set_aside_and_named():
  rows = [batches.Row(f'row {n}', (A,), (X,) * (n - 1)) for n in (5, 6, 7)]
  fitting = batches.fitting(rows, (4, 6))
  assert fitting.keep == (0, 1)
  assert fitting.too_long == ('row 7 (7 tokens > 6)',)
  with pytest.raises(ValueError, match='a row of 7 tokens does not fit the largest bucket, 6'):
    _pad(rows)


@pytest.mark.parametrize(
    'make, said',
    [
        (lambda: batches.Row('r', (), (X,)), 'r: the prompt has no tokens'),
        (lambda: batches.Row('r', (A,), (X, Y), (-1.0,)), 'r: 1 log-probabilities for 2 completion tokens'),
        (lambda: batches.Row('r', (A,), (X, Y), learnt=(True,)), 'r: 1 flags of what is learnt for 2 completion tokens'),
        (lambda: _pad([]), 'got 0; it must hold 1 to 0'),
        (lambda: _pad([batches.Row('r', (A,), (X,))] * 2, num_rows=1), 'got 2; it must hold 1 to 1'),
        (lambda: _pad([batches.Row('r', (A,), (X,))], columns={'advantage': np.zeros(2)}), "column 'advantage'"),
        (lambda: _pad([batches.Row('r', (A,), (X,))], columns={'tokens': np.zeros(1)}), "column 'tokens'"),
        (lambda: batches.bucket_lengths(1, 2), 'longest=1'),
    ],
)
def test_refused(make, said):
  with pytest.raises(ValueError, match=said):
    make()
