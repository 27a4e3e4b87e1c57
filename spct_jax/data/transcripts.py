"""The hh_rlhf reader: two whole transcripts of one conversation, `chosen` and `rejected`.

    \\n\\nHuman: Hello\\n\\nAssistant: Hi, how can I help?\\n\\nHuman: ...\\n\\nAssistant: <reply>

Everything before the last "\\n\\nAssistant:" is the prompt, which both share; the rest is the
reply. Spaces around a turn are dropped. Two turns of one role in a row (1 % of the rows) stay two
messages.

Skipped and counted, 9 of 2,312 rows of harmless-base/test and 15 of 2,354 of helpful-base/test:

    prefixes differ       5 + 9   the replies answer different conversations: no comparison
    empty reply           4 + 4   teaches to spot emptiness; in the four of harmless-base the
                                  empty reply is even the chosen one
    identical responses   0 + 2

None of those rows is skipped as 'not one assistant turn': a turn of the human after the last one of
the assistant, or two of the assistant at the end.
"""

from __future__ import annotations

import re

from spct_jax.data import items
from spct_jax.data.items import Skipped
from spct_jax.data.sources import RawRow
from spct_jax.types import Example, Message

_TURN = re.compile(r'\n\n(Human|Assistant):')
_ROLE = {'Human': 'user', 'Assistant': 'assistant'}
_REPLY = '\n\nAssistant:'


def accepts(row: dict) -> bool:
  """Whether both columns are transcripts, and no prompt stands beside them."""
  return 'prompt' not in row and all(
    isinstance(row.get(name), str) and row[name].startswith('\n\nHuman:')
    for name in ('chosen', 'rejected')
  )


def turns(transcript: str) -> tuple[Message, ...]:
  """The turns of a transcript that begins with one."""
  pieces = _TURN.split(transcript)  # '', role, text, role, text, ...
  return tuple(
    Message(_ROLE[role], text.strip())
    for role, text in zip(pieces[1::2], pieces[2::2], strict=True)
  )


def read(raw: RawRow) -> tuple[Example | Skipped, ...]:
  """One row gives one pair."""
  prefixes, replies = [], []
  for name in ('chosen', 'rejected'):
    text = items.text_of(raw, name)
    if not text.startswith('\n\nHuman:') or _REPLY not in text:
      raise ValueError(
        f"{raw.where}: {name!r} is no transcript that begins with '\\n\\nHuman:' and has a turn"
        f" '\\n\\nAssistant:': {text[:50]!r}"
      )
    prefix, _, reply = text.rpartition(_REPLY)
    prefixes.append(prefix)
    replies.append(reply)
  if prefixes[0] != prefixes[1]:
    return (Skipped(raw.where, items.PREFIXES),)
  messages = turns(prefixes[0])
  # 'Assistant:' twice (the first one is then an unfinished turn of the prompt), or a last turn of
  # the human.
  if messages[-1].role != 'user' or any(map(_TURN.search, replies)):
    return (Skipped(raw.where, items.NOT_ONE_REPLY),)
  uid = items.uid_of(raw)
  chosen, rejected = (reply.strip() for reply in replies)
  responses, label = items.place(uid, chosen, [rejected])
  subset = items.optional_word(raw, ('subset',)) or 'all'
  return (items.usable(Example(uid, messages, responses, label, subset=subset), raw.where),)
