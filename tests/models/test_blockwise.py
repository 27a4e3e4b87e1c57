"""Causal attention in blocks against the whole array of scores."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spct_jax.models import blockwise


def drawn(T, B=2, H=4, M=2, hk=8, hv=6, seed=0):
  normal = np.random.default_rng(seed).normal
  return tuple(jnp.asarray(normal(size=(B, T, n, d)), jnp.float32) for n, d in ((H, hk), (M, hk), (M, hv)))


def whole(q, k, v, scale, window, softcap):
  """float64, one array of all scores."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  k, v = (np.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
  scores = np.einsum('bqhd,bkhd->bhqk', q, k) * scale
  scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
  distance = np.arange(q.shape[1])[:, None] - np.arange(q.shape[1])
  seen = (distance >= 0) & (distance < (window or q.shape[1]))
  weights = np.where(seen, np.exp(scores - scores.max(axis=-1, keepdims=True)), 0)
  return np.einsum('bhqk,bkhd->bqhd', weights / weights.sum(axis=-1, keepdims=True), v)


# Seen to fail when the window is one too wide or too narrow, when a block too few or too late is visited, when the
# padding behind T is seen, and when mass or value are not rescaled as the largest score grows.
@pytest.mark.parametrize('T', [1, 8, 21])
@pytest.mark.parametrize('window, softcap', [(None, None), (1, None), (3, 2.0), (8, None), (9, None), (30, 2.0)])
def test_blocks_are_one_softmax(T, window, softcap):
  q, k, v = drawn(T)
  attend = jax.jit(functools.partial(blockwise.causal, scale=0.5, window=window, softcap=softcap, block=8))
  np.testing.assert_allclose(attend(q, 4 * k, v), whole(q, 4 * k, v, 0.5, window, softcap), atol=1e-5)


def test_no_array_of_all_scores_exists():
  T, H = 1024, 8
  q, k, v = (jax.ShapeDtypeStruct((1, T, n, 16), jnp.float32) for n in (H, 2, 2))
  program = jax.jit(lambda q, k, v: blockwise.causal(q, k, v, 0.25)).lower(q, k, v).compile()
  assert program.memory_analysis().temp_size_in_bytes < H * T * T * 4 / 8
