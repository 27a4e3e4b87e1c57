"""Which prompts begin alike, where they are cut, and how they are dealt: on the host, from token ids.

    the orders of an example     [instructions, conversation][responses in one order]
                                           trunk                     branch

A `Cut` gives every prompt with a task a trunk, which it shares with the other prompts of its example (their tasks have
one uid), and a branch of one token at least. Slots of trunks hold `size` tokens and those of branches `rest`, so that
both together hold any prompt of the bucket. A trunk is as long as what its prompts share, as far as `size` goes; prompts
whose branches would not fit, or that share next to nothing, get a trunk each. What a task gets does not depend on this.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from spct_jax.sampling import dealing
from spct_jax.types import PromptBatch, Tasks

LEAST = 1024  # tokens of the bucket; of shorter ones to read the beginnings costs less than to compile more programs
_BLOCK = 128  # slots of trunks that are longer are a multiple of it, as `suffixes` wants them


@dataclasses.dataclass(frozen=True)
class Cut:
  """`trunk` int[U] is the trunk of each prompt (-1: it has no task), `length` int[V] how long each is."""

  size: int
  rest: int
  trunk: np.ndarray
  length: np.ndarray


def cuts(prompts: PromptBatch, tasks: Tasks) -> list[Cut]:
  """Ways to cut a batch, few, so that few programs arise.

  None of short prompts (`LEAST`), and none where no two prompts share an eighth of the bucket.
  """
  P = prompts.tokens.shape[1]
  if P < LEAST:
    return []
  real = np.flatnonzero(tasks.row_mask)
  used, first = np.unique(tasks.prompt[real], return_index=True)
  length = np.asarray(prompts.length)
  examples = {}
  for prompt, uid in zip(used.tolist(), map(tuple, tasks.uid[real[first]].tolist())):
    examples.setdefault(uid, []).append(prompt)
  shared = [_common(prompts.tokens[members], length[members]) for members in examples.values()]
  if not any(len(members) > 1 and t >= P / 8 for members, t in zip(examples.values(), shared)):
    return []

  found = []
  for size in sorted({size if size <= _BLOCK else size // _BLOCK * _BLOCK for size in (P * 3 // 4, P // 2)}):
    trunk, lengths = np.full(len(length), -1), []
    for members, t in zip(examples.values(), shared):
      t = min(t, size)
      together = t >= P / 8 and length[members].max() - t <= P - size
      for run in [members] if together else [[member] for member in members]:
        trunk[run] = len(lengths)
        lengths.append(t if together else min(int(length[run[0]]) - 1, size))
    if len(lengths) < len(used):
      found.append(Cut(size, P - size, trunk, np.array(lengths)))
  return found


def _common(tokens: np.ndarray, length: np.ndarray) -> int:
  """With how many tokens all prompts [n, P] begin alike, less than the shortest has."""
  differ = np.flatnonzero((tokens != tokens[:1]).any(axis=0))
  return min(int(differ[0]) if differ.size else tokens.shape[1], int(length.min()) - 1)


class Dealt(NamedTuple):
  """Prompts and trunks in their groups.

  `group[U]` and `place[U]` of each prompt, and the place `trunk[U]` of its trunk (0 where it has no task: such are left
  out); by group and place, the tasks of prompts `number[G, V]` and of trunks `trunk_number[G, V]`, which trunk of the
  cut stands there (`source[G, V]`, -1: none) and where its prompts end (`end[G, V]`).
  """

  group: np.ndarray
  place: np.ndarray
  trunk: np.ndarray
  number: np.ndarray
  trunk_number: np.ndarray
  source: np.ndarray
  end: np.ndarray


def deal(counts: np.ndarray, cut: Cut, G: int) -> Dealt:
  """Trunks with all their prompts to groups, by `counts[U]` of tasks: each gets nearly as many, the largest come first.

  A trunk with more tasks than a group's share is held by several groups, each with some of its prompts.
  """
  U, share, pieces = len(counts), max(1, -(-int(counts.sum()) // G)), []
  for v in range(len(cut.length)):
    members = np.flatnonzero(cut.trunk == v)
    part = (counts[members].cumsum() - counts[members]) // share
    pieces += [(v, members[part == i]) for i in np.unique(part)]
  pieces.sort(key=lambda piece: -counts[piece[1]].sum())
  groups = [[] for _ in range(G)]
  for rank, piece in enumerate(pieces):
    groups[dealing.to_and_fro(rank, G)[1]].append(piece)
  room = -(-U // G)
  while room < max(sum(len(members) for _, members in group) for group in groups):
    room *= 2
  out = Dealt(*(np.zeros(U, int) for _ in range(3)), *(np.zeros((G, room), np.int32) for _ in range(4)))
  out.source[:] = -1
  for g, group in enumerate(groups):
    end = 0
    for place, (v, members) in enumerate(group):
      out.group[members], out.place[members], out.trunk[members] = g, end + np.arange(len(members)), place
      out.number[g, end : end + len(members)] = counts[members]
      end += len(members)
      out.trunk_number[g, place], out.source[g, place], out.end[g, place] = counts[members].sum(), v, end
  return out
