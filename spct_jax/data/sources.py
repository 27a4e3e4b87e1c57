"""Where raw rows come from: files, the files that a package carries, a function, and TFDS.

    path/to/file.jsonl, .ndjson, .json     objects one per line, or one JSON list of objects;
                                           each also with .gz
    builtin:preferences                    small files of our own writing
    builtin:instructions
    package:MODULE/folder/file.jsonl       a file that an importable package carries
    made:MODULE:FUNCTION?name=value&...    rows (dicts) that a Python function yields
    tfds:NAME:SPLIT[@FOLDER]               a prepared TFDS set in ArrayRecord format

The first character decides between lines and a list, and the first bytes between compressed and
plain: names lie, contents do not. A function is called with the values behind the question mark,
read as the types of its parameters (int, float, true or false, text), and its rows are taken one by
one, so that it may have no end where the reader has a limit. TFDS is
read by `tfds.data_source`, without TensorFlow, and imported only then.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import importlib.util
import inspect
import itertools
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from spct_jax import jsonl, packaged

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
  if name.startswith(MADE):
    yield from read_made(name)
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
  path = packaged.locate(name).expanduser()
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


# A function --------------------------------------------------------------------------------------

MADE = 'made:'
_BOOLEANS = {'true': True, 'false': False}
_TYPES = {'int': int, 'float': float, 'bool': bool, 'str': str}


def read_made(name: str) -> Iterator[RawRow]:
  """Yields what the function of 'made:MODULE:FUNCTION?name=value&name=value' yields, row by row.

  The function must be pure: the name alone decides what it yields.
  """
  module, function_name, _ = _made_name(name)
  yield from _remembered(name, _function(name, module, function_name))


def _make(name: str, function: Callable) -> Iterator[RawRow]:
  module, function_name, words = _made_name(name)
  arguments = _arguments(name, function, words)
  rows = function(**arguments)
  if not isinstance(rows, Iterable):
    raise ValueError(
      f'{name!r}: {function_name} must yield rows (dicts), and returned {type(rows).__name__}'
    )
  line = 0
  for line, row in enumerate(rows, start=1):
    if not isinstance(row, dict):
      raise ValueError(
        f'{name!r}: row {line} is no dict but {type(row).__name__}; {function_name} must yield rows'
        ' (dicts, column -> value)'
      )
    yield RawRow(row, f'{module}:{function_name}', line)
  if not line:
    raise ValueError(f'{name!r}: {function_name} yields no row: expected at least one')


class _Made:
  """The rows of one call, each made when it is first asked for and kept: stages read them again.

  A call that failed fails again in the same words, and never looks like one that ended early.
  """

  def __init__(self, rows: Iterator[RawRow]):
    self._rest = rows
    self._rows: list[RawRow] = []
    self._error: Exception | None = None

  def __iter__(self) -> Iterator[RawRow]:
    for place in itertools.count():
      if place == len(self._rows):
        if self._error is not None:
          raise self._error
        try:
          self._rows.append(next(self._rest))
        except StopIteration:
          return
        except Exception as error:
          self._error = error
          raise
      yield self._rows[place]


# A few names: the data of a run. The function is part of the key, so a module loaded anew counts.
@functools.lru_cache(maxsize=8)
def _remembered(name: str, function: Callable) -> _Made:
  return _Made(_make(name, function))


def made_file(name: str) -> pathlib.Path:
  """The source file of the module that a 'made:' name speaks of; it is not run."""
  module = _made_name(name)[0]
  try:
    spec = importlib.util.find_spec(module)
  # A parent that cannot be imported, a relative name, a module without a spec.
  except (ImportError, TypeError, ValueError) as error:
    raise ValueError(f'{name!r}: cannot find the module {module!r} ({error})') from error
  if spec is None:
    raise ValueError(f'{name!r}: there is no module {module!r}; install it, or correct its name')
  if not spec.has_location:
    raise ValueError(f'{name!r}: the module {module!r} has no source file')
  return pathlib.Path(spec.origin)


def _made_name(name: str) -> tuple[str, str, list[str]]:
  """(module, function, words 'name=value')."""
  place, mark, query = name.removeprefix(MADE).partition('?')
  module, _, function = place.partition(':')
  if not module or not function.isidentifier():
    raise ValueError(
      f'{name!r}: expected {MADE}MODULE:FUNCTION or {MADE}MODULE:FUNCTION?name=value&name=value'
    )
  return module, function, query.split('&') if mark else []


def _function(name: str, module: str, function: str) -> Callable:
  made_file(name)
  try:
    found = importlib.import_module(module)
  except ImportError as error:
    raise ValueError(
      f'{name!r}: cannot import {module!r} ({error}); install what it needs'
    ) from error
  value = getattr(found, function, None)
  if not inspect.isfunction(value):
    own = [
      key
      for key, member in inspect.getmembers(found, inspect.isfunction)
      if member.__module__ == found.__name__ and not key.startswith('_')
    ]
    raise ValueError(
      f'{name!r}: {module} has no function {function!r}; it has: {", ".join(own) or "none"}'
    )
  return value


def _arguments(name: str, function: Callable, words: list[str]) -> dict[str, Any]:
  """The values of the words, by the types of the parameters that they name."""
  types, needed, shown = {}, [], []
  for key, parameter in inspect.signature(function).parameters.items():
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
      continue
    kind = None
    if parameter.kind is not parameter.POSITIONAL_ONLY:
      kind = _type(parameter)
    bare = parameter.default is parameter.empty
    if kind is not None:
      types[key] = kind
      default = '' if bare else f', default {parameter.default!r}'
      shown.append(f'{key} ({kind.__name__}{default})')
    elif bare:
      raise ValueError(
        f'{name!r}: {function.__name__} needs {key!r}, which no name can give: only parameters of'
        f' the types {", ".join(_TYPES)} can be given'
      )
    if bare:
      needed.append(key)
  allowed = f'allowed: {", ".join(shown) or "none"}'
  values = {}
  for word in words:
    key, equals, text = word.partition('=')
    if not equals:
      raise ValueError(f'{name!r}: {word!r} is no name=value; {allowed}')
    if key not in types:
      raise ValueError(f'{name!r}: {function.__name__} has no {key!r}; {allowed}')
    if key in values:
      raise ValueError(f'{name!r}: {key!r} is given twice')
    try:
      values[key] = _BOOLEANS[text.lower()] if types[key] is bool else types[key](text)
    except (KeyError, ValueError):
      kind = 'true or false' if types[key] is bool else f'a value of type {types[key].__name__}'
      raise ValueError(f'{name!r}: {key}: got {text!r}; allowed: {kind}') from None
  missing = [key for key in needed if key not in values]
  if missing:
    raise ValueError(f'{name!r}: {function.__name__} needs {", ".join(missing)}; {allowed}')
  return values


def _type(parameter: inspect.Parameter) -> type | None:
  """int, float, bool or str: as annotated, else as the default is; a bare parameter is text."""
  noted = parameter.annotation
  if noted is not parameter.empty:
    noted = _TYPES.get(noted, noted) if isinstance(noted, str) else noted
    if noted in _TYPES.values():
      return noted
  elif parameter.default is parameter.empty:
    return str
  kind = type(parameter.default)
  return kind if kind in _TYPES.values() else None


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
