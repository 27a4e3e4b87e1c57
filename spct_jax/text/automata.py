"""Finite automata over bytes, and what they become over the token ids of a tokenizer.

An `Automaton` reads a text byte by byte. `compiled` turns it into a table that reads it token by token and lands in
the same states, wherever tokens begin and end:

    class_of[V]    tokens that act alike on every state are one class
    next[S, C]     the state after a token of that class

A token acts on the states as its bytes do one after the other, so it is a function from states to states, and the
functions of all tokens are found by composing those of bytes: each new one costs S steps, each token one lookup a
byte. There are few functions beside the tokens (`Scores` and ` Scores` differ, ` apple` and ` pear` do not), so a
vocabulary of 150,000 costs little more than one of 2,000, in time and in size.

The one thing besides bytes that a state may have to know is whether the next blank is swallowed (`pieces`): for such
tokenizers, token states are 2 q + glued.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
import dataclasses

import numpy as np

from spct_jax.text.pieces import Pieces

_BLANK, _GLUE = b'\x00', b'\x01'  # letters of a token beside the classes of its bytes, which follow


@dataclasses.dataclass(frozen=True, eq=False)
class Automaton:
  """`next[S, 256]`, `stops[S]`: a text ends where such a state is reached; `dead[S]`: it must never be reached."""

  next: np.ndarray
  stops: np.ndarray
  dead: np.ndarray

  def run(self, state: int, text: bytes) -> int:
    for byte in text:
      state = int(self.next[state, byte])
    return state

  def end(self, state: int, text: bytes) -> int | None:
    """How many bytes of a text are read when it stops; None if it does not."""
    for place, byte in enumerate(text, start=1):
      state = int(self.next[state, byte])
      if self.stops[state]:
        return place
    return None


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
  """An automaton over token ids; class 0 holds the ids without a text and those that were excluded."""

  class_of: np.ndarray  # int32[V]
  next: np.ndarray  # int32[S, C]
  stops: np.ndarray  # bool[S]
  dead: np.ndarray  # bool[S]
  joined: bool

  def start(self, state: int) -> int:
    """The token state at the start of a text, for a state of the automaton."""
    return 2 * state + 1 if self.joined else state

  def of(self, state: int) -> tuple[int, ...]:
    """All token states of a state of the automaton."""
    return (2 * state, 2 * state + 1) if self.joined else (state,)


def explored(
    starts: Sequence[Hashable], step: Callable[[Hashable, int], Hashable], groups: np.ndarray
) -> tuple[dict[Hashable, int], np.ndarray]:
  """All states that are reached from `starts`, numbered as found, and next[S, 256].

  groups uint8[256]: bytes of one number are alike to `step`.
  """
  index = {state: place for place, state in enumerate(dict.fromkeys(starts))}
  letters, inverse = np.unique(groups, return_index=True)[1], np.unique(groups, return_inverse=True)[1]
  rows, states = [], list(index)
  for state in states:  # which grows
    row = []
    for letter in letters.tolist():
      after = step(state, letter)
      if after not in index:
        index[after] = len(index)
        states.append(after)
      row.append(index[after])
    rows.append(row)
  return index, np.asarray(rows, np.int32)[:, inverse]


def minimal(next_: np.ndarray, kinds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Merges states that no text tells apart: (the new state of each, the new next). States whose columns of
  `kinds[:, S]` differ are never merged."""
  next_columns = np.unique(next_, axis=1)
  label, count = np.unique(kinds.astype(int), axis=1, return_inverse=True)[1].reshape(-1), 0
  while label.max() + 1 > count:
    count = label.max() + 1
    label = np.unique(np.column_stack([label, label[next_columns]]), axis=0, return_inverse=True)[1].reshape(-1)
  first = np.unique(label, return_index=True)[1]
  return label, label[next_[first]].astype(np.int32)


def strings(wanted: Sequence[bytes]) -> Automaton:
  """Stops at the end of the first of the strings that a text holds (Aho-Corasick); it starts in state 0."""
  prefixes = {text[:length] for text in wanted for length in range(len(text) + 1)}

  def step(held: bytes, byte: int) -> bytes:
    if any(held.endswith(text) for text in wanted):
      return held  # for good
    held += bytes([byte])
    while held not in prefixes:
      held = held[1:]
    return held

  index, next_ = explored([b''], step, _groups_of(b''.join(wanted)))
  stops = np.array([any(held.endswith(text) for text in wanted) for held in index])
  return Automaton(next_, stops, np.zeros(len(index), bool))


def exactly(text: bytes) -> Automaton:
  """Stops at the end of a text that is this one, but for blanks that split no word; it starts in state 0."""
  last, word = len(text), [bytes([byte]).isalnum() or byte == ord('-') for byte in text]

  def step(place: int, byte: int) -> int:
    if place < 0 or place == last:
      return place
    if text[place] == byte:
      return place + 1
    return place if byte == ord(' ') and not (place and word[place - 1] and word[place]) else -1

  index, next_ = explored([0], step, _groups_of(text + b' '))
  places = np.array(list(index))
  return Automaton(next_, places == last, places < 0)


def _groups_of(used: bytes) -> np.ndarray:
  """uint8[256]: each of the used bytes for itself, and all others."""
  groups, used = np.zeros(256, np.uint8), sorted(set(used))
  groups[used] = np.arange(1, len(used) + 1)
  return groups


def compiled(automaton: Automaton, pieces: Pieces, excluded: Iterable[int] = (), ignored: Iterable[int] = ()) -> Table:
  """The automaton over token ids. `excluded` ids lead to the dead state if there is one, and change nothing else;
  `ignored` ids change nothing."""
  groups = np.unique(automaton.next, axis=1, return_inverse=True)[1].reshape(-1)  # of bytes that act alike
  states = len(automaton.next)
  letters: dict[int, np.ndarray] = {}
  columns = automaton.next[:, np.unique(groups, return_index=True)[1]].T.astype(np.int32)
  for letter, after in enumerate(columns):
    if pieces.joined:
      after = np.stack([2 * after, 2 * after], axis=1).reshape(-1)
    letters[letter + 2] = after
  if pieces.joined:
    halves = np.arange(states, dtype=np.int32)
    blank = automaton.next[:, ord(' ')]
    # A swallowed blank, or a blank; then nothing is glued any more.
    letters[0] = np.stack([2 * blank, 2 * halves], axis=1).reshape(-1).astype(np.int32)
    letters[1] = np.stack([2 * halves + 1, 2 * halves + 1], axis=1).reshape(-1)
  translate = bytes(min(group + 2, 255) for group in groups.tolist())
  if groups.max() + 2 > 255:
    raise ValueError(f'automaton: {groups.max() + 1} kinds of bytes; allowed: 253. Use fewer stop strings.')

  size = 2 * states if pieces.joined else states
  identity = np.arange(size, dtype=np.int32)
  out = identity
  if automaton.dead.any():
    dead = int(np.flatnonzero(automaton.dead)[0])
    out = np.full(size, 2 * dead if pieces.joined else dead, np.int32)
  functions, number = [out, identity], {identity.tobytes(): 1}
  memo: dict[tuple[int, int], int] = {}
  known: dict[bytes, int] = {b'': 1}

  def function(word: bytes) -> int:
    found = 1
    for letter in word:
      key = found, letter
      after = memo.get(key)
      if after is None:
        composed = letters[letter][functions[found]]
        after = number.setdefault(composed.tobytes(), len(functions))
        if after == len(functions):
          functions.append(composed)
        memo[key] = after
      found = after
    return found

  excluded, ignored = set(excluded), set(ignored)
  function_of = np.zeros(len(pieces.text), np.int32)
  for index, text in enumerate(pieces.text):
    if text is None or index in excluded:
      continue
    if index in ignored:
      function_of[index] = 1
      continue
    word = text.translate(translate)
    if pieces.spaced[index]:
      word = _BLANK + word
    if pieces.glues[index]:
      word += _GLUE
    found = known.get(word)
    if found is None:
      found = known[word] = function(word)
    function_of[index] = found
  used, class_of = np.unique(np.concatenate([[0], function_of]), return_inverse=True)
  by_state = (lambda values: np.repeat(values, 2)) if pieces.joined else (lambda values: values)
  return Table(
      class_of=class_of.reshape(-1)[1:].astype(np.int32),
      next=np.stack([functions[f] for f in used.tolist()], axis=1),
      stops=by_state(automaton.stops),
      dead=by_state(automaton.dead),
      joined=pieces.joined,
  )
