"""General instruction data, for the mix of supervised fine-tuning: conversations with an answer.

A row is {messages: [..., assistant]} (or `conversations`), or {prompt, completion}, or
{instruction, input, output}, with the names of columns that `plain` knows. It becomes an Example
with one response and no label: `messages` up to the query, and the answer.

Where the answer is a message whose content is a list of parts, a part {type: 'text', text, train:
false} is read and not learnt: what cannot be known, such as the choice among many right
continuations, then costs no gradient.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from spct_jax.data import items, plain, preference
from spct_jax.data.items import Skipped, Unusable
from spct_jax.data.preference import Loaded, Reader
from spct_jax.data.sources import RawRow
from spct_jax.types import Example

CONVERSATIONS = ('messages', 'conversations')
COLUMNS = (
  'messages (or conversations) that end with an assistant turn, or prompt + completion, or'
  ' instruction (+ input) + output'
)


@dataclasses.dataclass(frozen=True)
class Instruction(Example):
  """A conversation whose answer is learnt in parts: (text, whether it is learnt), which joined are the answer."""

  pieces: tuple[tuple[str, bool], ...] = ()


def accepts(row: dict) -> bool:
  """Whether the row is a conversation with its answer."""
  prompt = any(name in row for name in plain.PROMPTS)
  answer = any(name in row for name in plain.SINGLE)
  return any(name in row for name in CONVERSATIONS) or (prompt and answer)


def read(raw: RawRow) -> tuple[Example | Skipped, ...]:
  """One row gives one conversation."""
  single = next((name for name in plain.SINGLE if name in raw.row), None)
  if single is not None:
    (found,) = plain.read(raw)
    return (found if isinstance(found, Skipped) else _in_parts(found, raw.row[single], raw.where),)
  name = next((name for name in CONVERSATIONS if name in raw.row), None)
  if name is None:
    raise ValueError(f'{raw.where}: columns found: {sorted(raw.row)}; expected {COLUMNS}')
  try:
    *context, answer = items.messages_of(raw.row[name], raw.where, name)
  except Unusable as unusable:
    return (Skipped(raw.where, unusable.reason),)
  if answer.role != 'assistant':
    raise ValueError(
      f"{raw.where}: {name!r} must end with the assistant's answer, not a turn of {answer.role!r}"
    )
  subset = items.optional_word(raw, ('subset', 'source')) or 'all'
  example = Example(items.uid_of(raw), tuple(context), (answer.content,), subset=subset)
  return (items.usable(_in_parts(example, raw.row[name], raw.where), raw.where),)


def _in_parts(example: Example, value: Any, where: str) -> Example:
  """The example with the parts of its answer: the last of the messages (or the one message) in `value`."""
  last = value[-1] if isinstance(value, list) else value
  pieces = _pieces(last.get('content', last.get('value')), where) if isinstance(last, dict) else ()
  return Instruction(**vars(example), pieces=pieces) if pieces else example


def _pieces(content: Any, where: str) -> tuple[tuple[str, bool], ...]:
  """The parts of an answer with their flags; none where all of it is learnt."""
  if not isinstance(content, list) or not any('train' in part for part in content):
    return ()
  for part in content:
    if not isinstance(part.get('train', True), bool):
      raise ValueError(f"{where}: 'train' of a part must be true or false, got {part['train']!r}")
  if not any(part.get('train', True) for part in content):
    raise ValueError(f"{where}: every part of the answer has train=false, so there is nothing to learn; drop the row")
  return tuple((part['text'], part.get('train', True)) for part in content)


READERS = {'instructions': Reader(read, accepts, COLUMNS)}


def load(path: os.PathLike | str, *, strict: bool = False, limit: int | None = None) -> Loaded:
  """Reads a source (see `sources`) of instruction data."""
  return preference.load(path, 'instructions', strict=strict, limit=limit, readers=READERS)
