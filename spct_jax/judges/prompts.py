"""What the judge reads: an example, in one order of its responses, as a `Prompt` (paper, appendix on
prompts).

A template is a folder of text files with named slots (`{{conversation}}`); the code knows no
wording. The instructions, given principles, conversation and reference answer stand before the
responses, so all orders of an example share that prefix. Message contents, responses, principles
and reference answers become data spans, neutralised here; everything else is frame.

    pointwise   one integer of 1..10 per response, n >= 1
    single      one response, 0 or 1 (verifiable questions)
    meta        what the meta-RM reads before a trajectory

Hinted prompts end with the slot in which the best response is *shown* (1-based), or, where there is
one response, with its gold score: the paper words the hint for n >= 2 only (departure 1). Section
headers for given principles and for the reference answer are ours: the paper prints none (departure
2).

`orders` draws the orders of decision 5 from a counter-based generator keyed by blake2b of what
names the draw, so sample i's order depends neither on how many samples there are nor on the items
around it.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import hashlib
import pathlib
import re

import numpy as np

from spct_jax import packaged
from spct_jax.text import markers
from spct_jax.types import Example, Prompt, Span

SCALES = {'pointwise': (1, 10), 'single': (0, 1), 'meta': (1, 10)}
_JUDGE_SLOTS = ('conversation', 'responses', 'boxes', 'principles', 'reference', 'hint')
# File -> (slots it must have, slots it may have).
FILES = {
    'pointwise.txt': (_JUDGE_SLOTS, ('count', 'low', 'high')),
    'single.txt': (_JUDGE_SLOTS, ('count', 'low', 'high')),
    'meta.txt': (('conversation', 'responses'), ('count',)),
    'response.txt': (('index', 'response'), ()),
    'response_single.txt': (('response',), ()),
    'principles.txt': (('principles',), ()),
    'reference.txt': (('reference',), ()),
    'hint.txt': (('slot',), ()),
    'hint_single.txt': (('score',), ()),
}
_BUILTIN = pathlib.Path(__file__).parent / 'templates'
_SLOT = re.compile(r'\{\{(\w+)\}\}')
# A section that is absent takes its line with it.
_OPTIONAL = ('principles', 'reference', 'hint')


@dataclasses.dataclass(frozen=True)
class Template:
  """The files of one template, each cut into literals (even places) and slot names (odd places)."""

  name: str
  files: dict[str, tuple[str, ...]]


def load_template(name: str | pathlib.Path) -> Template:
  """Reads 'grm' (the released models' format), 'short' (few tokens), or a folder of your own.

  'package:MODULE/folder' is a folder that an importable package carries.
  """
  folder = _BUILTIN / name if str(name) in builtin_templates() else packaged.locate(name)
  if not folder.is_dir():
    raise ValueError(
        f'template: no folder {str(name)!r}; allowed: {", ".join(builtin_templates())}, '
        f'or the path of a folder with the files {", ".join(FILES)}'
    )
  files = {}
  for file, (required, optional) in FILES.items():
    if not (folder / file).is_file():
      raise ValueError(
          f'template {folder}: the file {file} is missing; '
          f'a template has the files {", ".join(FILES)}'
      )
    text = (folder / file).read_text(encoding='utf-8').replace('\r\n', '\n').removesuffix('\n')
    pieces = tuple(_SLOT.split(text))
    for slot in pieces[1::2]:
      if slot not in required + optional:
        raise ValueError(f'template file {folder / file}: unknown slot {{{{{slot}}}}}; '
                         f'allowed: {", ".join(required + optional)}')
    for slot in required:
      if slot not in pieces[1::2]:
        raise ValueError(f'template file {folder / file}: the slot {{{{{slot}}}}} is missing; '
                         f'it must have: {", ".join(required)}')
    files[file] = pieces
  return Template(str(name), files)


def builtin_templates() -> tuple[str, ...]:
  """The names of the templates that the package carries."""
  return tuple(sorted(folder.name for folder in _BUILTIN.iterdir() if folder.is_dir()))


def build(
    example: Example,
    order: Sequence[int],
    template: Template,
    *,
    mode: str = 'pointwise',
    hint: int | None = None,
    principles: str | None = None,
    reference: str | None = None,
) -> Prompt:
  """Builds the user message that asks for the scores of `example`'s responses, shown in `order`.

  Args:
    order: order[slot] = index of the response shown in that slot.
    mode: 'pointwise' (1..10 each) or 'single' (one response, 0 or 1).
    hint: the example's label (index of the best response; for one response its score), or None.
    principles: criteria to judge by, where they are given and not the model's own (Eq 8).
    reference: a right answer to the query.
  """
  if mode not in ('pointwise', 'single'):
    raise ValueError(
        f"mode: got {mode!r}; allowed: 'pointwise', 'single' (build_meta makes the meta-RM's message)"
    )
  if mode == 'single' and len(example.responses) != 1:
    raise ValueError(
        f'{example.uid}: mode single judges one response, got {len(example.responses)}; '
        'use mode pointwise'
    )
  sections = {'principles': [], 'reference': [], 'hint': []}
  if principles is not None:
    values = {'principles': _data(principles)}
    sections['principles'] = _fill(template, 'principles.txt', values)
  if reference is not None:
    sections['reference'] = _fill(template, 'reference.txt', {'reference': _data(reference)})
  if hint is not None:
    sections['hint'] = _hint(example, order, template, hint, mode)
  return _build(example, order, template, mode, sections, hint is not None)


def build_meta(example: Example, order: Sequence[int], template: Template) -> Prompt:
  """Builds the meta-RM's user message, in the order that the sample saw; its text follows it."""
  return _build(example, order, template, 'meta', {}, False)


def _build(
    example: Example,
    order: Sequence[int],
    template: Template,
    mode: str,
    sections: dict[str, list[Span]],
    hinted: bool,
) -> Prompt:
  n = len(example.responses)
  if n == 0 or sorted(order) != list(range(n)):
    raise ValueError(
        f'{example.uid}: order {tuple(order)} is no permutation of the {n} response(s)'
    )
  low, high = SCALES[mode]
  responses = []
  for slot, index in enumerate(order, start=1):
    values = {'index': _frame(str(slot)), 'response': _data(example.responses[index])}
    file = 'response_single.txt' if mode == 'single' else 'response.txt'
    responses += ([Span('\n', data=False)] if responses else []) + _fill(template, file, values)
  spans = _fill(template, f'{mode}.txt', sections | {
      'conversation': _conversation(example),
      'responses': responses,
      'boxes': _frame(', '.join('x' * n)),
      'count': _frame(str(n)),
      'low': _frame(str(low)),
      'high': _frame(str(high)),
  })
  order = tuple(int(index) for index in order)
  return Prompt(uid=example.uid, spans=tuple(spans), order=order, hinted=hinted, low=low, high=high)


def _hint(
    example: Example, order: Sequence[int], template: Template, hint: int, mode: str
) -> list[Span]:
  if len(example.responses) == 1:
    low, high = SCALES[mode]
    if not low <= hint <= high:
      raise ValueError(
          f'{example.uid}: the hint {hint} is no score of mode {mode} ({low}..{high}); '
          'items labelled 0 or 1 are hinted in mode single'
      )
    return _fill(template, 'hint_single.txt', {'score': _frame(str(hint))})
  if hint not in order:
    raise ValueError(
        f'{example.uid}: the hint {hint} names no response; '
        f'allowed: 0..{len(example.responses) - 1}'
    )
  return _fill(template, 'hint.txt', {'slot': _frame(str(list(order).index(hint) + 1))})


def _conversation(example: Example) -> list[Span]:
  """One labelled turn under the other."""
  spans = []
  for message in example.messages:
    if message.role not in markers.TURNS:
      raise ValueError(
          f'{example.uid}: a message has the role {message.role!r}; '
          f'allowed: {", ".join(markers.TURNS)}'
      )
    label = f'{markers.TURNS[message.role]}: '
    spans += [Span('\n' + label if spans else label, data=False),
              Span(markers.neutralise(message.content, turns=True), data=True)]
  return spans


def _data(text: str) -> list[Span]:
  return [Span(markers.neutralise(text), data=True)]


def _frame(text: str) -> list[Span]:
  return [Span(text, data=False)]


def _fill(template: Template, file: str, values: dict[str, list[Span]]) -> list[Span]:
  """The spans of a template file, slots filled; `encode` is what joins neighbouring frame spans."""
  spans = []
  swallow = False
  for place, piece in enumerate(template.files[file]):
    if place % 2 == 0:
      # An absent optional section leaves no empty line behind.
      spans.append(Span(piece.removeprefix('\n') if swallow else piece, data=False))
      swallow = False
    else:
      spans += values[piece]
      swallow = piece in _OPTIONAL and not values[piece]
  spans = [span for span in spans if span.text or span.data]
  if spans and not spans[-1].data:
    spans[-1] = Span(spans[-1].text.removesuffix('\n'), data=False)
  return spans


def orders(
    kind: str, n: int, samples: int, *, seed: int, stage: str, visit: int, uid: str
) -> list[tuple[int, ...]]:
  """The order of the n responses for each sample: orders[i][slot] = index of the one shown there.

  Args:
    kind: 'shuffle' (a uniform permutation per sample), 'balanced' (cyclic shifts of one random
      permutation: each response stands in every slot once in any n consecutive samples) or 'fixed'.
  """
  if kind not in ('shuffle', 'balanced', 'fixed'):
    raise ValueError(f"order: got {kind!r}; allowed: 'shuffle', 'balanced', 'fixed'")
  if n < 1:
    raise ValueError(f'order: {uid} has {n} responses; at least one is needed')
  if kind == 'fixed':
    return [tuple(range(n))] * samples
  name = (kind, seed, stage, visit, uid)
  bits = np.random.Philox(key=0)  # made once: making one costs ten times what keying it anew does
  if kind == 'shuffle':
    return [_permutation(n, (*name, sample), bits) for sample in range(samples)]
  base = _permutation(n, name, bits)
  return [base[sample % n:] + base[: sample % n] for sample in range(samples)]


def _permutation(n: int, name: tuple[str | int, ...], bits: np.random.Philox) -> tuple[int, ...]:
  """Fisher-Yates on raw Philox words: numpy promises the words, not the methods built on them.

  `bits` is keyed anew and starts at counter 0, whatever was drawn from it.
  """
  text = ''.join(f'{len(str(part))}:{part}' for part in name)
  digest = hashlib.blake2b(text.encode('utf-8', 'surrogatepass'), digest_size=16).digest()
  start = {'counter': np.zeros(4, np.uint64), 'key': np.frombuffer(digest, '<u8')}
  # A buffer position of 4 is a buffer used up: the next word is the first of the counter.
  bits.state = bits.state | {'state': start, 'buffer_pos': 4}
  places = list(range(n))
  for last in range(n - 1, 0, -1):
    # Words beyond the largest multiple of `choices` are drawn again: folding them in is uneven.
    choices = last + 1
    bound = 2**64 - 2**64 % choices
    word = int(bits.random_raw())
    while word >= bound:
      word = int(bits.random_raw())
    chosen = word % choices
    places[last], places[chosen] = places[chosen], places[last]
  return tuple(places)
