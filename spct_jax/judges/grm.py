"""The pointwise generative reward model: examples in, judgements out (paper Eq 7, 9; sections 2.6, 4.1).

One verb, `judge`, shared by sampling, GRPO, evaluation and labelling. It has three parts that stages may
also call one by one, because a long run is resumed between chunks:

    plan(judge, examples, ...)   orders, prompts, token ids, whole chunks   (text -> arrays, gate 1)
    run(judge, chunks)           the engine draws each chunk, `read` parses  (arrays -> text, gate 2)
    judgments(examples, grouped) scores in the example's own order: the shown order is undone here, once

Chunks are composed from the items alone - never from time, hosts or what was done before - so a resumed
run redoes whole chunks and draws what the uninterrupted run drew. A sample's order and its uniforms are
keyed by (seed, stage, visit, uid, sample), so they do not depend on the chunk either.

Votes as needed (`Early`): the samples of an item stop once their vote is decided (`algos.early`); the others are
withdrawn from the engine and leave no trajectory. An item is then whole in one chunk, and what it keeps are its first
samples, as many as its vote needs: a function of the samples alone, so that rows, devices and resuming change nothing.

Where we add to the paper: a response whose verdict does not parse is data (`valid` False), never a score.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from spct_jax import records, types
from spct_jax.algos import early as early_algo
from spct_jax.judges import endings, parse, prompts
from spct_jax.text import chat, encode
from spct_jax.text.tokenizer import Tokenizer

# (prompts, tasks, infos) gives the rollouts, or starts them and gives a function that waits for them. Where votes may
# stop early it is given a fourth argument, `withdraw` (see `sampling.engine.Withdraw`).
Generate = Callable[..., types.Rollouts | Callable[[], types.Rollouts]]

EARLY_RULES = ('none', 'exact', 'statistical')
ORDER_RULES = ('shuffle', 'balanced', 'fixed', 'group')


@dataclasses.dataclass(frozen=True)
class Settings:
  """How examples become prompts and how the engine samples them.

  orders: 'shuffle' draws an order per sample (the paper's rule), 'balanced' deals the samples over cyclic
    shifts, 'fixed' keeps the file's order, 'group' draws one order per item and visit (GRPO).
  single: which prompt a single response gets: 'binary' (0/1, paper 4.2) or 'scale' (1..10, paper 4.1).
  buckets: ascending prompt lengths in tokens; a chunk is padded to the smallest that holds it and the last
    one is the limit.
  chunk_prompts, chunk_tasks: how many distinct prompts and samples the engine takes in one call.
  ends: where a judgement ends besides where the model ends it; such samples are for use, not for training.
  """

  template: prompts.Template
  orders: str
  single: str
  given_principles: bool
  reference_answer: bool
  buckets: tuple[int, ...]
  chunk_prompts: int
  chunk_tasks: int
  temperature: float
  top_p: float
  top_k: int
  min_p: float
  seed: int
  ends: endings.Endings = endings.NONE

  def __post_init__(self):
    if self.orders not in ORDER_RULES:
      raise ValueError(f'orders: got {self.orders!r}; allowed: {", ".join(ORDER_RULES)}')
    if self.single not in ('binary', 'scale'):
      raise ValueError(f"single: got {self.single!r}; allowed: 'binary', 'scale'")
    if not self.buckets or list(self.buckets) != sorted(set(self.buckets)) or self.buckets[0] < 2:
      raise ValueError(
          f'prompt buckets: got {self.buckets}; allowed: ascending, distinct lengths of at least 2 tokens'
      )
    if self.chunk_prompts < 1 or self.chunk_tasks < 1:
      raise ValueError(
          f'chunk_prompts={self.chunk_prompts}, chunk_tasks={self.chunk_tasks}: both must be at least 1'
      )
    if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0 or not 0 <= self.min_p < 1:
      raise ValueError(
          f'sampling: got temperature={self.temperature}, top_p={self.top_p}, top_k={self.top_k}, '
          f'min_p={self.min_p}; allowed: temperature >= 0, 0 < top_p <= 1, top_k >= 0, 0 <= min_p < 1'
      )


@dataclasses.dataclass(frozen=True)
class Early:
  """When votes stop (`algos.early`): alpha None is the exact rule; `threshold`: of a single response's mean score."""

  alpha: float | None
  threshold: float


def early(rule: str, *, alpha: float, threshold: float) -> Early | None:
  """The rule by its name; `alpha` is read for 'statistical' only."""
  if rule not in EARLY_RULES:
    raise ValueError(f'early: got {rule!r}; allowed: {", ".join(map(repr, EARLY_RULES))}')
  if rule == 'statistical' and not 0 < alpha < 1:
    raise ValueError(
        f'early_alpha: got {alpha}; allowed: above 0, below 1, the chance that an item gets another winner than with '
        'all votes'
    )
  return None if rule == 'none' else Early(alpha if rule == 'statistical' else None, threshold)


@dataclasses.dataclass(frozen=True)
class Judge:
  """A generative judge: an engine bound to its parameters, the tokenizer, and the settings."""

  generate: Generate
  tokenizer: Tokenizer
  settings: Settings


@dataclasses.dataclass(frozen=True)
class Task:
  """One sample to draw: which item of the caller's list, which sample of it, and what it reads."""

  item: int
  info: types.TaskInfo
  prompt: types.Prompt
  prompt_ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Chunk:
  """What one call of the engine draws."""

  index: int
  tasks: tuple[Task, ...]
  bucket: int
  early: Early | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
  """All chunks of a run; `overlong` are the positions of items whose prompt passes the limit."""

  chunks: tuple[Chunk, ...]
  overlong: tuple[int, ...]
  stage: str


@dataclasses.dataclass(frozen=True)
class Judged:
  """grouped[b] holds the K trajectories of item b in sample order (none for an over-long item), fewer if it stopped."""

  grouped: tuple[tuple[types.Trajectory, ...], ...]
  judgments: types.Judgments
  overlong: tuple[int, ...]


def prompt_of(
    example: types.Example, order: Sequence[int], *, settings: Settings, hinted: bool
) -> types.Prompt:
  """The judge's prompt for one order of the example's responses; the hint names the shown slot."""
  return prompts.build(
      example,
      tuple(order),
      settings.template,
      mode=mode(len(example.responses), settings),
      hint=example.label if hinted else None,
      principles=example.principles if settings.given_principles else None,
      reference=example.reference if settings.reference_answer else None,
  )


def mode(responses: int, settings: Settings) -> str:
  """Which prompt, and so which scale (`prompts.SCALES`), an item of so many responses gets."""
  return 'single' if responses == 1 and settings.single == 'binary' else 'pointwise'


def prompt_ids(prompt: types.Prompt, tokenizer: Tokenizer) -> tuple[int, ...]:
  """Gate 1 for one prompt: the user message in the tokenizer's chat template, as token ids."""
  return tuple(encode.encode(chat.wrap(prompt.spans, tokenizer), tokenizer))


def item_orders(
    example: types.Example, *, settings: Settings, stage: str, visit: int, samples: int
) -> list[tuple[int, ...]]:
  """One order per sample (decision 5): shared within the item for 'group', else drawn or dealt."""
  n = len(example.responses)
  kind, draws = (
      ('shuffle', 1) if settings.orders == 'group' else (settings.orders, samples)
  )
  drawn = prompts.orders(
      kind=kind, n=n, samples=draws, seed=settings.seed, stage=stage, visit=visit, uid=example.uid
  )
  return drawn * samples if settings.orders == 'group' else drawn


def plan(
    judge: Judge,
    examples: Sequence[types.Example],
    *,
    samples: int,
    stage: str,
    visits: Sequence[int] | None = None,
    hinted: bool = False,
    early: Early | None = None,
) -> Plan:
  """Composes every chunk of a run on the host, before any device works.

  Args:
    judge: the judge; only its tokenizer and settings are read here.
    examples: items; a uid may occur twice if its visits differ.
    samples: K >= 1, samples per item.
    stage: names the randomness, so two stages never share it.
    visits: how often each item was visited before; zeros if None.
    hinted: appends the hint with the gold response (paper 2.3); items without a label are an error.
    early: when the vote of an item stops; None: it never does.
  """
  if samples < 1:
    raise ValueError(f'samples per item: got {samples}; allowed: at least 1')
  settings = judge.settings
  if early is not None:
    check_early(early, orders=settings.orders, samples=samples, chunk_tasks=settings.chunk_tasks)
  limit = settings.buckets[-1]
  visits = [0] * len(examples) if visits is None else [int(v) for v in visits]
  tasks: list[Task] = []
  overlong: list[int] = []
  for item, (example, visit) in enumerate(zip(examples, visits, strict=True)):
    if hinted and example.label is None:
      raise ValueError(f'item {example.uid!r} has no label, so no hint can name its best response')
    orders = item_orders(example, settings=settings, stage=stage, visit=visit, samples=samples)
    built = {}
    for order in dict.fromkeys(orders):
      prompt = prompt_of(example, order, settings=settings, hinted=hinted)
      built[order] = prompt, prompt_ids(prompt, judge.tokenizer)
    if any(len(ids) > limit for _, ids in built.values()):
      overlong.append(item)
      continue
    for sample, order in enumerate(orders):
      info = types.TaskInfo(
          uid=example.uid, sample=sample, visit=visit, order=order, hinted=hinted
      )
      tasks.append(Task(item, info, *built[order]))
  compose = _compose if early is None else functools.partial(_compose_items, early=early)
  return Plan(tuple(compose(tasks, settings)), tuple(overlong), stage)


def check_early(early: Early, *, orders: str, samples: int, chunk_tasks: int) -> None:
  """What can be known to be wrong before there are items."""
  if samples > chunk_tasks:
    raise ValueError(
        f'early: {samples} samples per item do not fit into chunk_tasks={chunk_tasks}, and a vote that may '
        'stop is drawn in one chunk; raise judge.chunk_tasks'
    )
  if early.alpha is not None and orders == 'balanced':
    raise ValueError(
        "early: the statistical rule needs samples that can be exchanged, which those of orders='balanced' cannot; "
        "take orders='shuffle', or early='exact'"
    )


def _compose_items(tasks: Sequence[Task], settings: Settings, early: Early) -> Iterator[Chunk]:
  """The same as `_compose` with whole items."""
  items: dict[int, list[Task]] = {}
  for task in tasks:
    items.setdefault(task.item, []).append(task)
  bucket = [max(len(task.prompt_ids) for task in item) for item in items.values()]
  index, held, prompts_held = 0, [], 0
  items_ = list(items.values())
  for i in np.argsort(-np.searchsorted(settings.buckets, bucket), kind='stable'):
    orders = len({task.info.order for task in items_[i]})
    if orders > settings.chunk_prompts:
      raise ValueError(
          f'early: item {items_[i][0].info.uid!r} is shown in {orders} orders, but chunk_prompts is '
          f'{settings.chunk_prompts}, and a vote that may stop is drawn in one chunk; raise judge.chunk_prompts'
      )
    if len(held) + len(items_[i]) > settings.chunk_tasks or prompts_held + orders > settings.chunk_prompts:
      yield _chunk(index, held, settings, early)
      index, held, prompts_held = index + 1, [], 0
    held += items_[i]
    prompts_held += orders
  if held:
    yield _chunk(index, held, settings, early)


def _compose(tasks: Sequence[Task], settings: Settings) -> Iterator[Chunk]:
  """Cuts the tasks where the next one would overflow the prompts or the tasks of a chunk.

  Those of a longer bucket come first, otherwise in order: few short prompts are then padded to a long one's bucket,
  and a chunk with both ends on the short judgements, so that few rows wait for the last.
  """
  index, held, seen = 0, [], set()
  bucket = np.searchsorted(settings.buckets, [len(task.prompt_ids) for task in tasks])
  for task in (tasks[i] for i in np.argsort(-bucket, kind='stable')):
    key = task.item, task.info.order
    full = len(held) == settings.chunk_tasks
    if full or (key not in seen and len(seen) == settings.chunk_prompts):
      yield _chunk(index, held, settings)
      index, held, seen = index + 1, [], set()
    held.append(task)
    seen.add(key)
  if held:
    yield _chunk(index, held, settings)


def _chunk(index: int, tasks: Sequence[Task], settings: Settings, early: Early | None = None) -> Chunk:
  longest = max(len(task.prompt_ids) for task in tasks)
  return Chunk(index, tuple(tasks), next(b for b in settings.buckets if b >= longest), early)


def run(judge: Judge, chunks: Iterable[Chunk]) -> Iterator[tuple[Chunk, list[types.Trajectory]]]:
  """Draws the chunks in turn; while the devices draw one, the host reads the one before, and the caller uses it.

  Trajectories come in the order of the chunk's tasks, without those that were withdrawn. Where a chunk cannot be drawn,
  the one before is given first.
  """
  drawn, chunks = None, tuple(chunks)
  kinds = _kinds(judge, [task for chunk in chunks for task in chunk.tasks])
  for chunk in chunks:
    error = None
    try:
      votes = _Votes(chunk, judge)
      wait = _launch(judge, chunk, kinds, votes)
    except BaseException as caught:  # a signal to stop too: to compile a chunk's program may take minutes
      error = caught
    if drawn is not None:
      yield drawn[0], drawn[1].read(drawn[2])
    if error is not None:
      raise error
    drawn = chunk, votes, wait()
    del wait  # and with it the caches of this chunk
  if drawn is not None:
    yield drawn[0], drawn[1].read(drawn[2])


class _Votes:
  """The votes of a chunk's items, as far as they are read."""

  def __init__(self, chunk: Chunk, judge: Judge):
    self._chunk, self._tokenizer, self._ends = chunk, judge.tokenizer, judge.settings.ends
    self._found: dict[int, types.Trajectory] = {}
    items: dict[int, list[int]] = {}
    for row, task in enumerate(chunk.tasks):
      items.setdefault(task.item, []).append(row)
    if chunk.early is not None:
      self._rows = np.asarray(list(items.values()))  # [B, K]
      self._at = {row: (b, k) for b, rows in enumerate(self._rows.tolist()) for k, row in enumerate(rows)}
      first = [chunk.tasks[rows[0]] for rows in self._rows]
      sizes = np.asarray([len(task.info.order) for task in first])
      self._response_mask = np.arange(sizes.max())[None, :] < sizes[:, None]
      self._low, self._high = (np.asarray([getattr(task.prompt, name) for task in first]) for name in ('low', 'high'))
      self._scores = np.zeros((*self._rows.shape, sizes.max()), np.int32)
      self._valid, self._ended = np.zeros((2, *self._rows.shape), bool)

  def withdraw(self, index: np.ndarray, rollouts: types.Rollouts) -> np.ndarray:
    """Reads tasks that have ended; the samples that no vote needs any more."""
    self._read(index.tolist(), rollouts)
    return self._unneeded()

  def read(self, rollouts: types.Rollouts) -> list[types.Trajectory]:
    """All that the votes need."""
    kept = np.ones(len(self._chunk.tasks), bool)
    if rollouts.withdrawn is not None:
      kept = ~rollouts.withdrawn[: len(kept)]
    rest = [row for row in np.flatnonzero(kept).tolist() if row not in self._found]
    self._read(rest, rollouts.take(rest))
    if self._chunk.early is not None:
      kept[self._unneeded()] = False  # by what ended last, too
    return [self._found[row] for row in np.flatnonzero(kept).tolist()]

  def _read(self, rows, rollouts):
    tasks = [self._chunk.tasks[row] for row in rows]
    for row, found in zip(rows, read(tasks, rollouts, self._tokenizer, self._ends)):
      self._found[row] = found
      if self._chunk.early is not None:
        at = self._at[row]
        self._ended[at] = True
        if found.scores is not None:
          self._scores[at][list(found.order)] = found.scores
          self._valid[at] = True

  def _unneeded(self):
    K = self._rows.shape[1]
    known = np.where(self._ended.all(axis=1), K, np.argmin(self._ended, axis=1))  # the first ones without a gap
    needed = early_algo.votes_needed(
        self._scores, self._valid, known, self._response_mask, self._low, self._high, self._chunk.early.threshold,
        self._chunk.early.alpha,
    )
    return self._rows[np.arange(K)[None, :] >= needed[:, None]]


def _kinds(judge: Judge, tasks: Sequence[Task]) -> dict[tuple[int, ...], tuple]:
  """What the score line of each prompt has to be; nothing where nobody asks."""
  if judge.settings.ends == endings.NONE:
    return {}
  found = {}
  for task in tasks:
    if task.prompt_ids not in found:
      found[task.prompt_ids] = endings.kind(task.prompt, task.prompt_ids, judge.tokenizer)
  return found


def _launch(judge: Judge, chunk: Chunk, kinds: dict, votes: _Votes) -> Callable[[], types.Rollouts]:
  """Hands a chunk to the engine: prompts and tasks padded to the fixed sizes of the settings."""
  settings = judge.settings
  slots: dict[tuple, int] = {}
  ids: list[tuple[int, ...]] = []
  for task in chunk.tasks:
    key = task.item, task.info.order
    if key not in slots:
      slots[key] = len(ids)
      ids.append(task.prompt_ids)
  batch = encode.batch(
      ids, length=chunk.bucket, rows=settings.chunk_prompts, pad_id=judge.tokenizer.pad_id
  )
  queue = settings.chunk_tasks
  fill = lambda values, dtype: np.concatenate([
      np.asarray(values, dtype), np.zeros((queue - len(values), *np.shape(values)[1:]), dtype)
  ])
  constant = lambda value, dtype: np.full(queue, value, dtype)
  tasks = types.Tasks(
      prompt=fill([slots[t.item, t.info.order] for t in chunk.tasks], np.int32),
      uid=fill([records.uid_hash(t.info.uid) for t in chunk.tasks], np.uint32),
      visit=fill([t.info.visit for t in chunk.tasks], np.int32),
      sample=fill([t.info.sample for t in chunk.tasks], np.int32),
      temperature=constant(settings.temperature, np.float32),
      top_p=constant(settings.top_p, np.float32),
      top_k=constant(settings.top_k, np.int32),
      min_p=constant(settings.min_p, np.float32),
      row_mask=np.arange(queue) < len(chunk.tasks),
      guides=endings.guides(
          settings.ends, judge.tokenizer, kinds.values(), [kinds[t.prompt_ids] for t in chunk.tasks if kinds], queue
      ),
  )
  steer = () if chunk.early is None else (votes.withdraw,)
  rollouts = judge.generate(batch, tasks, tuple(t.info for t in chunk.tasks), *steer)
  return rollouts if callable(rollouts) else lambda: rollouts


def read(
    tasks: Sequence[Task],
    rollouts: types.Rollouts,
    tokenizer: Tokenizer,
    wanted: endings.Endings = endings.NONE,
) -> list[types.Trajectory]:
  """Gate 2: token ids back to text, parsed strictly; a run into the length limit is its own class."""
  out = []
  eos = set(tokenizer.eos_ids)
  for row, task in enumerate(tasks):
    length = int(np.count_nonzero(rollouts.token_mask[row]))
    tokens = tuple(int(t) for t in rollouts.tokens[row, :length])
    ended = bool(rollouts.ended[row])
    at_eos = ended and tokens[-1] in eos
    text = tokenizer.decode(tokens[:-1] if at_eos else tokens)
    if ended and not at_eos:
      text = endings.cut(text, wanted, endings.kind(task.prompt, task.prompt_ids, tokenizer))
    n = len(task.info.order)
    parsed = parse.read(
        text, n, low=task.prompt.low, high=task.prompt.high, truncated=not ended
    )
    out.append(
        types.Trajectory(
            uid=task.info.uid,
            sample=task.info.sample,
            visit=task.info.visit,
            order=task.info.order,
            hinted=task.info.hinted,
            prompt_ids=task.prompt_ids,
            token_ids=tokens,
            logp=tuple(float(p) for p in rollouts.logp[row, :length]),
            text=text,
            scores=parsed.scores,
            parse=parsed.kind,
            kept=_kept(rollouts.kept, row, length),
        )
    )
  return out


def _kept(recorded: types.Kept | None, row: int, length: int) -> types.Kept | None:
  """What a task's tokens were drawn from, without padding."""
  if recorded is None:
    return None
  ids, count = recorded.ids[row, :length], recorded.count[row, :length].tolist()
  # Many steps keep few tokens: a slice of what is there, not a search through the padding.
  return types.Kept(
      ids=tuple(tuple(line[: min(number, len(line))].tolist()) for line, number in zip(ids, count)),
      logp=tuple(recorded.logp[row, :length].tolist()),
      count=tuple(count),
  )


def judgments(
    responses: Sequence[int], grouped: Sequence[Sequence[types.Trajectory]]
) -> types.Judgments:
  """Stacks trajectories to arrays in the examples' own order of responses.

  Args:
    responses: how many responses each of the B items has.
    grouped: the trajectories of each item; K is the longest group, missing ones are invalid.

  Returns:
    scores int32[B, K, N], valid bool[B, K], response_mask bool[B, N]; `scores[b, k, order[slot]]` is the
    number that sample k wrote for the response that it saw in that slot.
  """
  if len(responses) != len(grouped):
    raise ValueError(f'{len(responses)} items but {len(grouped)} groups of trajectories')
  b = len(responses)
  n = max(responses, default=1)
  k = max((len(group) for group in grouped), default=0)
  scores = np.zeros((b, k, n), np.int32)
  valid = np.zeros((b, k), bool)
  for i, group in enumerate(grouped):
    for j, trajectory in enumerate(group):
      if len(trajectory.order) != responses[i]:
        raise ValueError(
            f'item {trajectory.uid!r} has {responses[i]} responses but sample {trajectory.sample} was shown '
            f'{len(trajectory.order)}: these trajectories belong to other data; sample again'
        )
      if trajectory.scores is not None:
        scores[i, j, list(trajectory.order)] = trajectory.scores
        valid[i, j] = True
  response_mask = np.arange(n)[None, :] < np.asarray(responses, np.int64).reshape(-1, 1)
  return types.Judgments(scores, valid, response_mask)


def group(
    examples: Sequence[types.Example],
    trajectories: Sequence[types.Trajectory],
    *,
    hinted: bool = False,
) -> list[list[types.Trajectory]]:
  """Trajectories of each example by uid, in sample order; those of the other hinting are left out."""
  found: dict[str, list[types.Trajectory]] = {example.uid: [] for example in examples}
  for trajectory in trajectories:
    if trajectory.hinted == hinted and trajectory.uid in found:
      found[trajectory.uid].append(trajectory)
  return [sorted(found[example.uid], key=lambda t: (t.visit, t.sample)) for example in examples]


def judge(
    judge: Judge,
    examples: Sequence[types.Example],
    *,
    samples: int,
    stage: str,
    visits: Sequence[int] | None = None,
    hinted: bool = False,
    on_chunk: Callable[[int], None] | None = None,
    early: Early | None = None,
) -> Judged:
  """Judges every example `samples` times, or as often as its vote needs (`early`).

  `on_chunk` is told how many samples each chunk was to draw.
  """
  planned = plan(
      judge, examples, samples=samples, stage=stage, visits=visits, hinted=hinted, early=early
  )
  grouped: list[list[types.Trajectory]] = [[] for _ in examples]
  for chunk, drawn in run(judge, planned.chunks):
    item = {(task.info.uid, task.info.visit): task.item for task in chunk.tasks}
    for trajectory in drawn:
      grouped[item[trajectory.uid, trajectory.visit]].append(trajectory)
    if on_chunk is not None:
      on_chunk(len(chunk.tasks))
  scored = judgments([len(e.responses) for e in examples], grouped)
  missing = samples - scored.valid.shape[1]  # every item was over-long, or stopped before
  if missing:
    scored = types.Judgments(
        np.pad(scored.scores, ((0, 0), (0, missing), (0, 0))),
        np.pad(scored.valid, ((0, 0), (0, missing))),
        scored.response_mask,
    )
  return Judged(tuple(map(tuple, grouped)), scored, planned.overlong)
