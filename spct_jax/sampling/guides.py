"""Automata over token ids beside the decode loop (`types.Guide`): which tokens a row may draw, where its task ends.

Tables are values, padded by whoever made them: other strings in a table of the same size compile nothing. What a
guide does not have (`need`) and an engine without guides are not compiled in.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spct_jax import types


class Guide(NamedTuple):
  """On the devices: `class_of[V]` of the model, `next[S, C]`, `stops[S]`, `need[S]` or None; `start[G, Q]`."""

  class_of: jax.Array
  next: jax.Array
  stops: jax.Array
  need: jax.Array | None
  start: jax.Array


def tables(guides: tuple[types.Guide, ...], V: int) -> tuple[dict, ...]:
  """The host's arrays but `start`; ids that the tokenizer lacks are of class 0, which has no text."""
  return tuple(
      {
          'class_of': np.pad(guide.class_of, (0, V - len(guide.class_of))).astype(np.int32),
          'next': guide.next, 'stops': guide.stops, 'need': guide.need,
      }
      for guide in guides
  )


def check(guides: tuple[types.Guide, ...], real: np.ndarray, limits: np.ndarray, V: int) -> None:
  """ValueError for tables of another model and for limits under which a line could not be completed."""
  for guide in guides:
    if len(guide.class_of) > V:
      raise ValueError(
          f'guides: got tables of a tokenizer with {len(guide.class_of)} tokens; the head of the model has {V}. Is it '
          'the right tokenizer?'
      )
    if guide.start is None or len(guide.start) != len(real):
      raise ValueError(f'guides: each needs a start for each of the {len(real)} tasks')
    if guide.need is None:
      continue
    need = guide.need[guide.start]
    short = np.flatnonzero(real & (need > limits))
    if short.size:
      raise ValueError(
          f'limits: got {limits[short[0]]} new tokens at {short[0]} ({short.size} such), where what a guide asks for '
          f'takes {need[short[0]]}; raise max_new_tokens'
      )


def allowed(guide: Guide, state: jax.Array, left: jax.Array) -> jax.Array:
  """bool[R, V]: the tokens of each row that leave enough of the `left[R]` tokens for the rest."""
  ok_RC = guide.need[guide.next[state].astype(jnp.int32)] < left[:, None]
  return ok_RC[:, guide.class_of]


def follow(guide: Guide, state: jax.Array, token: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(state after the token, whether the task ends there)."""
  state = guide.next[state, guide.class_of[token]].astype(jnp.int32)
  return state, guide.stops[state]


def stopped(guides: tuple[types.Guide, ...], tokens: np.ndarray, length: np.ndarray) -> np.ndarray:
  """bool[Q]: which tasks' last token is a stop, followed on the host; tokens int[Q, T]."""
  out = np.zeros(len(tokens), bool)
  for guide in guides:
    class_of = np.pad(guide.class_of, (0, max(0, int(tokens.max(initial=0)) + 1 - len(guide.class_of))))
    state = guide.start.astype(np.int64)
    for t in range(int(length.max(initial=0))):
      state = np.where(t < length, guide.next[state, class_of[tokens[:, t]]], state)
    out |= guide.stops[state] & (length > 0)
  return out
