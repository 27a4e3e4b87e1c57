"""The meta reward model: one scalar per whole trajectory (paper 2.7, 4.3).

A trajectory is shown as a chat turn: the user message holds the conversation and the responses in the order
*that sample saw*, the assistant's turn is the sampled text, and the scalar is read at its last token. The
sampled token ids are appended as they are; re-encoding their text could give other tokens.
"""

from collections.abc import Callable, Sequence

import numpy as np

from spct_jax import types
from spct_jax.judges import grm, prompts
from spct_jax.text.tokenizer import Tokenizer

# (tokens int32[Q, L], lengths int32[Q]) -> meta rewards float32[Q], numpy in and out.
Score = Callable[[np.ndarray, np.ndarray], np.ndarray]


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
    rows: Sequence[Sequence[int]],
    *,
    buckets: tuple[int, ...],
    batch_rows: int,
    pad_id: int,
    on_batch: Callable[[int], None] | None = None,
) -> np.ndarray:
  """Meta rewards float32[len(rows)]; NaN for a row longer than the last bucket, which then never leads.

  Rows are scored `batch_rows` at a time, those of a shorter bucket first, otherwise in their given order; each batch
  is padded to the smallest bucket that holds it. So the composition of a batch depends on the rows alone, and few
  short rows are padded to the longest.
  """
  out = np.full(len(rows), np.nan, np.float32)
  bucket = np.searchsorted(buckets, [len(row) for row in rows])
  fits = [i for i in np.argsort(bucket, kind='stable').tolist() if bucket[i] < len(buckets)]
  for start in range(0, len(fits), batch_rows):
    index = fits[start : start + batch_rows]
    width = buckets[bucket[index[-1]]]  # the last row is of the longest bucket
    tokens = np.full((batch_rows, width), pad_id, np.int32)
    lengths = np.ones(batch_rows, np.int32)
    for r, i in enumerate(index):
      tokens[r, : len(rows[i])] = rows[i]
      lengths[r] = len(rows[i])
    out[index] = np.asarray(score_fn(tokens, lengths))[: len(index)]
    if on_batch is not None:
      on_batch(len(index))
  return out
