"""Attention of many rows over few prompt caches, and over their own: parts and their merge.

Rows of one prompt sit at the seats of its slot, W of them, so that what they read of the prompt is one
product of matrices a slot and head, and the prompt's keys and values are read once for all of them:

    prompt part   queries [Z, M, W, g, d] at the seats of Z slots, keys [Z, M, P, d]
    own part      queries [R, M, 1, g, d] of R rows,               keys [R, M, T, d]

Where prompts share what they begin with, that trunk is one more part of the first kind, with slots and seats of
its own: there sit the rows of all prompts that continue it.

Each part gives, per query, its largest score t, the mass l = sum exp(s - t) and the value
a = sum exp(s - t) v, all float32. With t* = max t_i and c_i = exp(t_i - t*) the whole attention is

    (c1 a1 + c2 a2 + ...) / (c1 l1 + c2 l2 + ...)

A part in which a query sees nothing has the least finite score and so no weight, as long as the other part
sees something: a row always sees the token that it feeds. Only queries and results change places between
rows and seats; a cache never does.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from spct_jax.models import attention
from spct_jax.models.int8 import Int8, plain

_LEAST = jnp.finfo(jnp.float32).min  # not -inf: where nothing is seen, -inf - -inf would be NaN


class Part(NamedTuple):
  """One part of a softmax: `top` and `mass` [..., M, W, g], `value` [..., M, W, g, e]; float32."""

  top: jax.Array
  mass: jax.Array
  value: jax.Array


class Trunks(NamedTuple):
  """The caches [Z, M, P, d] and [Z, M, P, e] that several prompts continue, who sits there and what he sees."""

  k: jax.Array
  v: jax.Array
  seating: 'Seats'
  mask: jax.Array  # bool[Z, W, P]


class Seats(NamedTuple):
  """Who sits where, by group: `row[G, S * W]` of each seat (any row if it is empty), `seat[G, R]` of each row."""

  row: jax.Array
  seat: jax.Array


def seats(slot: Int[Array, 'G R'], slots: int, width: int) -> Seats:
  """Seats the rows of each slot side by side. `slot` is `slots` for a row that sits nowhere; it gets any seat.

  The caller sees to it that no slot has more than `width` rows.
  """
  R = slot.shape[1]
  earlier = (jnp.arange(R)[None, :] < jnp.arange(R)[:, None])[None]
  rank = ((slot[:, :, None] == slot[:, None, :]) & earlier).sum(axis=2)
  seat = jnp.where(slot < slots, slot * width + rank, slots * width)
  rows = jnp.broadcast_to(jnp.arange(R)[None, :], slot.shape)
  row = jax.vmap(lambda seat, rows: jnp.zeros(slots * width, jnp.int32).at[seat].set(rows, mode='drop'))(seat, rows)
  return Seats(row, jnp.minimum(seat, slots * width - 1))


def move(x: Shaped[Array, 'N *rest'], index: Int[Array, 'G m']) -> Shaped[Array, 'G*m *rest']:
  """Rows to seats or seats to rows: `x` holds N / G of them a group, `index` says which to take, in its group."""
  G = index.shape[0]
  parts = x.reshape(G, -1, *x.shape[1:])
  return jax.vmap(lambda part, index: part[index])(parts, index).reshape(index.size, *x.shape[1:])


def part(
    q: Float[Array, 'B M W g d'],
    k: Float[Array, 'B M S d'] | Int8,
    v: Float[Array, 'B M S e'] | Int8,
    mask: Bool[Array, 'B W S'],
    scale: float,
    softcap: int | float | None,
) -> Part:
  """Of `attention.capped(scale q k^T, softcap)` where `mask` allows; keys and values may be in eight bits."""
  scores = jnp.einsum('BMWgd,BMSd->BMWgS', q, plain(k).astype(q.dtype), preferred_element_type=jnp.float32)
  scores = _stepped(scores, k)
  scores = jnp.where(mask[:, None, :, None, :], attention.capped(scores * scale, softcap), _LEAST)
  top = scores.max(axis=-1)
  weights = jnp.exp(scores - top[..., None])
  value = jnp.einsum(
      'BMWgS,BMSe->BMWge', _stepped(weights, v).astype(q.dtype), plain(v).astype(q.dtype),
      preferred_element_type=jnp.float32,
  )
  return Part(top, weights.sum(axis=-1), value)


def _stepped(x: Float[Array, 'B M W g S'], cache) -> Float[Array, 'B M W g S']:
  return x * cache.step[:, :, None, None, :] if isinstance(cache, Int8) else x


def merge(*parts: Part) -> Float[Array, 'B M W g e']:
  """The attention over the keys of all parts, float32."""
  top = functools.reduce(jnp.maximum, [part.top for part in parts])
  weights = [jnp.exp(part.top - top) for part in parts]
  mass = sum(weight * part.mass for weight, part in zip(weights, parts))
  return sum(weight[..., None] * part.value for weight, part in zip(weights, parts)) / mass[..., None]


def attend(
    q: Float[Array, 'R 1 H d'],
    prompt: tuple[Float[Array, 'Z M P d'] | Int8, Float[Array, 'Z M P e'] | Int8],
    own: tuple[Float[Array, 'R M T d'] | Int8, Float[Array, 'R M T e'] | Int8],
    seating: Seats,
    prompt_mask: Bool[Array, 'Z W P'],
    own_mask: Bool[Array, 'R 1 T'],
    scale: float,
    softcap: int | float | None,
    trunks: Trunks | None = None,
) -> Float[Array, 'R 1 H e']:
  """One query a row over its prompt and its own tokens. R and Z count all groups, one group after the other."""
  (R, _, H, d), M, e = q.shape, prompt[0].shape[1], prompt[1].shape[-1]
  q = q.reshape(R, M, H // M, d)

  def seated(k, v, seating, mask):
    Z, W, _ = mask.shape
    at_seats = move(q, seating.row).reshape(Z, W, M, H // M, d).swapaxes(1, 2)
    found = part(at_seats, k, v, mask, scale, softcap)
    # [Z, M, W, ...] at the seats -> [R, M, 1, ...] of the rows
    back = lambda x: move(x.swapaxes(1, 2).reshape(Z * W, M, *x.shape[3:]), seating.seat)[:, :, None]
    return Part(*map(back, found))

  parts = [seated(*prompt, seating, prompt_mask), part(q[:, :, None], *own, own_mask, scale, softcap)]
  if trunks is not None:
    parts.append(seated(*trunks))
  return merge(*parts).reshape(R, 1, H, e).astype(q.dtype)
