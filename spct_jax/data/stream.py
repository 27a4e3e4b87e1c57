"""Which rows a batch holds, as a pure function of (seed, step): nothing to save, nothing to resume.

The data is an endless sequence of positions. Position p lies in epoch p // size, and each epoch is
a permutation of all rows, drawn by Philox keyed with (seed, epoch). Batch `step` holds the
positions step * batch_size ... (step + 1) * batch_size - 1, so the sequence is the same however it
is cut into batches. With size = 3 and batches of 2:

    position   0 1 | 2 3 | 4 5
    epoch      0 0 | 0 1 | 1 1
    row        b a | c c | a b

The epoch is also the row's `visit`: how often it was seen before, by which sampling draws anew.
"""

from __future__ import annotations

import fractions
import functools
import hashlib
import math

import numpy as np


def stage_seed(seed: int, stage: str) -> int:
  """A seed for each stage, so that two stages over equally many rows do not share an order."""
  name = f'{seed}:{stage}'.encode()
  digest = hashlib.blake2b(name, digest_size=4, person=b'data order').digest()
  return int.from_bytes(digest, 'little')


def indices(
  seed: int, step: int, batch_size: int, size: int, groups: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
  """(row int64[batch], visit int32[batch]) of batch `step`; with `groups` (int[size]), see `grouped`."""
  if groups is not None:
    return grouped(seed, step, batch_size, groups)
  _check(seed, step, batch_size, (size,))
  return _rows(seed, 0, _positions(step, batch_size), size)


def in_order(seed: int, step: int, batch_size: int, size: int) -> tuple[np.ndarray, np.ndarray]:
  """As `indices`, with every epoch in the order of the source: a curriculum."""
  _check(seed, step, batch_size, (size,))
  positions = _positions(step, batch_size)
  return positions % size, (positions // size).astype(np.int32)


def grouped(
  seed: int, step: int, batch_size: int, groups: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """As `indices` over len(groups) rows, where a batch holds rows of one group (int[size]) if it can.

  Of rows grouped by their length, few batches are padded to the longest. An epoch is the first
  size // batch_size batches' worth of its permutation, so fewer than batch_size rows, any rows, wait for
  the next. Of the others each group fills as many batches as it can; what the groups leave over fills the
  rest, in the order of the groups; then the batches are shuffled. The visit is the epoch. With fewer rows
  than a batch holds, this is `indices`.
  """
  groups = np.asarray(groups)
  _check(seed, step, batch_size, (len(groups),))
  count = len(groups) // batch_size
  if not count:
    return indices(seed, step, batch_size, len(groups))
  epoch, place = divmod(step, count)
  order = _permutation(seed, 0, epoch, len(groups))[: count * batch_size]
  full, left = [], []
  for group in np.unique(groups):
    mine = order[groups[order] == group]
    cut = len(mine) // batch_size * batch_size
    full.append(mine[:cut])
    left.append(mine[cut:])
  rows = np.concatenate(full + left).reshape(count, batch_size)
  chosen = rows[_permutation(seed, 1, epoch, count)[place]]
  return chosen.astype(np.int64), np.full(batch_size, epoch, np.int32)


# How a source becomes batches, by the name that a config gives it.
ORDERS = {'shuffle': indices, 'given': in_order}


def visits(step: int, batch_size: int, size: int) -> np.ndarray:
  """int32[batch]: how often each row of batch `step` was seen in earlier epochs."""
  _check(0, step, batch_size, (size,))
  return (_positions(step, batch_size) // size).astype(np.int32)


def mix(
  seed: int, step: int, batch_size: int, sizes: tuple[int, int], fraction: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(source int32[batch], row int64[batch], visit int32[batch]) of batch `step` over two sources.

  Source 1 gets the share `fraction` of the sequence, evenly spread: of its first p positions, for
  any p, floor(p * fraction) are of source 1, where the fraction is the decimal number that it is
  written as (0.29 is 29/100). Each source has epochs of its own.
  """
  if not 0 <= fraction <= 1:
    raise ValueError(f'fraction is the share of the second source, from 0 to 1, got {fraction}')
  # An exact ratio: in floats, 100 * 0.29 is below 29.
  share = fractions.Fraction(str(float(fraction)))
  used = tuple(size for size, part in zip(sizes, (1 - share, share), strict=True) if part > 0)
  _check(seed, step, batch_size, used)
  position = _positions(step, batch_size)
  # Positions of source 1 before each one. Integers of Python: 64 bits would overflow at 1e-17.
  bounds = range(step * batch_size, (step + 1) * batch_size + 1)
  taken = np.array([math.floor(p * share) for p in bounds], np.int64)
  before, source = taken[:-1], np.diff(taken).astype(np.int32)
  row, visit = np.empty(batch_size, np.int64), np.empty(batch_size, np.int32)
  for which, ordinal in enumerate((position - before, before)):
    mine = source == which
    if mine.any():
      row[mine], visit[mine] = _rows(seed, which, ordinal[mine], sizes[which])
  return source, row, visit


def _check(seed: int, step: int, batch_size: int, sizes: tuple[int, ...]) -> None:
  if not 0 <= seed < 2**63 or step < 0 or batch_size < 1:
    raise ValueError(
      f'expected seed >= 0, step >= 0 and batch_size >= 1, got seed={seed}, step={step},'
      f' batch_size={batch_size}'
    )
  if min(sizes) < 1:
    raise ValueError(f'a source without rows cannot fill a batch: sizes {sizes}')


def _positions(step: int, batch_size: int) -> np.ndarray:
  return np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.int64)


def _rows(
  seed: int, source: int, positions: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray]:
  epoch, offset = positions // size, positions % size
  row = np.empty(len(positions), np.int64)
  for number in np.unique(epoch):
    mine = epoch == number
    row[mine] = _permutation(seed, source, int(number), size)[offset[mine]]
  return row, epoch.astype(np.int32)


# Neighbouring steps share an epoch; the value is a constant of its arguments.
@functools.lru_cache(maxsize=4)
def _permutation(seed: int, source: int, epoch: int, size: int) -> np.ndarray:
  stream = np.random.Philox(key=np.array([seed, epoch], np.uint64), counter=[0, 0, 0, source])
  # Raw bits: numpy promises not to change them.
  order = np.argsort(stream.random_raw(size), kind='stable')
  order.setflags(write=False)
  return order
