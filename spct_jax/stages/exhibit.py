"""One item and what every stage said about it, for a reader to see what training changed.

    choice   the first item with n >= 2 that the first model's first sample gets wrong and the last model's right;
             items without such a change follow in their own order, so that there is always something to show
    shown    the query, the responses with their gold label and grades, and each stage's sample 0, verbatim

Everything quoted is data: it stands in fences longer than any run of backticks inside it, and on the console
without control characters, which a terminal would obey.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence

import numpy as np

from spct_jax import types

_MOST_LINES, _MOST_CHARACTERS = 40, 2000  # of one quoted text on the console; the report has it whole
_CONTROL = re.compile(r'[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]')


@dataclasses.dataclass(frozen=True)
class Exhibit:
  """An item, and per stage its first sample (None: it has none) and whether that is right."""

  example: types.Example
  judgements: Mapping[str, types.Trajectory | None]
  right: Mapping[str, bool]


def choose(
    examples: Sequence[types.Example], correct: Mapping[str, np.ndarray], judged: np.ndarray, *, show: int
) -> list[int]:
  """The positions of the first `show` items to print; `correct[stage]` bool[B] is of each item's first sample."""
  first, last = (correct[stage] for stage in (list(correct)[0], list(correct)[-1]))
  able = [i for i in range(len(examples)) if judged[i]]
  changed = [i for i in able if len(examples[i].responses) > 1 and not first[i] and last[i]]
  rest = [i for i in able if i not in set(changed)]
  return (changed + rest)[:show]


def markdown(exhibit: Exhibit) -> str:
  """The item as a section of report.md."""
  return '\n\n'.join([f'### Item {_inline(exhibit.example.uid)}', *_parts(exhibit, lambda text: text)])


def console(exhibit: Exhibit) -> str:
  """The same for a terminal: long texts cut, nothing in them obeyed."""
  return '\n'.join([f'Item {_inline(exhibit.example.uid)}', *_parts(exhibit, _clipped)])


def _parts(exhibit: Exhibit, quoted) -> list[str]:
  example, parts = exhibit.example, []
  for message in example.messages:
    parts += [f'{_inline(message.role)}:', _fence(quoted(message.content))]
  for i, response in enumerate(example.responses):
    parts += [f'Response {i + 1}{_gold(example, i)}:', _fence(quoted(response))]
  for stage, judgement in exhibit.judgements.items():
    if judgement is None:
      parts.append(f'**{_inline(stage)}** has no judgement of it.')
    else:
      parts += [
          f'**{_inline(stage)}** is {"right" if exhibit.right[stage] else "wrong"}'
          f'{_order(judgement)}; {_scores(judgement)}:',
          _fence(quoted(judgement.text)),
      ]
  return parts


def _gold(example: types.Example, i: int) -> str:
  words = []
  if len(example.responses) == 1:
    words.append(f'gold label {example.label}')
  elif example.label == i:
    words.append('the best')
  if example.grades is not None:
    words.append(f'grade {example.grades[i]:g}')
  return f' ({", ".join(words)})' if words else ''


def _order(judgement: types.Trajectory) -> str:
  """Which response stood where: the judgement's text counts the slots that it saw."""
  if len(judgement.order) == 1:
    return ''
  return ' (it read the responses in the order ' + ', '.join(str(i + 1) for i in judgement.order) + ')'


def _scores(judgement: types.Trajectory) -> str:
  if judgement.scores is None:
    return f'no score could be read ({judgement.parse})'
  by_response = sorted(zip(judgement.order, judgement.scores))
  return 'scores: ' + ', '.join(f'response {i + 1}: {score}' for i, score in by_response)


def _fence(text: str) -> str:
  longest = max((len(run) for run in re.findall(r'`+', text)), default=0)
  ticks = '`' * max(3, longest + 1)
  return f'{ticks}text\n{text}\n{ticks}'


def _inline(text: str) -> str:
  """Text from data on a line of its own: it cannot break the line, or open markup."""
  return ' '.join(_CONTROL.sub('\ufffd', text).split()).replace('<', '&lt;').replace('`', "'")


def _clipped(text: str) -> str:
  text = _CONTROL.sub('\ufffd', text)
  lines = text.split('\n')
  cut = '\n'.join(lines[:_MOST_LINES])[:_MOST_CHARACTERS]
  return text if cut == text else f'{cut}\n[... {len(text) - len(cut)} more characters in report.md]'
