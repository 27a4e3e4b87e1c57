"""What one of several processes does for all of them: writing files, printing, and deciding.

Every process runs the same program. A decision that changes what is dispatched must be the same in
all of them, so it is taken in process 0 and handed round.
"""

import os
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from spct_jax.jsonl import write_text


def is_writer() -> bool:
  """True in the one process that writes files and prints."""
  return jax.process_index() == 0


def say(*lines: str) -> None:
  """Prints lines for a person, from process 0."""
  if is_writer():
    print('\n'.join(lines), flush=True)


def barrier(name: str) -> None:
  """Waits until every process has come here; `name` must be the same in all of them."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def as_writer_says(function: Callable[[], bool], *, what: str) -> bool:
  """Calls `function` in process 0 and returns its answer in all of them.

  Raises:
    Exception: in process 0, what `function` raised; in the others a ValueError naming `what`.
  """
  answer, error = -1, None
  if is_writer():
    try:
      answer = int(function())
    except Exception as caught:
      error = caught  # Raised below, once the other processes know of it: else they wait forever.
  if jax.process_count() > 1:
    answer = int(multihost_utils.broadcast_one_to_all(np.int32(answer)))
  if error is not None:
    raise error
  if answer < 0:
    raise ValueError(f'process 0 stopped at {what!r}; its message says why')
  return bool(answer)


def only_writer(function: Callable[[], object], *, what: str) -> None:
  """Calls `function` in process 0 while the others wait; its error ends all of them."""
  as_writer_says(lambda: (function(), True)[1], what=what)


def each_as_writer_says(function: Callable[[], list[bool]], *, count: int, what: str) -> list[bool]:
  """`as_writer_says` for `count` answers at once."""
  answers = np.zeros(count, np.int32)

  def ask():
    answers[:] = function()
    return True

  as_writer_says(ask, what=what)
  if jax.process_count() > 1 and count:
    answers = np.asarray(multihost_utils.broadcast_one_to_all(answers))
  return answers.astype(bool).tolist()


def write_once(path: str | os.PathLike[str], text: str) -> None:
  """`write_text` in process 0; the others wait until it is there."""
  only_writer(lambda: write_text(path, text), what=f'writing {path}')
