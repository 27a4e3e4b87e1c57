"""The end of an evaluation on the console: one line per stage, so that nobody must open the report to see the result.

    stage   parse failures  greedy  k = 1  k = 8  k = 32  k = 8, guided  k = 8, guided softly
    base             0.1 %    61.0   60.2   62.0    62.3           62.9                  62.5

Columns: the k nearest below or at 8 stands for 8 where the pool is smaller. Where items of one, two and four
responses are mixed, each number of responses has its own block.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from spct_jax.stages import results

_VOTE = 8  # the vote that the paper reports most


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
  """Lines for a person, from the rows of results.json."""
  lines = []
  for benchmark in dict.fromkeys(row['benchmark'] for row in rows):
    own = [row for row in rows if row['benchmark'] == benchmark and row['subset'] == 'all']
    sizes = sorted({row['n'] for row in own if row['n'] is not None})
    for n in sizes if len(sizes) > 1 else list(dict.fromkeys(row['n'] for row in own)):
      lines += _block(benchmark, n, [row for row in own if row['n'] == n])
  return lines


def instructions(rows: Sequence[Mapping[str, Any]]) -> list[str]:
  """The same for general instruction data, from the rows of evaluate/instructions.json."""
  if not rows:
    return []
  head = ['stage', 'reproduced, %', 'nll per token', 'rows']
  cells = [
      [row['stage'], results.decimals(row['exact']), number(row['nll']), str(row['items'])] for row in rows
  ]
  return ['', 'general instruction data', *_aligned([head, *cells])]


def number(value: float | None) -> str:
  return '–' if value is None else f'{value:.4f}'


def _block(benchmark: str, n: int | None, rows: Sequence[Mapping[str, Any]]) -> list[str]:
  ks = sorted({row['k'] for row in rows if row['temperature'] > 0})
  eight = max([k for k in ks if k <= _VOTE] or ks[:1], default=None)
  kinds = [('greedy', 1, True, False)]
  kinds += [(f'k = {k}', k, False, False) for k in sorted({ks[0], eight, ks[-1]})] if ks else []
  kinds += [(f'k = {eight}, guided', eight, False, 'hard'), (f'k = {eight}, guided softly', eight, False, 'soft')]
  found = {
      (row['stage'], row['k'], row['temperature'] == 0, row['guided']): row for row in rows
  }
  stages = list(dict.fromkeys(row['stage'] for row in rows))
  kinds = [kind for kind in kinds if any((stage, *kind[1:]) in found for stage in stages)]
  stopped = any('votes_saved' in row for row in rows)
  cells = [['stage', 'parse failures', *(kind[0] for kind in kinds), *(['votes saved'] if stopped else [])]]
  for stage in stages:
    own = [found.get((stage, *kind[1:])) for kind in kinds]
    largest = max((row for row in own if row is not None), key=lambda row: row['k'])
    cells.append([
        stage,
        results.percent(largest['parse_failure']),
        *('–' if row is None else results.decimals(row['accuracy']) for row in own),
        *([results.percent(largest.get('votes_saved'))] if stopped else []),
    ])
  count = results.count(max(row['items'] for row in rows), 'item')
  what = '' if n is None else f' of {results.count(n, "response")}'
  return ['', f'{benchmark}, accuracy in % on {count}{what}', *_aligned(cells)]


def _aligned(cells: Sequence[Sequence[str]]) -> list[str]:
  widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
  return [
      '  '.join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:]))])
      for row in cells
  ]
