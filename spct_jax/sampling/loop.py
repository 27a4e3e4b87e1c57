"""The engine's program on the device: one loop that fills prompt slots, decodes, and never leaves the device.

A *slot* holds the cache of one prompt while its tasks run, and seats W rows at a time; a *row* runs one
task at a time and attends to the slot of its prompt. Rows and slots come in G groups, one for each part of
the mesh that holds rows of its own, and a row only meets slots of its own group. The loop does one of two
things, whichever the state asks for:

    fill    if as many slots are free as prompts go through the model at once (or as are left): prefill them
    step    1. every row feeds one token and stores its key and value at ring position clock % T, all rows alike
            2. it attends to its slot's prompt[:-1] and to its own ring entries since it began (`shared`)
            3. it draws a token; on an end-of-sequence id, a guide's stop, or after its limit, its task is done
            4. the clock ticks

After either one, free rows take waiting tasks: those of the earliest prompt first, as far as its slot has a
seat. A slot whose prompt has no task left is free. So a prompt is computed once, kept once and read
once a step, and rows go on with the next prompts while the last samples of the earlier ones end.

Prompts that begin alike, as the orders of an example do, may be cut in two (`trunks` chooses): what they share is a
*trunk*, kept in a trunk slot that seats the rows of all of them, and a prompt's slot holds its rest, the *branch*,
alone. There is then a third thing to do, before the other two: to load trunks into free trunk slots; only prompts
whose trunk is there are filled, and a trunk leaves when no prompt of it has a task left.

A row that starts feeds the *last* token of its prompt, so no logits of the prefill are ever needed, and
a prompt of one token leaves its slot empty. With T = 4, at clock 5, for a row that began at clock 4:

    ring position     0   1   2   3
    written at clock  4   5   2   3      age = (clock - position) mod T =  1 0 3 2
    seen              1   1   .   .      age <= clock - began

A row lives for at most T steps, so the ring never overwrites an entry that its row still needs.

The host may withdraw the last tasks of a prompt between two calls of `advance`, by a smaller `Prompts.number`: then
they are not started, rows that run one are free at once, and prompts that have no task left are not filled.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from spct_jax import sharding
from spct_jax.models import int8, kv_cache, prefill, unrolled
from spct_jax.models.transformer import Transformer
from spct_jax.sampling import decoding, guides, keys, shared, slots, suffixes
from spct_jax.sampling.slots import of as _of


@dataclasses.dataclass(frozen=True)
class Settings:
  """What is compiled in; hashable. `eos_ids` may be empty; `cache_rules` are unused without a mesh.

  `withdraws`: tasks may be withdrawn. `kept`: the cap C of the recorded sets (`decoding.sample_kept`), 0: none are.
  """

  model: Transformer
  mesh: jax.sharding.Mesh | None
  cache_rules: tuple
  max_new_tokens: int
  eos_ids: tuple[int, ...]
  cache_dtype: str | None = None  # None: the model's
  withdraws: bool = False
  kept: int = 0

  @property
  def groups(self) -> int:
    return 1 if self.mesh is None else sharding.data_ways(self.mesh)

  @property
  def decoder(self) -> Transformer:
    """The model as the loop runs it."""
    return unrolled.model(self.model)


class Sizes(NamedTuple):
  """Of one group: rows R, slots S, seats of a slot W, prompts that are prefilled at once B <= S.

  The same of trunks, Z of them; 0 where prompts are whole.
  """

  rows: int
  slots: int
  width: int
  batch: int
  trunk_slots: int = 0
  trunk_width: int = 0
  trunk_batch: int = 0


class Prompts(NamedTuple):
  """Prompts by group, those without a task last: `tokens[G, U, P]`, the rest [G, U]; `count[G]` have tasks.

  The tasks of prompt u are `number[u]` of the queue from `first[u]` on. With trunks, tokens and length are those of
  the branches, of one token at least, and `trunk[G, U]` says which trunk each continues.
  """

  count: jax.Array
  tokens: jax.Array
  length: jax.Array
  first: jax.Array
  number: jax.Array
  trunk: jax.Array | None = None
  trunks: slots.Trunks | None = None


class Queue(NamedTuple):
  """Tasks by group, those of a prompt side by side: arrays [G, Q]; `count[G]` of them are real."""

  count: jax.Array
  uid: jax.Array  # [G, Q, 2]
  visit: jax.Array
  sample: jax.Array
  limit: jax.Array  # of tokens, 1 to T
  temperature: jax.Array
  top_p: jax.Array
  top_k: jax.Array
  min_p: jax.Array
  guides: tuple = ()  # of `guides.Guide`; their tables are whole on every device


class State(NamedTuple):
  """What changes. A row without a task has `task` = Q and `slot` = S, behind the end of every array."""

  clock: jax.Array  # int32: steps since the start
  fills: jax.Array  # int32: prefills since the start, of B prompts a group
  head: jax.Array  # [G], the next prompt to fill a slot
  done: jax.Array  # [G], finished tasks
  prompt: jax.Array  # [G, S], the slot's prompt; U = free
  taken: jax.Array  # [G, S], the next task of the slot's prompt
  slots: dict  # cache over all G * S slots, P positions
  task: jax.Array  # [G, R]
  slot: jax.Array  # [G, R]
  token: jax.Array  # [G, R], fed next
  began: jax.Array  # [G, R], clock of the task's first step
  ring: dict  # cache over all G * R rows, T positions
  tokens: jax.Array  # [G, Q, T]
  logp: jax.Array  # [G, Q, T]
  length: jax.Array  # [G, Q], tokens generated
  trunks: slots.Loaded | None = None
  guided: tuple = ()  # [G, R] for each of the queue's guides, the state that the row's task is in since its first step
  kept: decoding.Kept | None = None  # [G, Q, T, C] and [G, Q, T]; None = not recorded


def empty_cache(settings: Settings, name: str, batch: int, length: int) -> dict:
  """Zeros of the model's cache, placed by the rules; `name` is 'prompt' or 'rows', the root of the paths."""
  return _place_cache(settings, name, kv_cache.init(settings.decoder.config, batch, length, settings.cache_dtype))


def cache_shardings(settings: Settings, name: str, batch: int, length: int) -> dict | None:
  """Where `empty_cache` lies; None without a mesh."""
  if settings.mesh is None:
    return None
  shapes = jax.eval_shape(lambda: kv_cache.init(settings.decoder.config, batch, length, settings.cache_dtype))
  return cache_layout(name, shapes, settings.cache_rules, settings.mesh)


def _place_cache(settings, name, cache):
  if settings.mesh is None:
    return cache
  return jax.lax.with_sharding_constraint(cache, cache_layout(name, cache, settings.cache_rules, settings.mesh))


def cache_layout(name: str, cache: dict, rules: sharding.Rules, mesh: jax.sharding.Mesh) -> dict:
  """Where a cache lies. Of a pair in eight bits the values lie as a float leaf would, and the steps as they do."""
  pair = lambda leaf: isinstance(leaf, int8.Int8)
  floats = jax.tree.map(lambda leaf: leaf.values if pair(leaf) else leaf, cache, is_leaf=pair)

  def place(leaf, where):
    if not pair(leaf):
      return where
    return int8.Int8(where, NamedSharding(mesh, PartitionSpec(*where.spec[: leaf.step.ndim])))

  return jax.tree.map(place, cache, sharding.tree_shardings({name: floats}, rules, mesh)[name], is_leaf=pair)


def _by_rows(settings, x):
  """First axis (groups, or rows or slots of all groups) over the data axes of the mesh."""
  if settings.mesh is None:
    return x
  return jax.lax.with_sharding_constraint(x, NamedSharding(settings.mesh, PartitionSpec(sharding.DATA_AXES)))


@functools.partial(jax.jit, static_argnames=('settings', 'sizes'))
def start(settings: Settings, sizes: Sizes, params: dict, prompts: Prompts, queue: Queue) -> tuple[dict, State]:
  """The weights as `advance` wants them, and the state before the first step.

  `params` are those of a model with stacked layers, of which the weights are a copy; or nothing, `{}`, where the caller
  has the weights: parameters whose layers stand side by side (`unrolled`).
  """
  (G, Q), (U, P), T = queue.visit.shape, prompts.tokens.shape[1:], settings.max_new_tokens
  zeros = lambda *shape: _by_rows(settings, jnp.zeros((G, *shape), jnp.int32))
  rows, trunks = zeros(sizes.rows), None
  if sizes.trunk_slots:
    V, Pt = prompts.trunks.tokens.shape[1:]
    cache = empty_cache(settings, 'prompt', G * sizes.trunk_slots, Pt)
    trunks = slots.Loaded(zeros(), zeros(sizes.trunk_slots) + V, cache)
  return unrolled.params(settings.model.config, params), State(
      clock=jnp.int32(0),
      fills=jnp.int32(0),
      head=zeros(),
      done=zeros(),
      prompt=zeros(sizes.slots) + U,
      taken=zeros(sizes.slots),
      slots=empty_cache(settings, 'prompt', G * sizes.slots, P),
      task=rows + Q,
      slot=rows + sizes.slots,
      token=rows,
      began=rows,
      ring=empty_cache(settings, 'rows', G * sizes.rows, T),
      tokens=zeros(Q, T),
      logp=zeros(Q, T).astype(jnp.float32),
      length=zeros(Q),
      trunks=trunks,
      guided=tuple(rows for _ in queue.guides),
      kept=decoding.Kept(
          ids=zeros(Q, T, settings.kept) - 1, logp=zeros(Q, T).astype(jnp.float32), count=zeros(Q, T)
      ) if settings.kept else None,
  )


@functools.partial(jax.jit, static_argnames=('settings', 'sizes'), donate_argnames='state')
def advance(
    settings: Settings, sizes: Sizes, weights: dict, root: jax.Array, prompts: Prompts, queue: Queue, state: State,
    steps: jax.Array,
) -> tuple[State, jax.Array]:
  """At most `steps` steps; returns the state and how many tasks are done (withdrawn ones, too).

  Cutting a run in parts changes nothing.

  `weights` are those of `start`, `root` is the data of `keys.root_key`: plain numbers, which every process may pass.
  """
  root = jax.random.wrap_key_data(root, impl='threefry2x32')
  task_keys = jax.vmap(keys.fold_tasks, (None, 0, 0, 0))(root, queue.uid, queue.visit, queue.sample)
  until, total = state.clock + steps, queue.count.sum()
  if settings.withdraws:
    state = _withdraw(sizes, prompts, queue, state)

  def done(state):
    return total - _left(prompts, queue, state) if settings.withdraws else state.done.sum()

  def unfinished(state):
    return (state.clock < until) & (done(state) < total)

  def can_prefill(state):
    fill = _can_fill(sizes, prompts, state)
    return fill | _can_load(sizes, prompts, state) if sizes.trunk_slots else fill

  def fill_then_decode(state):
    # Loops in place of a choice: a branch inside a loop would copy what it carries.
    if sizes.trunk_slots:
      state = jax.lax.while_loop(
          lambda state: _can_load(sizes, prompts, state),
          lambda state: _load(settings, sizes, int8.kept(weights, state.fills), prompts, state), state,
      )
    state = jax.lax.while_loop(
        lambda state: _can_fill(sizes, prompts, state),
        lambda state: _fill(settings, sizes, int8.kept(weights, state.fills), prompts, state), state,
    )
    return jax.lax.while_loop(
        lambda state: unfinished(state) & ~can_prefill(state),
        lambda state: _step(settings, sizes, int8.kept(weights, state.clock), task_keys, prompts, queue, state), state,
    )

  state = jax.lax.while_loop(unfinished, fill_then_decode, state)
  return state, done(state)


# --- tasks that are withdrawn


def _withdraw(sizes: Sizes, prompts: Prompts, queue: Queue, state: State) -> State:
  """Rows that run a withdrawn task are free, and take others."""
  Q = queue.visit.shape[1]
  end = _of(_of(prompts.first + prompts.number, state.prompt), state.slot)
  gone = (state.task < Q) & (state.task >= end)
  state = state._replace(task=jnp.where(gone, Q, state.task), slot=jnp.where(gone, sizes.slots, state.slot))
  return _admit(sizes, prompts, _skip(prompts, state))


def _skip(prompts: Prompts, state: State) -> State:
  """The next prompt to fill a slot is one with a task."""
  index = jnp.arange(prompts.number.shape[1], dtype=jnp.int32)[None, :]
  to_come = (index >= state.head[:, None]) & (prompts.number > 0)
  head = jnp.where(to_come.any(axis=1), jnp.argmax(to_come, axis=1), jnp.maximum(prompts.count, state.head))
  return state._replace(head=head.astype(jnp.int32))


def _left(prompts: Prompts, queue: Queue, state: State):
  """Tasks that run, wait in a slot, or wait for one."""
  index = jnp.arange(prompts.number.shape[1], dtype=jnp.int32)[None, :]
  to_come = jnp.where(index >= state.head[:, None], prompts.number, 0).sum()
  return to_come + _waiting(prompts, state).sum() + (state.task < queue.visit.shape[1]).sum()


@functools.partial(jax.jit, static_argnames='sizes')
def news(sizes: Sizes, state: State, told: jax.Array) -> tuple[tuple[jax.Array, ...], jax.Array]:
  """Tasks that have ended and are not `told` bool[G, Q], at most R a group, and `told` with them.

  They are (their places in the queue [G, R], Q = none; tokens [G, R, T], logp [G, R, T], length [G, R]).
  """
  (G, Q), R = told.shape, sizes.rows
  mark = jax.vmap(lambda out, index: out.at[index].set(True, mode='drop'))
  ended = (state.length > 0) & ~mark(jnp.zeros((G, Q), bool), state.task)
  new = ended & ~told
  rank = jnp.where(new, jnp.cumsum(new, axis=1) - 1, R)
  queue = jnp.broadcast_to(jnp.arange(Q, dtype=jnp.int32)[None, :], (G, Q))
  index = jax.vmap(lambda rank, queue: jnp.full(R, Q, jnp.int32).at[rank].set(queue, mode='drop'))(rank, queue)
  found = tuple(_of(values, index) for values in (state.tokens, state.logp, state.length))
  return (index, *found), mark(told, index)


# --- prompts


def _can_load(sizes: Sizes, prompts: Prompts, state: State):
  """Whether a group has trunks to come and free trunk slots for the next of them."""
  free = state.trunks.trunk == prompts.trunks.length.shape[1]
  return slots.fits(free, prompts.trunks.count - state.trunks.head, sizes.trunk_batch)


def _load(settings: Settings, sizes: Sizes, weights: dict, prompts: Prompts, state: State) -> State:
  """The next trunks of every group into its free trunk slots."""
  held, V = state.trunks, prompts.trunks.length.shape[1]
  place, new = slots.coming(held.trunk == V, held.head, prompts.trunks.count - held.head, sizes.trunk_batch)
  cache = _prefill(settings, weights, _of(prompts.trunks.tokens, new), place, held.cache)
  loaded = (place < sizes.trunk_slots).sum(axis=1)
  return state._replace(trunks=slots.Loaded(held.head + loaded, slots.put(held.trunk, place, new), cache))


def _ready(prompts: Prompts, state: State):
  """[G]: prompts that wait for a slot and for nothing else."""
  if prompts.trunks is None:
    return prompts.count - state.head
  loaded = state.trunks.head
  return jnp.where(loaded > 0, _of(prompts.trunks.end, loaded[:, None] - 1)[:, 0], 0) - state.head


def _can_fill(sizes: Sizes, prompts: Prompts, state: State):
  """Whether a group has prompts to come and free slots for the next B of them."""
  return slots.fits(state.prompt == prompts.length.shape[1], _ready(prompts, state), sizes.batch)


def _fill(settings: Settings, sizes: Sizes, weights: dict, prompts: Prompts, state: State) -> State:
  """The next prompts of every group into its free slots, at most B."""
  place, new = slots.coming(state.prompt == prompts.length.shape[1], state.head, _ready(prompts, state), sizes.batch)
  real, before = place < sizes.slots, None
  if sizes.trunk_slots:
    trunk = _of(prompts.trunk, new)
    slot = jnp.where(real, slots.slot_of(state.trunks, trunk), 0)
    # Those of one trunk side by side, as `suffixes` wants them.
    place, new, slot, trunk = (jnp.take_along_axis(x, jnp.argsort(slot, axis=1), 1) for x in (place, new, slot, trunk))
    before = slot, _of(prompts.trunks.length, trunk), state.trunks.cache

  cache = _prefill(settings, weights, _of(prompts.tokens, new), place, state.slots, before)
  state = state._replace(
      fills=state.fills + 1,
      head=state.head + real.sum(axis=1),
      prompt=slots.put(state.prompt, place, new),
      taken=slots.put(state.taken, place, _of(prompts.first, new)),
      slots=cache,
  )
  return _admit(sizes, prompts, _skip(prompts, state) if settings.withdraws else state)


def _prefill(settings, weights, tokens, place, cache, before=None):
  """Keys and values of tokens[G, B, P] in the slots `place`. What padding and a prompt's last token write is unseen.

  `before`: trunk slots [G, B], how many tokens of them are seen [G, B], and their cache.
  """
  model, (G, B, P) = settings.decoder, tokens.shape
  flat = _by_rows(settings, tokens.reshape(G * B, P))
  positions = jnp.broadcast_to(jnp.arange(P)[None, :], flat.shape)
  if before is not None:
    slot, held, trunks = before
    positions += held.reshape(-1, 1)
    rows = suffixes.Rows(slot, held, positions.reshape(G, B, P), None)

  def attend(ref, q, k, v, cache):
    scale, softcap, window = model.config.score_scale(ref.config), model.config.attn_softcap, ref.config.window
    if settings.cache_dtype == 'int8':
      # As the cache will hold them, and as a branch sees its trunk: else a task would depend on where prompts are cut.
      k, v = (int8.floats(int8.rounded(x, (3,)), x.dtype) for x in (k, v))
    if before is None:
      out = _causal(settings, q, k, v, scale, window, softcap)
    else:
      out = suffixes.attend(q, (k, v), kv_cache.read(trunks, ref), rows, scale, window, softcap)
    groups = lambda x: x.reshape(G, B, *x.shape[1:])
    return out, kv_cache.write_rows(cache, ref, groups(k), groups(v), place)

  x = _by_rows(settings, model.embed(weights, flat))
  return _place_cache(settings, 'prompt', model.run_layers(weights, x, positions, attend, cache)[1])


def _causal(settings, q, k, v, scale, window, softcap):
  """`prefill.causal` by the best means; a library's kernel runs on each device's own rows and heads."""
  mesh = settings.mesh
  device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
  capability = getattr(device, 'compute_capability', None)
  by = prefill.means(device.platform, capability, str(q.dtype), q.shape[-1], v.shape[-1], softcap)
  run = functools.partial(prefill.causal, scale=scale, window=window, softcap=softcap, by=by)
  if mesh is None or by == 'blockwise':
    return run(q, k, v)
  (H, M), ways = (q.shape[2], k.shape[2]), dict(mesh.shape)['tensor']
  # One key head may serve the query heads of every device; else a device has its query heads' own keys, or all.
  keys = 'tensor' if M % ways == 0 else None
  queries = 'tensor' if keys or (M == 1 and H % ways == 0) else None
  queries, keys = (PartitionSpec(sharding.DATA_AXES, None, heads, None) for heads in (queries, keys))
  return jax.shard_map(run, mesh=mesh, in_specs=(queries, keys, keys), out_specs=queries, check_vma=False)(q, k, v)


# --- steps


def _step(
    settings: Settings, sizes: Sizes, weights: dict, task_keys, prompts: Prompts, queue: Queue, state: State
) -> State:
  Q = queue.visit.shape[1]
  t = state.clock - state.began
  logits, ring = _logits(settings, sizes, weights, prompts, t, state)

  flat = lambda values: _of(values, state.task).reshape(-1)
  guided = [
      jnp.where(t == 0, _of(guide.start, state.task), held).reshape(-1)
      for guide, held in zip(queue.guides, state.guided)
  ]
  allowed = None
  for guide, held in zip(queue.guides, guided):
    if guide.need is not None:
      ok = guides.allowed(guide, held, flat(queue.limit) - t.reshape(-1))
      allowed = ok if allowed is None else allowed & ok
  if allowed is not None:
    # A row without a task has run out of tokens: it would draw one that no table has, and leave NaN in its ring.
    allowed |= (state.task == Q).reshape(-1, 1)
  token, logp, kept = decoding.sample_kept(
      logits, keys.uniform(flat(task_keys), t.reshape(-1)), flat(queue.temperature), flat(queue.top_p),
      flat(queue.top_k), flat(queue.min_p), settings.kept, allowed,
  )
  followed = [guides.follow(guide, held, token) for guide, held in zip(queue.guides, guided)]
  token = token.reshape(t.shape)

  # A row without a task has an index behind the end, so its writes are dropped.
  store = jax.vmap(lambda out, task, t, value: out.at[task, t].set(value, mode='drop'))
  record = lambda out, value: _by_rows(settings, store(out, state.task, t, value.reshape(*t.shape, *out.shape[3:])))
  count = jax.vmap(lambda out, task, value: out.at[task].set(value, mode='drop'))
  ends = t + 1 >= _of(queue.limit, state.task)
  for eos in settings.eos_ids:
    ends |= token == eos
  for _, stops in followed:
    ends |= stops.reshape(t.shape)
  ends &= state.task < Q
  state = state._replace(
      clock=state.clock + 1,
      done=state.done + ends.sum(axis=1),
      task=jnp.where(ends, Q, state.task),
      slot=jnp.where(ends, sizes.slots, state.slot),
      token=token,
      ring=ring,
      tokens=record(state.tokens, token),
      logp=record(state.logp, logp),
      length=_by_rows(settings, count(state.length, state.task, t + 1)),
      guided=tuple(held.reshape(t.shape) for held, _ in followed),
      kept=jax.tree.map(record, state.kept, kept),
  )
  return _admit(sizes, prompts, state)


def _logits(settings, sizes, weights, prompts, t, state):
  """float32[G * R, V] after every row has fed its token, and the ring with it."""
  model, T, P, W = settings.decoder, settings.max_new_tokens, prompts.tokens.shape[2], sizes.width
  held = _of(prompts.length, state.prompt) - 1  # [G, S]: each slot's prompt without its last token
  before = jnp.zeros_like(held)  # [G, S]: tokens of its trunk
  if sizes.trunk_slots:
    before = _of(prompts.trunks.length, _of(prompts.trunk, state.prompt))
  positions = (_of(before + held, state.slot) + t).reshape(-1)
  seating = shared.seats(state.slot, sizes.slots, W)
  index, age = jnp.arange(P)[None, None, :], ((state.clock - jnp.arange(T)) % T)[None, None, :]
  seated = shared.move(positions, seating.row).reshape(-1, W, 1)
  in_prompt = jnp.broadcast_to(index < held.reshape(-1, 1, 1), (held.size, W, P))
  since_start = age <= t.reshape(-1, 1, 1)
  trunks = slots.trunk_part(sizes, prompts, positions, state) if sizes.trunk_slots else None
  held_slots = int8.kept(state.slots, state.clock)  # a run of steps fills none

  def attend(ref, q, k, v, ring):
    ring = kv_cache.write(ring, ref, k, v, state.clock % T)
    window, masks = ref.config.window, (in_prompt, since_start)
    if window is not None:
      masks = in_prompt & (seated - before.reshape(-1, 1, 1) - index < window), since_start & (age < window)
    cached = kv_cache.read(held_slots, ref), kv_cache.read(ring, ref)
    scale, softcap = model.config.score_scale(ref.config), model.config.attn_softcap
    return shared.attend(q, *cached, seating, *masks, scale, softcap, trunks and trunks(ref)), ring

  x = _by_rows(settings, model.embed(weights, state.token.reshape(-1, 1)))
  x, ring = model.run_layers(weights, x, positions[:, None], attend, state.ring)
  return model.unembed(weights, x)[:, 0], _place_cache(settings, 'rows', ring)


def _admit(sizes: Sizes, prompts: Prompts, state: State) -> State:
  """Free rows take waiting tasks, the lowest row and the earliest prompt first; prompts without a task leave."""
  U = prompts.length.shape[1]
  index = jnp.arange(sizes.slots, dtype=jnp.int32)[None, None, :]
  waiting = _waiting(prompts, state)
  seated = (state.slot[:, :, None] == index).sum(axis=1)
  offered = jnp.minimum(waiting, sizes.width - seated)
  earlier = state.prompt[:, None, :] < state.prompt[:, :, None]
  if sizes.trunk_slots:
    at = slots.trunk_slots(sizes, prompts, state)
    same = at[:, None, :] == at[:, :, None]
    used = (same * (seated[:, None, :] + earlier * offered[:, None, :])).sum(axis=2)
    offered = jnp.clip(sizes.trunk_width - used, 0, offered)
  before = (earlier * offered[:, None, :]).sum(axis=2)  # tasks that are offered by earlier prompts
  free = state.slot == sizes.slots
  rank = (jnp.cumsum(free, axis=1) - 1)[:, :, None] - before[:, None, :]
  gets = free[:, :, None] & (rank >= 0) & (rank < offered[:, None, :])  # [G, R, S], at most one slot a row
  takes, taken = gets.any(axis=2), gets.sum(axis=1)
  of_slot = lambda values: (gets * values).sum(axis=2, dtype=jnp.int32)
  prompt = of_slot(state.prompt[:, None, :])
  length = _of(prompts.length, prompt)
  last = jax.vmap(lambda tokens, prompt, length: tokens[prompt, length - 1])(prompts.tokens, prompt, length)
  stays, trunks = waiting + seated > 0, state.trunks
  if sizes.trunk_slots:
    to_come = state.head[:, None] < _of(prompts.trunks.end, trunks.trunk)
    used = ((at[:, :, None] == jnp.arange(sizes.trunk_slots)[None, None, :]) & stays[:, :, None]).any(axis=1)
    trunks = trunks._replace(trunk=jnp.where(to_come | used, trunks.trunk, prompts.trunks.length.shape[1]))
  return state._replace(
      task=jnp.where(takes, of_slot(state.taken[:, None, :] + rank), state.task),
      slot=jnp.where(takes, of_slot(index), state.slot),
      token=jnp.where(takes, last, state.token),
      began=jnp.where(takes, state.clock, state.began),
      taken=state.taken + taken,
      prompt=jnp.where(stays, state.prompt, U),
      trunks=trunks,
  )


def _waiting(prompts: Prompts, state: State):
  """[G, S]: tasks of each slot's prompt that no row has taken; below what was taken where tasks are withdrawn: none."""
  end = _of(prompts.first, state.prompt) + _of(prompts.number, state.prompt)
  return jnp.where(state.prompt < prompts.length.shape[1], jnp.maximum(end - state.taken, 0), 0)
