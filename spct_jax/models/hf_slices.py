"""Leaves of our tree filled from tensors of a file: each process reads what its devices hold, once, and no more.

A device holds a box of a leaf: one range per dimension. Seen from the file, the box is a rectangle of each tensor
that the leaf is made of, and of a kernel `[in, out]` a turned one, because the file has `[out, in]`:

    leaf [P, D, H, hd], box [:, 0:D/2, 0:2, :]   ->   of P tensors [H hd, D]: rows 0 : 2 hd, columns 0 : D/2

Boxes of one process that share rows are read together, in runs of columns, and each gets its part; boxes that several
devices hold are read once. On CPU devices the memory that was filled becomes the array, so nothing is held twice; on
others a stacked leaf is put on the devices slice by slice, and the host holds one slice at a time.
"""

from collections.abc import Iterator, Sequence
import concurrent.futures
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spct_jax.models import hf_experts, hf_files, hf_names
from spct_jax.models.hf_files import Box, Tensor, Weights

Names = Any  # a tensor's name, or a list of Names for each place of a leading dimension

_TASK = 8 * 2**20  # bytes that a thread reads before it takes the next part


def fill(
    weights: Weights, names: Names, axes: int, shape: tuple[int, ...], dtype: Any, place: Any,
    pool: concurrent.futures.Executor, pairs: int = 0,
) -> jax.Array:
  """The leaf of `shape` laid out by the sharding `place`, from the tensors called `names`.

  names: one tensor, or a list per leading (stacked) dimension of the leaf. A name without a tensor gives zeros.
  axes: how many of the leaf's other dimensions the tensor's input dimension stands for; 0 if it is no kernel.
  Rows that the tensor lacks (a padded vocabulary) are zeros.
  pairs: so many of the last numbers of the leaf's last dimension are pairs in the file and two halves in the leaf.
  """
  dtype = jnp.dtype(dtype)
  stacked = not isinstance(names, str)
  on_host = all(device.platform == 'cpu' for device in place.addressable_devices)
  if on_host or not stacked or place.shard_shape(shape)[0] < shape[0]:
    return _whole(weights, names, axes, shape, dtype, place, pool, pairs)
  return by_slices(weights, names, axes, shape, dtype, place, pool, pairs)


def by_slices(weights, names, axes, shape, dtype, place, pool, pairs=0) -> jax.Array:
  """A stacked leaf put on its devices one slice of the first dimension after the other; arguments as in `fill`."""
  spec = place.spec[1:] if isinstance(place, jax.sharding.NamedSharding) else None
  inner = place if spec is None else jax.sharding.NamedSharding(place.mesh, jax.sharding.PartitionSpec(*spec))
  leaf = _zeros(shape, str(dtype), place)()
  for i, name in enumerate(names):
    piece = _whole(weights, name, axes, shape[1:], jnp.dtype(dtype), inner, pool, pairs)
    leaf = jax.block_until_ready(_insert(place)(leaf, piece, np.int32(i)))
  return leaf


def threads() -> concurrent.futures.ThreadPoolExecutor:
  return concurrent.futures.ThreadPoolExecutor(hf_files.THREADS)


@functools.lru_cache(maxsize=64)
def _zeros(shape, dtype, place):
  return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=place)


@functools.lru_cache(maxsize=64)
def _insert(place):
  put = lambda leaf, piece, i: jax.lax.dynamic_update_index_in_dim(leaf, piece, i, 0)
  return jax.jit(put, out_shardings=place, donate_argnums=0)


def _whole(weights, names, axes, shape, dtype, place, pool, pairs):
  """Fills one piece of host memory per distinct box of this process, and hands them to the devices."""
  boxes: dict[tuple, np.ndarray] = {}
  for index in place.addressable_devices_indices_map(shape).values():
    key = _ranges(index, shape)
    if key not in boxes:
      boxes[key] = hf_files.aligned([stop - start for start, stop in key], dtype)
  tasks, afterwards = _tasks(weights, names, axes, shape, boxes, pairs)
  for done in pool.map(lambda task: weights.read(*task), tasks):
    del done  # an error of a reader is raised here
  for finish in afterwards:
    finish()
  return jax.make_array_from_callback(shape, place, lambda index: boxes[_ranges(index, shape)])


def _ranges(index: tuple[slice, ...], shape: Sequence[int]) -> tuple[tuple[int, int], ...]:
  return tuple(part.indices(size)[:2] for part, size in zip(index, shape))


def _tasks(weights, names, axes, shape, boxes, pairs):
  """What to read into the boxes: arguments of `Weights.read`; and what is left to do once all has been read."""
  tasks, afterwards = [], []
  depth = hf_names.depth(names)
  for lead in itertools.product(*(range(size) for size in shape[:depth])):
    name = functools.reduce(lambda part, i: part[i], lead, names)
    parts = {}
    for key, memory in boxes.items():
      if all(start <= i < stop for i, (start, stop) in zip(lead, key)):
        held = memory[tuple(i - start for i, (start, _) in zip(lead, key))]
        parts[key[depth:]] = held
    if name not in weights.tensors:
      afterwards += [functools.partial(held.fill, 0) for held in parts.values()]
      continue
    tensor = weights.tensors[name]
    rectangles = []
    for key, held in parts.items():
      if pairs:
        held, turned = _halves(held, shape[-1], key[-1], pairs)
        key = (*key[:-1], (0, shape[-1]))
      rectangle, finish = _rectangle(tensor, axes, shape[depth:], key, held)
      rectangles.append(rectangle)
      afterwards += finish
      if pairs:
        afterwards.append(turned)
    tasks += _runs(tensor, rectangles)
  return tasks, afterwards


def _rectangle(tensor: Tensor, axes: int, shape: Sequence[int], key: Sequence[tuple[int, int]], held: np.ndarray):
  """(box, what is left to do once it is read): the part of the tensor's matrix that fills `held`, a box of a leaf."""
  split = axes if axes else len(shape) if len(tensor.shape) < 2 else 1
  # Of a kernel, which is turned, columns and rows of the file; else rows and columns.
  groups = [(shape[:split], key[:split]), (shape[split:], key[split:])]
  bounds = [_bounds(dims, ranges) for dims, ranges in groups]
  wanted = [bound.stop - bound.start for bound in bounds]
  whole = math.prod(wanted) == held.size
  # A dimension inside the rows or the columns may be cut too: then the rectangle around the box is read.
  matrix = held.reshape(wanted) if whole else np.empty(wanted, held.dtype)
  finish = []
  if not whole:
    finish.append(functools.partial(_cut, held, matrix, groups))
  columns, rows = bounds if axes else reversed(bounds)
  there = min(max(tensor.shape[0] - rows.start, 0), rows.stop - rows.start)
  if there < rows.stop - rows.start:  # the padding of the vocabulary
    (matrix[:, there:] if axes else matrix[there:]).fill(0)
    matrix = matrix[:, :there] if axes else matrix[:there]
  return Box(matrix, slice(rows.start, rows.start + there), columns, bool(axes)), finish


def _halves(held, size, bounds, pairs):
  """(memory to read into, what is left to do then): `held` if it has the last dimension whole, else room for that."""
  whole = held if bounds == (0, size) else np.empty((*held.shape[:-1], size), held.dtype)

  def finish():
    turned = whole[..., size - pairs :]
    turned[...] = hf_experts.to_halves(turned, pairs)
    if whole is not held:
      held[...] = whole[..., slice(*bounds)]

  return whole, finish


def _bounds(dims: Sequence[int], ranges: Sequence[tuple[int, int]]) -> slice:
  """The rows (or columns) of a matrix that ranges of the dimensions behind them span."""
  if not dims:
    return slice(0, 1)
  inner = math.prod(dims[1:])
  return slice(ranges[0][0] * inner, ranges[0][1] * inner)


def _cut(held, matrix, groups):
  sizes = [(ranges[0][1] - ranges[0][0], *dims[1:]) for dims, ranges in groups if dims]
  picks = [(slice(None), *(slice(*bound) for bound in ranges[1:])) for dims, ranges in groups if dims]
  held[...] = matrix.reshape(sum(sizes, ()))[sum(picks, ())]


def _runs(tensor: Tensor, boxes: Sequence[Box]) -> Iterator[tuple]:
  """Arguments of `Weights.read`: boxes with the same rows whose columns touch are read in one go, in bounded parts."""
  rows_of = lambda box: (box.rows.start, box.rows.stop)
  width = math.prod(tensor.shape[1:]) * hf_files.DTYPES[tensor.dtype].itemsize
  for (start, stop), group in itertools.groupby(sorted(boxes, key=rows_of), rows_of):
    runs: list[list[Box]] = []
    for box in sorted(group, key=lambda box: box.columns.start):
      if runs and box.columns.start <= max(other.columns.stop for other in runs[-1]):
        runs[-1].append(box)
      else:
        runs.append([box])
    step = max(_TASK // max(width, 1) // 64 * 64, 64)
    for run, first in itertools.product(runs, range(start, stop, step)):
      rows = slice(first, min(first + step, stop))
      columns = slice(run[0].columns.start, max(box.columns.stop for box in run))
      yield tensor, rows, columns, tuple(_part(box, rows) for box in run)


def _part(box: Box, rows: slice) -> Box:
  here = slice(rows.start - box.rows.start, rows.stop - box.rows.start)
  return Box(box.out[:, here] if box.turned else box.out[here], rows, box.columns, box.turned)
