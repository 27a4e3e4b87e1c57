r"""The score line as automata over bytes: where it is complete, and what may be written so that it parses.

Both read a completion as `judges.parse` does: thoughts (`<think>` at the start of a line, to the next closing tag)
are skipped, a label stands at the start of a line behind any Markdown, and its box follows on the line behind a
colon, or with nothing but signs and blanks between.

    closes      stops behind the first closed box of a line labelled `Scores` (`Final Scores`, `Overall Scores`). From
                there on all boxes must say the same, so the scores of whatever follows are these or none, unless a
                thought ends there, behind which the parser begins anew. Bare labels (`Score`, `Output`) also name
                single marks, so there the text goes on. A box with anything but integers, commas and blanks in it
                stops nothing.
    constrained stops behind a box with exactly n integers in [low, high], and has nowhere to go from what could keep
                such a box from being the verdict: a box that is on no score line (labels of all kinds open one), and a
                broken character, which would take its neighbours with it. So the text before it holds no box at all
                but in thoughts, and the parser's rules come down to one: the box is the last thing behind the last
                closing tag.

A state is what the parser would have to remember:

    ('answer', char, tag, blank, label, verdict, box, own)
      char     bytes that a character lacks (constrained only)         tag   the part of a tag that stands there
      blank    the line holds only blanks: `<think>` would open here   label the part of a label that stands there
      own      how much of `LINE` the line holds and nothing else, -1 where there is more (constrained only)
      verdict  what stands behind a label: '' none | 'word' the label just ended, a colon may follow | 'colon' and signs
               since | 'line' other text since | 'signs' only signs, and no colon on this line | 'box' inside the box
      box      how much of `\boxed{` stands there, and whether a score line is where it began
    ('thought', char, tag)
    ('box', i, digits, blank)     inside the box of `constrained`: the i-th score, its digits so far, a blank
    'stop', 'dead'
"""

from __future__ import annotations

from collections.abc import Hashable
import dataclasses
import functools

import numpy as np

from spct_jax.text import automata

LINE = r'Scores:\boxed{'  # how the line begins where the budget forces it, perhaps with blanks at `_BLANKS`
_BLANKS = (0, 6, 7)

_TAGS = ('</think>', '</thinking>', '^<think>', '^<thinking>')  # ^: at the start of a line
_TAG_PARTS = {tag[:length] for tag in _TAGS for length in range(2, len(tag) + 1)} | {'<'}
_FIRST, _PLURAL, _BARE = ('final', 'overall'), ('scores',), ('score', 'output')
_BOX = r'\boxed{'
_SIGNS = frozenset(' \t\n\r\f\v*_`~$<([>')
_IN_BOX = frozenset('0123456789, \t-')
_CHARACTER = '\x80'  # stands for every character that is not ASCII


@dataclasses.dataclass(frozen=True, eq=False)
class Reader:
  """An automaton, its states at the start of a completion, in a thought (where the prompt opened one) and outside.

  `line[S]` is how much of `LINE` a line of its own holds so far, -1 where it is none; `inside[S]` tells the states of
  the box.
  """

  automaton: automata.Automaton
  answer: int
  thought: int
  line: np.ndarray
  inside: np.ndarray

  def start(self, in_thought: bool) -> int:
    return self.thought if in_thought else self.answer


@functools.lru_cache(maxsize=1)
def closes() -> Reader:
  """Stops behind the first closed box of a line labelled `Scores`."""
  return _reader(None)


@functools.lru_cache(maxsize=64)
def constrained(n: int, low: int, high: int) -> Reader:
  """Stops behind the verdict, n integers from `low` to `high`; dead where none could follow."""
  if n < 1 or low > high:
    raise ValueError(f'score line: got {n} scores from {low} to {high}; allowed: at least one score, low <= high')
  return _reader((n, tuple(map(str, range(low, high + 1)))))


def _reader(box) -> Reader:
  answer, thought = ('answer', '', '', True, _NEW_LINE, '', _NO_BOX, 0), ('thought', '', '')
  states, next_ = automata.explored([answer, thought], functools.partial(_step, box), _groups())
  of = lambda value: np.array([value(state) for state in states])
  stops, dead, inside = of(lambda s: s == 'stop'), of(lambda s: s == 'dead'), of(lambda s: s[0] == 'box')
  line = of(lambda s: s[-1] if s[0] == 'answer' else -1)
  new, next_ = automata.minimal(next_, np.stack([stops, dead, inside, line]))
  one = np.unique(new, return_index=True)[1]  # of each new state, an old one
  automaton = automata.Automaton(next_, stops[one], dead[one])
  return Reader(automaton, int(new[states[answer]]), int(new[states[thought]]), line[one], inside[one])


# --- one byte


_NEW_LINE = ('signs', '')
_NO_BOX = (0, False)


def _step(box, state: Hashable, byte: int) -> Hashable:
  """The state after a byte; `box` is None for `closes`, else (n, the words for a score)."""
  if state in ('stop', 'dead'):
    return state
  if state[0] == 'box':
    return _in_box(*box, *state[1:], chr(byte))
  char = state[1]
  if box is not None and (char or byte >= 0x80):
    char = _utf8(char, byte)
    if char is None:
      return 'dead'
    if state[1]:  # the character was read with its first byte
      return (state[0], char, *state[2:])
  byte_char = chr(byte) if byte < 0x80 else _CHARACTER
  if state[0] == 'thought':
    tag = _tag(state[2], byte_char, False)
    return _AFTER_THOUGHT if tag in _TAGS else ('thought', char, tag)
  return _in_answer(box, char, *state[2:], byte_char)


def _in_answer(box, char, tag, blank, label, verdict, part, own, c):
  tag = _tag(tag, c, blank)
  if tag in _TAGS:
    return ('thought', '', '') if tag[0] == '^' else _AFTER_THOUGHT
  if verdict == 'box' and c == '}':
    return 'stop'
  label, ended = _label(label, c, _PLURAL if box is None else _PLURAL + _BARE)
  held = 'word' if ended else verdict
  part = (1, held not in ('', 'box')) if c == '\\' else (part[0] + 1, part[1]) if _BOX[part[0]] == c else _NO_BOX
  verdict = _verdict(held, c)
  if part[0] == len(_BOX):
    if box is not None:
      return ('box', 0, '', False) if part[1] else 'dead'
    part, verdict = _NO_BOX, 'box' if part[1] else verdict
  blank = c == '\n' or (blank and c in ' \t\r\f\v')
  return 'answer', char, tag, blank, label, verdict, part, -1 if box is None else _own(own, c)


def _own(own: int, c: str) -> int:
  if c == '\n':
    return 0
  if own in _BLANKS and c == ' ':
    return own
  return own + 1 if own >= 0 and LINE[own] == c else -1


# A label can follow a closing tag at once, an opening tag only at the start of the next line.
_AFTER_THOUGHT = ('answer', '', '', False, _NEW_LINE, '', _NO_BOX, -1)


def _tag(part: str, c: str, blank: bool) -> str:
  if c == '<':
    return '^<' if blank else '<'
  longer = '</' if part + c == '^</' else part + c.lower()
  return longer if longer in _TAG_PARTS else ''


def _label(label, c, last) -> tuple[tuple[str, str] | None, bool]:
  """(the part of a label on this line, whether one ended before `c`): ^signs (digits[.)])? (final|overall)? label."""
  if c == '\n':
    ended = label is not None and label[0] == 'word' and label[1] in last
    return _NEW_LINE, ended
  if label is None:
    return None, False
  kind, word = label
  if kind == 'signs' and c in ' \t>*_#`~+-|':
    return label, False
  if kind == 'signs' and c in '0123456789':
    return ('digits', 'd'), False
  if kind == 'digits':
    if c in '0123456789' and word == 'd':
      return ('digits', 'dd'), False
    return (('numbered', ''), False) if c in '.)' else (None, False)
  if kind == 'numbered' and c in ' \t*_':
    return label, False
  if kind == 'word' and word in last and not (c.isascii() and c.isalnum() or c == '_'):
    return None, True
  if c in ' \t' and (kind == 'gap' or (kind == 'word' and word in _FIRST)):
    return ('gap', ''), False
  # Behind `final` only the last word is missing; '=' marks a word that may not be followed by another.
  own = '=' if kind == 'gap' or word[:1] == '=' else ''
  longer = word.removeprefix('=') + c.lower()
  candidates = last if own else last + _FIRST
  if kind in ('signs', 'numbered', 'gap', 'word') and any(other.startswith(longer) for other in candidates):
    return ('word', longer if longer in last else own + longer), False
  return None, False


def _verdict(verdict: str, c: str) -> str:
  if verdict == 'box':
    return 'box' if c in _IN_BOX else ''
  if verdict == 'word':
    if c in ' \t*_`~':
      return 'word'
    if c == ':':
      return 'colon'
    verdict = 'signs'
  if verdict == 'signs':
    return 'signs' if c in _SIGNS else ''
  if verdict == 'colon':
    return 'signs' if c == '\n' else 'colon' if c in _SIGNS else 'line'
  return '' if c == '\n' else verdict


def _in_box(n, words, i, digits, blank, c):
  """Integers with commas between, and a blank wherever the parser takes one."""
  if c == ' ' and not blank and (not digits or digits in words):
    return 'box', i, digits, True
  if c in ',}' and digits in words:
    if c == '}':
      return 'stop' if i == n - 1 else 'dead'
    return ('box', i + 1, '', False) if i < n - 1 else 'dead'
  if digits and blank:
    return 'dead'
  longer = digits + c
  return ('box', i, longer, False) if any(w.startswith(longer) for w in words) else 'dead'


# How many bytes a character lacks, with the range of the next one, by its first byte (Unicode, table 3-7).
_LEADS = {
    **{byte: '1' for byte in range(0xC2, 0xE0)}, **{byte: '2' for byte in range(0xE1, 0xF0)}, 0xE0: '2a', 0xED: '2b',
    **{byte: '3' for byte in range(0xF1, 0xF4)}, 0xF0: '3a', 0xF4: '3b',
}  # fmt: skip
_RANGES = {'2a': (0xA0, 0xBF), '2b': (0x80, 0x9F), '3a': (0x90, 0xBF), '3b': (0x80, 0x8F)}


def _utf8(char: str, byte: int) -> str | None:
  """What a character lacks after a byte; None where no character goes on so."""
  if not char:
    return _LEADS.get(byte)
  low, high = _RANGES.get(char, (0x80, 0xBF))
  if not low <= byte <= high:
    return None
  return {'1': '', '2': '1', '3': '2'}[char[0]]


def _groups() -> np.ndarray:
  """Bytes that `_step` treats alike."""
  letters = set(''.join(_TAGS) + ''.join(_FIRST + _PLURAL + _BARE) + _BOX)
  signs = set(' \t\n\r\f\v*_`~$<([>+-|#:.)/\\{},')
  names: dict[Hashable, int] = {}

  def name(byte):
    c = chr(byte)
    if byte >= 0x80:
      return _LEADS.get(byte), tuple(low <= byte <= high for low, high in (*_RANGES.values(), (0x80, 0xBF)))
    if c in signs or c in '0123456789' or c.lower() in letters:
      return c
    return 'word' if c.isalnum() else 'other'

  return np.array([names.setdefault(name(byte), len(names)) for byte in range(256)], np.uint8)
