"""Trajectories on disk: each chunk is written whole as it is drawn, and a killed run goes on with the others."""

import pathlib
from collections.abc import Iterable, Sequence

from spct_jax import records, types
from spct_jax.judges import grm
from spct_jax.stages import processes
from spct_jax.stages.progress import Progress


def draw(
    judge: grm.Judge, planned: grm.Plan, path: pathlib.Path, *, desc: str
) -> tuple[types.Trajectory, ...]:
  """Draws all chunks of a plan into `path` (JSONL, one trajectory a row) and returns what it holds.

  A finished file is returned as it is: the stage's record says whether it belongs to this config. Every
  process draws and reads, one writes; the folder is shared between them.
  """
  writer = records.ChunkedWriter(path) if processes.is_writer() else None
  total = sum(len(chunk.tasks) for chunk in planned.chunks)
  # What is left to draw decides what the devices do, so process 0 decides it for all.
  todo = [
      chunk
      for chunk in planned.chunks
      if not processes.as_writer_says(
          lambda chunk=chunk: writer.finished or chunk.index in writer.done, what=f'{desc} resumes'
      )
  ]
  start = total - sum(len(chunk.tasks) for chunk in todo)
  with Progress(total=total, desc=desc, start=start) as progress:
    for chunk in todo:
      drawn = grm.run(judge, chunk)
      if writer is not None:
        writer.write(chunk.index, [records.to_row(trajectory) for trajectory in drawn])
      parsed = sum(trajectory.scores is not None for trajectory in drawn)
      progress.update(len(drawn), metrics={'parsed': parsed / len(drawn)})
  if writer is not None:
    writer.finish(len(planned.chunks))
  processes.barrier(f'{desc} drawn')
  found = load(path)
  if len(found) != total:
    raise ValueError(
        f'{path} holds {len(found)} trajectories where the plan has {total}; it was edited or belongs to other '
        'data: remove it, and the same command draws it again'
    )
  return found


def save(path: pathlib.Path, trajectories: Iterable[types.Trajectory]) -> None:
  """Writes a whole file of trajectories at once, in process 0; all processes wait for it."""
  if processes.is_writer():
    records.write_jsonl(path, [records.to_row(trajectory) for trajectory in trajectories])
  processes.barrier(f'{path.name} written')


def load(path: pathlib.Path) -> tuple[types.Trajectory, ...]:
  """Every trajectory of a file."""
  return tuple(records.read_trajectories(path))


def name_overlong(
    examples: Sequence[types.Example], positions: Sequence[int], *, limit: int, desc: str
) -> list[str]:
  """The uids of items whose prompt passes the limit; process 0 says so."""
  uids = [examples[i].uid for i in positions]
  if uids:
    shown = ', '.join(uids[:5]) + (', ...' if len(uids) > 5 else '')
    processes.say(
        f'{desc}: {len(uids)} of {len(examples)} items are over {limit} prompt tokens and skipped: {shown}'
    )
  return uids
