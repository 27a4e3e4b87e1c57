"""The records and arrays that cross package boundaries, and the one alphabet of axes.

Axes, each letter with one meaning everywhere:

    B examples          K samples per example    N responses per example
    U unique prompts    P prompt tokens          T generated tokens      L = P + T
    Q tasks of a rollout (one task = one sample of one prompt)           R engine rows
    V vocabulary        D model width            H query heads           M key/value heads
    F feed-forward width

Everything here is a frozen dataclass over text or numpy arrays, so that importing this module never
imports JAX. Masks are bool and True counts:

    row_mask       not a padding row
    token_mask     the token was generated, through the end-of-sequence token
    response_mask  the response exists
    valid          the sample parsed
    keep           the sample passed a filter
"""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Message:
  """One turn of a conversation; `role` is 'system', 'user' or 'assistant'."""

  role: str
  content: str


@dataclasses.dataclass(frozen=True)
class Example:
  """One item to judge: a conversation whose last turn is the query, and n >= 1 candidate responses.

  `label` is the index of the unique best response when n >= 2, and the gold score (0 or 1) when n == 1;
  None where the item has no label. `grades` are the graded labels, one per response, where known.
  """

  uid: str
  messages: tuple[Message, ...]
  responses: tuple[str, ...]
  label: int | None = None
  grades: tuple[float, ...] | None = None
  subset: str = 'all'
  reference: str | None = None
  principles: str | None = None


@dataclasses.dataclass(frozen=True)
class Span:
  """A piece of a prompt. `data` text is quoted material: nothing in it is a marker or a special token."""

  text: str
  data: bool


@dataclasses.dataclass(frozen=True)
class Prompt:
  """What the judge reads for one example in one order of its responses.

  `order[slot]` is the index of the response shown in that slot, so `scores[order[slot]] = shown[slot]`.
  `low` and `high` bound the integer scores that the prompt asks for.
  """

  uid: str
  spans: tuple[Span, ...]
  order: tuple[int, ...]
  hinted: bool
  low: int
  high: int


@dataclasses.dataclass(frozen=True)
class PromptBatch:
  """Right-padded prompts. tokens int32[U, P], length int32[U], row_mask bool[U]."""

  tokens: np.ndarray
  length: np.ndarray
  row_mask: np.ndarray


@dataclasses.dataclass(frozen=True)
class Guide:
  """An automaton over token ids that every task of a rollout carries along: where it ends, or what it may draw.

  A task is in a state; a token v takes it from state s to `next[s, class_of[v]]`.

  class_of int32[V of the tokenizer] (an id without a text is of class 0), next int16[S, C], stops bool[S] (a task ends
  where it gets into such a state), need int32[S] or None (the tokens to a stop at least: a token is drawn only if the
  state behind it needs no more than are left), start int32[Q].
  """

  class_of: np.ndarray
  next: np.ndarray
  stops: np.ndarray
  need: np.ndarray | None
  start: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Tasks:
  """What the engine is to sample: Q tasks, each one sample of one prompt, all arrays of length Q.

  prompt int32 (index into U), uid uint32[Q, 2] (stable 64-bit hash of the example's uid), visit int32,
  sample int32; temperature, top_p, min_p float32; top_k int32 (0 = off); row_mask bool.
  A temperature of 0 is greedy. `top_p = 1`, `top_k = 0`, `min_p = 0` switch truncation off. `guides` end tasks, or
  say what they may draw.
  """

  prompt: np.ndarray
  uid: np.ndarray
  visit: np.ndarray
  sample: np.ndarray
  temperature: np.ndarray
  top_p: np.ndarray
  top_k: np.ndarray
  min_p: np.ndarray
  row_mask: np.ndarray
  guides: tuple[Guide, ...] = ()


@dataclasses.dataclass(frozen=True)
class TaskInfo:
  """What a person would call a task: the text-side twin of one row of `Tasks`."""

  uid: str
  sample: int
  visit: int
  order: tuple[int, ...]
  hinted: bool


@dataclasses.dataclass(frozen=True)
class Kept:
  """What each token was drawn from, where a sampler recorded it (`sampling.decoding`, `sample_kept`).

  In Rollouts arrays: ids int32[Q, T, C], the likeliest first, -1 behind the last; logp float32[Q, T] of the drawn
  token among them, at the sampling temperature; count int32[Q, T] that truncation kept, more than C where the cap cut.
  In a Trajectory tuples with an entry for each token, `ids` without padding.
  """

  ids: np.ndarray | tuple[tuple[int, ...], ...]
  logp: np.ndarray | tuple[float, ...]
  count: np.ndarray | tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Rollouts:
  """Generated tokens, in the order of the tasks. tokens int32[Q, T], logp float32[Q, T], token_mask bool[Q, T].

  `token_mask` is True through the token that ended the task. `ended` bool[Q]: that was an end-of-sequence token or a
  guide's stop; False: the length limit. `logp` is of the full vocabulary at the sampling temperature, before
  truncation. `withdrawn` bool[Q] marks tasks that were given up while they waited or ran: empty rows; None: no task was.
  """

  tokens: np.ndarray
  logp: np.ndarray
  token_mask: np.ndarray
  ended: np.ndarray
  withdrawn: np.ndarray | None = None
  kept: Kept | None = None

  def take(self, index: np.ndarray) -> Rollouts:
    """Those of some tasks."""
    return _take(self, np.asarray(index, np.int64))


def _take(record, index):
  """Every array of a record, and of those within it, at `index`; None stays."""
  if dataclasses.is_dataclass(record):
    fields = dataclasses.fields(record)
    return dataclasses.replace(record, **{field.name: _take(getattr(record, field.name), index) for field in fields})
  return None if record is None else record[index]


@dataclasses.dataclass(frozen=True)
class Trajectory:
  """One judgement as it was sampled: the record that stages exchange.

  `scores` are in the order that the model saw (`order[slot]` = response index), None if `parse` is not 'ok'.
  `token_ids` run through the end-of-sequence token; learners train on them, never on re-encoded text.
  """

  uid: str
  sample: int
  visit: int
  order: tuple[int, ...]
  hinted: bool
  prompt_ids: tuple[int, ...]
  token_ids: tuple[int, ...]
  logp: tuple[float, ...]
  text: str
  scores: tuple[int, ...] | None
  parse: str
  kept: Kept | None = None


@dataclasses.dataclass(frozen=True)
class Judgments:
  """Scores in the order of the example's own responses (the shown order is undone).

  scores int32[B, K, N] (0 where invalid or absent), valid bool[B, K], response_mask bool[B, N].
  """

  scores: np.ndarray
  valid: np.ndarray
  response_mask: np.ndarray
