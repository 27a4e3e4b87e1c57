"""JSON lines on disk: written whole or not at all, and read with errors that name file and line.

Three ways to write, each safe against a kill at any moment:

    write_jsonl    a file at once: a temporary file in the same folder, flushed, then renamed
    append_jsonl   a log that grows: a torn last line left by a kill is cut off before the next row
    ChunkedWriter  a long result in chunks: each chunk is a file of its own until `finish` joins
                   them, so that a resumed run sees which are whole and computes only the others

numpy numbers and arrays become JSON numbers and lists; numbers that JSON does not have (nan, inf)
become null. A path that ends in .gz is compressed (with no time stamp: equal rows give equal
bytes); on reading, the content decides.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import json
import math
import os
import pathlib
import secrets
import sys
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

# Values to JSON -----------------------------------------------------------------------------------


def plain(value: Any) -> Any:
  """The JSON value of `value`: numpy and dataclasses become plain, nan and inf become None."""
  if isinstance(value, (str, bool, int)) or value is None:
    return value
  if isinstance(value, float):
    return value if math.isfinite(value) else None
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
  if isinstance(value, dict):
    return {_key(name): plain(item) for name, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [plain(item) for item in value]
  if isinstance(value, (np.ndarray, np.generic)):
    return plain(value.tolist())
  if isinstance(value, os.PathLike):
    return os.fspath(value)
  if hasattr(value, '__array__'):  # a jax array, without importing JAX
    return plain(np.asarray(value).tolist())
  raise ValueError(
    f'cannot write a {type(value).__name__} as JSON: {value!r}; allowed are numbers, strings,'
    ' booleans, None, lists, tuples, dicts, dataclasses, paths and numpy values: convert it first'
  )


def is_finite(value: Any) -> bool:
  """Whether it is a number that a float holds: JSON's 1e999 is not, nor is one of 400 digits."""
  if isinstance(value, bool) or not isinstance(value, (int, float)):
    return False
  return -sys.float_info.max <= value <= sys.float_info.max


def _key(name: Any) -> str:
  if isinstance(name, str):
    return name
  if isinstance(name, (int, np.integer)) and not isinstance(name, bool):
    return str(int(name))
  raise ValueError(f'cannot write {name!r} as a JSON key: allowed are strings and integers')


def dumps(value: Any, indent: int | None = None) -> str:
  """`value` as JSON text; without `indent` it is one line."""
  return json.dumps(plain(value), ensure_ascii=False, allow_nan=False, indent=indent)


# Writing ------------------------------------------------------------------------------------------


def _compressed(path: pathlib.Path) -> bool:
  return path.suffix.lower() == '.gz'


@contextlib.contextmanager
def _replacing(path: os.PathLike | str) -> Iterator[Any]:
  """A binary file that becomes `path` when the block ends well, and else leaves no trace."""
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  if path.is_dir():
    raise ValueError(
      f'cannot write the file {path}: a folder of that name is there; give a file name'
    )
  temporary = path.with_name(f'.{path.name[:100]}.{secrets.token_hex(4)}.part')
  try:
    with open(temporary, 'xb') as raw:
      if _compressed(path):
        with gzip.GzipFile(filename='', mode='wb', fileobj=raw, mtime=0) as file:
          yield file
      else:
        yield raw
      raw.flush()
      os.fsync(raw.fileno())
    os.replace(temporary, path)
  except BaseException:
    with contextlib.suppress(FileNotFoundError):
      os.unlink(temporary)
    raise


def write_text(path: os.PathLike | str, text: str) -> None:
  """Writes `text` as UTF-8, whole or not at all."""
  with _replacing(path) as file:
    file.write(text.encode('utf-8'))


def write_json(path: os.PathLike | str, value: Any) -> None:
  """Writes one JSON value, indented for people, whole or not at all."""
  write_text(path, dumps(value, indent=2) + '\n')


def _line(row: Any) -> bytes:
  return (dumps(row) + '\n').encode('utf-8')


def write_jsonl(path: os.PathLike | str, rows: Iterable[Any]) -> int:
  """Writes one JSON line per row, whole or not at all; returns the number of rows.

  If `rows` raises half-way, the file that was there before is untouched.
  """
  count = 0
  with _replacing(path) as file:
    for row in rows:
      file.write(_line(row))
      count += 1
  return count


def append_jsonl(path: os.PathLike | str, rows: Iterable[Any]) -> None:
  """Adds rows to the end of a plain (not compressed) file; a torn last line is cut off first."""
  path = pathlib.Path(path)
  if _compressed(path):
    raise ValueError(f'cannot append to the compressed file {path}: log to a plain .jsonl file')
  # A row that cannot be written fails here, before the file is touched.
  data = b''.join(_line(row) for row in rows)
  path.parent.mkdir(parents=True, exist_ok=True)
  with open(path, 'ab+') as file:
    size = file.seek(0, os.SEEK_END)
    file.truncate(_end_of_last_line(file, size))
    file.write(data)
    file.flush()
    os.fsync(file.fileno())


def _end_of_last_line(file: Any, size: int) -> int:
  """The offset after the last newline of the file, 0 if it has none."""
  end = size
  while end > 0:
    start = max(0, end - 65536)
    file.seek(start)
    found = file.read(end - start).rfind(b'\n')
    if found >= 0:
      return start + found + 1
    end = start
  return 0


class ChunkedWriter:
  """The rows of one file, computed in chunks that a killed run may leave incomplete.

  Until `finish`, chunk c lies in `<path>.chunks/<c>.jsonl`, written whole or not at all:

      writer = ChunkedWriter(path)
      for chunk in range(chunks):
        if chunk not in writer.done:
          writer.write(chunk, compute(chunk))
      writer.finish(chunks)

  A second run of this loop skips what the first has done, and gives the same bytes as one run
  would. Which rows make up a chunk must not depend on what is done already.
  """

  def __init__(self, path: os.PathLike | str):
    self.path = pathlib.Path(path)
    self.folder = self.path.with_name(self.path.name + '.chunks')
    if self.finished:  # killed between joining the chunks and removing them
      self._remove()

  @property
  def finished(self) -> bool:
    """Whether the joined file is there."""
    return self.path.is_file()

  @property
  def done(self) -> frozenset[int]:
    """The numbers of the chunks that are whole."""
    return frozenset(int(part.name[:-6]) for part in self._parts())

  def _parts(self) -> list[pathlib.Path]:
    return sorted(part for part in self.folder.glob('*.jsonl') if part.name[:-6].isdigit())

  def _part(self, chunk: int) -> pathlib.Path:
    return self.folder / f'{chunk:06d}.jsonl'

  def write(self, chunk: int, rows: Iterable[Any]) -> int:
    """Writes chunk number `chunk` (from 0); returns the number of rows."""
    if self.finished:
      raise ValueError(f'{self.path} is finished: remove it to compute its rows again')
    return write_jsonl(self._part(chunk), rows)

  def rows(self, chunk: int) -> Iterator[dict]:
    """The rows of a chunk that is whole."""
    return read_jsonl(self._part(chunk))

  def finish(self, chunks: int) -> None:
    """Joins chunks 0 .. chunks - 1 into `path`, in their order; done again, it does nothing."""
    if self.finished:
      return
    missing = sorted(set(range(chunks)) - self.done)
    extra = sorted(self.done - set(range(chunks)))
    if missing or extra:
      raise ValueError(
        f'cannot finish {self.path} with {chunks} chunks: missing {missing}, unknown {extra} in'
        f' {self.folder}; write the missing ones, or remove the folder to begin again'
      )
    with _replacing(self.path) as file:
      for chunk in range(chunks):
        file.write(self._part(chunk).read_bytes())
    self._remove()

  def _remove(self) -> None:
    for part in self._parts():
      part.unlink()
    if self.folder.is_dir():
      for torn in self.folder.glob('.*.part'):  # a write that was killed
        torn.unlink()
      with contextlib.suppress(OSError):
        self.folder.rmdir()


# Reading ------------------------------------------------------------------------------------------


def open_text_lines(path: os.PathLike | str) -> Iterator[tuple[int, str]]:
  """Yields (line number from 1, text) of a UTF-8 file, compressed or plain; no line ends, no BOM.

  Only a newline ends a line: the line separators of Unicode (U+2028, U+0085) may stand inside a
  string.
  """
  path = pathlib.Path(path)
  if path.is_dir():
    raise ValueError(f'{path} is a folder: give one file in it')
  if not path.exists():
    raise ValueError(f'{path} does not exist: check the path')
  with open(path, 'rb') as probe:
    compressed = probe.read(2) == b'\x1f\x8b'
  number = 0
  try:
    with gzip.open(path, 'rb') if compressed else open(path, 'rb') as file:
      for number, data in enumerate(file, start=1):
        text = data.decode('utf-8-sig' if number == 1 else 'utf-8')
        yield number, text.rstrip('\r\n')
  except UnicodeDecodeError as error:
    raise ValueError(
      f'{path}:{number}: not UTF-8 text ({error.reason}): save the file as UTF-8'
    ) from None
  except (EOFError, gzip.BadGzipFile, zlib.error) as error:
    raise ValueError(
      f'{path}: damaged gzip file after line {number} ({error}): fetch it again'
    ) from None


def _refuse_constant(name: str) -> Any:
  raise ValueError(f'{name} is not JSON')


def parse(text: str, where: str) -> Any:
  """The JSON value of `text`; a mistake is a ValueError that begins with `where`."""
  try:
    value = json.loads(text, parse_constant=_refuse_constant)
  except json.JSONDecodeError as error:
    line = f'line {error.lineno}, ' if error.lineno > 1 else ''
    raise ValueError(
      f'{where}: not valid JSON ({error.msg} at {line}column {error.colno}): {shorten(text)}'
    ) from None
  except (ValueError, RecursionError) as error:
    raise ValueError(f'{where}: not valid JSON ({error}): {shorten(text)}') from None
  # Half of an escaped surrogate pair cannot be encoded as UTF-8 later on.
  if '\\ud' in text.lower():
    try:
      json.dumps(value, ensure_ascii=False).encode('utf-8')
    except UnicodeEncodeError:
      raise ValueError(
        f'{where}: text with half of a surrogate pair (\\ud...): {shorten(text)}'
      ) from None
  return value


def read_json(path: os.PathLike | str) -> Any:
  """The one JSON value of a file; FileNotFoundError, or a ValueError that begins with the path."""
  try:
    return json.loads(pathlib.Path(path).read_text(encoding='utf-8'))
  except (ValueError, RecursionError) as error:
    raise ValueError(f'{path}: not JSON ({error})') from None


def shorten(text: str) -> str:
  """A quotation for a message."""
  return repr(text if len(text) <= 60 else text[:57] + '...')


def read_numbered(path: os.PathLike | str) -> Iterator[tuple[int, dict]]:
  """Yields (line number, row) of a JSON lines file; blank lines are passed over."""
  for number, text in open_text_lines(path):
    if not text.strip():
      continue
    row = parse(text, f'{path}:{number}')
    if not isinstance(row, dict):
      raise ValueError(
        f'{path}:{number}: a row is a JSON object {{...}}, got {type(row).__name__}:'
        f' {shorten(text)}'
      )
    yield number, row


def read_jsonl(path: os.PathLike | str) -> Iterator[dict]:
  """Yields the rows of a JSON lines file."""
  for _, row in read_numbered(path):
    yield row
