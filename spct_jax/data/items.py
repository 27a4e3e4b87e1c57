"""What all readers share: ids, messages, the skips and their names, and where the best response
stands.

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

IDS = ('id', 'uid', 'pair_id', 'prompt_id')
ROLES = {
  'system': 'system', 'user': 'user', 'human': 'user', 'assistant': 'assistant', 'gpt': 'assistant',
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Skipped:
  """An item that cannot be used: where it stands, and one of the reasons of this module."""

  where: str
  reason: str


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


def optional_text(raw: RawRow, names: Sequence[str]) -> str | None:
  """The first of the columns that is there and not null, a string; None if none is."""
  for name in names:
    if raw.row.get(name) is not None:
      return text_of(raw, name)
  return None


def messages_of(value: Any, where: str, name: str) -> tuple[Message, ...]:
  """A list of {role, content} or {from, value} objects as messages."""
  if not isinstance(value, list) or not value:
    raise ValueError(
      f'{where}: {name!r} must be a list of messages that is not empty, got {_kind(value)}'
    )
  return tuple(_message(item, where, name) for item in value)


def _message(item: Any, where: str, name: str) -> Message:
  keys = ('role', 'content') if isinstance(item, dict) and 'role' in item else ('from', 'value')
  if not isinstance(item, dict) or not all(isinstance(item.get(key), str) for key in keys):
    raise ValueError(
      f'{where}: a message of {name!r} must have the strings role and content (or from and value),'
      f' got {item!r:.80}'
    )
  role = item[keys[0]].strip().lower()
  if role not in ROLES:
    raise ValueError(
      f'{where}: role {item[keys[0]]!r} in {name!r} is unknown; allowed are {", ".join(ROLES)}'
    )
  return Message(ROLES[role], item[keys[1]])


def positions(uid: str, n: int) -> tuple[int, ...]:
  """A permutation of range(n) drawn from the uid: `positions(uid, n)[i]` is the index that item i
  gets."""
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
