"""Slots on the device: which are free, what comes into them, which trunk is where and who sits there (`loop`)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from spct_jax.models import int8, kv_cache
from spct_jax.sampling import shared


class Trunks(NamedTuple):
  """What prompts share, by group: `tokens[G, V, Pt]`, `length[G, V]`; `count[G]` are real.

  The prompts that continue trunk v stand side by side, before `end[v]`.
  """

  count: jax.Array
  tokens: jax.Array
  length: jax.Array
  end: jax.Array


class Loaded(NamedTuple):
  """The trunk slots: `head[G]` is the next trunk to load, `trunk[G, Z]` what each slot holds (V = free)."""

  head: jax.Array
  trunk: jax.Array
  cache: dict  # over all G * Z slots, Pt positions


def fits(free, waiting, batch):
  """Whether a group has free slots [G, S] for the next `batch` of those that wait [G], or for all of them."""
  return ((waiting > 0) & (free.sum(axis=1) >= jnp.minimum(batch, waiting))).any()


def coming(free, head, waiting, batch):
  """The next `batch` of each group from `head[G]` on -> their places in `free[G, S]` (S: there is none), themselves."""
  G, S = free.shape
  rank = jnp.where(free, jnp.cumsum(free, axis=1) - 1, batch)
  index = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32)[None, :], (G, S))
  place = jax.vmap(lambda rank, index: jnp.full(batch, S, jnp.int32).at[rank].set(index, mode='drop'))(rank, index)
  count = jnp.arange(batch, dtype=jnp.int32)[None, :]
  return jnp.where(count < waiting[:, None], place, S), head[:, None] + count


def put(out, place, value):
  """out[G, N] with value[G, m] at place[G, m], group by group; behind the end it is dropped."""
  return jax.vmap(lambda out, place, value: out.at[place].set(value, mode='drop'))(out, place, value)


def slot_of(loaded: Loaded, trunk):
  """The trunk slots [G, m] that hold `trunk[G, m]`; slot 0 where none does."""
  return (loaded.trunk[:, None, :] == trunk[:, :, None]).argmax(axis=2).astype(jnp.int32)


def trunk_part(sizes, prompts, positions, state):
  """Of a layer, the part of the attention to trunks; `positions[G * R]` are those of the queries."""
  at = trunk_slots(sizes, prompts, state)
  row = jnp.where(state.slot < sizes.slots, of(at, state.slot), sizes.trunk_slots)
  seating = shared.seats(row, sizes.trunk_slots, sizes.trunk_width)
  index = jnp.arange(prompts.trunks.tokens.shape[2])[None, None, :]
  seated = shared.move(positions, seating.row).reshape(-1, sizes.trunk_width, 1)
  held = of(prompts.trunks.length, state.trunks.trunk).reshape(-1, 1, 1)
  cache = int8.kept(state.trunks.cache, state.clock)

  def of_layer(ref):
    mask = jnp.broadcast_to(index < held, (*seated.shape[:2], index.size))
    if ref.config.window is not None:
      mask &= seated - index < ref.config.window
    return shared.Trunks(*kv_cache.read(cache, ref), seating, mask)

  return of_layer


def trunk_slots(sizes, prompts, state):
  """[G, S]: where the trunk of each slot's prompt is; Z for a free slot."""
  at = slot_of(state.trunks, of(prompts.trunk, state.prompt))
  return jnp.where(state.prompt < prompts.length.shape[1], at, sizes.trunk_slots)


def of(values, index):
  """values[G, N, ...] at index[G, m], group by group; behind the end, the last."""
  return jax.vmap(lambda values, index: values[jnp.minimum(index, values.shape[0] - 1)])(values, index)
