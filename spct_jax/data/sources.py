"""Where raw rows come from: files, the files that the package carries, and TFDS.

    path/to/file.jsonl, .ndjson, .json     objects one per line, or one JSON list of objects;
                                           each also with .gz
    builtin:preferences                    small files of our own writing
    builtin:instructions
    tfds:NAME:SPLIT[@FOLDER]               a prepared TFDS set in ArrayRecord format

The first character decides between lines and a list, and the first bytes between compressed and
plain: names lie, contents do not. TFDS is read by `tfds.data_source`, without TensorFlow, and
imported only then.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from spct_jax import jsonl

SUFFIXES = ('.jsonl', '.ndjson', '.json')
_FILES = pathlib.Path(__file__).parent / 'files'
BUILTIN = {
  'builtin:preferences': _FILES / 'preferences.jsonl',
  'builtin:instructions': _FILES / 'instructions.jsonl',
}


@dataclasses.dataclass(frozen=True)
class RawRow:
  """One row of a source; `line` counts from 1 (in a JSON list: the position of the item).

  A null column is dropped from `row`: where several data sets were put under one schema, null
  stands for a column that the row does not have.
  """

  row: dict
  file: str
  line: int

  def __post_init__(self) -> None:
    there = {name: value for name, value in self.row.items() if value is not None}
    object.__setattr__(self, 'row', there)

  @property
  def where(self) -> str:
    """file:line, for messages."""
    return f'{self.file}:{self.line}'

  @property
  def name(self) -> str:
    """<file name>:<line>, the uid of a row that has no id: it does not depend on the folder."""
    return f'{pathlib.PurePath(self.file).name}:{self.line}'


def read(path: os.PathLike | str) -> Iterator[RawRow]:
  """Yields the rows of a source; ValueError if it is missing, empty, malformed or no JSON."""
  name = os.fspath(path)
  if name.startswith('tfds:'):
    yield from read_tfds(*_tfds_name(name))
    return
  file = _locate(name)
  empty = True
  for line, row in _rows(file):
    empty = False
    yield RawRow(row, str(file), line)
  if empty:
    raise ValueError(f'{file} is empty: expected at least one row, a JSON object per line')


def _locate(name: str) -> pathlib.Path:
  """The file of a name, after the checks that need no reading."""
  if name.startswith('builtin:'):
    if name not in BUILTIN:
      raise ValueError(f'{name!r} is no file of the package: allowed are {", ".join(BUILTIN)}')
    return BUILTIN[name]
  path = pathlib.Path(name).expanduser()
  if path.is_dir():
    inside = sorted(p.name for p in path.iterdir() if _suffix(p.name) in SUFFIXES)[:5]
    raise ValueError(
      f'{path} is a folder: give one file' + (f', such as {inside}' if inside else '')
    )
  if not path.exists():
    there = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else None
    if there is None:
      raise ValueError(f'{path} does not exist, nor does its folder: check the path')
    close = difflib.get_close_matches(path.name, there, n=1)
    raise ValueError(
      f'{path} does not exist: ' + (f'did you mean {close[0]!r}?' if close else 'check the path')
    )
  if _suffix(path.name) not in SUFFIXES:
    raise ValueError(
      f'{path}: cannot read this format; allowed are {", ".join(SUFFIXES)}, each also with .gz:'
      ' convert the file to JSON lines'
    )
  return path


def _suffix(name: str) -> str:
  return pathlib.PurePath(name.lower().removesuffix('.gz')).suffix


def _rows(file: pathlib.Path) -> Iterator[tuple[int, dict]]:
  """(line, object) of a file; a file that begins with '[' is a list."""
  for _, text in jsonl.open_text_lines(file):
    if text.strip():
      is_list = text.lstrip().startswith('[')
      break
  else:
    return
  if not is_list:
    yield from jsonl.read_numbered(file)
    return
  values = jsonl.parse('\n'.join(text for _, text in jsonl.open_text_lines(file)), str(file))
  for number, value in enumerate(values, start=1):
    if not isinstance(value, dict):
      raise ValueError(
        f'{file}:{number}: item {number} of the list is no JSON object but {type(value).__name__}'
      )
    yield number, value


# TFDS ---------------------------------------------------------------------------------------------


def _tfds_name(name: str) -> tuple[str, str, str | None]:
  """(data set, split, folder or None) of 'tfds:NAME:SPLIT@FOLDER'."""
  rest, _, folder = name.removeprefix('tfds:').partition('@')
  dataset, _, split = rest.partition(':')
  if not dataset or not split:
    raise ValueError(
      f'{name!r}: expected tfds:NAME:SPLIT or tfds:NAME:SPLIT@FOLDER, such as tfds:gsm8k:test'
    )
  return dataset, split, folder or None


def read_tfds(name: str, split: str, data_dir: os.PathLike | str | None = None) -> Iterator[RawRow]:
  """Yields the rows of one split of a TFDS set, prepared in ArrayRecord format under `data_dir`.

  bytes become text and arrays become lists, so that a row looks as it would in a JSON file. Without
  `data_dir`, TFDS looks in its own folder (TFDS_DATA_DIR). Nothing is downloaded.
  """
  import tensorflow_datasets as tfds  # slow to import, and not needed for files

  where = f'TFDS set {name!r}, split {split!r}' + (f', in {data_dir}' if data_dir else '')
  try:
    builder = tfds.builder(name, data_dir=data_dir)
    source = builder.as_data_source(split=split)
  # TFDS raises many kinds: not found, no such split, not prepared, wrong format.
  except Exception as error:
    raise ValueError(
      f'{where}: cannot be read ({type(error).__name__}: {_first_line(error)}); prepare it first'
      " with file_format='array_record', and give the folder that it was prepared in"
    ) from error
  if not len(source):
    raise ValueError(f'{where}: is empty')
  for index in range(len(source)):
    yield RawRow(_from_tfds(source[index]), f'{name}:{split}', index + 1)


def _first_line(error: Exception) -> str:
  return (str(error).strip().splitlines() or [''])[0]


def _from_tfds(value: Any) -> Any:
  """The plain value of a TFDS feature; a sequence of dicts stays what it is, a dict of arrays."""
  if isinstance(value, bytes):
    return value.decode('utf-8')
  if isinstance(value, dict):
    return {key: _from_tfds(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [_from_tfds(item) for item in value]
  if hasattr(value, 'tolist'):
    return _from_tfds(value.tolist())
  return value
