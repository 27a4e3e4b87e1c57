"""What all readers share: ids, messages, the skips, and where the best response stands.

An item that cannot be used is no error but data: a `Skipped` with one of the reasons below, which
`load` counts and names. What is wrong with a *file* (a missing column, a wrong type) is a
ValueError instead.

The responses of a `chosen`/`rejected` row have no order of their own. They are put into one that is
drawn from the uid alone (`positions`), so the best one stands at each index equally often: "take
the first" is worth 1/n, the same row always comes out the same, and no other row can change it.
Formats that do have an order (lists, JudgeBench, GSM8K) keep it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from spct_jax.data.sources import RawRow
from spct_jax.types import Example, Message

NO_BEST = 'no unique best'  # the top grade is shared, or several or none of the responses are right
IDENTICAL = 'identical responses'  # the best response is also among the others
EMPTY_PROMPT = 'empty prompt'
EMPTY_REPLY = 'empty reply'
PREFIXES = 'prefixes differ'  # the responses answer different conversations
NOT_ONE_REPLY = 'not one assistant turn'  # what follows the prompt is not exactly one answer
NOT_TEXT = 'not text'  # a message has a part that is an image, a sound, ...
TOOLS = 'tool turns'  # a message calls a tool, or holds what a tool returned

IDS = ('id', 'uid', 'pair_id')  # not prompt_id: two pairs may share a prompt
ROLES = {
  'system': 'system', 'developer': 'system', 'user': 'user', 'human': 'user',
  'assistant': 'assistant', 'gpt': 'assistant',
}  # fmt: skip
TOOL_ROLES = ('tool', 'function', 'function_call', 'observation')


@dataclasses.dataclass(frozen=True)
class Skipped:
  """An item that cannot be used: where it stands, and one of the reasons of this module."""

  where: str
  reason: str


class Unusable(Exception):
  """Ends the reading of a row that is to be skipped: its reader turns `reason` into a `Skipped`."""

  def __init__(self, reason: str):
    super().__init__(reason)
    self.reason = reason


def uid_of(raw: RawRow) -> str:
  """The id that the row gives (the first of `IDS` that is there), else <file name>:<line>."""
  for name in IDS:
    value = raw.row.get(name)
    if value is None:
      continue
    if isinstance(value, bool) or not isinstance(value, (str, int)) or not str(value).strip():
      raise ValueError(
        f'{raw.where}: {name!r} must be a string or an integer that is not empty, got {value!r}'
      )
    return str(value)
  return raw.name


def text_of(raw: RawRow, name: str) -> str:
  """A column that must be a string."""
  value = raw.row.get(name)
  if not isinstance(value, str):
    raise ValueError(
      f'{raw.where}: {name!r} must be a string, got {_kind(value)}; columns found:'
      f' {sorted(raw.row)}'
    )
  return value


def word_of(raw: RawRow, name: str) -> str:
  """A column that must be a string or a number; a number becomes the text of it."""
  value = raw.row.get(name)
  if isinstance(value, float) and math.isfinite(value):
    return str(value)
  if isinstance(value, int) and not isinstance(value, bool):
    return str(value)
  if not isinstance(value, str):
    raise ValueError(
      f'{raw.where}: {name!r} must be a string or a finite number, got {_kind(value)}; columns'
      f' found: {sorted(raw.row)}'
    )
  return value


def optional_text(raw: RawRow, name: str) -> str | None:
  """A column that is a string if it is there; None if it is not."""
  return text_of(raw, name) if name in raw.row else None


def optional_word(raw: RawRow, names: Sequence[str]) -> str | None:
  """The first of the columns that is there, a string or a number; None if none is."""
  return next((word_of(raw, name) for name in names if name in raw.row), None)


def messages_of(value: Any, where: str, name: str) -> tuple[Message, ...]:
  """A list of {role, content} or {from, value} objects as messages.

  The content is a string or a list of parts {type: 'text', text}, which are joined as they are.
  Unusable if a part is no text, or if a message is one of a tool.
  """
  if not isinstance(value, list) or not value:
    raise ValueError(
      f'{where}: {name!r} must be a list of messages that is not empty, got {_kind(value)}'
    )
  return tuple(_message(item, where, name) for item in value)


def _message(item: Any, where: str, name: str) -> Message:
  fields = item if isinstance(item, dict) else {}
  given, content = fields.get('role'), fields.get('content')
  if given is None:
    given, content = fields.get('from'), fields.get('value')
  role = given.strip().lower() if isinstance(given, str) else None
  if role in TOOL_ROLES or fields.get('tool_calls'):
    raise Unusable(TOOLS)
  text = _text(content)
  if role is None or text is None:
    raise ValueError(
      f'{where}: a message of {name!r} must have the strings role and content (or from and value;'
      f" content may be a list of parts {{type: 'text', text}}), got {item!r:.80}"
    )
  if role not in ROLES:
    raise ValueError(
      f'{where}: role {given!r} in {name!r} is unknown; allowed are {", ".join(ROLES)}'
    )
  return Message(ROLES[role], text)


def _text(content: Any) -> str | None:
  """The text of a message; None if it is neither a string nor a list of parts."""
  if not isinstance(content, list):
    return content if isinstance(content, str) else None
  if not all(isinstance(part, dict) and isinstance(part.get('type'), str) for part in content):
    return None
  if any(part['type'] != 'text' for part in content):
    raise Unusable(NOT_TEXT)
  texts = [part.get('text') for part in content]
  return ''.join(texts) if all(isinstance(text, str) for text in texts) else None


def positions(uid: str, n: int) -> tuple[int, ...]:
  """A permutation of range(n) drawn from the uid; item i gets the index `positions(uid, n)[i]`."""
  digest = hashlib.blake2b(uid.encode('utf-8'), digest_size=8, person=b'positions').digest()
  keys = np.random.Philox(key=int.from_bytes(digest, 'little')).random_raw(n)
  return tuple(int(index) for index in np.argsort(keys, kind='stable'))


def place(uid: str, chosen: str, rejected: Sequence[str]) -> tuple[tuple[str, ...], int]:
  """(responses, label): the chosen response and the rejected ones at the positions of the uid."""
  texts = (chosen, *rejected)
  where = positions(uid, len(texts))
  return tuple(texts[where.index(i)] for i in range(len(texts))), where[0]


def usable(example: Example, where: str) -> Example | Skipped:
  """The example, or why nothing can be learned from it.

  With a label, the best response may not be among the others too; without one, they may not all be
  alike.
  """
  if not example.messages or not example.messages[-1].content.strip():
    return Skipped(where, EMPTY_PROMPT)
  if example.messages[-1].role != 'user':
    raise ValueError(
      f'{where}: the conversation must end with a turn of the user (the query), not with one of'
      f' {example.messages[-1].role!r}'
    )
  texts = [response.strip() for response in example.responses]
  if not all(texts):
    return Skipped(where, EMPTY_REPLY)
  if len(texts) > 1:
    repeated = (
      len(set(texts)) == 1 if example.label is None else texts.count(texts[example.label]) > 1
    )
    if repeated:
      return Skipped(where, IDENTICAL)
  return example


def _kind(value: Any) -> str:
  return 'nothing' if value is None else type(value).__name__
