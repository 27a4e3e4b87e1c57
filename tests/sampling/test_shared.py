"""Attention in two parts, seats and rows, against one float64 softmax over all keys of a row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spct_jax.sampling import shared

M, g, hk, hv, P, T = 2, 3, 8, 5, 7, 4


def softmax_over_all(q, keys, values, seen, scale, softcap):
  """q[H, hk], keys[M, S, hk], values[M, S, hv], seen[S] -> [H, hv], float64."""
  out = []
  for h, query in enumerate(np.asarray(q, np.float64)):
    scores = np.asarray(keys[h // g], np.float64) @ query * scale
    scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
    weights = np.where(seen, np.exp(scores - scores[seen].max()), 0)
    out.append(weights / weights.sum() @ np.asarray(values[h // g], np.float64))
  return np.stack(out)


def draw(slots, rows, seed=0, prompt_scale=1.0, own_scale=1.0):
  normal = np.random.default_rng(seed).normal
  q = normal(size=(rows, 1, M * g, hk))
  prompt = normal(size=(slots, M, P, hk)) * prompt_scale, normal(size=(slots, M, P, hv))
  own = normal(size=(rows, M, T, hk)) * own_scale, normal(size=(rows, M, T, hv))
  return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (q, prompt, own))


@jax.jit(static_argnames=('groups', 'slots', 'width', 'scale', 'softcap'))
def run(q, prompt, own, slot, held, since, groups, slots, width, scale, softcap):
  seating = shared.seats(slot.reshape(groups, -1), slots, width)
  in_prompt = jnp.broadcast_to(jnp.arange(P)[None, None, :] < held[:, None, None], (groups * slots, width, P))
  since_start = jnp.arange(T)[None, None, :] <= since[:, None, None]
  return shared.attend(q, prompt, own, seating, in_prompt, since_start, scale, softcap)


# Seen to fail when the merge leaves out the largest score (`top = 0`: overflow, where scores are large) or takes the
# weight of the other part, when a seat is read one further on, and when slots are numbered over all groups.
@pytest.mark.parametrize('prompt_scale, own_scale', [(1, 1), (60, 1), (1, 60)])
@pytest.mark.parametrize('scale, softcap', [(hk**-0.5, None), (0.7, 5.0)])
def test_two_parts_are_one_softmax(prompt_scale, own_scale, scale, softcap):
  groups, slots, width = 2, 3, 3
  slot = np.array([2, 0, 2, 1, 3, 2, 0, 1, 1, 3, 0, 1])  # within the group; 3 = no slot; slots 2 and 1 are full
  held = np.array([7, 0, 3, 1, 5, 0])
  since = np.arange(12) % T
  q, prompt, own = draw(groups * slots, 12, prompt_scale=prompt_scale, own_scale=own_scale)
  arrays = map(jnp.asarray, (slot, held, since))
  got = np.asarray(run(q, prompt, own, *arrays, groups, slots, width, scale, softcap))
  for row in np.flatnonzero(slot < slots):
    where = row // 6 * slots + slot[row]
    both = [np.concatenate([np.asarray(a[where]), np.asarray(b[row])], axis=1) for a, b in zip(prompt, own)]
    seen = np.concatenate([np.arange(P) < held[where], np.arange(T) <= since[row]])
    want = softmax_over_all(q[row, 0], *both, seen, scale, softcap)
    np.testing.assert_allclose(got[row, 0], want, atol=2e-5 if prompt_scale == own_scale else 2e-4)
  assert np.isfinite(got).all()


def test_rows_of_a_slot_sit_side_by_side():
  seating = shared.seats(jnp.array([[1, 0, 1, 2, 1, 0], [0, 0, 0, 2, 2, 2]]), 2, 3)
  assert seating.seat[:, :3].tolist() == [[3, 0, 4], [0, 1, 2]] and seating.seat[0, 4:].tolist() == [5, 1]
  assert seating.row[0].tolist() == [1, 5, 0, 0, 2, 4] and seating.row[1, :3].tolist() == [0, 1, 2]
