"""Which prompts begin alike, and where they are cut: on the host, from token ids.

    the orders of an example     [instructions, conversation][responses in one order]
                                           trunk                     branch

A `Cut` gives every prompt with a task a trunk, which it may share, and a branch of one token at least. Slots of
trunks hold `size` tokens and those of branches `rest`, so that both together hold a prompt of the bucket; where less is
shared than `size`, or where a prompt is alone, the trunk is as short or as long as it has to be.

Prompts of one example (their tasks have its uid) share one trunk. Apart from that prompts are gathered as it
keeps fewest tokens: of all ways to part the sorted prompts into runs, the one in which

    sum over runs of  |common prefix| + sum over its prompts of (length - |common prefix|)

is least, found from left to right. What a task gets does not depend on any of this.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from spct_jax.types import PromptBatch, Tasks

_STEP = 128  # caches that are longer are a multiple of it, as `suffixes` wants them
_RUN = 64  # examples that may share one trunk


@dataclasses.dataclass(frozen=True)
class Cut:
  """`trunk` int[U] is the trunk of each prompt (-1: it has no task), `length` int[V] how long each is."""

  size: int
  rest: int
  trunk: np.ndarray
  length: np.ndarray


class Dealt(NamedTuple):
  """Prompts and trunks in their groups: `group[U]` and `place[U]` of each prompt and the place `trunk[U]` of its trunk
  (0 for prompts without a task, which are left out); by group and place the number of tasks of prompts `number[G, V]`
  and trunks `trunk_number[G, V]`, which trunk of the cut that is (`source[G, V]`, -1: none) and where its prompts end.
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
  share, pieces = max(1, -(-int(counts.sum()) // G)), []
  for v in range(len(cut.length)):
    members = np.flatnonzero(cut.trunk == v)
    part = (counts[members].cumsum() - counts[members]) // share
    pieces += [(v, members[part == i]) for i in np.unique(part)]
  pieces.sort(key=lambda piece: -counts[piece[1]].sum())
  groups = [[] for _ in range(G)]
  for rank, piece in enumerate(pieces):
    # To and fro, as prompts are dealt.
    groups[G - 1 - rank % G if rank // G % 2 else rank % G].append(piece)
  room = -(-len(counts) // G)
  while room < max(sum(len(members) for _, members in group) for group in groups):
    room *= 2
  U, shape = len(counts), (G, room)
  out = Dealt(*(np.zeros(U, int) for _ in range(3)), *(np.zeros(shape, np.int32) for _ in range(4)))
  out.source[:] = -1
  for g, group in enumerate(groups):
    end = 0
    for place, (v, members) in enumerate(group):
      out.group[members], out.place[members], out.trunk[members] = g, end + np.arange(len(members)), place
      out.number[g, end : end + len(members)] = counts[members]
      end += len(members)
      out.trunk_number[g, place], out.source[g, place], out.end[g, place] = counts[members].sum(), v, end
  return out


def cuts(prompts: PromptBatch, tasks: Tasks) -> list[Cut]:
  """The ways to cut a batch that are worth a thought; none where prompts share less than an eighth of the bucket."""
  P = prompts.tokens.shape[1]
  real = np.flatnonzero(tasks.row_mask)
  used, first = np.unique(tasks.prompt[real], return_index=True)
  length = np.asarray(prompts.length)[used]
  tokens = np.where(np.arange(P)[None, :] < length[:, None], prompts.tokens[used], -1).astype('>i4')
  order = np.array(sorted(range(len(used)), key=lambda i: tokens[i].tobytes()), int)
  used, length, tokens, uid = used[order], length[order], tokens[order], tasks.uid[real[first]][order]
  least = max(P // 8, 1)
  if len(used) < 2 or _common(tokens[:-1], tokens[1:]).max() < least:
    return []

  units = []  # prompts that stay together, as indices of the sorted ones, and how many tokens they share
  for members in _by_uid(uid):
    shared = min(int(_common(tokens[members[:1]], tokens[members[-1:]])[0]), int(length[members].min()) - 1)
    together = len(members) > 1 and shared >= least
    units += [(members, shared)] if together else [([i], int(length[i]) - 1) for i in members]
  units.sort(key=lambda unit: unit[0][0])
  heads = tokens[[members[0] for members, _ in units]]
  beside = _common(heads[:-1], heads[1:])
  found = []
  for size in _sizes(P):
    runs = _runs(units, beside, length, size, P - size)
    if runs is None or len(runs) == len(used):
      continue
    trunk = np.full(len(prompts.length), -1)
    for v, (members, _) in enumerate(runs):
      trunk[used[members]] = v
    found.append(Cut(size, P - size, trunk, np.array([shared for _, shared in runs])))
  return found


def _sizes(P):
  """Few, so that few programs arise."""
  sizes = [P * i // 8 for i in (7, 6, 4, 2)]
  return sorted({size if size <= _STEP else size // _STEP * _STEP for size in sizes if size})


def _common(a, b):
  """How many leading tokens the rows a[n, P] and b[n, P] share; what is behind their ends (-1) does not count."""
  differ = (a != b) | (a < 0)
  return np.where(differ.any(axis=1), differ.argmax(axis=1), a.shape[1])


def _by_uid(uid):
  members = {}
  for i, name in enumerate(map(tuple, uid.tolist())):
    members.setdefault(name, []).append(i)
  return members.values()


def _runs(units, beside, length, size, rest):
  """[(prompts, common prefix)] of the parting that keeps fewest tokens; None if a branch would not fit."""
  own = np.array([shared for _, shared in units])
  count = np.array([len(members) for members, _ in units])
  longest = np.array([length[members].max() for members, _ in units])
  best, begins = np.zeros(len(units) + 1), np.zeros(len(units), int)
  for j in range(len(units)):
    low = max(0, j + 1 - _RUN)
    back = slice(j, low - 1 if low else None, -1)  # runs that begin at j, j - 1, ...
    shared = np.minimum.accumulate(np.minimum(own[back], np.r_[size, beside[low:j][::-1]]))
    saved = (count[back].cumsum() - 1) * shared
    fits = np.maximum.accumulate(longest[back]) - shared <= rest
    kept = np.where(fits, best[low : j + 1][::-1] - saved, np.inf)
    begins[j] = j - kept.argmin()
    best[j + 1] = kept.min()
  if not np.isfinite(best[-1]):
    return None
  runs, end = [], len(units)
  while end:
    begin = begins[end - 1]
    shared = min(int(own[begin:end].min()), size, *map(int, beside[begin : end - 1]))
    runs.append(([i for members, _ in units[begin:end] for i in members], shared))
    end = begin
  return runs[::-1]
