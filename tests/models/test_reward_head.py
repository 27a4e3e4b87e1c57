"""The scalar head reads the last real token of each row, and nothing else."""

import dataclasses

import jax
import numpy as np
import pytest

from spct_jax.models import reward_head
from spct_jax.models.config import BlockConfig, ModelConfig
from spct_jax.models.transformer import Transformer

CONFIG = ModelConfig(
    vocab_size=11, width=8, heads=2, kv_heads=1, head_dim=4, ffn=12, period=(BlockConfig(),), num_periods=2,
    head_kind='scalar',
)
TOKENS = np.array([[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 0, 1], [3, 3, 3, 3, 3, 3]], np.int32)
LENGTHS = np.array([4, 6, 0], np.int32)


@pytest.fixture(scope='module')
def case():
  model = Transformer(CONFIG)
  params = model.init(jax.random.key(0))
  return model, params


def test_reward_of_the_last_real_token(case):
  # Seen to fail: index `lengths` instead of `lengths - 1`; the final norm left out.
  model, params = case
  rewards = np.asarray(jax.jit(model.apply)({'params': params}, TOKENS, LENGTHS))
  assert rewards.shape == (3,) and rewards.dtype == np.float32 and np.all(np.isfinite(rewards))
  x = np.asarray(model.hidden(params, TOKENS, LENGTHS), np.float64)
  for b, index in ((0, 3), (1, 5)):
    last = x[b, index]
    last = last / np.sqrt((last**2).mean() + CONFIG.norm_eps)
    want = last @ np.asarray(params['reward']['kernel'])[:, 0]
    np.testing.assert_allclose(rewards[b], want, atol=1e-5)


def test_padding_and_what_follows_do_not_matter(case):
  model, params = case
  apply = jax.jit(model.apply)
  base = apply({'params': params}, TOKENS, LENGTHS)
  changed = TOKENS.copy()
  changed[0, 4:] = 9
  np.testing.assert_allclose(apply({'params': params}, changed, LENGTHS)[:2], base[:2], atol=1e-6)
  np.testing.assert_allclose(apply({'params': params}, TOKENS[:1, :4]), base[:1], atol=1e-6)


def test_gradients_are_finite_with_a_padding_row(case):
  model, params = case
  grads = jax.jit(jax.grad(lambda p: model.apply({'params': p}, TOKENS, LENGTHS).sum()))(params)
  assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(grads))
  assert 'unembed' not in grads


def test_reward_after_a_cached_prefix(case):
  model, params = case
  want = model.apply({'params': params}, TOKENS[:2])
  _, cache = model.apply({'params': params}, TOKENS[:2, :4], cache=model.init_cache(2, 6))
  got, _ = model.apply({'params': params}, TOKENS[:2, 4:], cache=cache)
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_bfloat16_model_gives_float32_rewards(case):
  _, params = case
  half = Transformer(dataclasses.replace(CONFIG, dtype='bfloat16'))
  assert half.apply({'params': params}, TOKENS, LENGTHS).dtype == np.float32


def test_padding_on_any_side(case):
  # Seen to fail: the last place of the row; the number of real tokens as their last place; `lengths` ignored.
  model, params = case
  segments = np.array([[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0]], np.int32)
  apply = jax.jit(model.apply)
  got = apply({'params': params}, TOKENS, segments=segments)
  for b, real in ((0, slice(2, 6)), (1, slice(1, 4))):
    np.testing.assert_allclose(got[b], model.apply({'params': params}, TOKENS[b : b + 1, real])[0], atol=1e-5)
  assert np.isfinite(got[2])
  shorter = model.apply({'params': params}, TOKENS, np.array([5, 6, 6]), segments=segments)
  np.testing.assert_allclose(shorter[0], model.apply({'params': params}, TOKENS[:1, 2:5])[0], atol=1e-5)
  np.testing.assert_allclose(shorter[1], got[1], atol=1e-5)


def test_several_sequences_in_a_row_are_refused(case):
  model, params = case
  segments = np.array([[1, 1, 2, 2, 2, 2], [0, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]], np.int32)
  with pytest.raises(ValueError, match='segments: got 2 sequences in a row for a scalar head'):
    model.apply({'params': params}, TOKENS, segments=segments)
  # Under jit nothing can be raised.
  got = jax.jit(model.apply)({'params': params}, TOKENS, segments=segments)
  assert np.isnan(got).tolist() == [True, False, False]
  with pytest.raises(ValueError, match='together with a cache'):
    model.apply({'params': params}, TOKENS, segments=segments, cache=model.init_cache(3, 6))


def test_last_token_of_six():
  x = np.arange(12, dtype=np.float32).reshape(2, 6, 1)
  assert np.asarray(reward_head.last_token(x, np.array([4, 6]))).tolist() == [[3.0], [11.0]]
