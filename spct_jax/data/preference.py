"""From a source to Examples: choose a reader, read every row, count what cannot be used.

A reader is one function per format, raw row -> items; the table `READERS` names them.
`reader='auto'` looks at the columns of the first row and says in `Loaded.describe()` what it found.
A mistake in the file is a ValueError with file and line; an item that cannot be used is skipped,
counted and named, and with `strict=True` all of them together are one ValueError.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence

from spct_jax.data import gsm8k, plain, sources, transcripts
from spct_jax.data.items import Skipped
from spct_jax.data.sources import RawRow
from spct_jax.types import Example

_NAMED = 10  # how many places a message names per reason


@dataclasses.dataclass(frozen=True)
class Reader:
  """One format: `read` makes items of a row, `accepts` knows its columns, `columns` names them."""

  read: Callable[[RawRow], tuple[Example | Skipped, ...]]
  accepts: Callable[[dict], bool]
  columns: str


READERS = {
  'plain': Reader(plain.read, plain.accepts, plain.FORMATS),
  'hh_rlhf': Reader(
    transcripts.read, transcripts.accepts, "chosen + rejected, transcripts from '\\n\\nHuman:' on"
  ),
  'gsm8k_single': Reader(
    gsm8k.read_single, gsm8k.accepts, 'question, ground_truth, <model>: {is_correct, solution}'
  ),
  'gsm8k_list': Reader(
    gsm8k.read_list, gsm8k.accepts, 'question, ground_truth, <model>: {is_correct, solution}'
  ),
}


@dataclasses.dataclass(frozen=True)
class Loaded:
  """What a source held. `skipped` maps a reason to the places (file:line) of the items left out."""

  source: str
  reader: str
  columns: tuple[str, ...]
  examples: tuple[Example, ...]
  skipped: dict[str, list[str]]

  def describe(self) -> str:
    """A few lines for the log: what was read, how, and what was left out."""
    sizes = collections.Counter(len(example.responses) for example in self.examples)
    shape = ', '.join(
      f'{count} with {n} response{"s" * (n > 1)}' for n, count in sorted(sizes.items())
    )
    unlabelled = sum(example.label is None for example in self.examples)
    lines = [
      f'{self.source}: {len(self.examples)} items ({shape}), read as {self.reader!r} from the'
      f' columns {", ".join(self.columns)}'
    ]
    if unlabelled:
      lines.append(f'  {unlabelled} items have no label')
    lines += [f'  skipped {line}' for line in _reasons(self.skipped)]
    return '\n'.join(lines)


def _reasons(skipped: Mapping[str, Sequence[str]]) -> list[str]:
  lines = []
  for reason, places in skipped.items():
    more = f' and {len(places) - _NAMED} more' if len(places) > _NAMED else ''
    names = ', '.join(pathlib.PurePath(place).name for place in places[:_NAMED])
    lines.append(f'{len(places)}: {reason} ({names}{more})')
  return lines


def load(
  path: os.PathLike | str,
  reader: str = 'auto',
  *,
  strict: bool = False,
  limit: int | None = None,
  subset: Sequence[str] | None = None,
  readers: Mapping[str, Reader] = READERS,
) -> Loaded:
  """Reads a source (see `sources`) into examples, in its order.

  Args:
    path: the source.
    reader: a name of `readers`, or 'auto'.
    strict: whether an item that cannot be used is an error.
    limit: how many usable items to take at most; reading stops there.
    subset: the subsets to keep; None keeps all.
    readers: the table of readers; `benchmarks.load` gives a longer one.
  """
  if reader != 'auto' and reader not in readers:
    raise ValueError(f'unknown reader {reader!r}: allowed are auto, {", ".join(readers)}')
  if limit is not None and limit < 1:
    raise ValueError(f'limit must be at least 1 or None, got {limit}')
  rows = sources.read(path)
  first = next(rows)
  name = detect(first, readers) if reader == 'auto' else reader
  read = readers[name].read

  examples, skipped, places, subsets = [], {}, {}, set()
  for raw in itertools.chain([first], rows):
    for item in read(raw):
      if isinstance(item, Skipped):
        skipped.setdefault(item.reason, []).append(item.where)
        continue
      _check_new(item.uid, raw.where, places)
      subsets.add(item.subset)
      if subset is None or item.subset in subset:
        examples.append(item)
    if limit is not None and len(examples) >= limit:
      break

  if strict and skipped:
    raise ValueError(
      f'{path}: strict, and some items cannot be used:\n  ' + '\n  '.join(_reasons(skipped))
    )
  if not examples:
    why = (
      '; '.join(_reasons(skipped))
      if skipped
      else f'its subsets are {sorted(subsets)}, asked for {subset}'
    )
    raise ValueError(f'{path}: no usable item as {name!r}: {why}')
  return Loaded(os.fspath(path), name, tuple(first.row), tuple(examples[:limit]), skipped)


def _check_new(uid: str, where: str, places: dict[str, str]) -> None:
  if uid in places:
    raise ValueError(
      f'duplicate id {uid!r}: {where} and {places[uid]}; ids key the randomness and join the'
      ' records, so give each item its own (or remove the id column: then file and line are the id)'
    )
  places[uid] = where


def detect(raw: RawRow, readers: Mapping[str, Reader] = READERS) -> str:
  """The one reader whose columns the row has."""
  found = [name for name, reader in readers.items() if reader.accepts(raw.row)]
  if len(found) == 1:
    return found[0]
  columns = f'{raw.where}: columns found: {sorted(raw.row)}'
  if found:
    raise ValueError(
      f'{columns}; they fit several readers: choose with reader={" or ".join(map(repr, found))}'
    )
  formats = '\n  '.join(f'{name}: {reader.columns}' for name, reader in readers.items())
  raise ValueError(f'{columns}; they fit no reader. Accepted formats:\n  {formats}')
