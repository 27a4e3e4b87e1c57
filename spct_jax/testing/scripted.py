"""An engine that answers from a script: every stage, vote and report can be checked to the digit.

It takes the place of `Engine.generate` (same call, same arrays out), so everything around it - orders, prompts,
chunks, parsing, votes, training on the written tokens, resuming - is the product's own code.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from spct_jax import types
from spct_jax.text.tokenizer import Tokenizer


class ScriptedEngine:
  """Writes `script(info)` for each task; `info` tells uid, sample, visit, shown order and hint.

  A text is cut at `max_new_tokens`, as a model's is, and ends in the end-of-sequence token if there is room.
  Where votes may stop, `rows` tasks run side by side and end together, and the next ones begin.
  """

  def __init__(
      self, tokenizer: Tokenizer, script: Callable[[types.TaskInfo], str], *, max_new_tokens: int, rows: int = 4
  ):
    self._tokenizer = tokenizer
    self._script = script
    self._length = max_new_tokens
    self._rows = rows
    self.calls: list[tuple[types.TaskInfo, ...]] = []

  def __call__(
      self, prompts: types.PromptBatch, tasks: types.Tasks, infos: tuple[types.TaskInfo, ...], withdraw=None
  ) -> types.Rollouts:
    self.calls.append(infos)
    rows = len(tasks.prompt)
    tokens = np.full((rows, self._length), self._tokenizer.pad_id, np.int32)
    mask = np.zeros((rows, self._length), bool)
    gone, ended = np.zeros((2, rows), bool)
    made = lambda index: types.Rollouts(
        tokens[index], np.where(mask[index], np.float32(-1), np.float32(0)), mask[index], ended[index]
    )
    waiting = list(range(len(infos)))
    while waiting:
      count = len(waiting) if withdraw is None else self._rows
      running, waiting = np.asarray(waiting[:count]), waiting[count:]
      for row in running:
        ids = [*self._tokenizer.encode_data(self._script(infos[row])), self._tokenizer.eos_ids[0]]
        ended[row] = len(ids) <= self._length
        ids = ids[: self._length]
        tokens[row, : len(ids)] = ids
        mask[row, : len(ids)] = True
      if withdraw is not None:
        gone[withdraw(running, made(running))] = True
        waiting = [row for row in waiting if not gone[row]]
    tokens[gone], mask[gone], ended[gone] = self._tokenizer.pad_id, False, False
    return dataclasses.replace(made(np.arange(rows)), withdrawn=None if withdraw is None else gone)


def verdict(info: types.TaskInfo, scores: tuple[int, ...]) -> str:
  """A well-formed judgement that gives `scores` (in the example's own order) in the order that was shown."""
  shown = ', '.join(str(scores[response]) for response in info.order)
  return (
      'Specific Criteria: Accuracy (60%), Clarity (40%)\n'
      'Analysis: One response answers the query more fully.\n'
      f'Scores: \\boxed{{{shown}}}'
  )
