"""Learner batches on the host: token ids in rows, right-padded, as numpy arrays.

A row is `prompt ids ; completion ids`. Position t predicts token t + 1, and every per-token array
(token_mask, sampler_logp, old_logp, ref_logp) lives in that frame: entry t belongs to token t + 1, and
the last entry belongs to nothing. Prompt a b c, completion x y, padded to L = 6:

    position      0  1  2  3  4  5
    tokens        a  b  c  x  y  .      lengths = 5
    predicts      b  c  x  y  .  -
    token_mask    .  .  1  1  .  .      where the predicted token is of the completion
    sampler_logp  0  0  x  y  0  0      log-probabilities that the sampler recorded for x and y
    kept_ids      .  .  X  Y  .  .      only where replayed: the ids that x and y were drawn from, -1 elsewhere

1. Completions are the token ids that were sampled, never re-encoded text.
2. L is the smallest of a few bucket lengths that holds the longest row: one compilation per bucket.
3. A batch has a fixed number of rows; the rest are padding rows (row_mask False, no token masked in,
   length 1 so that no index or softmax meets an empty row) and add nothing to any sum or count.
4. Where sampling was truncated, `kept_ids` brings the recorded sets to the learner, and `sampler_logp` is over them.
5. A row longer than the largest bucket is set aside by `fitting` before training, and named.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from spct_jax.types import Kept, Trajectory


@dataclasses.dataclass(frozen=True)
class Row:
  """One sequence to learn from; `logp` are the sampler's, one per completion token, or None.

  `learnt` says which completion tokens the loss counts; None: all. `kept`: what each was drawn from, if recorded.
  """

  name: str  # what a person would call it, for messages
  prompt_ids: tuple[int, ...]
  completion_ids: tuple[int, ...]
  logp: tuple[float, ...] | None = None
  learnt: tuple[bool, ...] | None = None
  kept: Kept | None = None

  def __post_init__(self):
    if not self.prompt_ids:
      raise ValueError(
          f'{self.name}: the prompt has no tokens, so nothing predicts the first completion token; give'
          ' at least one (a beginning-of-sequence or end-of-text token).'
      )
    if self.logp is not None and len(self.logp) != len(self.completion_ids):
      raise ValueError(
          f'{self.name}: {len(self.logp)} log-probabilities for {len(self.completion_ids)} completion'
          ' tokens; there must be one for each.'
      )
    if self.learnt is not None and len(self.learnt) != len(self.completion_ids):
      raise ValueError(
          f'{self.name}: {len(self.learnt)} flags of what is learnt for {len(self.completion_ids)}'
          ' completion tokens; there must be one for each.'
      )
    if self.kept is not None:
      for name in ('ids', 'logp', 'count'):
        if len(getattr(self.kept, name)) != len(self.completion_ids):
          raise ValueError(
              f'{self.name}: kept {name} of {len(getattr(self.kept, name))} tokens for {len(self.completion_ids)}'
              ' completion tokens; there must be one for each.'
          )
      for t, (token, ids) in enumerate(zip(self.completion_ids, self.kept.ids)):
        if token not in ids:
          raise ValueError(
              f'{self.name}: token {t}, id {token}, is not among the {len(ids)} that it was drawn from; the record was'
              ' edited, or belongs to other tokens.'
          )

  @property
  def length(self) -> int:
    return len(self.prompt_ids) + len(self.completion_ids)


def from_trajectory(trajectory: Trajectory, prompt_ids: Sequence[int] | None = None) -> Row:
  """The tokens as sampled. `prompt_ids` replaces the prompt, as for a hinted sample that is to be
  learnt without its hint; what the sampler recorded is then of another prompt and is dropped."""
  name = f'{trajectory.uid} sample {trajectory.sample} visit {trajectory.visit}'
  if prompt_ids is None:
    return Row(
        name, tuple(trajectory.prompt_ids), tuple(trajectory.token_ids), tuple(trajectory.logp), kept=trajectory.kept
    )
  return Row(name, tuple(prompt_ids), tuple(trajectory.token_ids))


def bucket_lengths(longest: int, count: int) -> tuple[int, ...]:
  """`count` bucket lengths up to `longest`, each half the next, rounded up to a multiple of 8."""
  if longest < 2 or count < 1:
    raise ValueError(f'bucket lengths: got longest={longest}, count={count}; needs longest >= 2, count >= 1.')
  lengths = {longest}
  for i in range(1, count):
    lengths.add(min(longest, max(8, -(-(longest >> i) // 8) * 8)))
  return tuple(sorted(lengths))


def bucket(length: int, buckets: Sequence[int]) -> int:
  """The smallest bucket that holds `length` tokens."""
  holding = [b for b in sorted(buckets) if b >= length]
  if not holding:
    raise ValueError(
        f'a row of {length} tokens does not fit the largest bucket, {max(buckets)}; set it aside with'
        ' `fitting`, or raise the length limit.'
    )
  return holding[0]


@dataclasses.dataclass(frozen=True)
class Fitting:
  """Which rows fit (`keep`, indices in order), and the names and lengths of those that do not."""

  keep: tuple[int, ...]
  too_long: tuple[str, ...]


def fitting(rows: Sequence[Row], buckets: Sequence[int]) -> Fitting:
  """Sets over-long rows aside: counted and named before training, never cut."""
  limit = max(buckets)
  keep = tuple(i for i, row in enumerate(rows) if row.length <= limit)
  too_long = tuple(f'{row.name} ({row.length} tokens > {limit})' for row in rows if row.length > limit)
  return Fitting(keep, too_long)


def pad(
    rows: Sequence[Row],
    *,
    num_rows: int,
    buckets: Sequence[int],
    pad_id: int,
    columns: Mapping[str, np.ndarray],
    replay_kept: int = 0,
) -> dict[str, np.ndarray]:
  """One batch of `num_rows` rows (Q) and a bucket's length (L).

  tokens int32[Q, L], lengths int32[Q], token_mask bool[Q, L], sampler_logp float32[Q, L] (0 where
  unknown), row_mask bool[Q]; and each of `columns` (one value per given row: 'advantage', 'target'),
  padded with zeros to [Q]. With `replay_kept` > 0 also kept_ids int32[Q, L, replay_kept], and sampler_logp is of
  the tokens among those; every row must have been recorded.
  """
  if not 0 < len(rows) <= num_rows:
    raise ValueError(f'a batch of {num_rows} rows: got {len(rows)}; it must hold 1 to {num_rows}.')
  length = bucket(max(row.length for row in rows), buckets)
  batch = {
      'tokens': np.full((num_rows, length), pad_id, np.int32),
      'lengths': np.ones(num_rows, np.int32),
      'token_mask': np.zeros((num_rows, length), bool),
      'sampler_logp': np.zeros((num_rows, length), np.float32),
      'row_mask': np.arange(num_rows) < len(rows),
  }
  if replay_kept:
    batch['kept_ids'] = np.full((num_rows, length, replay_kept), -1, np.int32)
  for i, row in enumerate(rows):
    batch['tokens'][i, : row.length] = row.prompt_ids + row.completion_ids
    batch['lengths'][i] = row.length
    predicting = slice(len(row.prompt_ids) - 1, row.length - 1)
    batch['token_mask'][i, predicting] = True if row.learnt is None else row.learnt
    if replay_kept:
      batch['kept_ids'][i, predicting] = _kept_ids(row, replay_kept)
      batch['sampler_logp'][i, predicting] = row.kept.logp
    elif row.logp is not None:
      batch['sampler_logp'][i, predicting] = row.logp
  for name, values in columns.items():
    values = np.asarray(values)
    if name in batch or values.shape != (len(rows),):
      raise ValueError(
          f'column {name!r} with shape {values.shape}: a column needs a new name and one value for each'
          f' of the {len(rows)} rows.'
      )
    batch[name] = np.zeros(num_rows, values.dtype)
    batch[name][: len(rows)] = values
  return batch


def _kept_ids(row: Row, width: int) -> np.ndarray:
  """int32[completion tokens, width], -1 behind the last of each."""
  if row.kept is None:
    raise ValueError(
        f'{row.name}: what its tokens were drawn from was not recorded, so it cannot be replayed; sample with an engine'
        f' that records it (kept={width}).'
    )
  widest = max(map(len, row.kept.ids), default=0)
  if widest > width:
    raise ValueError(
        f'{row.name}: {widest} kept tokens at a step, more than the {width} that are replayed; replay as many as were'
        ' recorded.'
    )
  return np.array(
      [[*ids, *itertools.repeat(-1, width - len(ids))] for ids in row.kept.ids], np.int32
  ).reshape(len(row.kept.ids), width)
