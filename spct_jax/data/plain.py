"""The plain reader: the common ways to write a preference in a row of named columns.

The prompt is one of `prompt`, `question`, `instruction`, `query` (a string, or a list of messages),
`messages` or `conversations` (a list); the first that is there counts. `input`, if it is not empty,
is put below an `instruction`, after an empty line. `system`, if it is not empty, adds a system
turn. The answers are one of

    chosen, rejected         each a string, a message, a conversation, or a list of strings (one
                             best, several worse). Without a prompt column both are conversations,
                             and the prompt is all but their last turn (TRL's implicit prompt).
    responses                a list of strings or messages, in order, with `label` (the index of
                             the best; 0 or 1 as a gold score if there is only one response) and/or
                             `grades` or `scores` (a number per response; the highest is best).
                             Neither: unlabelled.
    completion, response     one string or message, with `label` true/false or 1/0 (n = 1).
    or output                None: unlabelled.

A message is {role, content} or {from, value}; its content is a string or a list of text parts. Also
read: `id` (or `uid`, `pair_id`), `subset` (or `source`), `reference` (or `reference_answer`,
`ground_truth`), `principles`; a number as subset or reference becomes text. Other columns are
passed over, and so is a column that is null.
"""

from __future__ import annotations

from typing import Any

from spct_jax import jsonl
from spct_jax.data import items
from spct_jax.data.items import Skipped, Unusable
from spct_jax.data.sources import RawRow
from spct_jax.types import Example, Message

PROMPTS = ('prompt', 'question', 'instruction', 'query', 'messages', 'conversations')
SINGLE = ('completion', 'response', 'output')
GRADES = ('grades', 'scores')
FORMATS = (
  'a prompt (prompt, question, instruction (+ input), query, messages or conversations) with chosen'
  ' + rejected, or responses + label/grades/scores, or completion/response/output + label; or'
  ' chosen + rejected as whole conversations'
)

Completion = str | tuple[Message, ...]  # a reply, or messages that end with it


def accepts(row: dict) -> bool:
  """Whether the columns of a row are those of this reader."""
  pair = 'chosen' in row and 'rejected' in row
  if any(name in row for name in PROMPTS):
    return pair or 'responses' in row or any(name in row for name in SINGLE)
  return pair and not isinstance(row['chosen'], str)


def read(raw: RawRow) -> tuple[Example | Skipped, ...]:
  """One row gives one item."""
  forms = [
    name
    for name, there in (
      ('chosen + rejected', 'chosen' in raw.row or 'rejected' in raw.row),
      ('responses', 'responses' in raw.row),
      ('completion', any(name in raw.row for name in SINGLE)),
    )
    if there
  ]
  if len(forms) != 1:
    what = ' and '.join(forms) if forms else 'no column of answers'
    raise ValueError(
      f'{raw.where}: found {what}; columns found: {sorted(raw.row)}; expected {FORMATS}: rename or'
      ' remove columns'
    )
  read_form = {'chosen + rejected': _pair, 'responses': _list, 'completion': _single}[forms[0]]
  try:
    item = read_form(raw, _prompt(raw))
  except Unusable as unusable:
    item = Skipped(raw.where, unusable.reason)
  return (item if isinstance(item, Skipped) else items.usable(item, raw.where),)


def _example(
  raw: RawRow,
  prompt: tuple[Message, ...],
  responses: tuple[str, ...],
  label: int | None,
  **graded: Any,
):
  return Example(
    uid=items.uid_of(raw),
    messages=prompt,
    responses=responses,
    label=label,
    subset=items.optional_word(raw, ('subset', 'source')) or 'all',
    reference=items.optional_word(raw, ('reference', 'reference_answer', 'ground_truth')),
    principles=items.optional_text(raw, 'principles'),
    **graded,
  )


# The prompt and the replies -----------------------------------------------------------------------


def _prompt(raw: RawRow) -> tuple[Message, ...] | None:
  """The conversation before the responses; None where the row has no prompt column."""
  name = next((name for name in PROMPTS if name in raw.row), None)
  if name is None:
    return None
  value = raw.row[name]
  below = items.optional_text(raw, 'input') if name == 'instruction' else None
  if below is not None and below.strip():
    instruction = items.text_of(raw, name)
    value = f'{instruction}\n\n{below}' if instruction.strip() else below
  if isinstance(value, str):
    prompt = (Message('user', value),)
  elif isinstance(value, list):
    prompt = items.messages_of(value, raw.where, name)
  else:
    raise ValueError(
      f'{raw.where}: {name!r} must be a string or a list of messages, got {type(value).__name__}'
    )
  system = items.optional_text(raw, 'system')
  return (Message('system', system), *prompt) if system and system.strip() else prompt


def _completion(value: Any, where: str, name: str) -> Completion:
  if isinstance(value, str):
    return value
  return items.messages_of([value] if isinstance(value, dict) else value, where, name)


def _completions(value: Any, where: str, name: str) -> list[Completion]:
  """The answers of `chosen` or `rejected`: a list of messages is one, any other list several."""
  if isinstance(value, list) and value and not all(isinstance(item, dict) for item in value):
    return [_completion(item, where, name) for item in value]
  return [_completion(value, where, name)]


def _reply(completion: Completion, prompt: tuple[Message, ...], where: str) -> str | Skipped:
  """The text of one reply: a string, or one assistant turn, alone or after the prompt."""
  if isinstance(completion, str):
    return completion
  tail = completion
  if len(completion) > 1:
    bare = tuple(message for message in prompt if message.role != 'system')
    for prefix in (prompt, bare):
      if completion[: len(prefix)] == prefix:
        tail = completion[len(prefix) :]
        break
    else:
      return Skipped(where, items.PREFIXES)
  if len(tail) != 1 or tail[0].role != 'assistant':
    return Skipped(where, items.NOT_ONE_REPLY)
  return tail[0].content


def _replies(
  completions: list[Completion], prompt: tuple[Message, ...], where: str
) -> list[str] | Skipped:
  replies = [_reply(completion, prompt, where) for completion in completions]
  return next((reply for reply in replies if isinstance(reply, Skipped)), replies)


# The three forms ----------------------------------------------------------------------------------


def _pair(raw: RawRow, prompt: tuple[Message, ...] | None) -> Example | Skipped:
  for name in ('chosen', 'rejected'):
    if raw.row.get(name) is None:
      raise ValueError(
        f'{raw.where}: {name!r} is missing; columns found: {sorted(raw.row)}; expected {FORMATS}'
      )
  chosen = _completions(raw.row['chosen'], raw.where, 'chosen')
  rejected = _completions(raw.row['rejected'], raw.where, 'rejected')
  if prompt is None:
    prompt = _implicit_prompt(chosen + rejected, raw)
    if isinstance(prompt, Skipped):
      return prompt
  if len(chosen) != 1:
    return Skipped(raw.where, items.NO_BEST)
  replies = _replies(chosen + rejected, prompt, raw.where)
  if isinstance(replies, Skipped):
    return replies
  responses, label = items.place(items.uid_of(raw), replies[0], replies[1:])
  return _example(raw, prompt, responses, label)


def _implicit_prompt(completions: list[Completion], raw: RawRow) -> tuple[Message, ...] | Skipped:
  if any(isinstance(completion, str) for completion in completions):
    raise ValueError(
      f'{raw.where}: no prompt; columns found: {sorted(raw.row)}; expected {FORMATS}.'
      " Transcripts that begin with '\\n\\nHuman:' are read with reader='hh_rlhf'"
    )
  prompts = {completion[:-1] for completion in completions}
  if len(prompts) > 1:
    return Skipped(raw.where, items.PREFIXES)
  prompt = prompts.pop()
  return prompt if prompt else Skipped(raw.where, items.EMPTY_PROMPT)


def _need(prompt: tuple[Message, ...] | None, raw: RawRow) -> tuple[Message, ...]:
  if prompt is None:
    raise ValueError(
      f'{raw.where}: no prompt; columns found: {sorted(raw.row)}; expected {FORMATS}'
    )
  return prompt


def _list(raw: RawRow, prompt: tuple[Message, ...] | None) -> Example | Skipped:
  prompt = _need(prompt, raw)
  value = raw.row['responses']
  if not isinstance(value, list) or not value:
    raise ValueError(
      f"{raw.where}: 'responses' must be a list that is not empty, got {value!r:.60}"
    )
  completions = [_completion(item, raw.where, 'responses') for item in value]
  replies = _replies(completions, prompt, raw.where)
  if isinstance(replies, Skipped):
    return replies
  grades = _grades(raw, len(replies))
  label = raw.row.get('label')
  if len(replies) == 1:
    gold = _gold(raw, label)
    return _example(raw, prompt, tuple(replies), gold, grades=grades)
  if label is not None and (
    isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(replies)
  ):
    raise ValueError(
      f"{raw.where}: 'label' must be the index of the best of {len(replies)} responses"
      f' (0 to {len(replies) - 1}), got {label!r}'
    )
  if grades is not None:
    best = [i for i, grade in enumerate(grades) if grade == max(grades)]
    if label is not None and label not in best:
      raise ValueError(
        f"{raw.where}: 'label' {label} is not the response with the highest grade of {grades}"
      )
    if len(best) > 1:
      return Skipped(raw.where, items.NO_BEST)
    label = best[0]
  return _example(raw, prompt, tuple(replies), label, grades=grades)


def _grades(raw: RawRow, n: int) -> tuple[float, ...] | None:
  for name in GRADES:
    value = raw.row.get(name)
    if value is None:
      continue
    if not isinstance(value, list) or len(value) != n or not all(map(jsonl.is_finite, value)):
      raise ValueError(
        f'{raw.where}: {name!r} must be {n} numbers, one per response and each finite,'
        f' got {value!r:.80}'
      )
    return tuple(float(grade) for grade in value)
  return None


def _gold(raw: RawRow, label: Any) -> int | None:
  """The gold score of a single response."""
  if label is not None and (not isinstance(label, (int, float)) or label not in (0, 1)):
    raise ValueError(
      f"{raw.where}: 'label' of a single response must be true or false (1 or 0), got {label!r}"
    )
  return None if label is None else int(label)


def _single(raw: RawRow, prompt: tuple[Message, ...] | None) -> Example | Skipped:
  prompt = _need(prompt, raw)
  name = next(name for name in SINGLE if name in raw.row)
  reply = _reply(_completion(raw.row[name], raw.where, name), prompt, raw.where)
  if isinstance(reply, Skipped):
    return reply
  return _example(raw, prompt, (reply,), _gold(raw, raw.row.get('label')))
