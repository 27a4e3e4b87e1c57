"""JudgeBench (arXiv 2410.12784): pairs of answers of one model to hard questions, one right and one
wrong.

A row is {pair_id, source, question, response_A, response_B, label: 'A>B' or 'B>A'}. The file's
order is kept: the published baselines are those of this order. `subset` is the source
('mmlu-pro-law', ...), and `group(subset)` is the heading under which its authors report it.

Nothing is left out that the authors count: one pair of the Claude file has two equal answers, and
stays, so the totals are 350 and 270.
"""

from __future__ import annotations

from spct_jax.data import items
from spct_jax.data.items import Skipped
from spct_jax.data.sources import RawRow
from spct_jax.types import Example, Message

COLUMNS = "question, response_A, response_B, label 'A>B' or 'B>A' (and pair_id, source)"
LABELS = {'A>B': 0, 'B>A': 1}
GROUPS = {
  'mmlu-pro': 'knowledge',
  'livebench-reasoning': 'reasoning',
  'livebench-math': 'math',
  'livecodebench': 'coding',
}


def accepts(row: dict) -> bool:
  """Whether the columns are those of the benchmark."""
  return all(name in row for name in ('question', 'response_A', 'response_B', 'label'))


def reader(raw: RawRow) -> tuple[Example | Skipped, ...]:
  """One row gives one pair."""
  missing = [
    name for name in ('question', 'response_A', 'response_B', 'label') if name not in raw.row
  ]
  if missing:
    raise ValueError(
      f'{raw.where}: missing {missing}; columns found: {sorted(raw.row)}; expected {COLUMNS}'
    )
  label = items.text_of(raw, 'label')
  if label == 'A=B':
    return (Skipped(raw.where, items.NO_BEST),)
  if label not in LABELS:
    raise ValueError(f"{raw.where}: 'label' must be 'A>B' or 'B>A', got {label!r}")
  question = items.text_of(raw, 'question')
  responses = (items.text_of(raw, 'response_A'), items.text_of(raw, 'response_B'))
  if not question.strip():
    return (Skipped(raw.where, items.EMPTY_PROMPT),)
  if not all(text.strip() for text in responses):
    return (Skipped(raw.where, items.EMPTY_REPLY),)
  subset = items.optional_word(raw, ('source',)) or 'all'
  return (
    Example(
      items.uid_of(raw), (Message('user', question),), responses, LABELS[label], subset=subset
    ),
  )


def group(subset: str) -> str:
  """'knowledge', 'reasoning', 'math' or 'coding': the group of a source; another source is its own
  group."""
  return next((name for start, name in GROUPS.items() if subset.startswith(start)), subset)
