"""The engine's program on the device: one loop that fills prompt slots, decodes, and never leaves the device.

A *slot* holds the cache of one prompt while its tasks run, and seats W rows at a time; a *row* runs one
task at a time and attends to the slot of its prompt. Rows and slots come in G groups, one for each part of
the mesh that holds rows of its own, and a row only meets slots of its own group. The loop does one of two
things, whichever the state asks for:

    fill    if as many slots are free as prompts go through the model at once (or as are left): prefill them
    step    1. every row feeds one token and stores its key and value at ring position clock % T, all rows alike
            2. it attends to its slot's prompt[:-1] and to its own ring entries since it began (`shared`)
            3. it draws a token; on an end-of-sequence id, or after its limit, its task is done
            4. the clock ticks

After either one, free rows take waiting tasks: those of the earliest prompt first, as far as its slot has a
seat. A slot whose prompt has no task left is free. So a prompt is computed once, kept once and read
once a step, and rows go on with the next prompts while the last samples of the earlier ones end.

A row that starts feeds the *last* token of its prompt, so no logits of the prefill are ever needed, and
a prompt of one token leaves its slot empty. With T = 4, at clock 5, for a row that began at clock 4:

    ring position     0   1   2   3
    written at clock  4   5   2   3      age = (clock - position) mod T =  1 0 3 2
    seen              1   1   .   .      age <= clock - began

A row lives for at most T steps, so the ring never overwrites an entry that its row still needs.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from spct_jax import sharding
from spct_jax.models import blockwise, kv_cache, unrolled
from spct_jax.models.transformer import Transformer
from spct_jax.sampling import decoding, keys, shared


@dataclasses.dataclass(frozen=True)
class Settings:
  """What is compiled in; hashable. `eos_ids` may be empty; `cache_rules` are unused without a mesh.

  `kept` is the cap C of the recorded sets (`decoding.sample_kept`); 0 = none are recorded.
  """

  model: Transformer
  mesh: jax.sharding.Mesh | None
  cache_rules: tuple
  max_new_tokens: int
  eos_ids: tuple[int, ...]
  kept: int

  @property
  def groups(self) -> int:
    return 1 if self.mesh is None else sharding.data_ways(self.mesh)

  @property
  def decoder(self) -> Transformer:
    """The model as the loop runs it."""
    return unrolled.model(self.model)


class Sizes(NamedTuple):
  """Of one group: rows R, slots S, seats of a slot W, prompts that are prefilled at once B <= S."""

  rows: int
  slots: int
  width: int
  batch: int


class Prompts(NamedTuple):
  """Prompts by group, those without a task last: `tokens[G, U, P]`, the rest [G, U]; `count[G]` have tasks.

  The tasks of prompt u are `number[u]` of the queue from `first[u]` on.
  """

  count: jax.Array
  tokens: jax.Array
  length: jax.Array
  first: jax.Array
  number: jax.Array


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
  kept: decoding.Kept | tuple[()]  # [G, Q, T, C] and [G, Q, T]; () = not recorded


def empty_cache(settings: Settings, name: str, batch: int, length: int) -> dict:
  """Zeros of the model's cache, placed by the rules; `name` is 'prompt' or 'rows', the root of the paths."""
  return _place_cache(settings, name, kv_cache.init(settings.decoder.config, batch, length))


def cache_shardings(settings: Settings, name: str, batch: int, length: int) -> dict | None:
  """Where `empty_cache` lies; None without a mesh."""
  if settings.mesh is None:
    return None
  shapes = jax.eval_shape(lambda: kv_cache.init(settings.decoder.config, batch, length))
  return sharding.tree_shardings({name: shapes}, settings.cache_rules, settings.mesh)[name]


def _place_cache(settings, name, cache):
  if settings.mesh is None:
    return cache
  where = sharding.tree_shardings({name: cache}, settings.cache_rules, settings.mesh)[name]
  return jax.lax.with_sharding_constraint(cache, where)


def _by_rows(settings, x):
  """First axis (groups, or rows or slots of all groups) over the data axes of the mesh."""
  if settings.mesh is None:
    return x
  return jax.lax.with_sharding_constraint(x, NamedSharding(settings.mesh, PartitionSpec(sharding.DATA_AXES)))


@functools.partial(jax.jit, static_argnames=('settings', 'sizes'))
def start(settings: Settings, sizes: Sizes, params: dict, prompts: Prompts, queue: Queue) -> tuple[dict, State]:
  """The weights as `advance` wants them (`unrolled`: of scanned layers a copy), and the state before the first step."""
  (G, Q), (U, P), T = queue.visit.shape, prompts.tokens.shape[1:], settings.max_new_tokens
  zeros = lambda *shape: _by_rows(settings, jnp.zeros((G, *shape), jnp.int32))
  rows = zeros(sizes.rows)
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
      kept=decoding.Kept(
          ids=zeros(Q, T, settings.kept) - 1, logp=zeros(Q, T).astype(jnp.float32), count=zeros(Q, T)
      ) if settings.kept else (),
  )


@functools.partial(jax.jit, static_argnames=('settings', 'sizes'), donate_argnames='state')
def advance(
    settings: Settings, sizes: Sizes, weights: dict, root: jax.Array, prompts: Prompts, queue: Queue, state: State,
    steps: jax.Array,
) -> tuple[State, jax.Array]:
  """At most `steps` steps; returns the state and how many tasks are done. Cutting a run in parts changes nothing.

  `weights` are those of `start`, `root` is the data of `keys.root_key`: plain numbers, which every process may pass.
  """
  root = jax.random.wrap_key_data(root, impl='threefry2x32')
  task_keys = jax.vmap(keys.fold_tasks, (None, 0, 0, 0))(root, queue.uid, queue.visit, queue.sample)
  until, total = state.clock + steps, queue.count.sum()

  def unfinished(state):
    return (state.clock < until) & (state.done.sum() < total)

  def fill_then_decode(state):
    # Two loops in place of a choice: a branch inside a loop would copy what it carries.
    state = jax.lax.while_loop(
        lambda state: _can_fill(sizes, prompts, state),
        lambda state: _fill(settings, sizes, weights, prompts, state), state,
    )
    return jax.lax.while_loop(
        lambda state: unfinished(state) & ~_can_fill(sizes, prompts, state),
        lambda state: _step(settings, sizes, weights, task_keys, prompts, queue, state), state,
    )

  state = jax.lax.while_loop(unfinished, fill_then_decode, state)
  return state, state.done.sum()


# --- prompts


def _can_fill(sizes: Sizes, prompts: Prompts, state: State):
  """Whether a group has prompts to come and free slots for the next B of them."""
  waiting = prompts.count - state.head
  free = (state.prompt == prompts.length.shape[1]).sum(axis=1)
  return ((waiting > 0) & (free >= jnp.minimum(sizes.batch, waiting))).any()


def _fill(settings: Settings, sizes: Sizes, weights: dict, prompts: Prompts, state: State) -> State:
  """The next prompts of every group into its free slots, at most B."""
  (G, U), B, S = prompts.length.shape, sizes.batch, sizes.slots
  free = state.prompt == U
  rank = jnp.where(free, jnp.cumsum(free, axis=1) - 1, B)
  index = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32)[None, :], (G, S))
  place = jax.vmap(lambda rank, index: jnp.full(B, S, jnp.int32).at[rank].set(index, mode='drop'))(rank, index)
  new = state.head[:, None] + jnp.arange(B, dtype=jnp.int32)[None, :]
  real = (new < prompts.count[:, None]) & (place < S)
  place, new = jnp.where(real, place, S), jnp.minimum(new, U - 1)

  cache = _prefill(settings, weights, _of(prompts.tokens, new), place, state.slots)
  put = jax.vmap(lambda out, place, value: out.at[place].set(value, mode='drop'))
  state = state._replace(
      fills=state.fills + 1,
      head=state.head + real.sum(axis=1),
      prompt=put(state.prompt, place, new),
      taken=put(state.taken, place, _of(prompts.first, new)),
      slots=cache,
  )
  return _admit(sizes, prompts, state)


def _prefill(settings, weights, tokens, place, cache):
  """Keys and values of tokens[G, B, P] in the slots `place`. What padding and a prompt's last token write is unseen."""
  model, (G, B, P) = settings.decoder, tokens.shape
  flat = _by_rows(settings, tokens.reshape(G * B, P))
  positions = jnp.broadcast_to(jnp.arange(P)[None, :], flat.shape)

  def attend(ref, q, k, v, cache):
    scale, softcap = model.config.score_scale(ref.config), model.config.attn_softcap
    out = blockwise.causal(q, k, v, scale, ref.config.window, softcap)
    groups = lambda x: x.reshape(G, B, *x.shape[1:])
    return out, kv_cache.write_rows(cache, ref, groups(k), groups(v), place)

  x = _by_rows(settings, model.embed(weights, flat))
  return _place_cache(settings, 'prompt', model.run_layers(weights, x, positions, attend, cache)[1])


# --- steps


def _step(
    settings: Settings, sizes: Sizes, weights: dict, task_keys, prompts: Prompts, queue: Queue, state: State
) -> State:
  Q = queue.visit.shape[1]
  t = state.clock - state.began
  logits, ring = _logits(settings, sizes, weights, prompts, t, state)

  flat = lambda values: _of(values, state.task).reshape(-1)
  given = (
      logits, keys.uniform(flat(task_keys), t.reshape(-1)), flat(queue.temperature), flat(queue.top_p),
      flat(queue.top_k), flat(queue.min_p),
  )
  if settings.kept:
    token, logp, kept = decoding.sample_kept(*given, settings.kept)
  else:
    (token, logp), kept = decoding.sample(*given), ()
  token, logp = token.reshape(t.shape), logp.reshape(t.shape)

  # A row without a task has an index behind the end, so its writes are dropped.
  store = jax.vmap(lambda out, task, t, value: out.at[task, t].set(value, mode='drop'))
  record = lambda out, value: _by_rows(settings, store(out, state.task, t, value.reshape(*t.shape, *value.shape[1:])))
  count = jax.vmap(lambda out, task, value: out.at[task].set(value, mode='drop'))
  ends = t + 1 >= _of(queue.limit, state.task)
  for eos in settings.eos_ids:
    ends |= token == eos
  ends &= state.task < Q
  state = state._replace(
      clock=state.clock + 1,
      done=state.done + ends.sum(axis=1),
      task=jnp.where(ends, Q, state.task),
      slot=jnp.where(ends, sizes.slots, state.slot),
      token=token,
      ring=ring,
      tokens=_by_rows(settings, store(state.tokens, state.task, t, token)),
      logp=_by_rows(settings, store(state.logp, state.task, t, logp)),
      length=_by_rows(settings, count(state.length, state.task, t + 1)),
      kept=jax.tree.map(record, state.kept, kept),
  )
  return _admit(sizes, prompts, state)


def _logits(settings, sizes, weights, prompts, t, state):
  """float32[G * R, V] after every row has fed its token, and the ring with it."""
  model, T, P, W = settings.decoder, settings.max_new_tokens, prompts.tokens.shape[2], sizes.width
  held = _of(prompts.length, state.prompt) - 1  # [G, S]: each slot's prompt without its last token
  positions = (_of(held, state.slot) + t).reshape(-1)
  seating = shared.seats(state.slot, sizes.slots, W)
  index, age = jnp.arange(P)[None, None, :], ((state.clock - jnp.arange(T)) % T)[None, None, :]
  seated = shared.move(positions, seating.row).reshape(-1, W, 1)
  in_prompt = jnp.broadcast_to(index < held.reshape(-1, 1, 1), (held.size, W, P))
  since_start = age <= t.reshape(-1, 1, 1)

  def attend(ref, q, k, v, ring):
    ring = kv_cache.write(ring, ref, k, v, state.clock % T)
    window, masks = ref.config.window, (in_prompt, since_start)
    if window is not None:
      masks = in_prompt & (seated - index < window), since_start & (age < window)
    cached = kv_cache.read(state.slots, ref), kv_cache.read(ring, ref)
    scale, softcap = model.config.score_scale(ref.config), model.config.attn_softcap
    return shared.attend(q, *cached, seating, *masks, scale, softcap), ring

  x = _by_rows(settings, model.embed(weights, state.token.reshape(-1, 1)))
  x, ring = model.run_layers(weights, x, positions[:, None], attend, state.ring)
  return model.unembed(weights, x)[:, 0], _place_cache(settings, 'rows', ring)


def _admit(sizes: Sizes, prompts: Prompts, state: State) -> State:
  """Free rows take waiting tasks, the lowest row and the earliest prompt first; prompts without a task leave."""
  U = prompts.length.shape[1]
  slots = jnp.arange(sizes.slots, dtype=jnp.int32)[None, None, :]
  here = state.prompt < U
  end = _of(prompts.first, state.prompt) + _of(prompts.number, state.prompt)
  waiting = jnp.where(here, end - state.taken, 0)
  seated = (state.slot[:, :, None] == slots).sum(axis=1)
  offered = jnp.minimum(waiting, sizes.width - seated)
  earlier = state.prompt[:, None, :] < state.prompt[:, :, None]
  before = (earlier * offered[:, None, :]).sum(axis=2)  # tasks that are offered by earlier prompts
  free = state.slot == sizes.slots
  rank = (jnp.cumsum(free, axis=1) - 1)[:, :, None] - before[:, None, :]
  gets = free[:, :, None] & (rank >= 0) & (rank < offered[:, None, :])  # [G, R, S], at most one slot a row
  takes, taken = gets.any(axis=2), gets.sum(axis=1)
  of_slot = lambda values: (gets * values).sum(axis=2, dtype=jnp.int32)
  prompt = of_slot(state.prompt[:, None, :])
  length = _of(prompts.length, prompt)
  last = jax.vmap(lambda tokens, prompt, length: tokens[prompt, length - 1])(prompts.tokens, prompt, length)
  return state._replace(
      task=jnp.where(takes, of_slot(state.taken[:, None, :] + rank), state.task),
      slot=jnp.where(takes, of_slot(slots), state.slot),
      token=jnp.where(takes, last, state.token),
      began=jnp.where(takes, state.clock, state.began),
      taken=state.taken + taken,
      prompt=jnp.where(waiting + seated > 0, state.prompt, U),
  )


def _of(values, index):
  """values[G, N, ...] at index[G, m], group by group; behind the end, the last."""
  return jax.vmap(lambda values, index: values[jnp.minimum(index, values.shape[0] - 1)])(values, index)
