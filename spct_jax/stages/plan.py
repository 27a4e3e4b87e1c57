"""What a run will need, said before it starts: devices, mesh, and bytes per device.

The table counts arrays exactly, from abstract trees and their shardings; activations are an
estimate.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from spct_jax import sharding
from spct_jax.stages import processes

# Of the device's memory; the rest goes to XLA's temporaries, fragmentation and the program itself.
_USABLE = 0.9


@dataclasses.dataclass(frozen=True)
class Row:
  """One line of the memory table: bytes on one device, exact or estimated."""

  name: str
  bytes: int
  estimate: bool = False


def row(name: str, tree: Any, shardings: Any) -> Row:
  """What one device holds of a tree of arrays or ShapeDtypeStructs laid out by `shardings`."""
  return Row(name, sharding.bytes_per_device(tree, shardings))


def activations(
  *, tokens: int, width: int, ffn: int, layers: int, vocab: int, itemsize: int, remat: bool
) -> Row:
  """Estimate of what a backward pass keeps, for `tokens` tokens of a microbatch on one device.

  Per layer and token, with remat only the residual (D); without it about 12 D + 3 F values. Logits
  and their gradient are float32 over the vocabulary. Scores of attention, quadratic in length, are
  not counted.
  """
  per_layer = width if remat else 12 * width + 3 * ffn
  return Row('activations', tokens * (layers * per_layer * itemsize + 2 * 4 * vocab), estimate=True)


def describe(mesh: Any) -> list[str]:
  """Lines that say what the run stands on."""
  devices = mesh.devices.flatten()
  kind = devices[0].device_kind
  platform = devices[0].platform
  axes = ', '.join(f'{axis} {size}' for axis, size in dict(mesh.shape).items())
  unused = jax.device_count() - devices.size
  # Devices on a CPU share one memory: a number for each would mislead.
  limit = None if platform == 'cpu' else sharding.memory_limit(devices)
  return [
    f'devices: {devices.size} x {kind}'
    + (f' ({platform})' if platform != kind else '')
    + (f', {unused} more unused' if unused else '')
    + (f', {size(limit)} each' if limit is not None else '')
    + f', in {jax.process_count()} {"process" if jax.process_count() == 1 else "processes"}',
    f'mesh: {axes}; JAX {jax.__version__}',
  ]


def memory(rows: Sequence[Row], *, limit: int | None) -> list[str]:
  """The table as lines. `limit` is a device's memory in bytes (`sharding.memory_limit`), None if unknown.

  Raises:
    ValueError: the exact rows alone are more than the device has.
  """
  exact = sum(entry.bytes for entry in rows if not entry.estimate)
  total = sum(entry.bytes for entry in rows)
  width = max([len(entry.name) for entry in rows] + [len('memory per device')])
  lines = [
    f'{entry.name:<{width}}  {size(entry.bytes):>10}' + ('  (estimate)' if entry.estimate else '')
    for entry in rows
  ]
  lines.insert(0, f'{"memory per device":<{width}}')
  lines.append(
    f'{"sum":<{width}}  {size(total):>10}' + (f'  of {size(limit)}' if limit is not None else '')
  )
  if limit is None:
    return lines
  if exact > limit:
    largest = max((entry for entry in rows if not entry.estimate), key=lambda entry: entry.bytes)
    raise ValueError(
      '\n'.join(
        [
          *lines,
          f'this cannot fit: {size(exact)} of arrays on a device of {size(limit)}; the largest '
          'part is '
          f'{largest.name} with {size(largest.bytes)}. Spread it over more devices '
          '(mesh.fsdp, mesh.tensor), or '
          'take a smaller model, smaller dtypes, fewer rows or shorter sequences',
        ]
      )
    )
  if total > _USABLE * limit:
    lines.append(
      f'warning: {total / limit:.0%} of the device; if it runs out, raise microbatches or remat'
    )
  return lines


def report(
  stage: str, parts: Mapping[str, int], mesh: Any, *, estimates: Sequence[Row] = ()
) -> None:
  """Prints a stage's memory table: exact bytes per device by name, and estimates.

  Raises:
    ValueError: it cannot fit.
  """
  rows = [*(Row(name, count) for name, count in parts.items()), *estimates]
  processes.say(*(f'{stage}: {line}' for line in memory(rows, limit=sharding.memory_limit(mesh.devices.flatten()))))


def size(count: int | float) -> str:
  """Bytes in words: 1536 -> '1.5 KiB'."""
  value = float(count)
  for unit in ('B', 'KiB', 'MiB', 'GiB'):
    if value < 1023.95:
      return f'{value:.0f} {unit}' if unit == 'B' else f'{value:.1f} {unit}'
    value /= 1024
  return f'{value:.1f} TiB'
