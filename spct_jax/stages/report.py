"""report.md from the rows of results.json: every accuracy with what qualifies it beside it.

A reader must not see an accuracy without its 95 % interval, the share of judgements that did not
parse, of votes that tied, and of verdicts that flip with the order, nor without what a rule that
reads nothing (longest, shortest, first, random) would have scored.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from spct_jax.stages import processes, results
from spct_jax.stages.results import (
  Row,
  count,
  decimals,
  percent,
  read as read_results,
  write as write_results,
)

__all__ = ('Extras', 'count', 'percent', 'read_results', 'setting', 'write_report', 'write_results')

_NAMES_SHOWN = 20

# Columns that a table has if one of its rows has the field: field, heading.
_MORE_COLUMNS = (
  ('accuracy_judged', 'of judged, %'),
  ('overlong', 'over-long'),
  ('auc', 'ROC-AUC, %'),
  ('gain', 'gain on plain, points'),
)


@dataclasses.dataclass(frozen=True)
class Extras:
  """What a report says besides its accuracies.

  config: flat {'grpo.kl_coef': 0.08}. baselines: rows {benchmark, subset, name, accuracy, stderr,
  items} with low and high where known. skipped: {reason: names of the items left out}. figures:
  {caption: path}; paths are shown relative to the report. notes: sentences for a person, such as
  the meta-RM's ROC-AUC. instructions: rows {stage, exact, low, high, nll, tokens, items} on held-out
  general instruction data. exhibits: items with every stage's judgement, as Markdown.
  """

  title: str
  commit: str | None
  config: Mapping[str, Any]
  baselines: Sequence[Mapping[str, Any]]
  skipped: Mapping[str, Sequence[str]]
  figures: Mapping[str, str | os.PathLike[str]]
  notes: Sequence[str]
  instructions: Sequence[Mapping[str, Any]]
  exhibits: Sequence[str]


def write_report(
  path: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]], extras: Extras
) -> None:
  """Writes report.md, and skipped.json with all names beside it if an item was skipped."""
  path = pathlib.Path(path)
  rows = results.validated(rows)
  sections = [
    f'# {extras.title}',
    _origin(extras),
    *_headline(rows, extras),
    *_by_k(rows),
    *_subsets(rows, extras),
    *_instructions(extras),
    *_exhibits(extras),
  ]
  sections += _figures(path, extras) + _notes(extras) + _skipped(extras) + _config(extras)
  if any(extras.skipped.values()):
    names = {reason: list(found) for reason, found in extras.skipped.items()}
    processes.write_text(
      path.with_name('skipped.json'), json.dumps(names, indent=2, ensure_ascii=False) + '\n'
    )
  processes.write_text(path, '\n\n'.join(section for section in sections if section) + '\n')


def setting(row: Mapping[str, Any], temperatures: Sequence[float]) -> str:
  """How a row judged: 'greedy', 'one sample', 'vote of 8, guided'; temperature if several."""
  if row['k'] == 1 and row['temperature'] == 0:
    words = 'greedy'
  else:
    words = 'one sample' if row['k'] == 1 else f'vote of {row["k"]}'
  words += {False: '', 'hard': ', guided', 'soft': ', guided softly'}[row['guided']]
  sampled = {temperature for temperature in temperatures if temperature > 0}
  if row['temperature'] > 0 and len(sampled) > 1:
    words += f', temperature {row["temperature"]:g}'
  return words


def _origin(extras: Extras) -> str:
  if extras.commit is None:
    return 'Made outside a git clone: the commit is unknown.'
  return f'Made at commit `{extras.commit}`.'


def _unique(values: Any) -> list[Any]:
  return list(dict.fromkeys(values))


def _headline(rows: Sequence[Row], extras: Extras) -> list[str]:
  sections = ['## Results']
  if not rows:
    return [*sections, 'Nothing was evaluated: there are no rows.']
  for benchmark in _unique(row['benchmark'] for row in rows):
    whole = results.whole(rows, benchmark)
    if not whole:
      continue
    sections += [f'### {_cell(benchmark)}', _lead(whole)]
    baselines = results.whole(extras.baselines, benchmark)
    sections.append(_table(_headline_rows(whole), baselines=baselines, first='stage'))
  sections.append(
    'Interval: 95 %, clustered by item. A judgement that does not parse counts as wrong; a '
    'tie is credited as a random pick among the tied. Order flips: how often two samples that saw '
    'the responses in different orders disagree on the best.'
    + (
      ' Gain: accuracy minus that of the plain vote of as many of the same samples, with its 95 % '
      'interval, paired by item.'
      if any(row.get('gain') is not None for row in rows)
      else ''
    )
  )
  return sections


def _headline_rows(rows: Sequence[Row]) -> list[Row]:
  """Per stage: greedy, and the largest vote with each kind of guidance."""
  chosen = []
  for stage in _unique(row['stage'] for row in rows):
    own = [row for row in rows if row['stage'] == stage]
    chosen += [row for row in own if row['temperature'] == 0]
    sampled = [row for row in own if row['temperature'] > 0]
    for n, temperature, guided in _unique(
      (row['n'], row['temperature'], row['guided']) for row in sampled
    ):
      alike = [
        row
        for row in sampled
        if (row['n'], row['temperature'], row['guided']) == (n, temperature, guided)
      ]
      chosen.append(max(alike, key=lambda row: row['k']))
  return chosen


def _lead(rows: Sequence[Row]) -> str:
  """What a reader in a hurry takes away."""
  known = [row for row in rows if row['accuracy'] is not None and row['items']]
  if not known:
    return 'No item could be judged, so there is no accuracy.'
  if all(row['parse_failure'] == 1 for row in known):
    return (
      'No judgement parsed, so every accuracy is 0: the model does not write the format yet. This says '
      'nothing about its taste.'
    )
  best = max(known, key=lambda row: row['accuracy'])
  low, high = results.interval(best) or (None, None)
  return (
    f'Best: {_cell(best["stage"])}, {setting(best, [row["temperature"] for row in rows])}: '
    f'**{percent(best["accuracy"])}** [{decimals(low)}, {decimals(high)}] of {count(best["items"], "item")}, '
    f'with {percent(best["parse_failure"])} parse failures, {percent(best["ties"])} ties and '
    f'{percent(best.get("order_flip"))} order flips.' + _temperatures(rows)
  )


def _temperatures(rows: Sequence[Row]) -> str:
  sampled = sorted({row['temperature'] for row in rows if row['temperature'] > 0})
  return f' Votes are sampled at temperature {sampled[0]:g}.' if len(sampled) == 1 else ''


def _by_k(rows: Sequence[Row]) -> list[str]:
  sections = []
  for benchmark in _unique(row['benchmark'] for row in rows):
    sampled = [row for row in results.whole(rows, benchmark) if row['temperature'] > 0]
    if len(_unique(row['k'] for row in sampled)) > 1:
      ordered = sorted(sampled, key=lambda row: (_order(rows, row), str(row['guided']), row['k']))
      sections += [f'### {_cell(benchmark)}', _table(ordered, baselines=(), first='stage')]
  return ['## Accuracy by the number of samples', *sections] if sections else []


def _order(rows: Sequence[Row], row: Row) -> int:
  return _unique(other['stage'] for other in rows).index(row['stage'])


def _subsets(rows: Sequence[Row], extras: Extras) -> list[str]:
  sections = []
  for benchmark in _unique(row['benchmark'] for row in rows):
    whole = results.whole(rows, benchmark)
    parts = [row for row in rows if row['benchmark'] == benchmark and row not in whole]
    chosen = [
      row
      for name in _unique((row['subset'], row['n']) for row in parts)
      for row in _headline_rows([part for part in parts if (part['subset'], part['n']) == name])
    ]
    if chosen:
      all_items = results.whole(extras.baselines, benchmark)
      baselines = [
        line
        for line in extras.baselines
        if line['benchmark'] == benchmark and line not in all_items
      ]
      sections += [f'### {_cell(benchmark)}', _table(chosen, baselines=baselines, first='subset')]
  return ['## By part', *sections] if sections else []


def _table(rows: Sequence[Row], *, baselines: Sequence[Mapping[str, Any]], first: str) -> str:
  """One line per row and, below, per baseline; `first` is 'stage', or 'subset' to open with that."""
  more = [
    (field, heading)
    for field, heading in _MORE_COLUMNS
    if any(row.get(field) is not None for row in rows)
  ]
  several_n = len(_unique(line['n'] for line in (*rows, *baselines))) > 1
  temperatures = [row['temperature'] for row in rows]
  heads = (
    (['subset'] if first == 'subset' else [])
    + ['stage', 'judgement']
    + (['responses'] if several_n else [])
  )
  texts = len(heads)
  heads += ['accuracy, %', '95 % interval', 'parse failures, %', 'ties, %', 'order flips, %']
  heads += [heading for _, heading in more] + ['items']
  lines = []
  for row in rows:
    cells = [_cell(row['subset'])] if first == 'subset' else []
    cells += [_cell(row['stage']), setting(row, temperatures)]
    cells += [_responses(row)] if several_n else []
    cells += _accuracy(row)
    cells += [
      decimals(row['parse_failure']),
      decimals(row['ties']),
      decimals(row.get('order_flip')),
    ]
    cells += [_more(row, field) for field, _ in more] + [str(row['items'])]
    lines.append(cells)
  for line in baselines:
    cells = ([_cell(line['subset'])] if first == 'subset' else []) + [
      'baseline',
      _cell(line['name']),
    ]
    cells += [_responses(line)] if several_n else []
    lines.append(
      [*cells, *_accuracy(line), '–', '–', '–', *('–' for _ in more), str(line['items'])]
    )
  rule = ['---'] * texts + ['---:'] * (len(heads) - texts)
  return '\n'.join('| ' + ' | '.join(cells) + ' |' for cells in [heads, rule, *lines])


def _accuracy(row: Mapping[str, Any]) -> list[str]:
  accuracy = row['accuracy'] if row['items'] else None
  bounds = results.interval(row)
  return [
    decimals(accuracy),
    '–' if bounds is None else f'{decimals(bounds[0])} to {decimals(bounds[1])}',
  ]


def _responses(row: Mapping[str, Any]) -> str:
  return 'mixed' if row['n'] is None else str(row['n'])


def _more(row: Row, field: str) -> str:
  """A share as a percentage; `overlong` is a number of items, `gain` has a sign and its interval."""
  value = row.get(field)
  if field == 'gain' and value is not None:
    low, high = results.points(row['gain_low']), results.points(row['gain_high'])
    return f'{results.points(value)} [{low}, {high}]'
  return str(value) if isinstance(value, int) and not isinstance(value, bool) else decimals(value)


def _instructions(extras: Extras) -> list[str]:
  if not extras.instructions:
    return []
  lines = [
    '| stage | reproduced, % | 95 % interval | negative log-likelihood per token | tokens | rows |',
    '| --- | ---: | ---: | ---: | ---: | ---: |',
  ]
  for row in extras.instructions:
    bounds = f'{decimals(row["low"])} to {decimals(row["high"])}'
    nll = '–' if row['nll'] is None else f'{row["nll"]:.4f}'
    cells = [_cell(row['stage']), decimals(row['exact']), bounds, nll, row['tokens'], row['items']]
    lines.append('| ' + ' | '.join(str(cell) for cell in cells) + ' |')
  return [
    '## General instruction data',
    'Held-out rows that have nothing to do with judging: the share of answers that greedy decoding '
    'reproduces to the last token, end of sequence included.',
    '\n'.join(lines),
  ]


def _exhibits(extras: Extras) -> list[str]:
  if not extras.exhibits:
    return []
  return ['## One judgement by every stage', *extras.exhibits]


def _figures(path: pathlib.Path, extras: Extras) -> list[str]:
  shown = [
    f'![{_cell(caption)}]({pathlib.Path(os.path.relpath(figure, path.parent)).as_posix()})'
    for caption, figure in extras.figures.items()
  ]
  return ['## Figures', *shown] if shown else []


def _notes(extras: Extras) -> list[str]:
  return ['## Notes', '\n'.join(f'- {note}' for note in extras.notes)] if extras.notes else []


def _skipped(extras: Extras) -> list[str]:
  total = sum(len(names) for names in extras.skipped.values())
  if not total:
    return ['## Skipped items', 'None.']
  lines = []
  for reason, names in extras.skipped.items():
    if names:
      shown = ', '.join(_cell(name) for name in names[:_NAMES_SHOWN])
      rest = len(names) - _NAMES_SHOWN
      lines.append(
        f'- {reason}: {count(len(names), "item")}: {shown}'
        + (f', and {rest} more' if rest > 0 else '')
      )
  return [
    '## Skipped items',
    f'{count(total, "item")} left out; all names are in `skipped.json`.',
    '\n'.join(lines),
  ]


def _config(extras: Extras) -> list[str]:
  if not extras.config:
    return []
  lines = ['| field | value |', '| --- | --- |']
  lines += [
    f'| {_cell(name)} | `{_cell(json.dumps(value))}` |' for name, value in extras.config.items()
  ]
  return [
    '## Config',
    '<details><summary>All fields that decide the result</summary>',
    '\n'.join(lines),
    '</details>',
  ]


def _cell(text: Any) -> str:
  """Text that may come from data, so that it cannot break a table or a heading."""
  return ' '.join(str(text).split()).replace('|', '\\|').replace('<', '&lt;')
