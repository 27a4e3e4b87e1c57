"""The records that stages exchange, as rows of JSON lines that say what they are.

A row carries its type and version, `{"schema": "trajectory/1", ...}`; a reader that meets another
type or version says so. Everything comes back exactly as it was; a log-probability or a grade that
is not finite is an error when it is written, and again when it is read. `kept` of a trajectory is
there only where the sampler recorded it.

`uid_hash` is the stable 64-bit name of an example's uid, by BLAKE2b: Python's own `hash` differs
from one process to the next.

The functions of `jsonl`, which writes and reads the files, are at hand here too.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from spct_jax import jsonl
from spct_jax.jsonl import (
  ChunkedWriter,
  append_jsonl,
  dumps,
  read_jsonl,
  read_numbered,
  write_json,
  write_jsonl,
  write_text,
)
from spct_jax.types import Example, Kept, Message, Trajectory

__all__ = [
  'ChunkedWriter',
  'append_jsonl',
  'dumps',
  'example_from_row',
  'read_examples',
  'read_jsonl',
  'read_numbered',
  'read_trajectories',
  'to_row',
  'trajectory_from_row',
  'uid_hash',
  'write_json',
  'write_jsonl',
  'write_text',
]

SCHEMAS = {Trajectory: 'trajectory/1', Example: 'example/1'}


# Names that do not change -------------------------------------------------------------------------


def uid_hash(uid: str) -> np.ndarray:
  """uint32[2], the stable 64-bit hash of a uid (lower half first): the same on every machine."""
  digest = hashlib.blake2b(uid.encode('utf-8'), digest_size=8).digest()
  return np.frombuffer(digest, dtype='<u4').astype(np.uint32)


# Records ------------------------------------------------------------------------------------------


def to_row(record: Trajectory | Example) -> dict:
  """The row of a record: its fields and its schema."""
  if type(record) not in SCHEMAS:
    known = ', '.join(kind.__name__ for kind in SCHEMAS)
    raise ValueError(f'{type(record).__name__} has no schema; records are {known}')
  if isinstance(record, Trajectory):
    logp = record.logp if record.kept is None else (*record.logp, *record.kept.logp)
    if not all(math.isfinite(value) for value in logp):
      raise ValueError(
        f'trajectory {record.uid!r}, sample {record.sample}: logp has a value that is not finite'
      )
  if isinstance(record, Example) and not all(map(jsonl.is_finite, record.grades or ())):
    raise ValueError(f'example {record.uid!r}: grades must be finite, got {record.grades}')
  row = {'schema': SCHEMAS[type(record)], **jsonl.plain(record)}
  if isinstance(record, Trajectory) and record.kept is None:
    del row['kept']
  return row


def _is(kind: type) -> Any:
  return lambda value: (
    isinstance(value, kind) and not (kind is not bool and isinstance(value, bool))
  )


def _list_of(check: Any) -> Any:
  return lambda value: isinstance(value, list) and all(check(item) for item in value)


def _or_none(check: Any) -> Any:
  return lambda value: value is None or check(value)


_KEPT = {
  'ids': _list_of(_list_of(_is(int))),
  'logp': _list_of(jsonl.is_finite),
  'count': _list_of(_is(int)),
}


def _is_kept(value: Any) -> bool:
  return isinstance(value, dict) and value.keys() == _KEPT.keys() and all(
    check(value[name]) for name, check in _KEPT.items()
  )


_TRAJECTORY = {
  'uid': _is(str),
  'sample': _is(int),
  'visit': _is(int),
  'order': _list_of(_is(int)),
  'hinted': _is(bool),
  'prompt_ids': _list_of(_is(int)),
  'token_ids': _list_of(_is(int)),
  'logp': _list_of(jsonl.is_finite),
  'text': _is(str),
  'scores': _or_none(_list_of(_is(int))),
  'parse': _is(str),
  'kept': _or_none(_is_kept),
}
_EXAMPLE = {
  'uid': _is(str),
  'messages': _list_of(_is(dict)),
  'responses': _list_of(_is(str)),
  'label': _or_none(_is(int)),
  'grades': _or_none(_list_of(jsonl.is_finite)),
  'subset': _is(str),
  'reference': _or_none(_is(str)),
  'principles': _or_none(_is(str)),
}


def _fields(row: dict, where: str, schema: str, checks: dict) -> dict:
  """The fields of a row after checking its schema, their names and their types."""
  if row.get('schema') != schema:
    raise ValueError(
      f'{where}: expected a row of schema {schema!r}, got {row.get("schema")!r}:'
      ' this file is of another kind, or was written by another version'
    )
  fields = {name: value for name, value in row.items() if name != 'schema'}
  missing, unknown = sorted(checks.keys() - fields.keys()), sorted(fields.keys() - checks.keys())
  if missing or unknown:
    raise ValueError(f'{where}: fields of {schema!r} missing: {missing}, unknown: {unknown}')
  for name, check in checks.items():
    if not check(fields[name]):
      got = jsonl.shorten(repr(fields[name]))
      raise ValueError(f'{where}: field {name!r} of {schema!r} has the wrong type: {got}')
  return fields


def _tuple(value: list | None) -> tuple | None:
  return None if value is None else tuple(value)


def trajectory_from_row(row: dict, where: str = 'row') -> Trajectory:
  """The record of a row made by `to_row`; `where` opens the message of an error."""
  fields = _fields({'kept': None, **row}, where, SCHEMAS[Trajectory], _TRAJECTORY)
  lists = ('order', 'prompt_ids', 'token_ids', 'logp', 'scores')
  kept = fields['kept']
  if kept is not None:
    kept = Kept(tuple(map(tuple, kept['ids'])), tuple(kept['logp']), tuple(kept['count']))
  return Trajectory(**{**fields, **{name: _tuple(fields[name]) for name in lists}, 'kept': kept})


def example_from_row(row: dict, where: str = 'row') -> Example:
  """The record of a row made by `to_row`; `where` opens the message of an error."""
  fields = _fields(row, where, SCHEMAS[Example], _EXAMPLE)
  for message in fields['messages']:
    if message.keys() != {'role', 'content'} or not all(
      isinstance(text, str) for text in message.values()
    ):
      raise ValueError(f'{where}: a message has the two strings role and content, got {message!r}')
  messages = tuple(Message(**message) for message in fields['messages'])
  lists = {name: _tuple(fields[name]) for name in ('responses', 'grades')}
  return Example(**{**fields, **lists, 'messages': messages})


def read_trajectories(path: os.PathLike | str) -> Iterator[Trajectory]:
  """Yields the trajectories of a file; a wrong row is an error that names file and line."""
  for number, row in read_numbered(path):
    yield trajectory_from_row(row, f'{path}:{number}')


def read_examples(path: os.PathLike | str) -> Iterator[Example]:
  """Yields the examples of a file; a wrong row is an error that names file and line."""
  for number, row in read_numbered(path):
    yield example_from_row(row, f'{path}:{number}')
