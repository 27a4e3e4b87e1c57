"""Gate 1: prompts of text become arrays of token ids.

Spans are encoded one by one, so that nothing can join across the seam of frame and data, and the
ids of the frame before the responses do not depend on what follows (all orders of an example share
that prefix).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from spct_jax.text.tokenizer import Tokenizer
from spct_jax.types import PromptBatch, Span


def encode(spans: Sequence[Span], tokenizer: Tokenizer) -> list[int]:
  """Token ids of a prompt; special tokens come from its frame only."""
  ids = []
  for place, span in enumerate(_joined(spans)):
    if span.data:
      ids += tokenizer.encode_data(span.text)
    else:
      ids += tokenizer.encode_next(span.text) if place else tokenizer.encode(span.text)
  return ids


def batch(
    prompts: Sequence[Sequence[int]], length: int, *, rows: int | None = None, pad_id: int = 0
) -> PromptBatch:
  """Right-pads prompts to `length` tokens, and to `rows` rows where that is given.

  A prompt over the limit is an error here: whoever skips and counts over-long items does so before.
  """
  rows = len(prompts) if rows is None else rows
  if len(prompts) > rows:
    raise ValueError(
        f'batch: got {len(prompts)} prompts for {rows} rows; raise rows or split the batch'
    )
  tokens = np.full((rows, length), pad_id, np.int32)
  lengths = np.zeros(rows, np.int32)
  for row, ids in enumerate(prompts):
    if not 0 < len(ids) <= length:
      raise ValueError(
          f'batch: prompt {row} has {len(ids)} tokens; allowed: 1..{length}; '
          'raise the prompt limit or leave the item out'
      )
    tokens[row, : len(ids)] = ids
    lengths[row] = len(ids)
  return PromptBatch(tokens=tokens, length=lengths, row_mask=np.arange(rows) < len(prompts))


def _joined(spans: Sequence[Span]) -> list[Span]:
  """Neighbouring frame spans as one, so that how a frame was put together is not seen in its ids."""
  joined: list[Span] = []
  for span in spans:
    if joined and not span.data and not joined[-1].data:
      joined[-1] = Span(joined[-1].text + span.text, data=False)
    elif span.text:
      joined.append(span)
  return joined
