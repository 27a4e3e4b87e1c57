"""Trajectories on disk: each chunk is written whole as it is drawn, and a killed run goes on with the others."""

import pathlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from spct_jax import records, types
from spct_jax.algos import outcome
from spct_jax.judges import grm
from spct_jax.stages import processes
from spct_jax.stages.progress import Progress
from spct_jax.text.tokenizer import Tokenizer


def draw(
    judge: grm.Judge, planned: grm.Plan, path: pathlib.Path, *, desc: str
) -> tuple[types.Trajectory, ...]:
  """Draws all chunks of a plan into `path` (JSONL, one trajectory a row) and returns what it holds.

  Where votes stop early, each item has the first of its planned samples, as many as its vote needed: a vote stops
  within its chunk, so a resumed run draws what the uninterrupted one would have drawn.

  A finished file is returned as it is: the stage's record says whether it belongs to this config. Every
  process draws and reads, one writes; the folder is shared between them. What one call has drawn whole is not read
  back.
  """
  writer = records.ChunkedWriter(path) if processes.is_writer() else None
  total = sum(len(chunk.tasks) for chunk in planned.chunks)

  def done():
    held = writer.done
    for chunk in planned.chunks:
      if chunk.index in held and not writer.finished and not _drawn_of(chunk, _names(writer.rows(chunk.index))):
        raise ValueError(
            f'{writer.folder}: what an earlier run has drawn is not what this plan draws there; it belongs to other data, '
            'or was begun by a release that drew in another order: remove that folder, and the same command begins again'
        )
    return [writer.finished or chunk.index in held for chunk in planned.chunks]

  # What is left to draw decides what the devices do, so process 0 decides it for all.
  held = processes.each_as_writer_says(done, count=len(planned.chunks), what=f'{desc} resumes')
  todo = [chunk for chunk, whole in zip(planned.chunks, held) if not whole]
  start = total - sum(len(chunk.tasks) for chunk in todo)
  fresh: list[types.Trajectory] = []
  with Progress(total=total, desc=desc, start=start) as progress:
    for chunk, drawn in grm.run(judge, todo):
      processes.only_writer(
          lambda c=chunk, d=drawn: writer.write(c.index, [records.to_row(t) for t in d]),
          what=f'writing {path}',
      )
      fresh += drawn
      parsed = sum(trajectory.scores is not None for trajectory in drawn)
      progress.update(len(chunk.tasks), metrics={'parsed': parsed / len(drawn)})
  processes.only_writer(lambda: writer.finish(len(planned.chunks)), what=f'writing {path}')
  if len(todo) == len(planned.chunks):
    return tuple(fresh)
  found = load(path)
  names = {_name(vars(one)) for one in found}
  whole = all(_drawn_of(chunk, names & _planned(chunk)) for chunk in planned.chunks)
  if len(found) != len(names) or not whole or names - set().union(*map(_planned, planned.chunks)):
    raise ValueError(
        f'{path} holds {len(found)} trajectories that are not the {total} of the plan; it was edited or belongs to other '
        'data: remove it, and the same command draws it again'
    )
  return found


def _name(row: Mapping[str, object]) -> tuple:
  return tuple(row.get(field) for field in ('uid', 'visit', 'sample', 'hinted'))


def _names(rows: Iterable[Mapping[str, object]]) -> set[tuple]:
  return {_name(row) for row in rows}


def _planned(chunk: grm.Chunk) -> set[tuple]:
  return _names(vars(task.info) for task in chunk.tasks)


def _drawn_of(chunk: grm.Chunk, names: set[tuple]) -> bool:
  """Whether these are what a chunk draws: all its tasks, or of each item the first ones if votes may stop."""
  planned = _planned(chunk)
  if chunk.early is None:
    return names == planned
  before = lambda name: (*name[:2], name[2] - 1, name[3])
  firsts = {name for name in planned if name[2] == 0}
  return firsts <= names <= planned and all(before(name) in names for name in names - firsts)


def save(path: pathlib.Path, trajectories: Iterable[types.Trajectory]) -> None:
  """Writes a whole file of trajectories at once, in process 0; all processes wait for it."""
  rows = [records.to_row(trajectory) for trajectory in trajectories]
  processes.only_writer(lambda: records.write_jsonl(path, rows), what=f'writing {path}')


def load(path: pathlib.Path) -> tuple[types.Trajectory, ...]:
  """Every trajectory of a file."""
  return tuple(records.read_trajectories(path))


def judged(
    examples: Sequence[types.Example], grouped: Sequence[Sequence[types.Trajectory]]
) -> tuple[types.Judgments, np.ndarray]:
  """(judgments, correct bool[B, K]) of each item's trajectories: Eq 10 against the items' labels."""
  found = grm.judgments([len(e.responses) for e in examples], grouped)
  label = np.asarray([e.label for e in examples], np.int32)
  correct = outcome.correct(found.scores, found.valid, label, found.response_mask)
  return found, np.asarray(correct)


def lengths(
    examples: Sequence[types.Example], settings: grm.Settings, tokenizer: Tokenizer
) -> np.ndarray:
  """int64[B]: the tokens of each item's prompt; the order of the responses does not matter to it."""
  def length(example):
    prompt = grm.prompt_of(
        example, range(len(example.responses)), settings=settings, hinted=False
    )
    return len(grm.prompt_ids(prompt, tokenizer))

  return np.asarray([length(example) for example in examples], np.int64)


def overlong(
    examples: Sequence[types.Example], settings: grm.Settings, tokenizer: Tokenizer
) -> list[int]:
  """The positions of the items whose prompt passes the limit."""
  return np.flatnonzero(lengths(examples, settings, tokenizer) > settings.buckets[-1]).tolist()


def name_overlong(
    examples: Sequence[types.Example],
    positions: Sequence[int],
    *,
    limit: int,
    desc: str,
    strict: bool,
) -> list[str]:
  """The uids of items whose prompt passes the limit; process 0 says so.

  Raises:
    ValueError: there are some and `strict`, or there is no other item.
  """
  uids = [examples[i].uid for i in positions]
  if uids:
    shown = ', '.join(uids[:5]) + (', ...' if len(uids) > 5 else '')
    if strict or len(uids) == len(examples):
      raise ValueError(
          f'{desc}: {len(uids)} of {len(examples)} items are over the limit of {limit} prompt tokens: {shown}; '
          'raise the last of judge.buckets, take a shorter template, or leave these items out'
      )
    processes.say(
        f'{desc}: {len(uids)} of {len(examples)} items are over {limit} prompt tokens and skipped: {shown}'
    )
  return uids
