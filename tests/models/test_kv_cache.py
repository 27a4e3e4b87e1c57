"""Decoding with a cache gives the logits of reading everything at once, also from ragged prefixes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spct_jax.models import kv_cache
from spct_jax.models.config import BlockConfig, ModelConfig
from spct_jax.models.kv_cache import LayerRef
from spct_jax.models.transformer import Transformer

CONFIG = ModelConfig(
    vocab_size=11, width=8, heads=4, kv_heads=2, head_dim=4, ffn=12,
    head=(BlockConfig(),), period=(BlockConfig(window=3), BlockConfig(rope_theta=500.0)), num_periods=2,
    remainder=(BlockConfig(),),
)
TOKENS = np.random.default_rng(0).integers(0, 11, (3, 10)).astype(np.int32)
PREFIX = np.array([5, 2, 3], np.int32)


@pytest.fixture(scope='module')
def case():
  model = Transformer(CONFIG)
  params = jax.jit(model.init)(jax.random.key(0))
  return jax.jit(model.apply), params, np.asarray(jax.jit(model.apply)({'params': params}, TOKENS)), model


def prefix(fill):
  tokens = TOKENS[:, :5].copy()
  tokens[np.arange(5)[None, :] >= PREFIX[:, None]] = fill
  return tokens


@pytest.mark.parametrize('fill', [0, 7])
def test_token_by_token_equals_all_at_once(case, fill):
  # Seen to fail: `held` left out of the write index; `length` grown by T instead of `lengths`; default positions
  # started at 0; the causal mask dropped.
  apply, params, want, model = case
  logits, cache = apply({'params': params}, prefix(fill), PREFIX, cache=model.init_cache(3, 12))
  for b in range(3):
    np.testing.assert_allclose(logits[b, : PREFIX[b]], want[b, : PREFIX[b]], atol=1e-5)
  for step in range(5):
    place = PREFIX + step
    logits, cache = apply({'params': params}, TOKENS[np.arange(3), place][:, None], cache=cache)
    np.testing.assert_allclose(logits[:, 0], want[np.arange(3), place], atol=1e-5)
  assert np.asarray(cache['length']).tolist() == [10, 7, 8]


def test_chunks_of_different_lengths(case):
  """A second right-padded chunk, one row of it empty."""
  apply, params, want, model = case
  _, cache = apply({'params': params}, prefix(3), PREFIX, cache=model.init_cache(3, 10))
  lengths = np.array([2, 0, 4], np.int32)
  chunk = np.full((3, 4), 9, np.int32)
  for b in range(3):
    chunk[b, : lengths[b]] = TOKENS[b, PREFIX[b] : PREFIX[b] + lengths[b]]
  logits, cache = apply({'params': params}, chunk, lengths, cache=cache)
  assert np.all(np.isfinite(logits))
  for b in range(3):
    np.testing.assert_allclose(logits[b, : lengths[b]], want[b, PREFIX[b] : PREFIX[b] + lengths[b]], atol=1e-5)
  logits, _ = apply({'params': params}, TOKENS[np.arange(3), PREFIX + lengths][:, None], cache=cache)
  np.testing.assert_allclose(logits[:, 0], want[np.arange(3), PREFIX + lengths], atol=1e-5)


def test_given_positions_are_remembered(case):
  """Windows are cut by position, so the cache keeps the positions of its keys."""
  # Seen to fail: the new positions not stored.
  apply, params, _, model = case
  positions = np.broadcast_to(np.arange(10, dtype=np.int32) * 2 + 3, (3, 10))
  want = np.asarray(apply({'params': params}, TOKENS, positions=positions))
  cache = model.init_cache(3, 10)
  _, cache = apply({'params': params}, TOKENS[:, :9], positions=positions[:, :9], cache=cache)
  logits, _ = apply({'params': params}, TOKENS[:, 9:], positions=positions[:, 9:], cache=cache)
  np.testing.assert_allclose(logits[:, 0], want[:, 9], atol=1e-5)


def test_overflow_is_never_silent(case):
  apply, params, _, model = case
  with pytest.raises(ValueError, match='room for 4'):
    model.apply({'params': params}, TOKENS[:, :5], cache=model.init_cache(3, 4))
  logits, _ = apply({'params': params}, TOKENS[:, :5], np.array([5, 4, 4], np.int32), cache=model.init_cache(3, 4))
  assert np.all(np.isnan(logits[0])) and np.all(np.isfinite(logits[1:, :4]))


def test_layout_follows_the_layers():
  cache = kv_cache.init(dataclasses.replace(CONFIG, remainder=()), batch=3, length=4, dtype='bfloat16')
  assert jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), cache) == {
      'head': {'0': {n: ((3, 2, 4, 4), 'bfloat16') for n in 'kv'}},
      'period': {j: {n: ((2, 3, 2, 4, 4), 'bfloat16') for n in 'kv'} for j in '01'},
  }


REFS = (LayerRef('head', 0, None, CONFIG.head[0]), LayerRef('period', 1, 1, CONFIG.period[1]))


@pytest.mark.parametrize('ref', REFS)
@pytest.mark.parametrize('index', [2, [2, 0, 3]])
def test_write_touches_one_layer_and_place(ref, index):
  # Seen to fail: the period index left at 0.
  if ref.i is not None:
    ref = dataclasses.replace(ref, i=jnp.asarray(ref.i))
  cache = kv_cache.init(CONFIG, batch=3, length=4)
  new = jnp.ones((3, 2, 2, 4))
  out = kv_cache.write(cache, ref, new, 2 * new, jnp.asarray(index))
  starts = np.broadcast_to(index, (3,))
  want = (np.arange(4)[None, :] >= starts[:, None]) & (np.arange(4)[None, :] < starts[:, None] + 2)
  k, v = kv_cache.read(out, ref)
  np.testing.assert_array_equal(np.asarray(k)[:, 0, :, 0], want)
  np.testing.assert_array_equal(np.asarray(v)[:, 1, :, 3], 2 * want)
  touched = sum(int(jnp.count_nonzero(leaf)) for leaf in jax.tree.leaves(out))
  assert touched == 2 * 8 * want.sum()
