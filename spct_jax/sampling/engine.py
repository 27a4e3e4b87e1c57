"""The sampler: prompts and tasks in, token ids with their log-probabilities out (decisions 4, 6 and 7).

    engine = Engine(model=..., mesh=..., ...)
    rollouts = engine.generate(params, prompts, tasks)
    wait = engine.launch(params, prompts, tasks)        the same in two steps: the host is free until wait()

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
"""

from collections.abc import Callable
import dataclasses
import math

import jax
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np

from spct_jax import sharding
from spct_jax.models.transformer import Transformer
from spct_jax.sampling import keys, loop, slots, trunks
from spct_jax.types import PromptBatch, Rollouts, Tasks

_ALL = 2**30  # steps: more than any run takes
_PREFILL = 1024  # tokens that go through the model at once: enough to fill it, few enough to keep its activations small
_WIDTHS = sorted(m << i for m in (1, 3) for i in range(24))
_SLOTS = sorted({m << i for m in range(8, 16) for i in range(24)} | set(range(1, 8)))
# What a step's work is made of, in seats of one slot: to read one more slot, and a row with all that is not its prompt.
_SLOT, _ROW = 16, 4
_POSITIONS = 1024  # of the slot that is meant
_GAIN = 0.9  # a cut has to leave this much of the work at most, so that chance does not choose a program


@dataclasses.dataclass(frozen=True)
class Engine:
  """How to sample from a model. `rows` run side by side; `mesh` None is one device without placement.

  `cache_rules` place the caches (sharding rules; paths 'prompt/period/0/k', 'rows/head/0/v', ...; shape
  [slots or rows, M, positions, hd]). A task ends with one of `eos_ids`, or after `max_new_tokens`.
  With `share_trunks` what prompts begin with alike is computed, held and read once, where that is worth it.
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
    keys.root_key(self.seed, self.stage)

  @property
  def _settings(self) -> loop.Settings:
    rules = tuple((pattern, _hashable(spec)) for pattern, spec in self.cache_rules)
    return loop.Settings(self.model, self.mesh, rules, self.max_new_tokens, tuple(map(int, self.eos_ids)))

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
  ) -> Rollouts:
    """Runs all tasks; numpy in, numpy out, in the order of the tasks. Padding tasks get an empty row.

    `on_progress(done, total)` is called after every `segment` steps, or once at the end if that is None.
    `limits` int[Q] ends each task after so many tokens; None is `max_new_tokens` for all.
    """
    return self._launch(params, prompts, tasks, on_progress, segment, limits)()

  def launch(self, params: dict, prompts: PromptBatch, tasks: Tasks) -> Callable[[], Rollouts]:
    """Starts what `generate` does and returns at once; the function that it returns waits and gives the rollouts.

    The caches of two launched runs exist side by side: call the first one's function before launching the second.
    """
    return self._launch(params, prompts, tasks, None, None, None)

  def _launch(self, params, prompts, tasks, on_progress, segment, limits):
    if segment is not None and segment < 1:
      raise ValueError(f'segment: got {segment}; needs at least 1 step, or None for one uninterrupted run.')
    dealt, given, state = self._begin(params, prompts, tasks, limits)
    total = int(tasks.row_mask.sum())
    if not total:
      return lambda: self._rollouts(len(tasks.prompt), None, None)
    steps = np.int32(_ALL if segment is None else segment)
    state, finished = loop.advance(*given, state, steps)

    def wait():
      held, done = state, int(sharding.to_host(finished))
      while True:
        if on_progress is not None:
          on_progress(done, total)
        if done == total:
          return self._rollouts(len(tasks.prompt), dealt, held)
        held, count = loop.advance(*given, held, steps)
        done = int(sharding.to_host(count))

    return wait

  def _begin(self, params, prompts, tasks, limits):
    """-> which task stands where in the queues, what `loop.advance` takes before its state, the first state."""
    T, settings = self.max_new_tokens, self._settings
    limits = np.full(len(tasks.prompt), T) if limits is None else np.asarray(limits)
    _check(prompts, tasks, self.model.config.vocab_size, limits, T)
    if not tasks.row_mask.any():
      return None, None, None
    cut, sizes = _choose(prompts, tasks, settings.groups, self.rows, T, self.share_trunks)
    dealt, *host = _deal(prompts, tasks, limits, settings.groups, cut)
    dealt_prompts, queue = _put(host, self.mesh)
    root = np.asarray(jax.random.key_data(keys.root_key(self.seed, self.stage)))
    weights, state = loop.start(settings, sizes, params, dealt_prompts, queue)
    return dealt, (settings, sizes, weights, root, dealt_prompts, queue), state

  def _rollouts(self, Q, dealt, state) -> Rollouts:
    """The state's results in the order of the tasks; empty rows for padding."""
    T = self.max_new_tokens
    tokens, logp, length = np.zeros((Q, T), np.int32), np.zeros((Q, T), np.float32), np.zeros(Q, np.int32)
    if state is not None:
      real = dealt >= 0
      found = sharding.to_host((state.tokens, state.logp, state.length))
      if np.isnan(found[1][real]).any():
        raise FloatingPointError(
            'the model gives no finite logit, so nothing can be sampled from it: its parameters are NaN or infinite; '
            'go back to a checkpoint before the training diverged'
        )
      for out, values in zip((tokens, logp, length), found):
        out[dealt[real]] = values[real]
    return Rollouts(tokens=tokens, logp=logp, token_mask=np.arange(T)[None, :] < length[:, None])


def _hashable(spec):
  return tuple(tuple(entry) if isinstance(entry, list) else entry for entry in spec)


def _parts(count: int, ways: int) -> int:
  return -(-count // ways)


def _put(tree, mesh):
  where = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  if mesh is not None:
    where = NamedSharding(mesh, PartitionSpec(sharding.DATA_AXES))
  return sharding.to_device(tree, where)


def _counts(prompts: PromptBatch, tasks: Tasks) -> np.ndarray:
  """int[U]: how many tasks each prompt has."""
  return np.bincount(tasks.prompt[tasks.row_mask], minlength=len(prompts.length))


def _places(counts: np.ndarray, G: int):
  """Prompts to groups -> group[U], place[U], and the tasks at each place, number[G, U / G]."""
  U = len(counts)
  rank = np.empty(U, int)
  rank[np.argsort(-counts, kind='stable')] = np.arange(U)
  # To and fro (0 1 2 2 1 0 0 1 ...), so that no group gets the larger one every time.
  place, group = rank // G, rank % G
  group = np.where(place % 2, G - 1 - group, group)
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


def _deal(prompts: PromptBatch, tasks: Tasks, limits: np.ndarray, G: int, cut: trunks.Cut | None = None):
  """-> dealt int[G, q] (which task stands where in the queues, -1 = none), Prompts, Queue."""
  Q, (U, P) = len(tasks.prompt), prompts.tokens.shape
  prompt = np.where(tasks.row_mask, tasks.prompt, 0)
  counts = _counts(prompts, tasks)
  if cut is None:
    group, place, number = _places(counts, G)
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


def _choose(prompts: PromptBatch, tasks: Tasks, G: int, rows: int, T: int, share_trunks: bool):
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
  sizes = _sizes(number, room, held, P)
  best = work(number, held, [(sizes, P, number, 0)]), None, sizes
  for cut in trunks.cuts(prompts, tasks) if share_trunks else ():
    dealt = trunks.deal(counts, cut, G)
    room = _room(Q, dealt.number)
    held = min(_parts(rows, G), room)
    there = (dealt.source >= 0).sum(axis=1).max()
    of_trunks = dealt.trunk_number[:, : next(width for width in _WIDTHS if width >= there)]
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


def _sizes(number: np.ndarray, Q: int, rows: int, P: int) -> loop.Sizes:
  """How many slots a group of Q places in the queue gets and how many rows sit at each; `number[G, U]` tasks a prompt.

  The least of steps x work of a step, both as estimated here. Widths go in steps of a half, slots in
  steps of an eighth, so that few programs arise.
  """
  U, used = number.shape[1], number[number > 0]
  batch = max(1, min(U, _PREFILL // P))
  best = None
  for width in _WIDTHS:
    width = min(width, rows)
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
    if width >= min(rows, used.max()):
      break
  _, slots, width = best
  return loop.Sizes(rows=rows, slots=slots, width=width, batch=min(batch, slots))


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
