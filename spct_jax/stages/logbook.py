"""The numbers of a run as they come: metrics.jsonl, timing.jsonl and TensorBoard.

A row is `{"stage": ..., "step": ..., name: value, ...}`. metrics.jsonl holds only what is
deterministic, so that a resumed run's file equals an uninterrupted one's byte for byte: on resume,
`truncate` drops the stage's rows beyond the checkpoint, and the steps that are run again write them
anew. timing.jsonl holds seconds and bytes. A number that is not finite is null in the files.
"""

import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorboardX

from spct_jax.stages import processes


class MetricsWriter:
  """Appends the rows of one stage; only process 0 writes. Close it, or use it in a `with`."""

  def __init__(self, workdir: Any, stage: str, *, tensorboard: bool = True):
    self._stage = stage
    self._path: pathlib.Path = workdir.path
    self._tensorboard = tensorboard
    self._board: tensorboardX.SummaryWriter | None = None
    self._purge_step: int | None = None
    self._writes = processes.is_writer()
    if self._writes:
      for name in ('metrics.jsonl', 'timing.jsonl'):
        _repair(self._path / name)

  def __enter__(self) -> 'MetricsWriter':
    return self

  def __exit__(self, *error: Any) -> None:
    self.close()

  def write(self, step: int, metrics: Mapping[str, Any], timing: Mapping[str, Any]) -> None:
    """One row in each file; values are numbers, or lists of them such as a histogram."""
    if not self._writes:
      return
    for name, values in (('metrics.jsonl', metrics), ('timing.jsonl', timing)):
      if not values:
        continue
      row = {'stage': self._stage, 'step': int(step)} | {
        key: number(value) for key, value in values.items()
      }
      # One write of one whole line: a run that is killed leaves at most the last line incomplete.
      with open(self._path / name, 'a', encoding='utf-8') as file:
        file.write(json.dumps(row, allow_nan=False) + '\n')
    if self._tensorboard:
      self._write_board(
        step, {**metrics, **{f'timing/{key}': value for key, value in timing.items()}}
      )

  def _write_board(self, step: int, values: Mapping[str, Any]) -> None:
    if self._board is None:
      folder = self._path / 'tensorboard' / self._stage
      self._board = tensorboardX.SummaryWriter(str(folder), purge_step=self._purge_step)
    for key, value in values.items():
      if np.ndim(value) == 0 and value is not None:
        self._board.add_scalar(key, float(value), int(step))
    self._board.flush()

  def truncate(self, after_step: int) -> None:
    """Drops this stage's rows with a step above `after_step`; -1 drops them all."""
    if not self._writes:
      return
    self._purge_step = after_step + 1
    for name in ('metrics.jsonl', 'timing.jsonl'):
      path = self._path / name
      rows = read_rows(path)
      kept = [row for row in rows if row['stage'] != self._stage or row['step'] <= after_step]
      if len(kept) < len(rows):
        processes.write_text(path, ''.join(json.dumps(row, allow_nan=False) + '\n' for row in kept))

  def close(self) -> None:
    if self._board is not None:
      self._board.close()
      self._board = None


def number(value: Any) -> Any:
  """A number, array or None as JSON holds it: ints stay ints, what is not finite becomes None."""
  if value is None or isinstance(value, (bool, int)):
    return value
  if isinstance(value, (list, tuple)) or np.ndim(value) > 0:
    return [number(item) for item in np.asarray(value).tolist()]
  value = np.asarray(value).item()
  return None if isinstance(value, float) and not math.isfinite(value) else value


def read_rows(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """The rows of metrics.jsonl or timing.jsonl; none if there is no such file yet."""
  path = pathlib.Path(path)
  if not path.exists():
    return []
  rows = []
  for line, text in enumerate(path.read_text(encoding='utf-8').splitlines(), start=1):
    row = _row(text)
    if row is None:
      raise ValueError(
        f'{path}:{line}: not a row {{"stage": ..., "step": ...}}: {text[:80]!r}; remove the line'
      )
    rows.append(row)
  return rows


def _row(text: str) -> dict[str, Any] | None:
  try:
    row = json.loads(text)
  except json.JSONDecodeError:
    return None
  return row if isinstance(row, dict) and {'stage', 'step'} <= row.keys() else None


def _repair(path: pathlib.Path) -> None:
  """Mends a last line without an end, as a killed run may leave it; touches no other."""
  if not path.exists() or path.stat().st_size == 0:
    return
  text = path.read_bytes()
  if text.endswith(b'\n'):
    return
  head, _, tail = text.rpartition(b'\n')
  whole = _row(tail.decode('utf-8', errors='replace')) is not None
  lines: Sequence[bytes] = [line for line in (head, tail if whole else b'') if line]
  processes.write_text(path, ''.join(line.decode('utf-8') + '\n' for line in lines))
