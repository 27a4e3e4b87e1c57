"""Schedules by hand, the optimizer against Optax called directly and against Adam in numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spct_jax.testing import tiny
from spct_jax.train import optim


def _rates(counts, **changes):
  schedule = optim.make_schedule(tiny.optim_settings(learning_rate=1.0, **changes))
  return [float(schedule(jnp.int32(count))) for count in counts]


# Mutations seen: warm-up from 0 (count instead of count + 1); decay counted from 0 instead of the warm-up's end.
def test_schedules_by_hand():
  np.testing.assert_allclose(_rates([0, 5, 999], schedule='constant'), [1, 1, 1])
  np.testing.assert_allclose(
      _rates([0, 1, 3, 4, 50], schedule='warmup_constant', warmup_steps=4), [0.25, 0.5, 1, 1, 1]
  )
  np.testing.assert_allclose(
      _rates([0, 1, 2, 6, 10, 50], schedule='cosine', warmup_steps=2, total_steps=10, end_fraction=0.1),
      [0.5, 1, 1, 0.55, 0.1, 0.1],
      rtol=1e-6,
  )
  np.testing.assert_allclose(
      _rates([0, 1, 2, 4, 10, 50], schedule='linear', warmup_steps=2, total_steps=10, end_fraction=0.2),
      [0.5, 1, 1, 0.8, 0.2, 0.2],
      rtol=1e-6,
  )
  np.testing.assert_allclose(_rates([0], schedule='cosine', warmup_steps=0), [1.0])


def _tree(rng):
  return {
      'block': {
          'up': {'kernel': rng.normal(size=(4, 6)).astype(np.float32), 'bias': rng.normal(size=6).astype(np.float32)},
          'norm': {'scale': rng.normal(size=(2, 4)).astype(np.float32)},  # stacked, so of two dimensions
      },
      'embed': {'table': rng.normal(size=(5, 4)).astype(np.float32)},
  }


def _run(optimizer, params, all_grads):
  opt_state = optimizer.init(params)
  for grads in all_grads:
    updates, opt_state = optimizer.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
  return params


def test_adamw_is_optax_adamw():
  rng = np.random.default_rng(0)
  settings = tiny.optim_settings(schedule='cosine', warmup_steps=2, total_steps=6)
  params, all_grads = _tree(rng), [_tree(rng) for _ in range(4)]
  mask = {'block': {'up': {'kernel': True, 'bias': False}, 'norm': {'scale': False}}, 'embed': {'table': True}}
  direct = optax.chain(
      optax.clip_by_global_norm(1.0),
      optax.adamw(optim.make_schedule(settings), b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, mask=mask),
  )
  ours = _run(optim.make_optimizer(settings).transform, params, all_grads)
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(_run(direct, params, all_grads))):
    np.testing.assert_allclose(a, b, rtol=1e-6)


# Mutations seen: b1 and b2 exchanged; decay on every leaf; clipping left out.
def test_adamw_by_numpy():
  rng = np.random.default_rng(1)
  params, all_grads = _tree(rng), [_tree(rng) for _ in range(3)]
  ours = _run(optim.make_optimizer(tiny.optim_settings()).transform, params, all_grads)
  names = {'kernel': 0.1, 'table': 0.1, 'bias': 0.0, 'scale': 0.0}
  def flat(tree):
    return jax.tree_util.tree_flatten_with_path(tree)[0]

  expected = [value.astype(np.float64) for _, value in flat(params)]
  mu, nu = [np.zeros_like(v) for v in expected], [np.zeros_like(v) for v in expected]
  for t, grads in enumerate(all_grads, 1):
    grads = [g.astype(np.float64) for _, g in flat(grads)]
    norm = np.sqrt(sum((g**2).sum() for g in grads))
    for i, (path, _) in enumerate(flat(params)):
      g = grads[i] * min(1.0, 1.0 / norm)
      mu[i] = 0.9 * mu[i] + 0.1 * g
      nu[i] = 0.95 * nu[i] + 0.05 * g**2
      u = mu[i] / (1 - 0.9**t) / (np.sqrt(nu[i] / (1 - 0.95**t)) + 1e-8)
      expected[i] = expected[i] - 1e-2 * (u + names[path[-1].key] * expected[i])
  for (_, a), b in zip(flat(ours), expected):
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


def test_clip_norm_zero_is_off():
  params, grads = {'kernel': jnp.ones(3)}, {'kernel': jnp.array([1e3, 0.0, 0.0])}
  optimizer = optim.make_optimizer(tiny.optim_settings(clip_norm=0.0)).transform
  _, opt_state = optimizer.update(grads, optimizer.init(params), params)
  np.testing.assert_allclose(opt_state[1].mu['kernel'][0], 100.0, rtol=1e-6)


def test_count_of_applied_updates():
  optimizer = optim.make_optimizer(tiny.optim_settings()).transform
  params = {'kernel': jnp.ones(3)}
  opt_state = optimizer.init(params)
  assert optim.applied_updates(opt_state) == 0
  _, opt_state = optimizer.update(params, opt_state, params)
  assert optim.applied_updates(opt_state) == 1


@pytest.mark.parametrize(
    'changes, said',
    [
        ({'schedule': 'cosin'}, r"unknown schedule 'cosin'; the known ones are constant, warmup_constant, cosine"),
        ({'learning_rate': 0.0}, r'learning_rate: got 0.0; it must be a positive number'),
        ({'learning_rate': float('nan')}, r'learning_rate: got nan'),
        ({'b2': 1.0}, r'b2: got 1.0; it must be at least 0 and below 1'),
        ({'clip_norm': -1.0}, r'clip_norm: got -1.0'),
        ({'end_fraction': 2.0}, r'end_fraction'),
        ({'warmup_steps': 3}, r"'constant' has no warm-up, but warmup_steps is 3.*'warmup_constant'"),
        ({'schedule': 'linear', 'warmup_steps': 100}, r'warmup_steps 100 must be smaller than total_steps 100'),
    ],
)
def test_settings_that_cannot_be(changes, said):
  with pytest.raises(ValueError, match=said):
    tiny.optim_settings(**changes)


def test_settings_are_hashable_and_have_no_defaults():
  assert hash(tiny.optim_settings()) == hash(tiny.optim_settings())
  assert all(field.default is dataclasses.MISSING for field in dataclasses.fields(optim.OptimSettings))
