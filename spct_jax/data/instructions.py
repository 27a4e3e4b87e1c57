"""General instruction data, for the mix of supervised fine-tuning: a conversation and the answer to
learn.

A row is {messages: [..., assistant]} or {prompt, completion} (also `response`). It becomes an
Example with one response and no label: `messages` up to the query, and the answer.
"""

from __future__ import annotations

import os

from spct_jax.data import items, plain, preference
from spct_jax.data.items import Skipped
from spct_jax.data.preference import Loaded, Reader
from spct_jax.data.sources import RawRow
from spct_jax.types import Example

COLUMNS = 'messages that end with an assistant turn, or prompt + completion'


def accepts(row: dict) -> bool:
  """Whether the row is a conversation with its answer."""
  return 'messages' in row or ('prompt' in row and any(name in row for name in plain.SINGLE))


def read(raw: RawRow) -> tuple[Example | Skipped, ...]:
  """One row gives one conversation."""
  if any(name in raw.row for name in plain.SINGLE):
    return plain.read(raw)
  if 'messages' not in raw.row:
    raise ValueError(f'{raw.where}: columns found: {sorted(raw.row)}; expected {COLUMNS}')
  *context, answer = items.messages_of(raw.row['messages'], raw.where, 'messages')
  if answer.role != 'assistant':
    raise ValueError(
      f"{raw.where}: 'messages' must end with the assistant's answer, not a turn of {answer.role!r}"
    )
  subset = items.optional_text(raw, ('subset', 'source')) or 'all'
  example = Example(items.uid_of(raw), tuple(context), (answer.content,), subset=subset)
  return (items.usable(example, raw.where),)


READERS = {'instructions': Reader(read, accepts, COLUMNS)}


def load(path: os.PathLike | str, *, strict: bool = False, limit: int | None = None) -> Loaded:
  """Reads a source (see `sources`) of instruction data."""
  return preference.load(path, 'instructions', strict=strict, limit=limit, readers=READERS)
