"""The meta reward model: one scalar per whole trajectory (paper 2.7, 4.3).

A trajectory is shown as a chat turn: the user message holds the conversation and the responses in the order
*that sample saw*, the assistant's turn is the sampled text, and the scalar is read at its last token. The
sampled token ids are appended as they are; re-encoding their text could give other tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from spct_jax import types
from spct_jax.judges import grm, prompts
from spct_jax.text.tokenizer import Tokenizer

# (prompts, suffixes, the prompt of each suffix, on_rows) -> float32[Q]: `sampling.scoring.Scorer.rewards` of a model.
Score = Callable[[Sequence[Sequence[int]], Sequence[Sequence[int]], Sequence[int], Callable[[int], None] | None], Any]


def reader(
    *, template: prompts.Template, tokenizer: Tokenizer
) -> Callable[[types.Example, Sequence[int]], tuple[int, ...]]:
  """(example, order) -> what the meta-RM reads before a trajectory, as token ids; the trajectory's own ids follow it.

  Each prompt is built and encoded once: many samples of an item saw the same order.
  """
  known: dict[tuple, tuple[int, ...]] = {}

  def prompt_ids(example, order):
    key = example.uid, tuple(order)
    if key not in known:
      known[key] = grm.prompt_ids(prompts.build_meta(example, order, template), tokenizer)
    return known[key]

  return prompt_ids


def score(
    score_fn: Score,
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    limit: int,
    on_rows: Callable[[int], None] | None = None,
) -> np.ndarray:
  """Meta rewards float32[len(rows)] of (what is read before, sampled ids); NaN over `limit` tokens: it never leads.

  Rows whose first part is the same, which samples of one item and order are, share one pass over it.
  `on_rows` is told how many more rows are scored.
  """
  out = np.full(len(rows), np.nan, np.float32)
  fits = [i for i, (prompt, ids) in enumerate(rows) if len(prompt) + len(ids) <= limit]
  known: dict[tuple[int, ...], int] = {}
  suffixes, prompt_of = [], []
  for i in fits:
    prompt, ids = map(tuple, rows[i])
    if not ids:  # the reward is then read at the last token of the prompt
      prompt, ids = prompt[:-1], prompt[-1:]
    suffixes.append(ids)
    prompt_of.append(known.setdefault(prompt, len(known)))
  if fits:
    out[fits] = score_fn(list(known), suffixes, prompt_of, on_rows)
  return out
