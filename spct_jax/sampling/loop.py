"""The engine's program on the device: one prefill of all prompt slots, then one loop that never leaves it.

A *slot* is the cache of one prompt, filled once; a *row* runs one task at a time against the slot of
its prompt. Rows and slots come in G groups, one for each part of the mesh that holds rows of its own, and
a row only meets slots of its own group, so that the gather of a slot stays on its device. Each step:

    1. every row feeds one token and stores its key and value at ring position clock % T, all rows alike
    2. it attends to its slot's prompt[:-1] and to its own ring entries since it began, in one softmax
    3. it draws a token; on an end-of-sequence id, or after T tokens, its task is done
    4. free rows take the next tasks of their group's queue; the clock ticks

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
from spct_jax.models import attention, kv_cache
from spct_jax.models.transformer import Transformer
from spct_jax.sampling import decoding, keys


@dataclasses.dataclass(frozen=True)
class Settings:
  """What is compiled in; hashable. `eos_ids` may be empty; `cache_rules` are unused without a mesh."""

  model: Transformer
  mesh: jax.sharding.Mesh | None
  cache_rules: tuple
  max_new_tokens: int
  eos_ids: tuple[int, ...]

  @property
  def groups(self) -> int:
    return 1 if self.mesh is None else sharding.data_ways(self.mesh)


class Queue(NamedTuple):
  """Tasks by group, in the order they are taken: arrays [G, Q]; `count[G]` of them are real."""

  count: jax.Array
  slot: jax.Array  # within the group
  uid: jax.Array  # [G, Q, 2]
  visit: jax.Array
  sample: jax.Array
  temperature: jax.Array
  top_p: jax.Array
  top_k: jax.Array
  min_p: jax.Array


class Slots(NamedTuple):
  """Prompts by group: `tokens[G, U, P]`, `length[G, U]`, and their cache over all G * U slots."""

  tokens: jax.Array
  length: jax.Array
  cache: dict


class State(NamedTuple):
  """What a step changes. A row without a task has `task` = Q, behind the end of every array."""

  clock: jax.Array  # int32: steps since the start
  task: jax.Array  # [G, R]
  token: jax.Array  # [G, R], fed next
  began: jax.Array  # [G, R], clock of the task's first step
  head: jax.Array  # [G], next task of the queue
  ring: dict  # cache over all G * R rows, T positions
  tokens: jax.Array  # [G, Q, T]
  logp: jax.Array  # [G, Q, T]
  length: jax.Array  # [G, Q], tokens generated


def empty_cache(settings: Settings, name: str, batch: int, length: int) -> dict:
  """Zeros of the model's cache, placed by the rules; `name` is 'prompt' or 'rows', the root of the paths."""
  return _place_cache(settings, name, kv_cache.init(settings.model.config, batch, length))


def cache_shardings(settings: Settings, name: str, batch: int, length: int) -> dict | None:
  """Where `empty_cache` lies; None without a mesh."""
  if settings.mesh is None:
    return None
  shapes = jax.eval_shape(lambda: kv_cache.init(settings.model.config, batch, length))
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


@functools.partial(jax.jit, static_argnames='settings')
def prefill(settings: Settings, params: dict, tokens: jax.Array, length: jax.Array) -> Slots:
  """Keys and values of all prompts in one pass. What padding and a prompt's last token write is never seen."""
  model, (G, U, P) = settings.model, tokens.shape
  flat = _by_rows(settings, tokens.reshape(G * U, P))
  positions = jnp.broadcast_to(jnp.arange(P)[None, :], flat.shape)
  causal = attention.causal_mask(P, None, None)

  def attend(ref, q, k, v, cache):
    mask = attention.window_mask(causal, ref.config.window, positions, positions)
    scale, cap = model.config.score_scale(ref.config), model.config.attn_softcap
    out = attention.dot_product(q, k, v, jnp.broadcast_to(mask, (G * U, P, P)), scale=scale, softcap=cap)
    return out, kv_cache.write(cache, ref, k, v, 0)

  cache = empty_cache(settings, 'prompt', G * U, P)
  x = _by_rows(settings, model.embed(params, flat))
  _, cache = model.run_layers(params, x, positions, attend, cache)
  return Slots(tokens, length, _place_cache(settings, 'prompt', cache))


@functools.partial(jax.jit, static_argnames=('settings', 'rows'))
def start(settings: Settings, rows: int, slots: Slots, queue: Queue) -> State:
  """`rows` rows a group, the first tasks already on them."""
  G, Q = queue.slot.shape
  T = settings.max_new_tokens
  idle = jnp.full((G, rows), Q, jnp.int32)
  state = State(
      clock=jnp.int32(0),
      task=idle,
      token=jnp.zeros_like(idle),
      began=jnp.zeros_like(idle),
      head=jnp.zeros(G, jnp.int32),
      ring=empty_cache(settings, 'rows', G * rows, T),
      tokens=_by_rows(settings, jnp.zeros((G, Q, T), jnp.int32)),
      logp=_by_rows(settings, jnp.zeros((G, Q, T), jnp.float32)),
      length=_by_rows(settings, jnp.zeros((G, Q), jnp.int32)),
  )
  return _refill(slots, queue, state, state.task == Q)


@functools.partial(jax.jit, static_argnames='settings', donate_argnames='state')
def advance(
    settings: Settings, params: dict, root: jax.Array, slots: Slots, queue: Queue, state: State, steps: jax.Array
) -> tuple[State, jax.Array]:
  """At most `steps` steps; returns the state and how many tasks are done. Cutting a run in parts changes nothing.

  `root` is the data of `keys.root_key`: plain numbers, which every process may pass.
  """
  G, Q = queue.slot.shape
  root = jax.random.wrap_key_data(root, impl='threefry2x32')
  task_keys = jax.vmap(keys.fold_tasks, (None, 0, 0, 0))(root, queue.uid, queue.visit, queue.sample)
  until = state.clock + steps

  def unfinished(state):
    return (state.clock < until) & (state.task < Q).any()

  state = jax.lax.while_loop(
      unfinished, lambda state: _step(settings, params, task_keys, slots, queue, state), state
  )
  return state, state.head.sum() - (state.task < Q).sum()


def _step(settings: Settings, params: dict, task_keys, slots: Slots, queue: Queue, state: State) -> State:
  (_, Q), T = queue.slot.shape, settings.max_new_tokens
  t = state.clock - state.began
  logits, ring = _logits(settings, params, slots, _of_task(queue.slot, state.task), t, state)

  flat = lambda values: _of_task(values, state.task).reshape(-1)
  token, logp = decoding.sample(
      logits, keys.uniform(flat(task_keys), t.reshape(-1)), flat(queue.temperature), flat(queue.top_p),
      flat(queue.top_k), flat(queue.min_p),
  )
  token, logp = token.reshape(t.shape), logp.reshape(t.shape)

  # A row without a task has an index behind the end, so its writes are dropped.
  store = jax.vmap(lambda out, task, t, value: out.at[task, t].set(value, mode='drop'))
  count = jax.vmap(lambda out, task, value: out.at[task].set(value, mode='drop'))
  done = t + 1 >= T
  for eos in settings.eos_ids:
    done |= token == eos
  state = state._replace(
      clock=state.clock + 1,
      token=token,
      ring=ring,
      tokens=_by_rows(settings, store(state.tokens, state.task, t, token)),
      logp=_by_rows(settings, store(state.logp, state.task, t, logp)),
      length=_by_rows(settings, count(state.length, state.task, t + 1)),
  )
  return _refill(slots, queue, state, done | (state.task == Q))


def _logits(settings, params, slots, slot, t, state):
  """float32[G * R, V] after every row has fed its token, and the ring with it."""
  model, T = settings.model, settings.max_new_tokens
  U, P = slots.tokens.shape[1:]
  held = _of_task(slots.length, slot).reshape(-1) - 1  # the prompt without its last token
  since = t.reshape(-1)
  positions = held + since
  age = (state.clock - jnp.arange(T)) % T
  index = jnp.arange(P)
  # Distance of each key from the row's query, and whether it is the row's own: the prompt, then the ring.
  distance = jnp.concatenate(
      [positions[:, None] - index[None, :], jnp.broadcast_to(age[None, :], (since.size, T))], axis=1
  )
  own = jnp.concatenate([index[None, :] < held[:, None], age[None, :] <= since[:, None]], axis=1)

  def attend(ref, q, k, v, ring):
    ring = kv_cache.write(ring, ref, k, v, state.clock % T)
    mask = own if ref.config.window is None else own & (distance < ref.config.window)
    prompt = [_rows_slots(leaf, slot, U) for leaf in kv_cache.read(slots.cache, ref)]
    scale, cap = model.config.score_scale(ref.config), model.config.attn_softcap
    return _attend(q, prompt, kv_cache.read(ring, ref), mask, scale, cap), ring

  x = _by_rows(settings, model.embed(params, state.token.reshape(-1, 1)))
  x, ring = model.run_layers(params, x, positions[:, None], attend, state.ring)
  return model.unembed(params, x)[:, 0], _place_cache(settings, 'rows', ring)


def _attend(q, prompt, ring, mask, scale, softcap):
  """One query a row over two caches: scores side by side, one float32 softmax. `mask` is bool[R, P + T]."""
  R, _, H, hk = q.shape
  M, P = prompt[0].shape[1:3]
  q = q.reshape(R, M, H // M, hk)
  dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  scores = jnp.concatenate([dot('RMGd,RMSd->RMGS', q, k.astype(q.dtype)) for k, _ in (prompt, ring)], axis=-1)
  scores = attention.capped(scores * scale, softcap)
  scores = jnp.where(mask[:, None, None, :], scores, jnp.finfo(jnp.float32).min)
  weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)  # a row always sees the token it feeds
  parts = zip((weights[..., :P], weights[..., P:]), (prompt[1], ring[1]))
  out = sum(dot('RMGS,RMSd->RMGd', weight, v.astype(q.dtype)) for weight, v in parts)
  return out.reshape(R, 1, H, out.shape[-1]).astype(q.dtype)


def _refill(slots: Slots, queue: Queue, state: State, free) -> State:
  """Rows that are `free` take the next tasks of their group, the lowest row first."""
  Q = queue.slot.shape[1]
  wanted = state.head[:, None] + jnp.cumsum(free, axis=1) - free
  takes = free & (wanted < queue.count[:, None])
  task = jnp.where(takes, wanted, jnp.where(free, Q, state.task))
  slot = _of_task(queue.slot, task)
  last = jax.vmap(lambda tokens, length, slot: tokens[slot, length[slot] - 1])(slots.tokens, slots.length, slot)
  return state._replace(
      task=task,
      token=jnp.where(takes, last, state.token),
      began=jnp.where(takes, state.clock, state.began),
      head=state.head + takes.sum(axis=1),
  )


def _of_task(values, index):
  """values[G, N] at index[G, R], group by group; behind the end, the last."""
  return jax.vmap(lambda values, index: values[jnp.minimum(index, values.shape[0] - 1)])(values, index)


def _rows_slots(leaf, slot, U):
  """The slot of every row: [G * U, M, P, hd] at slot[G, R] -> [G * R, M, P, hd]."""
  groups = leaf.reshape(slot.shape[0], U, *leaf.shape[1:])
  return jax.vmap(lambda slots, slot: slots[slot])(groups, slot).reshape(slot.size, *leaf.shape[1:])
