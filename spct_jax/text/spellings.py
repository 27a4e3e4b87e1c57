r"""Every way in which a tokenizer's ids can spell a word and what ends it: the token paths as a tree.

What is spelled is asked in characters. A target is

    rest  blank{0..before}  word  blank{0..behind}  end

with `rest` what must come first (the last bytes of a token that the text before is cut in), one of the words, and one
of the ends, such as ',' or '}'. A *path* is a sequence of ids whose text begins with a target, of which no shorter
part does: '1' '0' ',' and '10' ',' and ' 10' ', ' and '10}\n' are paths of 10. Paths are disjoint events, so the
probability that a text begins with one of a word's targets is the sum over its paths of the product of the
probabilities of their ids.

The inner nodes of the tree are what such sequences have in common before their last id; of a node it matters only
what is spelled so far and whether a blank may come before the next piece (`pieces`): its *state*. A state says which
next ids go on to another node, and which end a path, and of which word.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
import dataclasses
import functools

from spct_jax.text import pieces as pieces_
from spct_jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class State:
  """What the next id may be: `ends[i]` the ids that end a path of word i, `goes` id -> its state, and `covers`, the
  ids with which `rest` is complete (none where it was before)."""

  ends: tuple[tuple[int, ...], ...]
  goes: dict[int, int]
  covers: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Node:
  """Reached from node `before` (-1: the root) by `token`; `state` is its own."""

  token: int
  before: int
  state: int


@dataclasses.dataclass(frozen=True)
class Paths:
  """`states[0]` is that of the root; `nodes` are the others, each behind the one that it follows."""

  states: tuple[State, ...]
  nodes: tuple[Node, ...]


class Spelling:
  """The ids of a vocabulary by what they add to a text; `silent` ids (those that end an answer) add nothing to it."""

  def __init__(self, pieces: pieces_.Pieces, silent: Sequence[int]):
    self.pieces, self._known = pieces, {}
    self._sorted = {}
    for glued in (True, False):
      added = [
          (b' ' * (pieces.spaced[v] and not glued) + text, v)
          for v, text in enumerate(pieces.text) if text is not None and v not in silent
      ]
      self._sorted[glued] = sorted(piece for piece in added if piece[0])

  def paths(
      self, words: tuple[bytes, ...], ends: tuple[bytes, ...], *, rest: bytes, glued: bool, before: int, behind: int
  ) -> Paths:
    """The tree of all paths, made once; `glued`: the id before lets no blank come before the next piece."""
    key = words, ends, rest, glued, before, behind
    if key not in self._known:
      self._known[key] = self._paths(*key)
    return self._known[key]

  def _paths(self, words, ends, rest, glued, before, behind):
    targets = [
        (i, rest + b' ' * left + word + b' ' * right + end)
        for i, word in enumerate(words) for left in range(before + 1) for right in range(behind + 1) for end in ends
    ]
    places, queue, states = {(b'', glued): 0}, [(b'', glued)], []
    while len(states) < len(queue):
      spelled, held = queue[len(states)]
      finished, goes = [set() for _ in words], {}
      for i, target in targets:
        if not target.startswith(spelled):
          continue
        left = target[len(spelled):]
        finished[i].update(self._beginning(left, held))
        for length in range(1, len(left)):
          for v in self._exactly(left[:length], held):
            state = spelled + left[:length], self.pieces.glues[v]
            if state not in places:
              places[state] = len(queue)
              queue.append(state)
            goes[v] = places[state]
      covers = self._beginning(rest[len(spelled):], held) if len(spelled) < len(rest) else ()
      states.append(State(tuple(tuple(sorted(found)) for found in finished), goes, tuple(covers)))
    return Paths(tuple(states), tuple(_unfolded(states)))

  def _beginning(self, text: bytes, glued: bool) -> list[int]:
    """The ids whose piece begins with `text`."""
    after = text[:-1] + bytes([text[-1] + 1])  # no text here ends on byte 255
    pieces = self._sorted[glued]
    return [v for _, v in pieces[bisect.bisect_left(pieces, (text,)) : bisect.bisect_left(pieces, (after,))]]

  def _exactly(self, text: bytes, glued: bool) -> list[int]:
    pieces = self._sorted[glued]
    return [v for _, v in pieces[bisect.bisect_left(pieces, (text,)) : bisect.bisect_left(pieces, (text + b'\0',))]]


def _unfolded(states):
  """Nodes for every way to every state: finite, because each id adds to what is spelled."""
  nodes, at = [Node(token, -1, state) for token, state in states[0].goes.items()], 0
  while at < len(nodes):
    nodes += [Node(token, at, state) for token, state in states[nodes[at].state].goes.items()]
    at += 1
  return nodes


@functools.lru_cache(maxsize=8)
def of(tokenizer: Tokenizer) -> Spelling:
  """The spelling of a tokenizer; ValueError where `pieces` cannot read its decoder."""
  return Spelling(pieces_.of(tokenizer), tokenizer.eos_ids)
