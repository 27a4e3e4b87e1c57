"""The rows of results.json: what they must hold, how they are written and how a number is shown.

A row is flat: one accuracy of one stage on one benchmark, with what belongs beside it.

    stage, benchmark, subset     'rft', 'judgebench', 'all' or the name of a part
    n                            responses per item; None where items of different n are mixed
    temperature, k, guided       greedy is k = 1 at temperature 0; guided is False, 'hard' or 'soft'
    accuracy, stderr, items      share in 0..1, standard error clustered by item, how many
    parse_failure, ties          shares in 0..1

and may hold more, such as low and high (the 95 % interval), accuracy_judged, order_flip, overlong,
auc. A guided row has gain, gain_stderr, gain_low and gain_high: its accuracy minus that of the plain
vote of as many samples, on the same blocks of the same samples, paired by item. A plain row has, where
asked for, what the same votes give by expected scores: expected_accuracy, expected_gain and so on. A row
of votes that stop early has votes_saved, the share of the samples that they did not need. A number that
does not exist (no item, not finite) is None, null in the file.
"""

import decimal
import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from spct_jax.stages import processes

KEY = ('stage', 'benchmark', 'subset', 'n', 'temperature', 'k', 'guided')
_Z95 = 1.959963984540054

Row = dict[str, Any]


def _is_number(value: Any) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_share(value: Any) -> bool:
  return value is None or (_is_number(value) and 0 <= value <= 1)


def _is_gain(value: Any) -> bool:
  return value is None or (_is_number(value) and -1 <= value <= 1)


def _is_count(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and value >= 0


_REQUIRED: dict[str, tuple[str, Callable[[Any], bool]]] = {
  'stage': ('a name', lambda value: isinstance(value, str) and value != ''),
  'benchmark': ('a name', lambda value: isinstance(value, str) and value != ''),
  'subset': ('a name', lambda value: isinstance(value, str) and value != ''),
  'n': (
    'a positive integer, or None',
    lambda value: value is None or (_is_count(value) and value > 0),
  ),
  'temperature': ('a number >= 0', lambda value: _is_number(value) and value >= 0),
  'k': ('a positive integer', lambda value: _is_count(value) and value > 0),
  'guided': ("False, 'hard' or 'soft'", lambda value: value is False or value in ('hard', 'soft')),
  'accuracy': ('a share in 0..1, or None', _is_share),
  'stderr': (
    'a number >= 0, or None',
    lambda value: value is None or (_is_number(value) and value >= 0),
  ),
  'items': ('an integer >= 0', _is_count),
  'parse_failure': ('a share in 0..1, or None', _is_share),
  'ties': ('a share in 0..1, or None', _is_share),
}
_OPTIONAL_GAINS = ('gain', 'gain_low', 'gain_high', 'expected_gain', 'expected_gain_low', 'expected_gain_high')
_OPTIONAL_SHARES = (
  'low', 'high', 'accuracy_judged', 'order_flip', 'resample_flip', 'auc', 'votes_saved', 'expected_accuracy',
  'expected_auc',
)


def validated(rows: Sequence[Mapping[str, Any]]) -> list[Row]:
  """The rows with plain Python values; ValueError names the row and the field that is wrong."""
  checked, seen = [], set()
  for i, row in enumerate(rows):
    row = {name: _plain(value) for name, value in row.items()}
    name = f'results row {i} ({", ".join(f"{key}={row[key]!r}" for key in KEY if key in row)})'
    missing = [key for key in _REQUIRED if key not in row]
    if missing:
      raise ValueError(f'{name} lacks {", ".join(missing)}; every row has {", ".join(_REQUIRED)}')
    allowed = _REQUIRED | {
      key: ('a share in 0..1, or None', _is_share) for key in _OPTIONAL_SHARES if key in row
    }
    allowed |= {
      key: ('a difference in -1..1, or None', _is_gain) for key in _OPTIONAL_GAINS if key in row
    }
    for key, (what, check) in allowed.items():
      if not check(row[key]):
        raise ValueError(f'{name}: {key} is {row[key]!r}; allowed: {what}')
    identity = tuple(row[key] for key in KEY)
    if identity in seen:
      raise ValueError(f'{name} is there twice; a row is told apart by {", ".join(KEY)}')
    seen.add(identity)
    checked.append(row)
  return checked


def _plain(value: Any) -> Any:
  if isinstance(value, np.generic) or hasattr(value, 'item'):
    value = value.item()
  return None if isinstance(value, float) and not math.isfinite(value) else value


def write(path: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]]) -> None:
  """Writes results.json, a list of flat rows, one per line."""
  lines = [json.dumps(row, allow_nan=False) for row in validated(rows)]
  processes.write_text(path, '[\n' + ',\n'.join(lines) + '\n]\n')


def read(path: str | os.PathLike[str]) -> list[Row]:
  """Reads what `write` wrote."""
  try:
    rows = json.loads(pathlib.Path(path).read_text(encoding='utf-8'))
  except json.JSONDecodeError as error:
    raise ValueError(f'{path} is not JSON ({error}); run the evaluation again') from error
  return validated(rows)


def whole(rows: Sequence[Mapping[str, Any]], benchmark: str) -> list[Mapping[str, Any]]:
  """The rows (or baselines) over all items of a benchmark: subset 'all', no single n where n is mixed."""
  everything = [row for row in rows if row['benchmark'] == benchmark and row['subset'] == 'all']
  mixed = [row for row in everything if row['n'] is None]
  return mixed or everything


def interval(row: Mapping[str, Any]) -> tuple[float, float] | None:
  """The row's 95 % interval: its own low and high, else the normal one from its standard error."""
  if row['accuracy'] is None or not row['items']:
    return None
  low, high = row.get('low'), row.get('high')
  if low is not None and high is not None:
    return low, high
  if row['stderr'] is None:
    return None
  return max(0.0, row['accuracy'] - _Z95 * row['stderr']), min(
    1.0, row['accuracy'] + _Z95 * row['stderr']
  )


def percent(share: Any, places: int = 1) -> str:
  """A share as a percentage, halves rounded up as on paper: 0.62285 -> '62.3 %'; None -> '–'.

  Python's own rounding goes by the binary value: it writes 0.1235 as 12.3, and a share of 201/320,
  exactly 62.8125, as 62.812. Twelve significant digits first take away what sums in binary leave
  behind.
  """
  return '–' if share is None else f'{decimals(share, places)} %'


def decimals(share: Any, places: int = 1) -> str:
  """`percent` without the sign."""
  if share is None or not math.isfinite(share):
    return '–'
  exact = decimal.Decimal(format(decimal.Decimal(str(share)), '.12g')) * 100
  rounded = exact.quantize(decimal.Decimal(1).scaleb(-places), rounding=decimal.ROUND_HALF_UP)
  return str(abs(rounded) if rounded == 0 else rounded)


def points(gain: Any, places: int = 1) -> str:
  """A difference of shares in points, with its sign: 0.0123 -> '+1.2', -0.5 -> '-50.0', 0 -> '0.0'."""
  words = decimals(gain, places)
  return words if words.startswith(('-', '–')) or not words.strip('0.') else f'+{words}'


def count(number: int, noun: str) -> str:
  """'1 item', '2 items', '0 items'."""
  return f'{number} {noun}' if number == 1 else f'{number} {noun}s'
