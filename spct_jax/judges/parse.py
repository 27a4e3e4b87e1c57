r"""Reads the scores from what the judge wrote: strictly, and without ever raising (house style 36).

The input is the completion alone, never the prompt, whose own `\boxed{x, x}` would be found. In
order:

1. A sample that ran into its length limit fails as `truncated`, whatever it holds.
2. Only what follows a thought counts: what follows the last `</think>` that closes a `<think>` or
   `<thinking>`, and, if the prompt had opened the thought, what follows a `</think>` that closes
   none, as long as a `\boxed{` or a `Scores:` or `Score:` line comes after it. A `<think>` counts at
   the start of the text or of a line only, elsewhere it is a mention; one left open fails.
3. A score line starts with one of the labels `Scores`, `Final Scores`, `Overall Scores` (behind any
   Markdown, in any case) and holds a `\boxed{`, on the line behind a colon, or with nothing but
   signs and blanks between. Where no line does so, one with `Score`, `Final Score`,
   `Overall Score`, `Output`, `Final Output` or `Overall Output` is taken: these also name single
   marks and quoted answers. From the first such line on, all boxes must say the same: a model that
   runs on and judges a second example of its own making fails as `disagree`.
4. Without a score line the last complete box counts. A box left open after it fails as
   `unclosed_box`. A `Scores:` or `Score:` line that gives no box and stands after the last box fails
   as `no_box`, unless a plural label had a box before: an earlier box is not the verdict.
5. The box holds exactly n integers in ASCII digits, separated by commas, each within [low, high]:
   no signs, fractions, leading zeros, words, `8/10`, full-width digits or nested commands.

This is stricter than the released models' own extraction (last match of a loose pattern, parts that
fail dropped, the rest clamped), which can shift a score to another response (departure 1).
All steps are linear in the length of the text.
"""

from __future__ import annotations

import dataclasses
import re

KINDS = (
    'ok', 'empty', 'no_box', 'wrong_count', 'not_integer', 'out_of_range', 'disagree',
    'unclosed_think', 'unclosed_box', 'truncated',
)

_THINK = re.compile(
    r'(?P<opening>^[^\S\n]*<think(?:ing)?>)|</think(?:ing)?>',
    re.IGNORECASE | re.ASCII | re.MULTILINE,
)
_BRACES = re.compile(r'\\boxed\{|\\[{}]|[{}]')
_LABEL = re.compile(
    r'^[ \t>*_#`~+\-|]*(?:\d{1,2}[.)][ \t*_]*)?'
    r'(?:(?:final|overall)[ \t]+)?'
    r'(?:(?P<score>score(?P<plural>s)?)|output)\b[ \t*_`~]*(?P<colon>:?)',
    re.IGNORECASE | re.ASCII | re.MULTILINE,
)
_BEFORE_BOX = re.compile(r'[\s*_`~$<(\[>]*')
_INTEGER = re.compile(r'0|[1-9][0-9]*')
_NEGATIVE = re.compile(r'-[1-9][0-9]*')


@dataclasses.dataclass(frozen=True)
class Parsed:
  """The scores in the order shown, or None and the reason; `kind` is one of `KINDS`."""

  scores: tuple[int, ...] | None
  kind: str


def scores(text: str, n: int, low: int = 1, high: int = 10) -> tuple[int, ...] | None:
  """Returns the n scores of a completion, or None."""
  return read(text, n, low, high).scores


def read(text: str, n: int, low: int = 1, high: int = 10, truncated: bool = False) -> Parsed:
  """Returns the n scores of a completion, in the order shown, or why there are none.

  Args:
    text: the completion, cut at its first end-of-sequence token.
    truncated: the completion ended at the length limit and not at an end-of-sequence token.
  """
  if truncated:
    return Parsed(None, 'truncated')
  answer = _after_thinking(text)
  if answer is None:
    return Parsed(None, 'unclosed_think')
  if not answer.strip():
    return Parsed(None, 'empty')
  closed, opened = _boxes(answer)
  start, last_label = _score_lines(answer, sorted([box[0] for box in closed] + opened))
  last = max((a for a, _ in closed), default=-1)
  if any(at >= (last if start is None else start) for at in opened):
    return Parsed(None, 'unclosed_box')
  if last < last_label or last < 0:
    return Parsed(None, 'no_box')
  if start is not None:
    return _agreed([_content(answer[a:b], n, low, high) for a, b in closed if a >= start])
  return _content(answer[last:dict(closed)[last]], n, low, high)


def box(text: str, n: int, low: int = 1, high: int = 10) -> tuple[int, int] | None:
  """Where the scores stand that `read` gives: the span of what is inside the first box that says them, or None."""
  if read(text, n, low, high).scores is None:
    return None
  answer = _after_thinking(text)
  closed, opened = _boxes(answer)
  start, _ = _score_lines(answer, sorted([box[0] for box in closed] + opened))
  first = max(a for a, _ in closed) if start is None else min(a for a, _ in closed if a >= start)
  offset = len(text) - len(answer)  # what follows a thought is the end of the text
  return offset + first, offset + dict(closed)[first]


def _after_thinking(text: str) -> str | None:
  """What follows the last closed thought; None where a thought is left open."""
  start, is_open, unopened = 0, False, []
  for tag in _THINK.finditer(text):
    if tag['opening']:
      is_open = True
    elif is_open:
      start, is_open, unopened = tag.end(), False, []
    else:
      unopened.append(tag)
  if is_open:
    return None
  end = len(text)
  for tag in reversed(unopened):
    if _tries_a_verdict(text[tag.end() : end]):
      return text[tag.end() :]
    end = tag.start()
  return text[start:]


def _tries_a_verdict(text: str) -> bool:
  return r'\boxed{' in text or any(
      label['score'] and label['colon'] for label in _LABEL.finditer(text)
  )


def _boxes(text: str) -> tuple[list[tuple[int, int]], list[int]]:
  """Spans of the contents of the complete boxes, and starts of the contents of the open ones."""
  closed, stack = [], []
  for sign in _BRACES.finditer(text):
    if sign[0] == '}':
      start = stack.pop() if stack else None
      if start is not None:
        closed.append((start, sign.start()))
    elif sign[0] == '{':
      stack.append(None)
    elif sign[0][-1] == '{' and len(sign[0]) > 2:
      stack.append(sign.end())
  return closed, [start for start in stack if start is not None]


def _score_lines(text: str, boxes: list[int]) -> tuple[int | None, int]:
  """Where the first score line starts (or None), and where the last bare `Scores:` does (or -1).

  Behind a line with a plural label no bare one is looked for. `boxes` holds the starts of the
  contents of all boxes, ascending.
  """
  start, last_label, following = None, -1, 0
  for label in _LABEL.finditer(text):
    while following < len(boxes) and boxes[following] < label.end():
      following += 1
    if following < len(boxes):
      box = boxes[following] - len(r'\boxed{')
      line_end = text.find('\n', label.end())
      on_line = label['colon'] and (line_end < 0 or box < line_end)
      if on_line or _BEFORE_BOX.fullmatch(text, label.end(), box):
        if label['plural']:
          return label.start(), -1
        start = label.start() if start is None else start
        continue
    if label['score'] and label['colon']:
      last_label = label.start()
  return start, last_label


def _agreed(parsed: list[Parsed]) -> Parsed:
  if any(other.scores != parsed[0].scores for other in parsed):
    return Parsed(None, 'disagree')
  return parsed[0]


def _content(content: str, n: int, low: int, high: int) -> Parsed:
  """Reads the inside of a box."""
  parts = [part.strip(' \t') for part in content.split(',')]
  if not all(_INTEGER.fullmatch(part) or _NEGATIVE.fullmatch(part) for part in parts):
    return Parsed(None, 'not_integer')
  if len(parts) != n:
    return Parsed(None, 'wrong_count')
  # The length is looked at first because int() refuses very long digit strings by raising.
  if any(len(part) > len(str(high)) + 1 or not low <= int(part) <= high for part in parts):
    return Parsed(None, 'out_of_range')
  return Parsed(tuple(int(part) for part in parts), 'ok')
