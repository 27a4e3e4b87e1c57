"""The sampler: prompts and tasks in, token ids with their log-probabilities out (decisions 4, 6 and 7).

    engine = Engine(model=..., mesh=..., ...)
    rollouts = engine.generate(params, prompts, tasks)
    wait = engine.launch(params, prompts, tasks)        the same in two steps: the host is free until wait()
    ... engine.launch(params, prompts, tasks, withdraw)  gives tasks up as soon as `withdraw` says so

The host side only checks and deals: prompts go to the G groups of rows of the mesh, each task follows
its prompt, everything is padded to what the mesh divides, and the results are put back in the order of
the tasks. `loop` is the program that runs. What a task gets depends on its prompt, its settings and its
name (seed, stage, visit, uid, sample) only, up to float ties: not on rows, batches, groups or refills.

1. Shapes decide what is compiled: U, P, Q, the rows, T, and how many tasks the prompts have (`_sizes`, in a
   few steps). Sampling settings, limits, seed, stage and the number of real tasks are values.
2. Prompts are dealt to groups by their number of tasks, so that groups get nearly equal queues; when one
   prompt has far more than the others, the queues of all groups grow to a power of two times Q / G.
3. At most so many prompts are held at a time as keep the rows busy; the others wait for their turn.
4. Prompts that begin alike are cut in trunk and branch where that is less work (`trunks`, `_choose`).
5. Where tasks may be withdrawn, the prompts of the first samples come first, and few tasks of a prompt run side by
   side: an item's samples are then spread over time, and are not all under way when the first of them have decided.
   Prompts stay whole there.
6. Guides (`types.Guide`: stop strings, the score line) are tables over token ids that come with the tasks: values too,
   of which only the number and the sizes are compiled in. The engine never sees text.
"""

from collections.abc import Callable
import dataclasses
import functools
import math

import jax
import numpy as np

from spct_jax import sharding
from spct_jax.models import unrolled
from spct_jax.models.config import DTYPES
from spct_jax.models.transformer import Transformer
from spct_jax.sampling import dealing, guides, keys, loop, slots, trunks
from spct_jax.types import Kept, PromptBatch, Rollouts, Tasks

_ALL = 2**30  # steps: more than any run takes
_PREFILL = 1024  # tokens that go through the model at once: enough to fill it, few enough to keep its activations small
_SEATS = 8  # of a prompt whose tasks may be withdrawn, where that keeps all rows busy
_SLOTS = sorted({m << i for m in range(8, 16) for i in range(24)} | set(range(1, 8)))
# What a step's work is made of, in seats of one slot: to read one more slot, and a row with all that is not its prompt.
_SLOT, _ROW = 16, 4
_POSITIONS = 1024  # of the slot that is meant
_GAIN = 0.9  # a cut has to leave this much of the work at most, so that chance does not choose a program


# Called with the tasks that have newly ended, as their indices int[m] and their rollouts in that order, without `kept`;
# returns the indices of tasks to give up: of each prompt the last ones, in the order of the tasks. What ran or has
# ended may be among them. A function of what it was given alone, because every process calls its own.
Withdraw = Callable[[np.ndarray, Rollouts], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Engine:
  """How to sample from a model. `rows` run side by side; `mesh` None is one device without placement.

  `cache_rules` place the caches (sharding rules; paths 'prompt/period/0/k', 'rows/head/0/v', ...; shape
  [slots or rows, M, positions, hd]). A task ends with one of `eos_ids`, at a stop of the tasks' guides, or after
  `max_new_tokens`.
  With `share_trunks` what prompts begin with alike is computed, held and read once, where that is worth it.
  `cache_dtype`: what keys and values are kept in; None is what the model computes in, 'int8' eight bits (`int8`).
  Parameters may be the model's own, or have their layers side by side (`unrolled`), which saves a copy at each call.
  `kept` > 0 records the tokens that each token was drawn from, and draws from at most so many; 0 = off.
  """

  model: Transformer
  mesh: jax.sharding.Mesh | None
  cache_rules: tuple
  rows: int
  max_new_tokens: int
  eos_ids: tuple[int, ...]
  seed: int
  stage: str
  share_trunks: bool = True
  cache_dtype: str | None = None
  kept: int = 0

  def __post_init__(self):
    for name in ('rows', 'max_new_tokens'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name}: got {getattr(self, name)}; the engine needs at least 1.')
    config = self.model.config
    if config.head_kind != 'lm':
      raise ValueError(f'model: got a {config.head_kind!r} head, which samples no tokens; needs head_kind lm.')
    wrong = [eos for eos in self.eos_ids if not 0 <= eos < config.vocab_size]
    if wrong:
      raise ValueError(
          f'eos_ids: got {wrong}; the model has ids 0 to {config.vocab_size - 1}. Is it the right tokenizer?'
      )
    if self.cache_dtype not in (None, *DTYPES, 'int8'):
      raise ValueError(f'cache_dtype: got {self.cache_dtype!r}; allowed: int8, {", ".join(DTYPES)}, or None: as computed')
    if self.cache_dtype == 'int8' and config.latent is not None:
      raise ValueError(
          f'cache_dtype: got int8 for latent attention, whose cache of {config.latent.rank} + {config.latent.rope} '
          'numbers a token is small already, and whose rotated part one step with the latent would spoil; leave it out'
      )
    if not 0 <= self.kept <= config.vocab_size:
      raise ValueError(
          f'kept: got {self.kept}; allowed: 0 (off) to {config.vocab_size}, the vocabulary. It is the most tokens of a '
          'step that truncated sampling draws from and records.'
      )
    keys.root_key(self.seed, self.stage)

  @property
  def _settings(self) -> loop.Settings:
    return self._settings_of(withdraws=False)

  def _settings_of(self, withdraws: bool) -> loop.Settings:
    rules = tuple((pattern, _hashable(spec)) for pattern, spec in self.cache_rules)
    eos_ids = tuple(map(int, self.eos_ids))
    return loop.Settings(
        self.model, self.mesh, rules, self.max_new_tokens, eos_ids, self.cache_dtype, withdraws, self.kept
    )

  def cache_shardings(self, num_prompts: int, prompt_length: int) -> dict | None:
    """{'prompt': tree, 'rows': tree} of NamedShardings, of caches as large as `generate` makes at most.

    Caches of trunks and of branches lie as those of prompts do, and both together are never larger.
    """
    if self.mesh is None:
      return None
    G = self._settings.groups
    shapes = {
        'prompt': (G * _parts(num_prompts, G), prompt_length), 'rows': (G * _parts(self.rows, G), self.max_new_tokens)
    }
    return {name: loop.cache_shardings(self._settings, name, *shape) for name, shape in shapes.items()}

  def generate(
      self,
      params: dict,
      prompts: PromptBatch,
      tasks: Tasks,
      on_progress: Callable[[int, int], None] | None = None,
      segment: int | None = None,
      limits: np.ndarray | None = None,
      withdraw: Withdraw | None = None,
  ) -> Rollouts:
    """Runs all tasks; numpy in, numpy out, in the order of the tasks. Padding tasks get an empty row.

    `on_progress(done, total)` is called after every `segment` steps, or once at the end if that is None.
    `limits` int[Q] ends each task after so many tokens; None is `max_new_tokens` for all.
    `withdraw` is asked after every segment, by default of a sixteenth of `max_new_tokens`; the devices go on with the
    next one while it thinks. The other tasks get what they get without it; tasks that it gave up have empty rows.
    """
    return self._launch(params, prompts, tasks, on_progress, segment, limits, withdraw)()

  def launch(
      self, params: dict, prompts: PromptBatch, tasks: Tasks, withdraw: Withdraw | None = None
  ) -> Callable[[], Rollouts]:
    """Starts what `generate` does and returns at once; the function that it returns waits and gives the rollouts.

    The caches of two launched runs exist side by side: call the first one's function before launching the second.
    With `withdraw` only the first segment is started at once.
    """
    return self._launch(params, prompts, tasks, None, None, None, withdraw)

  def _launch(self, params, prompts, tasks, on_progress, segment, limits, withdraw):
    if segment is not None and segment < 1:
      raise ValueError(f'segment: got {segment}; needs at least 1 step, or None for one uninterrupted run.')
    dealt, given, state = self._begin(params, prompts, tasks, limits, withdraw is not None)
    total = int(tasks.row_mask.sum())
    if not total:
      return lambda: self._rollouts(tasks, None, None)
    if withdraw is not None:
      steps = np.int32(segment or max(1, self.max_new_tokens // 16))
      return self._withdrawing(tasks, dealt, given, state, steps, on_progress, withdraw)
    steps = np.int32(_ALL if segment is None else segment)
    state, finished = loop.advance(*given, state, steps)

    def wait():
      held, done = state, int(sharding.to_host(finished))
      while True:
        if on_progress is not None:
          on_progress(done, total)
        if done == total:
          return self._rollouts(tasks, dealt, held)
        held, count = loop.advance(*given, held, steps)
        done = int(sharding.to_host(count))

    return wait

  def _withdrawing(self, tasks, dealt, given, state, steps, on_progress, withdraw):
    """The rest of `_launch` where tasks may be withdrawn."""
    settings, sizes, weights, root, prompts, queue = given
    waiting, total = _Waiting(dealt, sharding.to_host(prompts.number)), int((dealt >= 0).sum())
    state, count = loop.advance(*given, state, steps)
    ended, told = loop.news(sizes, state, dealing.put(np.zeros(dealt.shape, bool), self.mesh))

    def wait():
      nonlocal prompts
      held, (done, seen, told_) = state, (count, ended, told)
      while True:
        # What is decided below holds from the segment after this one.
        held, next_done = loop.advance(settings, sizes, weights, root, prompts, queue, held, steps)
        next_seen, told_ = loop.news(sizes, held, told_)
        finished = int(sharding.to_host(done))
        if on_progress is not None:
          on_progress(finished, total)
        if finished == total:
          return self._rollouts(tasks, dealt, held, waiting.withdrawn(len(tasks.prompt)))
        place, *found = sharding.to_host(seen)
        index = waiting.tasks(place)
        if (index >= 0).any():
          new = index >= 0
          theirs = tuple(dataclasses.replace(guide, start=guide.start[index[new]]) for guide in tasks.guides)
          waiting.withdraw(withdraw(index[new], self._rows(theirs, *(values[new] for values in found))))
          prompts = prompts._replace(number=dealing.put(waiting.number, self.mesh))
        done, seen = next_done, next_seen

    return wait

  def _begin(self, params, prompts, tasks, limits, withdraws=False):
    """-> which task stands where in the queues, what `loop.advance` takes before its state, the first state."""
    T, settings = self.max_new_tokens, self._settings_of(withdraws)
    limits = np.full(len(tasks.prompt), T) if limits is None else np.asarray(limits)
    _check(prompts, tasks, self.model.config.vocab_size, limits, T)
    if not tasks.row_mask.any():
      return None, None, None
    share = self.share_trunks and not withdraws
    cut, sizes = _choose(prompts, tasks, settings.groups, self.rows, T, share, withdraws)
    dealt, *host = _deal(prompts, tasks, limits, settings.groups, cut, withdraws)
    P = prompts.tokens.shape[1]
    _check_memory(settings, sizes, *((P, 0) if cut is None else (cut.rest, cut.size)))
    dealt_prompts, queue = dealing.put(host, self.mesh)
    queue = queue._replace(guides=_guides(tasks.guides, dealt, self.model.config.vocab_size, self.mesh))
    root = np.asarray(jax.random.key_data(keys.root_key(self.seed, self.stage)))
    # Layers that stand alone pass by the program, whose results would be copies of them.
    alone = unrolled.alone(params)
    weights, state = loop.start(settings, sizes, {} if alone else params, dealt_prompts, queue)
    return dealt, (settings, sizes, params if alone else weights, root, dealt_prompts, queue), state

  def _rollouts(self, tasks, dealt, state, withdrawn=None) -> Rollouts:
    """The state's results in the order of the tasks; empty rows for padding and for what was withdrawn."""
    Q, T = len(tasks.prompt), self.max_new_tokens
    tokens, logp, length = np.zeros((Q, T), np.int32), np.zeros((Q, T), np.float32), np.zeros(Q, np.int32)
    kept = None
    if self.kept:
      kept = Kept(np.full((Q, T, self.kept), -1, np.int32), np.zeros((Q, T), np.float32), np.zeros((Q, T), np.int32))
    if state is not None:
      real = dealt >= 0
      if withdrawn is not None:
        real &= ~withdrawn[dealt]
      found = sharding.to_host((state.tokens, state.logp, state.length))
      outs = (tokens, logp, length)
      if kept is not None:
        outs, found = (*outs, kept.ids, kept.logp, kept.count), (*found, *sharding.to_host(state.kept))
      for out, values in zip(outs, found, strict=True):
        out[dealt[real]] = values[real]
    return dataclasses.replace(self._rows(tasks.guides, tokens, logp, length), kept=kept, withdrawn=withdrawn)

  def _rows(self, given, tokens, logp, length) -> Rollouts:
    """Rollouts of these tasks; `given` are their guides."""
    if np.isnan(logp).any():
      raise FloatingPointError(
          'the model gives no finite logit, so nothing can be sampled from it: its parameters are NaN or infinite; '
          'go back to a checkpoint before the training diverged'
      )
    last = tokens[np.arange(len(tokens)), np.maximum(length, 1) - 1]
    ended = ((length > 0) & np.isin(last, self.eos_ids)) | guides.stopped(given, tokens, length)
    token_mask = np.arange(self.max_new_tokens)[None, :] < length[:, None]
    return Rollouts(tokens=tokens, logp=logp, token_mask=token_mask, ended=ended)


class _Waiting:
  """Which tasks are withdrawn, on the host: `number[G, U]` of each prompt's tasks are left."""

  def __init__(self, dealt: np.ndarray, number: np.ndarray):
    self._dealt, self.number = dealt, number
    G, Q = dealt.shape
    self._gone = np.zeros((G, Q), bool)
    ends = number.cumsum(axis=1)
    self._prompt = np.stack([np.searchsorted(end, np.arange(Q), 'right') for end in ends])  # of each place, [G, Q]

  def tasks(self, place: np.ndarray) -> np.ndarray:
    """The tasks at these places [G, R] of the queues; -1 where there is none or it was withdrawn."""
    G, Q = self._dealt.shape
    group, inside = np.arange(G)[:, None], np.minimum(place, Q - 1)
    return np.where((place < Q) & ~self._gone[group, inside], self._dealt[group, inside], -1)

  def withdraw(self, index: np.ndarray):
    index = np.asarray(index, np.int64).reshape(-1)
    real = self._dealt >= 0
    known = np.isin(index, self._dealt[real])
    if not known.all():
      raise ValueError(f'withdraw: gave up task {index[~known][0]}; allowed: the indices of real tasks.')
    self._gone |= real & np.isin(self._dealt, index)
    kept = real & ~self._gone
    same = self._prompt[:, 1:] == self._prompt[:, :-1]
    if (same & kept[:, 1:] & ~kept[:, :-1]).any():
      raise ValueError('withdraw: gave up a task before others of its prompt; allowed: the last tasks of each prompt.')
    G, U = self.number.shape
    self.number = np.stack([
        np.bincount(prompt[keep], minlength=U)[:U] for prompt, keep in zip(self._prompt, kept)
    ]).astype(np.int32)

  def withdrawn(self, Q: int) -> np.ndarray:
    """bool[Q], in the order of the tasks."""
    out = np.zeros(Q, bool)
    out[self._dealt[self._gone]] = True
    return out


def _hashable(spec):
  return tuple(tuple(entry) if isinstance(entry, list) else entry for entry in spec)


def _parts(count: int, ways: int) -> int:
  return -(-count // ways)


def _guides(given, dealt, V, mesh) -> tuple[guides.Guide, ...]:
  """The tables whole on every device, the tasks' starts where the queues are."""
  starts = dealing.put([guide.start[np.maximum(dealt, 0)].astype(np.int32) for guide in given], mesh)
  everywhere = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  if mesh is not None:
    everywhere = sharding.replicated(mesh)
  whole = sharding.to_device(guides.tables(given, V), everywhere)
  return tuple(guides.Guide(**table, start=start) for table, start in zip(whole, starts))


def _counts(prompts: PromptBatch, tasks: Tasks) -> np.ndarray:
  """int[U]: how many tasks each prompt has."""
  return np.bincount(tasks.prompt[tasks.row_mask], minlength=len(prompts.length))


def _places(counts: np.ndarray, G: int):
  """Prompts to groups -> group[U], place[U], and the tasks at each place, number[G, U / G]."""
  U = len(counts)
  rank = np.empty(U, int)
  rank[np.argsort(-counts, kind='stable')] = np.arange(U)
  place, group = dealing.to_and_fro(rank, G)
  number = np.zeros((G, _parts(U, G)), np.int32)
  number[group, place] = counts
  return group, place, number


def _room(Q: int, number: np.ndarray) -> int:
  """Places in the queue of each group."""
  room = _parts(Q, len(number))
  while room < number.sum(axis=1).max():
    room *= 2
  return room


def _slices(prompts: PromptBatch, begin: np.ndarray, size: int) -> np.ndarray:
  """int32[n, size]: tokens of each prompt from `begin` on.

  Padding becomes token 0: an id outside the embedding table would be NaN, and 0 weight times NaN is NaN.
  """
  at = begin[:, None] + np.arange(size)[None, :]
  tokens = np.take_along_axis(prompts.tokens, np.minimum(at, prompts.tokens.shape[1] - 1), axis=1)
  return np.where(at < prompts.length[:, None], tokens, 0)


def _deal(prompts: PromptBatch, tasks: Tasks, limits: np.ndarray, G: int, cut: trunks.Cut | None = None, withdraws: bool = False):
  """-> dealt int[G, q] (which task stands where in the queues, -1 = none), Prompts, Queue."""
  Q, (U, P) = len(tasks.prompt), prompts.tokens.shape
  prompt = np.where(tasks.row_mask, tasks.prompt, 0)
  counts = _counts(prompts, tasks)
  if cut is None:
    group, place, number = _places(counts, G)
    if withdraws:
      place = _by_samples(group, prompt, tasks)
      number[group, place] = counts
    here, begin, size, more = np.arange(U), np.zeros(U, int), P, {}
  else:
    places = trunks.deal(counts, cut, G)
    group, place, number = places.group, places.place, places.number
    here, begin, size = np.flatnonzero(cut.trunk >= 0), np.maximum(cut.length[cut.trunk], 0), cut.rest
    more = _trunk_arrays(prompts, cut, places, here)
  tokens, length = np.zeros((*number.shape, size), np.int32), np.ones(number.shape, np.int32)
  at = group[here], place[here]
  tokens[at], length[at] = _slices(prompts, begin, size)[here], np.clip(prompts.length - begin, 1, size)[here]

  queues = []
  for g in range(G):
    queue = np.flatnonzero(tasks.row_mask & (group[prompt] == g))
    queues.append(queue[np.argsort(place[prompt[queue]], kind='stable')])  # the tasks of a prompt side by side
  dealt = np.full((G, _room(Q, number)), -1)
  for g, queue in enumerate(queues):
    dealt[g, :len(queue)] = queue
  here = np.maximum(dealt, 0)
  dealt_prompts = loop.Prompts(
      count=(number > 0).sum(axis=1, dtype=np.int32),
      tokens=tokens,
      length=length,
      first=np.cumsum(number, axis=1, dtype=np.int32) - number,
      number=number,
      **more,
  )
  return dealt, dealt_prompts, loop.Queue(
      count=number.sum(axis=1, dtype=np.int32),
      uid=tasks.uid[here].astype(np.uint32),
      visit=tasks.visit[here].astype(np.int32),
      sample=tasks.sample[here].astype(np.int32),
      limit=limits[here].astype(np.int32),
      temperature=tasks.temperature[here].astype(np.float32),
      top_p=tasks.top_p[here].astype(np.float32),
      top_k=tasks.top_k[here].astype(np.int32),
      min_p=tasks.min_p[here].astype(np.float32),
  )


def _trunk_arrays(prompts: PromptBatch, cut: trunks.Cut, places: trunks.Dealt, here: np.ndarray) -> dict:
  """What `loop.Prompts` says of trunks; `here` are the prompts with tasks."""
  G, V = places.source.shape
  one = np.zeros(len(cut.length), int)
  one[cut.trunk[here]] = here  # any of the prompts that continue a trunk begins with it
  real, source = places.source >= 0, np.maximum(places.source, 0)
  length = np.where(real, cut.length[source], 0).astype(np.int32)
  tokens = _slices(prompts, np.zeros(len(prompts.length), int), cut.size)[one][source]
  trunk = np.zeros((G, V), np.int32)
  trunk[places.group[here], places.place[here]] = places.trunk[here]
  return dict(
      trunk=trunk,
      trunks=slots.Trunks(
          count=real.sum(axis=1, dtype=np.int32),
          tokens=np.where(np.arange(cut.size)[None, None, :] < length[..., None], tokens, 0),
          length=length,
          end=places.end,
      ),
  )


def _choose(prompts: PromptBatch, tasks: Tasks, G: int, rows: int, T: int, share_trunks: bool, withdraws: bool = False):
  """-> the cut of the prompts, None where whole ones are as good, and the sizes. By work as estimated here.

  It is counted in what one query's attention to one position costs, for one group.
  """
  counts, (Q, (U, P)) = _counts(prompts, tasks), (len(tasks.prompt), prompts.tokens.shape)

  def work(number, held, kinds):
    """`kinds`: sizes of prompts or trunks, their length, how many there are, and what stands before them."""
    steps = max(1.0, number.sum(axis=1).max() / held) * T / 2
    total = steps * held * _ROW * _POSITIONS
    for sizes, length, there, before in kinds:
      total += steps * sizes.slots * (sizes.width + _SLOT) * length
      # Tokens side by side cost half of a row each.
      total += (there > 0).sum(axis=1).max() * length * (before + length / 2 + _ROW * _POSITIONS / 2)
    return total

  number = _places(counts, G)[2]
  room = _room(Q, number)
  held = min(_parts(rows, G), room)
  sizes = _sizes(number, room, held, P, withdraws)
  best = work(number, held, [(sizes, P, number, 0)]), None, sizes
  for cut in trunks.cuts(prompts, tasks) if share_trunks else ():
    dealt = trunks.deal(counts, cut, G)
    room = _room(Q, dealt.number)
    held = min(_parts(rows, G), room)
    there = (dealt.source >= 0).sum(axis=1).max()
    of_trunks = dealt.trunk_number[:, : dealing.step(int(there))]
    branch, trunk = _sizes(dealt.number, room, held, cut.rest), _sizes(of_trunks, room, held, cut.size)
    # Never more than whole prompts would take.
    slots = min(branch.slots, _parts(U, G))
    sizes = loop.Sizes(
        held, slots, branch.width, min(branch.batch, slots), min(trunk.slots, slots), trunk.width,
        min(trunk.batch, trunk.slots, slots),
    )
    cost = work(
        dealt.number, held, [(branch, cut.rest, dealt.number, cut.size), (trunk, cut.size, dealt.trunk_number, 0)]
    )
    if cost < _GAIN * best[0]:
      best = cost, cut, sizes
  return best[1:]


def _by_samples(group: np.ndarray, prompt: np.ndarray, tasks: Tasks) -> np.ndarray:
  """Places of the prompts in their groups where tasks may be withdrawn: those of the first samples come first.

  Prompts of one item, as its orders, stay side by side: a vote needs the first samples of all of them.
  """
  last = np.iinfo(np.int64).max
  real, U = tasks.row_mask, len(group)
  sample, seen, place = np.full(U, last), np.full(U, last), np.empty(U, int)
  np.minimum.at(sample, prompt[real], tasks.sample[real])
  np.minimum.at(seen, prompt[real], np.flatnonzero(real))
  order = np.lexsort((seen, sample // _SEATS))
  for g in set(group.tolist()):
    mine = order[group[order] == g]
    place[mine] = np.arange(len(mine))
  return place


def _sizes(number: np.ndarray, Q: int, rows: int, P: int, withdraws: bool = False) -> loop.Sizes:
  """How many slots a group of Q places in the queue gets and how many rows sit at each; `number[G, U]` tasks a prompt.

  The least of steps x work of a step, both as estimated here. Widths go in steps of a half, slots in
  steps of an eighth, so that few programs arise.
  """
  U, used = number.shape[1], number[number > 0]
  prompts = max(1, int((number > 0).sum(axis=1).min()))
  most = max(_SEATS, _parts(rows, prompts)) if withdraws else rows
  batch = max(1, min(U, _PREFILL // P))
  best = None
  for width in dealing.STEPS:
    width = min(width, rows, most)
    held = np.minimum(used, width).mean()
    waves = used.mean() / held
    slots = rows / held
    if Q > rows:
      # A slot is free when the longest of its last samples ends: of W, after 1 + log2(W) / 3 mean lengths (seen for
      # lengths that are lognormal with sigma 0.45); before that its seats are taken again and again.
      slots = slots * (1 + math.log2(width) / 3 / waves) + batch
    slots = min(U, next(size for size in _SLOTS if size >= slots))
    busy = np.sort(np.minimum(number, width), axis=1)[:, -slots:].sum(axis=1).min()
    length = max(number.sum(axis=1).max() / min(rows, max(busy, 1)), used.max() / width)
    cost = (length + waves - 1) * (_ROW * rows + slots * (width + _SLOT))
    if best is None or cost < best[0]:
      best = cost, slots, width
    if width >= min(rows, most, used.max()):
      break
  _, slots, width = best
  return loop.Sizes(rows=rows, slots=slots, width=width, batch=min(batch, slots))


@functools.lru_cache(maxsize=64)
def _check_memory(settings: loop.Settings, sizes: loop.Sizes, P: int, Pt: int):
  """ValueError where the caches alone are more than a device has; slots hold P tokens, those of trunks Pt."""
  mesh, G, T = settings.mesh, settings.groups, settings.max_new_tokens
  devices = jax.local_devices()[:1] if mesh is None else mesh.devices.flat
  limit, found = sharding.memory_limit(devices), {}
  for what, name, count, length in (
      ('slots for prompts', 'prompt', sizes.slots, P), ('slots for what prompts share', 'prompt', sizes.trunk_slots, Pt),
      ('rows', 'rows', sizes.rows, T),
  ):
    if count:
      shapes = jax.eval_shape(functools.partial(loop.empty_cache, settings, name, G * count, length))
      if mesh is None:
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
      else:
        size = sharding.bytes_per_device(shapes, loop.cache_layout(name, shapes, settings.cache_rules, mesh))
      found[f'{G * count} {what} of {length} tokens {size / 2**30:.3g} GiB'] = size
  if limit is not None and sum(found.values()) > limit:
    raise ValueError(
        f'the caches need {sum(found.values()) / 2**30:.3g} GiB on each device ({", ".join(found)}), but a device has '
        f'{limit / 2**30:.3g} GiB; take fewer rows, shorter prompts, fewer new tokens, more devices over the mesh, or '
        "cache_dtype='int8'"
    )


def _check(prompts: PromptBatch, tasks: Tasks, vocab_size: int, limits: np.ndarray, T: int):
  real, (U, P) = np.asarray(tasks.row_mask), prompts.tokens.shape

  def refuse(name, values, wrong, allowed):
    where = np.flatnonzero(wrong)
    if where.size:
      raise ValueError(f'{name}: got {values[where[0]]} at {where[0]} ({where.size} such); allowed: {allowed}.')

  outside = (tasks.prompt < 0) | (tasks.prompt >= U)
  refuse('tasks.prompt', tasks.prompt, real & outside, f'0 to {U - 1}, the index of a prompt')
  used = np.zeros(U, bool)
  used[tasks.prompt[real]] = True
  refuse('prompts.row_mask', prompts.row_mask, used & ~prompts.row_mask, 'True for every prompt that a task names')
  outside = (prompts.length < 1) | (prompts.length > P)
  refuse('prompts.length', prompts.length, used & outside, f'1 to {P}')
  inside = used[:, None] & (np.arange(P)[None, :] < prompts.length[:, None])
  bad = inside & ((prompts.tokens < 0) | (prompts.tokens >= vocab_size))
  refuse('prompts.tokens', prompts.tokens.ravel(), bad.ravel(), f'0 to {vocab_size - 1}, the ids of the model')
  finite = np.isfinite(tasks.temperature) & (tasks.temperature >= 0)
  refuse('tasks.temperature', tasks.temperature, real & ~finite, '0 (greedy) and above')
  refuse('tasks.top_p', tasks.top_p, real & ~((tasks.top_p > 0) & (tasks.top_p <= 1)), 'above 0, to 1 (off)')
  refuse('tasks.top_k', tasks.top_k, real & (tasks.top_k < 0), '0 (off) and above')
  refuse('tasks.min_p', tasks.min_p, real & ~((tasks.min_p >= 0) & (tasks.min_p <= 1)), '0 (off) to 1')
  if limits.shape != real.shape:
    raise ValueError(f'limits: got shape {limits.shape}; needs one number of tokens for each of {real.size} tasks.')
  refuse('limits', limits, real & ((limits < 1) | (limits > T)), f'1 to {T}, max_new_tokens')
  guides.check(tasks.guides, real, limits, vocab_size)
