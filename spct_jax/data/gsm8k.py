"""The gsm8k readers: grade-school problems, each with one solution by each of several models.

A row is {question, ground_truth, <model>: {is_correct, solution}, ...}. Solutions stay as the
models wrote them, with their <<3*4=12>> annotations. `ground_truth`, a string or a number, becomes
the reference answer.

    gsm8k_single   each solution is an item of its own: n = 1, label 1 if it is right and 0 if not,
                   uid <row>:<model>, subset = the model
    gsm8k_list     the solutions of a row are one item, in the file's order, with grades 1 and 0.
                   With none or several of them right there is no unique best: the row is skipped.
"""

from __future__ import annotations

from spct_jax.data import items
from spct_jax.data.items import Skipped
from spct_jax.data.sources import RawRow
from spct_jax.types import Example, Message


def accepts(row: dict) -> bool:
  """Whether the row has a question, its answer and solutions."""
  return (
    'question' in row
    and 'ground_truth' in row
    and any(_is_solution(value) for value in row.values())
  )


def _is_solution(value: object) -> bool:
  return isinstance(value, dict) and 'is_correct' in value


def _solutions(raw: RawRow) -> dict[str, tuple[str, bool]]:
  """model -> (solution, whether it is right)."""
  found = {}
  for model, value in raw.row.items():
    if not _is_solution(value):
      continue
    if not isinstance(value.get('solution'), str) or not isinstance(value['is_correct'], bool):
      raise ValueError(
        f'{raw.where}: {model!r} must have a string solution and a boolean is_correct, got'
        f' {value!r:.80}'
      )
    found[model] = (value['solution'], value['is_correct'])
  if not found:
    raise ValueError(
      f'{raw.where}: no model solutions; columns found: {sorted(raw.row)}; expected question,'
      ' ground_truth and one column per model that holds {is_correct, solution}'
    )
  return found


def _problem(raw: RawRow) -> tuple[tuple[Message, ...], str]:
  return (Message('user', items.text_of(raw, 'question')),), items.word_of(raw, 'ground_truth')


def read_single(raw: RawRow) -> tuple[Example | Skipped, ...]:
  """One row gives one item per model."""
  messages, reference = _problem(raw)
  uid = items.uid_of(raw)
  return tuple(
    items.usable(
      Example(f'{uid}:{model}', messages, (text,), int(right), subset=model, reference=reference),
      f'{raw.where}:{model}',
    )
    for model, (text, right) in _solutions(raw).items()
  )


def read_list(raw: RawRow) -> tuple[Example | Skipped, ...]:
  """One row gives one item with a response per model."""
  messages, reference = _problem(raw)
  texts, right = zip(*_solutions(raw).values(), strict=True)
  if sum(right) != 1:
    return (Skipped(raw.where, items.NO_BEST),)
  example = Example(
    items.uid_of(raw),
    messages,
    texts,
    right.index(True),
    grades=tuple(map(float, right)),
    reference=reference,
  )
  return (items.usable(example, raw.where),)
