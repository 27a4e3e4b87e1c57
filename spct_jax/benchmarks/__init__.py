"""Benchmarks, one file each: raw row -> Example, and the groups that its authors report.

`load` reads any file that the package can read; it knows the readers of `data.preference` and those
of the benchmarks. Stages call this one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from spct_jax.benchmarks import judgebench
from spct_jax.data import preference
from spct_jax.data.preference import Loaded, Reader

READERS = {
  **preference.READERS,
  'judgebench': Reader(judgebench.reader, judgebench.accepts, judgebench.COLUMNS),
}


def load(
  path: os.PathLike | str,
  reader: str = 'auto',
  *,
  strict: bool = False,
  limit: int | None = None,
  subset: Sequence[str] | None = None,
) -> Loaded:
  """Reads a source into examples; see `data.preference.load`."""
  return preference.load(path, reader, strict=strict, limit=limit, subset=subset, readers=READERS)
