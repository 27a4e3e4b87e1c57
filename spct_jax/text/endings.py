r"""Where a sample ends besides at an end-of-sequence token, as tables over token ids for the engine.

    stop_strings   the text holds one of some strings, whichever tokens spell it
    score_line     the score line is complete (`score_line.closes`)
    constrained    only what leads to a score line that parses is drawn, and the text ends with it

A constrained sample always completes its line. With `need` the tokens that a state still takes at least, a token
may be drawn if the state behind it needs no more than are left:

    inside the box   the fewest tokens to its end
    before it        the fewest to a line of its own, `Scores: \boxed{`, and a reserve: what the most expensive score
                     would take n times, so that the budget chooses no score

So the text is the model's own until just enough tokens are left, then the line begins, wherever the text is: in a
thought, which is closed first, or in the middle of a word. Without a token that needs less than it costs there would
be a way out of the budget; there is none, because `need` is a shortest path.
"""

from __future__ import annotations

from collections.abc import Sequence
import functools

import numpy as np

from spct_jax.text import automata, pieces, score_line
from spct_jax.text.tokenizer import Tokenizer
from spct_jax.types import Guide

_NEVER = 2**30  # tokens


@functools.lru_cache(maxsize=16)
def stop_strings(tokenizer: Tokenizer, strings: tuple[str, ...]) -> tuple[Guide, int]:
  """(table, start). ValueError for a string that is empty or that no tokens spell."""
  found = pieces.of(tokenizer)
  for text in strings:
    if not text:
      raise ValueError("stop strings: got '', which every text holds; allowed: strings of at least one character")
    _check_spelled(tokenizer, found, text)
  table = automata.compiled(strings_automaton(strings), found, ignored=tokenizer.eos_ids)
  return _guide(table, None), table.start(0)


def strings_automaton(strings: Sequence[str]) -> automata.Automaton:
  return automata.strings([text.encode('utf-8', 'surrogatepass') for text in strings])


def _check_spelled(tokenizer, found, text):
  table = automata.compiled(strings_automaton((text,)), found, ignored=tokenizer.eos_ids)
  reached, size = {table.start(0)}, 0
  while len(reached) > size:
    size = len(reached)
    reached |= set(table.next[sorted(reached)].ravel().tolist())
  if not table.stops[sorted(reached)].any():
    raise ValueError(
        f'stop strings: got {text!r}, which no tokens of the tokenizer spell, so no text would ever stop there; '
        'allowed: text as the tokenizer decodes it'
    )


@functools.lru_cache(maxsize=8)
def score_line_closes(tokenizer: Tokenizer) -> tuple[Guide, dict[bool, int]]:
  """(table, its start by whether the prompt has opened a thought)."""
  reader = score_line.closes()
  table = automata.compiled(reader.automaton, pieces.of(tokenizer), ignored=tokenizer.eos_ids)
  return _guide(table, None), {opened: table.start(reader.start(opened)) for opened in (False, True)}


# How many scores, from, to, and whether the prompt has opened a thought.
Kind = tuple[int, int, int, bool]


@functools.lru_cache(maxsize=16)
def constrained(tokenizer: Tokenizer, kinds: tuple[Kind, ...]) -> tuple[Guide, dict[Kind, int]]:
  """(one table for all kinds of score lines, its start by kind). ValueError if no tokens spell such a line."""
  found = pieces.of(tokenizer)
  lines = tuple(dict.fromkeys(kind[:3] for kind in kinds))
  readers = [score_line.constrained(*line) for line in lines]
  offsets = np.cumsum([0] + [len(reader.automaton.next) for reader in readers]).tolist()
  joined = lambda name: np.concatenate([getattr(reader.automaton, name) for reader in readers])
  whole = automata.Automaton(
      np.concatenate([reader.automaton.next + first for reader, first in zip(readers, offsets)]),
      joined('stops'), joined('dead'),
  )
  table = automata.compiled(whole, found, excluded=tokenizer.eos_ids)
  need = np.full(len(table.next), _NEVER, np.int32)
  for line, reader, first in zip(lines, readers, offsets):
    need = np.minimum(need, _need(table, reader, first, _reserve(line, found)))
  starts = {}
  for kind in kinds:
    place = lines.index(kind[:3])
    starts[kind] = table.start(offsets[place] + readers[place].start(kind[3]))
    if need[starts[kind]] >= _NEVER:
      raise ValueError(
          f'constrained score lines: no tokens of the tokenizer spell a line such as {_example(kind)!r}'
          + (' behind </think>' if kind[3] else '') + '; leave the option off'
      )
  return _guide(table, need), starts


def _example(kind: Kind) -> str:
  n, _, high = kind[:3]
  return score_line.LINE.replace(':', ': ') + ', '.join([str(high)] * n) + '}'


def _reserve(line: tuple[int, int, int], found: pieces.Pieces) -> int:
  """Tokens that a box takes at most from its start on, each score spelled as shortly as it can be behind ', '."""
  n, low, high = line
  letters = set(b'-0123456789, }')
  few = pieces.Pieces(
      tuple(text if text is not None and letters.issuperset(text) else None for text in found.text), found.spaced,
      found.glues,
  )
  most = 0
  for score in range(low, high + 1):
    table = automata.compiled(automata.exactly((', '.join([str(score)] * n) + '}').encode()), few)
    cost = int(_steps(table.next, table.stops)[list(table.of(0))].max())
    if cost >= _NEVER:
      raise ValueError(f'constrained score lines: no tokens of the tokenizer spell the score {score} in a box')
    most = max(most, cost)
  return most


def _steps(next_: np.ndarray, ends: np.ndarray, edges: np.ndarray | None = None, at: int = 0) -> np.ndarray:
  """int[S]: the fewest tokens from each state to one of `ends`, over the `edges` bool[S, C]; `at` more from there."""
  steps = np.where(ends, at, _NEVER)
  while True:
    after = steps[next_]
    if edges is not None:
      after = np.where(edges, after, _NEVER)
    better = np.where(ends, steps, np.minimum(steps, after.min(axis=1) + 1))
    if (better == steps).all():
      return np.minimum(steps, _NEVER)
    steps = better


def _need(table: automata.Table, reader: score_line.Reader, first: int, reserve: int) -> np.ndarray:
  """int[S]: see the module's text; `_NEVER` for states that are not the reader's, which begin at `first`."""
  local = np.full(len(table.next), -1)
  for state in range(len(reader.line)):
    local[list(table.of(first + state))] = state
  mine = lambda values, other: np.where(local >= 0, values[local], other)
  stops, end = mine(reader.automaton.stops, False), mine(reader.automaton.stops | reader.inside, False)
  place = np.where(end, len(score_line.LINE), mine(reader.line, -1))
  within = np.where(end, _steps(table.next, stops), _NEVER)
  entered = np.unique(table.next[mine(~(reader.automaton.dead | reader.automaton.stops | reader.inside), False)])
  entered = entered[within[entered] < _NEVER]
  reserve = max(reserve, int(within[entered].max(initial=0)))
  # On its own line the text goes on to the box; from anywhere else to such a line, and into no box from there.
  after = place[table.next]
  edges = np.where(place[:, None] >= 0, after > place[:, None], after < len(score_line.LINE))
  before = _steps(table.next, end & (within < _NEVER), edges=edges, at=reserve)
  return np.where(end, within, np.where(local >= 0, before, _NEVER))


def _guide(table: automata.Table, need: np.ndarray | None) -> Guide:
  """Padded to powers of two, so that other strings and scores seldom ask for another program."""
  (S, C), size = table.next.shape, lambda n: 1 << max(n - 1, 1).bit_length()
  if S > 2**15 - 1:
    raise ValueError(f'stopping: got an automaton of {S} states; allowed: {2**15 - 1}. Use fewer or shorter strings.')
  rows, columns = size(S) - S, size(C) - C
  return Guide(
      class_of=table.class_of,
      next=np.pad(table.next, ((0, rows), (0, columns))).astype(np.int16),
      stops=np.pad(table.stops, (0, rows)),
      need=None if need is None else np.pad(need, (0, rows), constant_values=_NEVER).astype(np.int32),
      start=None,
  )
