"""Tensors in safetensors files: what a folder holds, checked whole before a byte is used, and read slice by slice.

A file is 8 bytes (the header's length n, little-endian), n bytes of JSON and the data. The JSON maps a tensor's name
to `{"dtype": "BF16", "shape": [out, in], "data_offsets": [begin, end]}`, offsets counted from the end of the header;
the tensors fill the data without a gap. Large models are several such files beside an index,
`{"weight_map": {name: file}}`.

Reads are `pread` into the caller's memory: a mapped file would count every page it touched as ours. Nothing here
unpickles; a folder with other weight formats is refused with the remedy.
"""

import collections
import dataclasses
import functools
import json
import math
import os
import pathlib
import struct
import threading
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

SINGLE, INDEX = 'model.safetensors', 'model.safetensors.index.json'

# What the format knows -> bits of one value, and the ones that become parameters.
_BITS = {
    'BOOL': 8, 'U8': 8, 'I8': 8, 'F8_E4M3': 8, 'F8_E5M2': 8, 'F8_E8M0': 8, 'F4': 4, 'F6_E2M3': 6, 'F6_E3M2': 6,
    'I16': 16, 'U16': 16, 'F16': 16, 'BF16': 16, 'I32': 32, 'U32': 32, 'F32': 32, 'C64': 64, 'F64': 64, 'I64': 64,
    'U64': 64,
}  # fmt: skip
DTYPES = {'BF16': jnp.dtype('bfloat16'), 'F16': np.dtype('float16'), 'F32': np.dtype('float32')}
NAMES = {dtype.name: name for name, dtype in DTYPES.items()}

_LONGEST_HEADER = 100 * 2**20  # bytes; what the format allows
_OTHER_FORMATS = ('.bin', '.pt', '.pth', '.ckpt', '.pkl', '.h5', '.msgpack', '.npz', '.gguf', '.onnx', '.ot')
# Readers, for the processors that this process may use: the copies that turn a kernel are bound by them.
THREADS = min(8, len(os.sched_getaffinity(0)))
_CHUNK = 2**20  # bytes that a reader takes at most where values are not read in place: in its cache until they are copied
_LEAST_CHUNK = 2**17
_ROWS = 64  # at least: of a wide matrix few rows would be slow to turn


@dataclasses.dataclass(frozen=True)
class Tensor:
  """Where a tensor lies: `begin` and `nbytes` count bytes of the file `path`."""

  name: str
  path: pathlib.Path
  dtype: str
  shape: tuple[int, ...]
  begin: int
  nbytes: int


class Weights:
  """The tensors of a folder, open for reading. A context manager; `read` may be called from several threads.

  `tensors` maps names to `Tensor`; `bytes_read` counts what this object has read of them.
  """

  def __init__(self, folder: str | os.PathLike):
    """ValueError, naming the file, if anything about the files is wrong; no tensor has been read then."""
    self.folder = pathlib.Path(folder)
    self.bytes_read = 0
    self._lock = threading.Lock()
    self._open: dict[pathlib.Path, int] = {}
    try:
      self.tensors = self._tensors()
    except BaseException:
      self.close()
      raise

  def __enter__(self) -> 'Weights':
    return self

  def __exit__(self, *error: Any) -> None:
    self.close()

  def close(self) -> None:
    """Closes the files; the tensors cannot be read afterwards."""
    while self._open:
      os.close(self._open.popitem()[1])

  def read(self, tensor: Tensor, rows: slice, columns: slice, into: Sequence['Box']) -> None:
    """Reads a rectangle of a tensor, seen as a matrix, and copies it into each of the boxes.

    The matrix has the tensor's first dimension as rows and all others as columns; one dimension counts as rows of
    one column. A box names the part of the rectangle that it takes, in rows and columns of the matrix.
    """
    width = math.prod(tensor.shape[1:])
    source = DTYPES[tensor.dtype]
    wide = columns.stop - columns.start == width
    if wide and len(into) == 1 and into[0].takes(tensor, rows, columns):
      return self._bytes(tensor, rows.start * width * source.itemsize, into[0].out)
    step = max(self._chunk // max((columns.stop - columns.start) * source.itemsize, 1), _ROWS)
    for first in range(rows.start, rows.stop, step):
      last = min(first + step, rows.stop)
      values = self._scratch((last - first, columns.stop - columns.start), source)
      at = (first * width + columns.start) * source.itemsize
      if wide:
        self._bytes(tensor, at, values)
      else:
        for row in values:
          self._bytes(tensor, at, row)
          at += width * source.itemsize
      for box in into:
        try:
          box.copy(values, first, columns.start)
        except OverflowError as error:
          raise ValueError(f'{tensor.path}: tensor {tensor.name} {error}') from None

  def whole(self, tensor: Tensor) -> np.ndarray:
    """One tensor in its own shape and dtype."""
    out = np.empty(tensor.shape, DTYPES[tensor.dtype])
    self._bytes(tensor, 0, out)
    return out

  def same(self, a: Tensor, b: Tensor, part: int = 0, parts: int = 1) -> bool:
    """Whether two tensors hold the same bytes, read in bounded pieces; of them every `parts`-th, from `part` on."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
      return False
    for at in range(part * _CHUNK, a.nbytes, parts * _CHUNK):
      pieces = [np.empty(min(_CHUNK, a.nbytes - at), np.uint8) for _ in range(2)]
      for tensor, piece in zip((a, b), pieces):
        self._bytes(tensor, at, piece)
      if not np.array_equal(*pieces):
        return False
    return True

  @functools.cached_property
  def _chunk(self) -> int:
    """So little that all readers together hold less than the largest tensor: a chunk, what it is turned to, and more."""
    largest = max(tensor.nbytes for tensor in self.tensors.values())
    return min(_CHUNK, max(_LEAST_CHUNK, largest // (8 * max(2, THREADS))))

  _memory = threading.local()

  def _scratch(self, shape, dtype):
    """Memory of this thread for one chunk: fresh pages for each would cost as much as the copy."""
    need = math.prod(shape) * dtype.itemsize
    if getattr(self._memory, 'bytes', np.empty(0)).nbytes < need:
      self._memory.bytes = np.empty(need, np.uint8)
    return self._memory.bytes[:need].view(dtype).reshape(shape)

  def _bytes(self, tensor, at, out):
    """Fills `out`, contiguous, from byte `at` of the tensor on."""
    view = memoryview(out.reshape(-1).view(np.uint8))
    done, fd = 0, self._open[tensor.path]
    while done < len(view):  # a read stops at 2 GiB
      got = os.preadv(fd, [view[done:]], tensor.begin + at + done)
      if not got:
        raise ValueError(f'{tensor.path}: ends inside tensor {tensor.name}; the file was cut while it was read')
      done += got
    with self._lock:
      self.bytes_read += done

  def _tensors(self):
    found: dict[str, Tensor] = {}
    if (self.folder / SINGLE).is_file():  # transformers, too, prefers it to an index beside it
      return self._header(self.folder / SINGLE)
    listed = self._index()
    for file in sorted(set(listed.values())):
      for name, tensor in self._header(self.folder / file).items():
        if name in found:
          raise ValueError(
              f'{self.folder / file}: holds tensor {name}, which {found[name].path.name} holds too; remove one of them'
          )
        if listed.get(name) != file:
          said = f'in {listed[name]}' if name in listed else 'nowhere'
          raise ValueError(
              f'{self.folder / INDEX}: puts tensor {name} {said}, but it is in {file}; the index and the files are of '
              'different models, download or export them together again'
          )
        found[name] = tensor
    gone = sorted(set(listed) - set(found))
    if gone:
      raise ValueError(
          f'{self.folder / INDEX}: names tensors that its files do not hold: {listing(gone, listed.get)}; download '
          'the files again'
      )
    return found

  def _index(self):
    path = self.folder / INDEX
    if not path.is_file():
      raise ValueError(_no_weights(self.folder))
    try:
      fields = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
      raise ValueError(f'{path}: not JSON ({error}); download it again') from None
    listed = fields.get('weight_map') if isinstance(fields, dict) else None
    if not isinstance(listed, dict) or not listed or not all(isinstance(file, str) for file in listed.values()):
      raise ValueError(f'{path}: no weight_map of names to files in it; the download is damaged')
    for file in sorted(set(listed.values())):
      if pathlib.PurePath(file).name != file or file in ('', '.', '..') or '\\' in file or '\0' in file:
        raise ValueError(f'{path}: names the file {file!r}; allowed are files of its own folder')
      if not file.endswith('.safetensors'):
        raise ValueError(f'{path}: names the file {file!r}; only .safetensors files are read')
      if not (self.folder / file).is_file():
        raise ValueError(f'{path}: names {file}, which is not in the folder; the download is incomplete')
    return listed

  def _header(self, path):
    """The tensors of one file, whose offsets are known to fill it exactly."""
    fd = self._open[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    size = os.fstat(fd).st_size
    length = struct.unpack('<Q', os.pread(fd, 8, 0))[0] if size >= 8 else 0
    if size < 8 or length > size - 8 or length > _LONGEST_HEADER:
      raise ValueError(
          f'{path}: not a whole safetensors file: its header would have {length} bytes of the {size} that are there; '
          'download it again'
      )
    try:
      fields = json.loads(os.pread(fd, length, 8), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
      raise ValueError(f'{path}: not a safetensors file: its header is no JSON ({error})') from None
    if not isinstance(fields, dict):
      raise ValueError(f'{path}: not a safetensors file: its header is no table of tensors')
    fields.pop('__metadata__', None)
    data = size - 8 - length
    tensors = [_entry(path, name, entry, 8 + length) for name, entry in fields.items()]
    at = 8 + length
    for tensor in sorted(tensors, key=lambda tensor: (tensor.begin, tensor.nbytes)):
      if tensor.begin != at:
        kind = 'overlaps the one before it' if tensor.begin < at else 'leaves a gap before it'
        raise ValueError(
            f'{path}: damaged safetensors file: tensor {tensor.name} {kind} (byte {tensor.begin - 8 - length} of the '
            f'data, expected {at - 8 - length})'
        )
      at += tensor.nbytes
    if at != size:
      word = 'cut off' if at > size else 'longer than its tensors'
      raise ValueError(
          f'{path}: not a whole safetensors file: it is {word}; its header names {at - 8 - length} bytes of tensors, '
          f'and {data} are there. Download it again'
      )
    return {tensor.name: tensor for tensor in tensors}


@dataclasses.dataclass(frozen=True)
class Box:
  """Memory for a part of a tensor: `rows` and `columns` of its matrix, `turned` if `out` is [columns, rows].

  `out` is two-dimensional and may have another dtype, to which the values are rounded.
  """

  out: np.ndarray
  rows: slice
  columns: slice
  turned: bool

  def takes(self, tensor: Tensor, rows: slice, columns: slice) -> bool:
    """Whether the file's bytes of that rectangle are the box's bytes."""
    return (
        not self.turned
        and self.out.flags.c_contiguous
        and self.out.dtype == DTYPES[tensor.dtype]
        and (self.rows, self.columns) == (rows, columns)
    )

  def copy(self, values: np.ndarray, first_row: int, first_column: int) -> None:
    """Takes its part of a block of the matrix that begins at the given row and column."""
    start, stop = max(self.rows.start, first_row), min(self.rows.stop, first_row + len(values))
    if start >= stop:
      return
    left = self.columns.start - first_column
    values = values[start - first_row : stop - first_row, left : left + self.columns.stop - self.columns.start]
    start, stop = start - self.rows.start, stop - self.rows.start
    if self.turned:
      turn(self.out[:, start:stop], values)
    else:
      self.out[start:stop] = rounded(values, self.out.dtype)


def turn(out: np.ndarray, values: np.ndarray) -> None:
  """`out[:] = values.T` for matrices of cache size; where the dtypes differ, values are rounded to that of `out`.

  The runtime of JAX turns an array that it takes over from strided memory, with a kernel for that, twice as fast as
  numpy does it in tiles. Its result lies in the cache and is copied from there.
  """
  values = rounded(values, out.dtype)
  # As plain integers: numpy moves its own types faster than ml_dtypes' bfloat16.
  word = f'u{out.dtype.itemsize}'
  turned = jax.device_put(values.view(word).T, jax.local_devices(backend='cpu')[0])
  np.copyto(out.view(word), np.asarray(turned))


def rounded(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
  """`values` in `dtype`; OverflowError where float16 has no number for one, which would become infinite."""
  if values.dtype == dtype:
    return values
  with np.errstate(over='ignore'):  # said below, once
    new = values.astype(dtype)
  if dtype == np.float16 and np.isinf(new).any() and (np.isinf(new) & np.isfinite(values)).any():
    raise OverflowError('has values beyond float16 (65504); take bfloat16 or float32')
  return new


def aligned(shape: Sequence[int], dtype: Any) -> np.ndarray:
  """An array that JAX's CPU backend takes over as it is: its memory begins at a multiple of 64 bytes."""
  dtype = jnp.dtype(dtype)
  nbytes = math.prod(shape) * dtype.itemsize
  memory = np.empty(nbytes + 64, np.uint8)
  start = -memory.ctypes.data % 64
  return memory[start : start + nbytes].view(dtype).reshape(shape)


def listing(names: Sequence[str], about: Any = None) -> str:
  """Names for an error message, each with what `about` says of it; a message stays readable at 40 of them."""
  shown = [name if about is None else f'{name} ({about(name)})' for name in names[:40]]
  return ', '.join(shown) + (f' and {len(names) - 40} more' if len(names) > 40 else '')


def _entry(path, name, entry, start):
  where = f'{path}: damaged safetensors file: tensor {name}'
  entry = entry if isinstance(entry, dict) else {}
  dtype, shape, offsets = (entry.get(key) for key in ('dtype', 'shape', 'data_offsets'))
  if not isinstance(dtype, str) or dtype not in _BITS:
    raise ValueError(f'{path}: tensor {name} has the dtype {dtype!r}, which the format does not have')
  if not _counts(shape) or not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
    raise ValueError(f'{where} has the shape {shape} and the offsets {offsets}')
  bits = math.prod(shape) * _BITS[dtype]
  if bits % 8 or offsets[1] - offsets[0] != bits // 8:
    raise ValueError(f'{where} has {offsets[1] - offsets[0]} bytes for the shape {shape} of {dtype}')
  return Tensor(name, path, dtype, tuple(shape), start + offsets[0], bits // 8)


def _counts(values):
  return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _unique(pairs):
  twice = [name for name, count in collections.Counter(name for name, _ in pairs).items() if count > 1]
  if twice:
    raise ValueError(f'{twice[0]!r} is there twice')
  return dict(pairs)


def present(folder: str | os.PathLike) -> bool:
  """Whether the folder has weights that are read here."""
  return any((pathlib.Path(folder) / name).is_file() for name in (SINGLE, INDEX))


def _no_weights(folder):
  if not folder.is_dir():
    return f'{folder}: no such folder; give a folder as save_pretrained writes it'
  files = sorted(path.name for path in folder.iterdir() if path.is_file())
  other = [name for name in files if name.endswith(_OTHER_FORMATS)]
  if 'adapter_config.json' in files:
    return f'{folder}: holds an adapter, not a model; merge it into its base model, or give the base model'
  if other:
    return (
        f'{folder}: holds weights in other formats only ({listing(other)}). They are not read: a pickle can run any '
        'program. Load them where you trust them and write them again with '
        'save_pretrained(folder, safe_serialization=True)'
    )
  return f'{folder}: no {SINGLE} and no {INDEX}; the download is incomplete, or it is no model folder'
