"""One mesh, sharding rules as data, and the pair of functions where host and device arrays meet.

A rule is `(regex, spec)`. The regex is searched in a leaf's path ('opt_state/0/mu/period/0/q/kernel')
and the first rule that matches wins; the spec names, for each dimension, a mesh axis, a tuple of axes,
or None. Parameters, optimizer state and caches are all placed by this one rule:

    ('q/kernel$', ('fsdp', 'tensor', None))     [D, H, hd]: D over fsdp, H over tensor

1. A scalar is replicated and needs no rule; an array that no rule matches is an error.
2. The empty spec `()` replicates an array of any rank; any other spec must name every dimension.
3. A leaf below 'period' is stacked over periods: one dimension more than its spec puts a None in front.
4. `spec_for` looks only at the sizes of the mesh's axes, so an `AbstractMesh` (no devices) serves too.

Crossing between host and global arrays happens in `to_device` and `to_host` and nowhere else. Both are
safe with several processes: every process holds the same host data and makes the same calls.
"""

import functools
import math
import os
import re
from collections.abc import Iterable
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

AXES = ('data', 'fsdp', 'tensor')
DATA_AXES = ('data', 'fsdp')  # the rows of a batch are dealt over both

Rules = tuple[tuple[str, tuple], ...]


def make_mesh(shape: dict[str, int], devices: list | None = None) -> Mesh:
  """The one mesh, with axes ('data', 'fsdp', 'tensor') of the given sizes.

  One size may be -1: the rest of the devices. An axis that is not given has size 1. With one process
  the mesh may use fewer devices than there are; with several it must use them all.
  """
  devices = list(jax.devices()) if devices is None else list(devices)
  sizes = _mesh_sizes(shape, len(devices))
  used = math.prod(sizes)
  if used < len(devices) and jax.process_count() > 1:
    raise ValueError(
        f'impossible mesh: {dict(zip(AXES, sizes))} uses {used} of {len(devices)} devices, but with'
        f' {jax.process_count()} processes each device must take part; set one axis to -1.'
    )
  return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices[:used])


def _mesh_sizes(shape: dict[str, int], available: int) -> tuple[int, ...]:
  shape = dict(shape)
  unknown = sorted(set(shape) - set(AXES))
  if unknown:
    raise ValueError(f'impossible mesh: unknown axis {unknown[0]!r}; the axes are {", ".join(AXES)}.')
  sizes = [shape[axis] if axis in shape else 1 for axis in AXES]
  for axis, size in zip(AXES, sizes):
    if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or (size < 1 and size != -1):
      raise ValueError(f'impossible mesh: {axis}={size!r}; a size is a positive integer, or -1 for the rest.')
  asked = ', '.join(f'{axis}={size}' for axis, size in zip(AXES, sizes))
  if sizes.count(-1) > 1:
    raise ValueError(f'impossible mesh: {asked}; at most one axis may be -1.')
  fixed = math.prod(size for size in sizes if size != -1)
  if -1 in sizes:
    if fixed > available or available % fixed:
      raise ValueError(
          f'impossible mesh: {asked} leaves -1 undefined, because the other axes ask for {fixed} and'
          f' there are {available} devices; make their product a divisor of {available}.'
      )
    sizes[sizes.index(-1)] = available // fixed
  elif fixed > available:
    raise ValueError(
        f'impossible mesh: {asked} needs {fixed} devices, and there are {available}; make the product'
        f' of the axes at most {available}, or set one axis to -1.'
    )
  return tuple(int(size) for size in sizes)


def spec_for(path: str, shape: tuple[int, ...], rules: Rules, mesh: Any) -> PartitionSpec:
  """How the leaf at `path` is laid out; `mesh` needs only `.shape` (a `Mesh` or an `AbstractMesh`)."""
  if not shape:
    return PartitionSpec()
  pattern, spec = _first_match(path, shape, rules)
  if not spec:
    return PartitionSpec()
  if len(spec) == len(shape) - 1 and 'period' in path.split('/'):
    spec = (None, *spec)
  if len(spec) != len(shape):
    raise ValueError(
        f'sharding rule {pattern!r} has {len(spec)} entries {spec}, but {path!r} has shape {shape}; name'
        ' every dimension (None = not split), or use () to replicate.'
    )
  sizes = dict(mesh.shape)
  used = []
  for dim, entry in zip(shape, spec):
    axes = () if entry is None else (entry,) if isinstance(entry, str) else entry
    for axis in axes:
      if axis not in sizes or axis in used:
        fault = 'an unknown axis' if axis not in sizes else 'one axis twice'
        raise ValueError(
            f'sharding rule {pattern!r} names {fault} ({axis!r}) for {path!r}; the axes are'
            f' {", ".join(sizes)}, each at most once.'
        )
      used.append(axis)
    ways = math.prod(sizes[axis] for axis in axes)
    if dim % ways:
      raise ValueError(
          f'{path!r} with shape {shape}: its dimension of {dim} cannot be split {ways} ways over'
          f' {" x ".join(f"{axis}={sizes[axis]}" for axis in axes)}; choose a model size that {ways}'
          f' divides, a smaller axis, or another entry for the rule {pattern!r}.'
      )
  return PartitionSpec(*spec)


def _first_match(path: str, shape: tuple[int, ...], rules: Rules) -> tuple[str, tuple]:
  for pattern, spec in rules:
    if re.search(pattern, path):
      if isinstance(spec, str):
        raise ValueError(
            f'sharding rule {pattern!r}: got the string {spec!r}; a spec is a tuple with one entry per'
            f' dimension, such as ({spec!r},).'
        )
      return pattern, tuple(tuple(e) if isinstance(e, (list, tuple)) else e for e in spec)
  raise ValueError(
      f'no sharding rule matches {path!r} with shape {tuple(shape)}; the rules, in order:'
      f' {", ".join(repr(pattern) for pattern, _ in rules) or "none"}. Add a rule for it, () to replicate.'
  )


def leaf_paths(tree: Any) -> list[tuple[str, Any]]:
  """(path, leaf) pairs; a path joins keys, indices and field names with '/'."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return [(jax.tree_util.keystr(path, simple=True, separator='/'), leaf) for path, leaf in leaves]


def tree_shardings(tree: Any, rules: Rules, mesh: Any) -> Any:
  """A tree of NamedShardings for a tree of arrays or ShapeDtypeStructs."""
  def place(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    return NamedSharding(mesh, spec_for(name, tuple(leaf.shape), rules, mesh))
  return jax.tree_util.tree_map_with_path(place, tree)


def replicated(mesh: Any) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def batch_rows(mesh: Any) -> NamedSharding:
  """Rows (the first dimension) dealt over `DATA_AXES`, everything else whole."""
  return NamedSharding(mesh, PartitionSpec(DATA_AXES))


def data_ways(mesh: Any) -> int:
  """How many ways the rows of a batch are split; a batch must be a multiple of it."""
  return math.prod(dict(mesh.shape)[axis] for axis in DATA_AXES)


def bytes_per_device(tree: Any, shardings: Any) -> int:
  """Bytes that one device holds of a tree of arrays or ShapeDtypeStructs laid out by `shardings`."""
  def size(leaf, sharding):
    return math.prod(sharding.shard_shape(tuple(leaf.shape))) * np.dtype(leaf.dtype).itemsize
  return sum(jax.tree.leaves(jax.tree.map(size, tree, shardings)))


def memory_limit(devices: Iterable[Any]) -> int | None:
  """Bytes that the least of the devices of this process lets us use; None where nothing tells.

  Devices on a CPU are given equal parts of the machine's memory.
  """
  local = [device for device in devices if device.process_index == jax.process_index()]
  if local and all(device.platform == 'cpu' for device in local):
    try:
      return os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') // jax.local_device_count('cpu')
    except (AttributeError, OSError, ValueError):  # not on every system
      return None
  stats = [device.memory_stats() for device in local]
  limits = [entry['bytes_limit'] for entry in stats if entry and 'bytes_limit' in entry]
  return min(limits) if limits else None


def to_device(host_tree: Any, sharding: Any) -> Any:
  """Host arrays (the same in every process) -> global arrays.

  `sharding` is one sharding for all leaves or a tree of them. 64-bit arrays become 32-bit, as
  everywhere in JAX.
  """
  def put(leaf, where):
    leaf = np.asarray(leaf)
    leaf = leaf.astype(jax.dtypes.canonicalize_dtype(leaf.dtype), copy=False)
    return jax.make_array_from_callback(leaf.shape, where, lambda index: leaf[index])
  if isinstance(sharding, jax.sharding.Sharding):
    return jax.tree.map(lambda leaf: put(leaf, sharding), host_tree)
  return jax.tree.map(put, host_tree, sharding)


def to_host(tree: Any) -> Any:
  """Global arrays -> numpy, whole, in every process."""
  def whole(leaf):
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
      return leaf
    return _replicate(leaf.sharding.mesh)(leaf)
  return jax.tree.map(np.asarray, jax.device_get(jax.tree.map(whole, tree)))


@functools.lru_cache(maxsize=None)
def _replicate(mesh):
  return jax.jit(lambda leaf: leaf, out_shardings=replicated(mesh))
