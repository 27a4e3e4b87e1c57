r"""Reads the scores from what the judge wrote: strictly, and without ever raising (house style 36).

The input is the completion alone, never the prompt, whose own `\boxed{x, x}` would be found. In
order:

1. A sample that ran into its length limit fails as `truncated`, whatever it holds.
2. Only what follows the last `</think>` counts; a `<think>` opened there and not closed fails.
3. A score line starts with `Scores`, `Score`, `Final Scores` or `Output` (behind any Markdown) and
   holds a `\boxed{`, on the line or alone on the next one. From the first score line on, all boxes
   must say the same: a model that runs on and judges a second example of its own making fails as
   `disagree`.
4. Without a score line the last complete box counts. A box left open after it fails as
   `unclosed_box`, and a `Scores:` after it that gives no box fails as `no_box`: an earlier box is
   not the verdict.
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

_THINK = re.compile(r'<(/?)think(?:ing)?>', re.IGNORECASE | re.ASCII)
_BRACES = re.compile(r'\\boxed\{|\\[{}]|[{}]')
_LABEL = re.compile(
    r'^[ \t>*_#`~+\-|]*(?:\d{1,2}[.)][ \t*_]*)?'
    r'(?:(?:final|overall)[ \t]+)?(?:(scores?)|output)\b[ \t*_`~]*(:?)',
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
  if start is not None:
    if any(at >= start for at in opened):
      return Parsed(None, 'unclosed_box')
    return _agreed([_content(answer[a:b], n, low, high) for a, b in closed if a >= start])
  last = max((a for a, _ in closed), default=-1)
  if any(at > last for at in opened):
    return Parsed(None, 'unclosed_box')
  if last < last_label or last < 0:
    return Parsed(None, 'no_box')
  return _content(answer[last:dict(closed)[last]], n, low, high)


def _after_thinking(text: str) -> str | None:
  """What follows the last closed thought; None where a thought is left open."""
  start, is_open = 0, False
  for tag in _THINK.finditer(text):
    is_open = not tag[1]
    start = start if is_open else tag.end()
  return None if is_open else text[start:]


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

  `boxes` holds the starts of the contents of all boxes, ascending.
  """
  last_label, following = -1, 0
  for label in _LABEL.finditer(text):
    while following < len(boxes) and boxes[following] < label.end():
      following += 1
    if following < len(boxes):
      box = boxes[following] - len(r'\boxed{')
      line_end = text.find('\n', label.end())
      on_line = label[2] and (line_end < 0 or box < line_end)
      if on_line or _BEFORE_BOX.fullmatch(text, label.end(), box):
        return label.start(), last_label
    if label[1] and label[2]:
      last_label = label.start()
  return None, last_label


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
