"""The strings that frame a judge's prompt, and how quoted text is kept from imitating them.

The markers are the interface of the released generalist reward models (paper, appendix: prompt
formats). `neutralise` leaves quoted text as it is, except that each place where it imitates a
marker receives the word `(quoted)`: `[The End of Response 1]` becomes `[(quoted) The End of
Response 1]`, and `Analysis:` becomes `Analysis (quoted):`. Nothing is ever removed, so the text
stays readable and the original can be had back by deleting what was inserted.

What counts as an imitation is decided on a folded copy: compatibility forms (full-width letters and
brackets), case, accents, look-alike letters, and everything invisible or blank are folded away
first. Section headers, response frames and the hint are searched across line ends; the labels of
the answer (`Analysis:` and its like) count only at the start of a line, behind any signs and one
short number. Between the words of a marker, and between the signs that open it and its first word,
Markdown, quotes, dashes and underscores are seen through, too. Since the inserted word is part of
no marker and the search sees through blanks, an insertion can make no new marker. The search takes
time linear in the text: no two runs of the same signs stand side by side in a pattern.
"""

from __future__ import annotations

import functools
import re
import unicodedata

CRITERIA = '#### Evaluation Criteria ####'
CONVERSATION = '#### Conversation Context ####'
RESPONSES = '#### Responses to be Scored ####'
FORMAT = '#### Output Format Requirements ####'
PRINCIPLES = '#### Given Principles ####'
REFERENCE = '#### Reference Answer ####'
HEADERS = (CRITERIA, CONVERSATION, RESPONSES, FORMAT, PRINCIPLES, REFERENCE)

SPECIFIC = 'Specific Criteria:'
ANALYSIS = 'Analysis:'
SCORES = 'Scores:'
LABELS = (SPECIFIC, ANALYSIS, SCORES)

HINT = 'The best response is: Response'
HINT_SINGLE = 'The correct score is:'
TURNS = {'system': 'System', 'user': 'User', 'assistant': 'Assistant'}

QUOTED, LABEL_QUOTED = '(quoted) ', ' (quoted)'


def begin(index: int | None = None) -> str:
  """The line that opens response `index` (1-based), or the only response."""
  return '[The Begin of Response]' if index is None else f'[The Begin of Response {index}]'


def end(index: int | None = None) -> str:
  """The line that closes response `index` (1-based), or the only response."""
  return '[The End of Response]' if index is None else f'[The End of Response {index}]'


# Letters and signs that Unicode's compatibility forms keep apart but a reader does not.
_LOOKALIKES = {
    'a': 'аαɑ', 'b': 'вβƅ', 'c': 'сϲƈ', 'd': 'ԁɗ', 'e': 'еεҽ', 'f': 'ƒ', 'g': 'ɡց', 'h': 'нһηհ',
    'i': 'іιıɩ', 'j': 'јʝ', 'l': 'ӏߊ', 'm': 'мμ', 'n': 'ոռ', 'o': 'оοօ', 'p': 'рρ', 'q': 'ԛ',
    'r': 'ɾг', 's': 'ѕꜱ', 't': 'тτ', 'u': 'υս', 'v': 'νѵ', 'w': 'ԝω', 'x': 'хχ', 'y': 'уγү',
    'z': 'ʐ', ':': '։׃∶꞉ːˑ', '#': '♯⌗⋕', '[': '【〔〖⟦⦋「『⟨〈《❲', ']': '】〕〗⟧⦌」』⟩〉》❳',
    '\\': '⧵∖╲', '{': '❴⦃', '}': '❵⦄',
}
_SAME = {ord(like): plain for plain, likes in _LOOKALIKES.items() for like in likes}
_LINE_ENDS = frozenset('\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029')
_BLANK_LETTERS = frozenset('\u115f\u1160\u3164\uffa0\u2800\u17b4\u17b5')
_INVISIBLE = frozenset(('Cf', 'Cc', 'Mn', 'Me', 'Cs', 'Cn', 'Co'))


class _Fold(dict):
  """Code point -> its folded string ('' for what is blank or invisible), filled on first use."""

  def __missing__(self, code: int) -> str:
    self[code] = folded = _fold(chr(code))
    return folded


def _fold(char: str) -> str:
  if char in _LINE_ENDS:
    return '\n'
  if char in _BLANK_LETTERS:
    return ''
  pieces = []
  for piece in unicodedata.normalize('NFKD', char).casefold():
    piece = _SAME.get(ord(piece), piece)
    if not piece.isspace() and unicodedata.category(piece) not in _INVISIBLE:
      pieces.append(piece)
  return ''.join(pieces)


_FOLD = _Fold()


# What may stand between the words of a marker, in the folded text.
_GAP = r'[*_`~"“”\-\u2010-\u2015]*'


def _words(marker: str) -> str:
  return _GAP.join(re.escape(word.translate(_FOLD)) for word in marker.split())


_NAMES = '|'.join(_words(header.strip('# ')) for header in HEADERS)
_OPENING = rf'the{_GAP}(?:begin|end)(?:ning|ing)?{_GAP}of{_GAP}response'
_HINTS = '|'.join(map(_words, ('the best response is', 'the correct score is')))
_SIGNS = r'(?:[^\w\n]|_)*'
_PREFIX = rf'{_SIGNS}(?:\d{{1,2}}{_SIGNS})?'
_RATED = rf'(?:(?:final|overall){_GAP})?score'
_LABELS = rf'(?:specific{_GAP}(?:\n{_GAP})?criteria|analysis|{_RATED}s)'
_SIGN = r'[*_`~)\]"”]*\n?:'
_BOX = r'[*_`~$<]*(?:\n[*_`~$<]*)?\\+boxed'
# An opening gets the word behind its match, which is empty; a label gets it behind its last letter.
# JOINED: searched in the folded text without its line ends; the others with them.
_OPENINGS_JOINED = (
    re.compile(rf'(?<=####)(?={_GAP}(?:{_NAMES}))'),
    re.compile(rf'(?<=\[)(?={_GAP}{_OPENING})'),
)
_LABELS_JOINED = (
    re.compile(rf'(?:{_HINTS})(?={_SIGN})'),
)
_OPENINGS = (re.compile(rf'(?<=#)(?={_GAP}(?:{_NAMES}){_GAP}#)'),)
_LABEL_LINES = (
    re.compile(rf'^{_PREFIX}{_LABELS}(?={_SIGN})', re.MULTILINE),
    re.compile(rf'^{_PREFIX}{_RATED}(?={_SIGN}{_BOX})', re.MULTILINE),
    re.compile(rf'scores(?={_SIGN}{_BOX})'),
)
_TURN_LINES = (
    re.compile(rf'^{_PREFIX}(?:system|user|human|assistant)(?={_SIGN})', re.MULTILINE),
)


@functools.lru_cache(maxsize=64)  # an item's texts come back in each of its orders
def neutralise(text: str, turns: bool = False) -> str:
  """Returns `text` with `(quoted)` put into whatever imitates a marker; idempotent.

  Args:
    turns: also treat `User:` and its like at the start of a line as markers, which they are inside
      the conversation, where a message could otherwise speak for the next one, and everywhere in a
      prompt for a tokenizer without a chat template.
  """
  pieces, start = [], 0
  for place, word in sorted(_insertions(text, turns).items()):
    pieces += (text[start:place], word)
    start = place
  return ''.join(pieces) + text[start:]


def _insertions(text: str, turns: bool) -> dict[int, str]:
  """Where in `text` the word goes, and in which form."""
  lines = text.translate(_FOLD)
  joined = lines.replace('\n', '')
  openings_joined = _ends(_OPENINGS_JOINED, joined)
  labels_joined = _ends(_LABELS_JOINED, joined)
  openings = _ends(_OPENINGS, lines)
  labels = _ends(_LABEL_LINES + _TURN_LINES if turns else _LABEL_LINES, lines)
  if not (openings_joined or labels_joined or openings or labels):
    return {}
  # owner[i]: the character of `text` that folded character i came from.
  owner = [at for at, char in enumerate(text) for _ in _FOLD[ord(char)]]
  owner_joined = [at for at, char in zip(owner, lines) if char != '\n']
  before = {owner_joined[at] for at in openings_joined} | {owner[at] for at in openings}
  behind = {owner_joined[at - 1] + 1 for at in labels_joined} | {owner[at - 1] + 1 for at in labels}
  return dict.fromkeys(behind, LABEL_QUOTED) | dict.fromkeys(before, QUOTED)


def _ends(patterns: tuple[re.Pattern[str], ...], text: str) -> set[int]:
  return {match.end() for pattern in patterns for match in pattern.finditer(text)}
