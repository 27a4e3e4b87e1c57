r"""The exact probability of every score at its place, given the text before it; hence expected scores (paper 2.6).

One sampled judgement says `\boxed{8, 6}`. At the place of its i-th score the model had a distribution over all
integers, of which the sample is one draw. Here it is computed:

    p_i(s) = P(the text goes on with s and its delimiter | prompt and sampled ids before the place) / Z
    E[S_i] = sum over s of s p_i(s)             given the sampled scores before it

1. **The place** of a score begins right behind the `{` or the `,` before it. The condition are the sampled ids that
   end there or before. Where an id ends beyond it (a token such as `{8` or `, `), the condition ends before that id,
   and the event is that the characters up to the place come first (`rest`), divided by the probability that they do.
2. **The event** is one of characters: at most `BEFORE` blanks, the integer as `parse` reads it, at most `BEHIND`
   blanks, and the delimiter: `,` behind all scores but the last, `}` behind the last, since anything else would not
   parse. It is summed over all token paths (`text.spellings`): '10' as one token or as '1', '0', a blank of its own or
   merged into the digits, a delimiter merged with whatever follows it ('},', '}\n'). What follows is not asked.
3. **Z** is the sum over low..high, so that p_i adds up to 1. What Z lacks of 1 is `lost`: the text went on with
   something else (a score out of range, a word, more blanks, the end).
4. Probabilities are of the full vocabulary at the sampling temperature, before any truncation or constraint.

All samples of a prompt share it, and of one sample all places and paths are one row that branches
(`sampling.scoring`): its text is read once.
"""

from collections.abc import Callable, Sequence
import dataclasses

import numpy as np

from spct_jax import types
from spct_jax.judges import parse
from spct_jax.sampling import scoring
from spct_jax.text import spellings

BEFORE, BEHIND = 1, 0

# (prompts, branches, prompt of each, places, sets, temperature) -> a list of masses: `Scorer.masses` of a model.
Masses = Callable[..., list[np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Expected:
  """Of one judgement, in the order that the model saw: p float64[n, low..high] as normalised, lost float64[n]."""

  p: np.ndarray
  lost: np.ndarray
  low: int

  @property
  def scores(self) -> tuple[float, ...]:
    """E[S_i]."""
    return tuple((self.p @ (self.low + np.arange(self.p.shape[1]))).tolist())


@dataclasses.dataclass(frozen=True)
class _Place:
  """Where a score begins: `context` ids of the judgement are the condition, `paths` go on from there."""

  context: int
  paths: spellings.Paths


def of(
    masses: Masses,
    trajectories: Sequence[types.Trajectory],
    scales: Sequence[tuple[int, int]],
    *,
    spelling: spellings.Spelling,
    temperature: float,
    before: int = BEFORE,
    behind: int = BEHIND,
) -> list[Expected | None]:
  """One `Expected` for each judgement that parsed, whose (low, high) are `scales`; None for the others.

  None too where the judgement's ids do not spell its own scores (its text was cut or normalised on the way), or
  where Z is 0 in float32.
  """
  found, places = [], []
  for index, (trajectory, (low, high)) in enumerate(zip(trajectories, scales, strict=True)):
    where = _places(trajectory, low, high, spelling, before, behind) if trajectory.scores is not None else None
    if where is not None:
      found.append(index)
      places.append(where)
  if not found:
    return [None] * len(trajectories)
  table = _table([place.paths for where in places for place in where])
  known: dict[tuple[int, ...], int] = {}
  branches, asked, prompt_of = [], [], []
  for index, where in zip(found, places):
    trajectory = trajectories[index]
    *prompt, last = trajectory.prompt_ids  # the last id of the prompt begins the row, where the first one is asked
    prompt_of.append(known.setdefault(tuple(prompt), len(known)))
    branch, questions = _row(last, trajectory.token_ids, where, table)
    branches.append(branch)
    asked.append(questions)
  answers = masses(list(known), branches, prompt_of, asked, table.sets, temperature)
  out: list[Expected | None] = [None] * len(trajectories)
  for index, where, answer in zip(found, places, answers):
    out[index] = _read(where, answer.astype(np.float64), table.words, *scales[index])
  return out


def _places(trajectory, low, high, spelling, before, behind) -> list[_Place] | None:
  """Where the scores begin; None if the ids do not spell them."""
  raw, stops, glued = spelling.pieces.spans(trajectory.token_ids)
  text, n = raw.decode('utf-8', 'surrogateescape'), len(trajectory.order)
  box = parse.box(text, n, low, high)
  if box is None or parse.scores(text, n, low, high) != trajectory.scores:
    return None
  size = lambda text: len(text.encode('utf-8', 'surrogateescape'))
  start, out = size(text[: box[0]]), []
  words = tuple(str(score).encode() for score in range(low, high + 1))
  for slot, part in enumerate(text[slice(*box)].split(',')):
    context = int(np.searchsorted(stops, start, side='right')) - 1
    out.append(_Place(context, spelling.paths(
        words, (b',' if slot < n - 1 else b'}',), rest=raw[stops[context] : start], glued=glued[context], before=before,
        behind=behind,
    )))
    start += size(part) + 1
  return out


@dataclasses.dataclass(frozen=True)
class _Table:
  """The states of all `Paths` as `scoring.Sets`: `first[id(paths)]` is the number of the first state of each.

  The classes of a state: one for each of up to `words` words, one for `covers`, and one for each id that goes on.
  """

  first: dict[int, int]
  words: int
  sets: scoring.Sets


def _table(paths: list[spellings.Paths]) -> _Table:
  first, states = {}, []
  for one in paths:
    if id(one) not in first:
      first[id(one)] = len(states)
      states += one.states
  words = max(len(state.ends) for state in states)
  classes = words + 1 + max(len(state.goes) for state in states)
  rows = []
  for state in states:
    row = [(v, i) for i, ids in enumerate(state.ends) for v in ids] + [(v, words) for v in state.covers]
    rows.append(row + [(v, words + 1 + i) for i, v in enumerate(state.goes)])
  shape = len(rows), max(1, *map(len, rows))
  ids, of_ = np.zeros(shape, np.int32), np.full(shape, classes, np.int32)
  for w, row in enumerate(rows):
    if row:
      ids[w, : len(row)], of_[w, : len(row)] = np.asarray(row, np.int32).T
  return _Table(first, words, scoring.Sets(ids, of_, classes))


def _row(last: int, ids, where: list[_Place], table: _Table) -> tuple[scoring.Branch, list[tuple[int, int]]]:
  """The text up to the last place with the nodes of every place; what is asked: each root, then its nodes."""
  main = where[-1].context + 1
  tokens, before, asked = [last, *ids[: main - 1]], list(range(-1, main - 1)), []
  for place in where:
    offset, state = len(tokens), table.first[id(place.paths)]
    asked.append((place.context, state))
    for node in place.paths.nodes:
      before.append(place.context if node.before < 0 else offset + node.before)
      asked.append((len(tokens), state + node.state))
      tokens.append(node.token)
  return scoring.Branch(tuple(tokens), tuple(before), main), asked


def _read(where: list[_Place], answer: np.ndarray, words: int, low: int, high: int) -> Expected | None:
  """Sums the paths of each place; `answer[asked, classes]`."""
  start, p, lost = 0, [], []
  for place in where:
    states, nodes = place.paths.states, place.paths.nodes
    here = answer[start : start + 1 + len(nodes)]
    start += len(here)
    reached, of_node = np.ones(len(here)), [0]  # the probability of the ids to a node, and its state
    for at, node in enumerate(nodes, start=1):
      before = node.before + 1
      turn = words + 1 + list(states[of_node[before]].goes).index(node.token)
      reached[at] = reached[before] * here[before, turn]
      of_node.append(node.state)
    total = reached @ here[:, : high - low + 1]
    covered = reached @ here[:, words] if any(state.covers for state in states) else 1.0
    if not total.sum() > 0:
      return None
    p.append(total / total.sum())
    lost.append(max(0.0, 1 - total.sum() / covered))
  return Expected(np.stack(p), np.asarray(lost), low)
