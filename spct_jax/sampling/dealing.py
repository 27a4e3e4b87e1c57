"""What the engine and the scorer have in common on the host: sizes in steps, work dealt to groups, arrays put there."""

from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np

from spct_jax import sharding

STEPS = sorted(m << i for m in (1, 3) for i in range(30))  # 1, 2, 3, 4, 6, 8, 12, ...: few sizes make few programs


def step(number: int) -> int:
  """The next of `STEPS`."""
  return next(size for size in STEPS if size >= number)


def to_and_fro(rank: int | np.ndarray, groups: int) -> tuple[int | np.ndarray, int | np.ndarray]:
  """(place, group) of what comes as number `rank`, the largest first: 0 1 2 2 1 0 0 1 ..., so that no group gets the
  larger one every time."""
  place, at = divmod(rank, groups)
  return place, at + place % 2 * (groups - 1 - 2 * at)


def put(tree: Any, mesh: Any) -> Any:
  """Host arrays, whose first axis is groups, to the devices of the mesh that hold them; without one to one device."""
  where = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  if mesh is not None:
    where = NamedSharding(mesh, PartitionSpec(sharding.DATA_AXES))
  return sharding.to_device(tree, where)
