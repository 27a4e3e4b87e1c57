"""The order of the data: epochs are permutations, and cutting it into batches changes nothing."""

import numpy as np
import pytest

from spct_jax.data import stream


def sequence(seed, batch_size, size, length):
  parts = [stream.indices(seed, step, batch_size, size) for step in range(-(-length // batch_size))]
  row, visit = (np.concatenate(column)[:length] for column in zip(*parts, strict=True))
  return row, visit


# Mutations seen to fail: a permutation that ignores the epoch; one visit for a whole batch.
@pytest.mark.parametrize('size', [1, 2, 7, 30])
def test_every_epoch_is_a_permutation(size):
  row, visit = sequence(3, 4, size, 5 * size)
  assert row.dtype == np.int64 and visit.dtype == np.int32
  epochs = row.reshape(5, size)
  assert (np.sort(epochs, axis=1) == np.arange(size)).all()
  assert (visit.reshape(5, size) == np.arange(5)[:, None]).all()
  if size == 30:
    assert len({tuple(epoch) for epoch in epochs}) == 5


# Mutation seen to fail: epochs that begin anew with each batch (position = i in place of step *
# batch + i).
@pytest.mark.parametrize('batch_size', [1, 2, 3, 5, 8, 64])
def test_the_sequence_does_not_depend_on_the_batch_size(batch_size):
  for size in (1, 4, 13):
    for column, expected in zip(
      sequence(5, batch_size, size, 60), sequence(5, 7, size, 60), strict=True
    ):
      np.testing.assert_array_equal(column, expected)


# Mutation seen to fail: a permutation that ignores the seed.
def test_resumed_is_uninterrupted_and_seeds_differ():
  before = [stream.indices(1, step, 6, 20)[0].tolist() for step in range(10)]
  stream._permutation.cache_clear()
  assert [stream.indices(1, step, 6, 20)[0].tolist() for step in range(9, -1, -1)] == before[::-1]
  assert sequence(1, 5, 20, 20)[0].tolist() != sequence(2, 5, 20, 20)[0].tolist()
  # The order is part of the meaning of a checkpoint: it may never change between versions.
  assert stream.indices(0, 0, 8, 8)[0].tolist() == [0, 2, 1, 5, 4, 3, 6, 7]


def test_visits_are_those_of_indices():
  for step in range(8):
    np.testing.assert_array_equal(stream.visits(step, 5, 7), stream.indices(0, step, 5, 7)[1])


def of_epoch(seed, batch_size, groups, epoch):
  count = len(groups) // batch_size
  drawn = [stream.grouped(seed, step, batch_size, groups) for step in range(epoch * count, (epoch + 1) * count)]
  assert all(row.dtype == np.int64 and (visit == epoch).all() and visit.dtype == np.int32 for row, visit in drawn)
  return np.stack([row for row, _ in drawn])


# Mutations seen to fail: the rows of an epoch cut without their groups; one order of the batches for all
# epochs; the rows that wait taken from what the groups leave over.
@pytest.mark.parametrize('sizes', [(16, 40, 8), (13, 29, 7), (3, 3, 3), (50,), (1, 60)])
def test_grouped_batches_are_of_one_group_and_no_row_waits_for_ever(sizes):
  groups = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
  batch_size, epochs = 8, [of_epoch(5, 8, groups, epoch) for epoch in range(60)]
  for rows in epochs:
    assert len(np.unique(rows)) == rows.size > len(groups) - batch_size
    assert len(rows) - sum(len(set(groups[row])) == 1 for row in rows) < len(sizes)  # mixed batches
  seen = np.bincount(np.concatenate([rows.ravel() for rows in epochs]), minlength=len(groups))
  share = epochs[0].size / len(groups)
  assert abs(seen - 60 * share).max() < 4.5 * np.sqrt(60 * share * (1 - share)) + 1e-9
  if len(epochs[0]) > 4 and len(sizes) > 1 and min(sizes) > 1:
    assert len({tuple(groups[row[0]] for row in rows) for rows in epochs}) > 1
  assert len({tuple(rows.ravel()) for rows in epochs}) > 30


def test_fewer_rows_than_a_batch_are_not_grouped():
  for step in range(5):
    for ours, plain in zip(stream.grouped(2, step, 8, np.array([0, 1, 0])), stream.indices(2, step, 8, 3)):
      np.testing.assert_array_equal(ours, plain)


# The order is part of the meaning of a checkpoint: it may never change between versions.
def test_the_grouped_order_stays_what_it_is():
  groups = np.array([0, 1] * 6)
  assert [stream.grouped(0, step, 4, groups)[0].tolist() for step in range(3)] == [[10, 6, 3, 7], [0, 2, 8, 4], [11, 9, 1, 5]]


def test_the_page_of_the_docstring():
  np.testing.assert_array_equal(stream.visits(0, 6, 3), [0, 0, 0, 1, 1, 1])


def test_the_rows_that_come_back_cannot_be_spoilt():
  row, _ = stream.indices(0, 0, 4, 4)
  row[:] = -1
  assert (np.sort(stream.indices(0, 0, 4, 4)[0]) == np.arange(4)).all()


# Mutations seen to fail: rounding the share per batch; a float product (0.29 * 100 < 29); one
# ordinal for both sources.
@pytest.mark.parametrize('fraction', [0.0, 0.1, 0.25, 0.29, 1 / 3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize('batch_size', [1, 3, 16])
def test_a_mix_is_in_proportion_from_the_first_row_on(fraction, batch_size):
  sizes, length = (11, 5), 240
  parts = [stream.mix(4, step, batch_size, sizes, fraction) for step in range(length // batch_size)]
  source, row, visit = (np.concatenate(column) for column in zip(*parts, strict=True))
  taken = np.cumsum(source)
  share = np.arange(1, length + 1) * fraction
  assert (np.abs(taken - share) < 1 + 1e-3).all()
  assert taken[99] == {1 / 3: 33}.get(fraction, round(100 * fraction))
  for which, size in enumerate(sizes):
    mine, times = row[source == which], visit[source == which]
    np.testing.assert_array_equal(times, np.arange(len(mine)) // size)
    for epoch in range(len(mine) // size):
      assert sorted(mine[times == epoch]) == list(range(size))


# Seen to fail: a share rounded to a millionth (1e-7 is then 0).
def test_a_mix_is_exact_for_small_shares_and_late_steps():
  for fraction, at in ((1e-7, 10**7), (1 - 1e-7, 1), (0.29, 10**9 + 100)):
    step = (at - 1) // 4
    source = stream.mix(0, step, 4, (1, 1), fraction)[0]
    share = {1e-7: 1, 1 - 1e-7: 10**7 - 1, 0.29: 2_900_000}[fraction]
    before = [p * share // 10**7 for p in range(4 * step, 4 * step + 5)]
    assert source.tolist() == np.diff(before).tolist()
  assert sum(stream.mix(0, 10**12, 300, (1, 1), 1 / 3)[0]) == 100


def test_a_mix_does_not_depend_on_the_batch_size():
  whole = stream.mix(0, 0, 120, (9, 4), 0.3)
  for batch_size in (1, 7, 40):
    parts = [stream.mix(0, step, batch_size, (9, 4), 0.3) for step in range(-(-120 // batch_size))]
    for column, expected in zip(zip(*parts, strict=True), whole, strict=True):
      np.testing.assert_array_equal(np.concatenate(column)[:120], expected)


def test_the_two_sources_have_orders_of_their_own():
  source, row, _ = stream.mix(0, 0, 80, (40, 40), 0.5)
  assert row[source == 0].tolist() != row[source == 1].tolist()


# Mutation seen to fail: positions that begin anew with each batch.
def test_in_order_is_the_source_again_and_again():
  parts = [stream.in_order(seed=9, step=step, batch_size=4, size=3) for step in range(3)]
  row, visit = (np.concatenate(column) for column in zip(*parts, strict=True))
  assert row.tolist() == [0, 1, 2] * 4 and visit.tolist() == [i // 3 for i in range(12)]
  expected = stream.indices(seed=9, step=1, batch_size=4, size=3)
  assert [part.dtype for part in parts[1]] == [part.dtype for part in expected]
  assert (parts[1][1] == expected[1]).all()
  with pytest.raises(ValueError, match='without rows'):
    stream.in_order(0, 0, 2, 0)


def test_mistakes():
  for arguments in ((0, 0, 0, 5), (0, -1, 2, 5), (-1, 0, 2, 5)):
    with pytest.raises(ValueError, match='expected seed >= 0, step >= 0 and batch_size >= 1, got'):
      stream.indices(*arguments)
  with pytest.raises(ValueError, match='without rows'):
    stream.indices(0, 0, 2, 0)
  with pytest.raises(ValueError, match='without rows'):
    stream.mix(0, 0, 4, (5, 0), 0.1)
  assert (stream.mix(0, 0, 4, (5, 0), 0.0)[0] == 0).all()  # an unused source may be empty
  with pytest.raises(ValueError, match='fraction is the share of the second source'):
    stream.mix(0, 0, 4, (5, 5), 1.5)
