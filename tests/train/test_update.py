"""The update step: meshes, microbatches, padding, what is skipped, and one compilation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spct_jax import sharding
from spct_jax.models.transformer import Transformer
from spct_jax.testing import tiny
from spct_jax.train import objectives
from spct_jax.train import optim
from spct_jax.train import state as states
from spct_jax.train import update

OBJECTIVES = {
    'sft': lambda model: objectives.sft_objective(model),
    'grpo': lambda model: objectives.grpo_objective(model, 0.2, 0.08, 0.7, chunk=4),
    'meta_rm': lambda model: objectives.meta_rm_objective(model),
}
# Adam divides by |g|, which turns rounding into sign flips where g is 0: a coarse eps keeps the comparison fair.
SETTINGS = tiny.optim_settings(eps=1e-3)


def _mesh(data, fsdp, tensor):
  return sharding.make_mesh({'data': data, 'fsdp': fsdp, 'tensor': tensor})


def _train(name, model, mesh, *, batches, microbatches=1, loss_fn=None, settings=SETTINGS):
  """(state, list of metrics), on the host, after a step on each batch; and the jitted step."""
  optimizer = optim.make_optimizer(settings)
  shardings = states.state_shardings(model, optimizer, tiny.RULES, mesh)
  state = states.create(model, optimizer, jax.random.key(1), shardings)
  loss_fn = loss_fn or OBJECTIVES[name](model)
  step = update.make_step(loss_fn, optimizer, microbatches=microbatches, mesh=mesh, shardings=shardings)
  metrics = []
  for batch in batches:
    state, more = step(state, update.put_batch(batch, mesh))
    metrics.append({key: float(value) for key, value in more.items()})
  return sharding.to_host(state), metrics, step


def _model(name, kv_heads=2):
  kind = 'scalar' if name == 'meta_rm' else 'lm'
  return Transformer(tiny.model_config(head_kind=kind, kv_heads=kv_heads, remat=name == 'grpo'))


def _small(name):
  return tiny.small_model(head_kind='scalar' if name == 'meta_rm' else 'lm')


def _batches(count=2, num_rows=8, real_rows=7):
  return [tiny.learner_batch(num_rows=num_rows, real_rows=real_rows, seed=s) for s in range(count)]


def _close(ours, theirs, rtol=2e-4, atol=2e-5):
  for (path, a), (_, b) in zip(sharding.leaf_paths(ours), sharding.leaf_paths(theirs), strict=True):
    np.testing.assert_allclose(a, b, rtol=rtol, atol=atol, err_msg=path)


@functools.cache
def _one_device(name, kv_heads):
  return _train(name, _model(name, kv_heads), _mesh(1, 1, 1), batches=_batches())[:2]


# Mutations seen: a loss normalised per device (shard_map mean); rows of a batch permuted against one column.
@pytest.mark.parametrize(
    'name, sizes',
    [
        ('sft', (2, 2, 2)), ('sft', (8, 1, 1)), ('sft', (1, 8, 1)), ('sft', (1, 1, 8)),
        ('grpo', (2, 2, 2)), ('grpo', (1, 8, 1)),
        ('meta_rm', (2, 2, 2)), ('meta_rm', (8, 1, 1)),
    ],
)
def test_eight_devices_are_one(name, sizes):
  kv_heads = 8 if sizes[2] == 8 else 2
  state, metrics, step = _train(name, _model(name, kv_heads), _mesh(*sizes), batches=_batches())
  one_state, one_metrics = _one_device(name, kv_heads)
  _close(state['params'], one_state['params'])
  _close(state['opt_state'], one_state['opt_state'])
  for ours, theirs in zip(metrics, one_metrics, strict=True):
    for key in theirs:
      np.testing.assert_allclose(ours[key], theirs[key], rtol=1e-3, atol=1e-5, err_msg=key)
  assert step._cache_size() == 1


# Mutation seen: mean of the microbatches' means; `_max` metrics added up; microbatch rows taken twice.
@pytest.mark.parametrize('name', ['sft', 'grpo', 'meta_rm'])
@pytest.mark.parametrize('microbatches', [2, 4])
def test_microbatches_change_nothing(name, microbatches):
  batch = _batches(1)[0]
  tokens = [batch['token_mask'][i::microbatches].sum() for i in range(microbatches)]
  assert len(set(tokens)) > 1, 'the microbatches must hold different numbers of tokens'
  mesh = _mesh(2, 1, 1)
  whole, whole_metrics, _ = _train(name, _small(name), mesh, batches=[batch])
  split, split_metrics, _ = _train(name, _small(name), mesh, batches=[batch], microbatches=microbatches)
  _close(split['params'], whole['params'], rtol=1e-5, atol=2e-6)
  _close(split['opt_state'], whole['opt_state'], rtol=1e-4, atol=1e-6)
  for key, value in whole_metrics[0].items():
    np.testing.assert_allclose(split_metrics[0][key], value, rtol=1e-4, atol=1e-6, err_msg=key)


def test_the_mean_of_means_would_be_seen():
  """The check of the test above: on this batch a mean of means differs by far more than its tolerance."""
  batch = _batches(1)[0]
  model = _small('sft')
  params = model.init(jax.random.key(1))
  loss_fn = objectives.sft_objective(model)
  parts = [loss_fn(params, {k: v[i::4] for k, v in batch.items()})[:2] for i in range(4)]
  exact = sum(total for total, _ in parts) / sum(count for _, count in parts)
  of_means = sum(total / count for total, count in parts) / 4
  assert abs(float(exact - of_means)) > 1e-3


# Mutation seen: count taken from the number of rows.
@pytest.mark.parametrize('name', ['sft', 'grpo', 'meta_rm'])
def test_padding_rows_change_no_update(name):
  full = tiny.learner_batch(num_rows=4, real_rows=4, seed=5)
  padded = tiny.learner_batch(num_rows=8, real_rows=4, seed=5)
  np.testing.assert_array_equal(full['tokens'], padded['tokens'][:4])
  mesh = _mesh(1, 2, 1)
  states_ = [_train(name, _small(name), mesh, batches=[batch])[0] for batch in (full, padded)]
  _close(states_[1]['params'], states_[0]['params'], rtol=1e-5, atol=2e-6)


def test_logged_numbers():
  batch = _batches(1)[0]
  settings = tiny.optim_settings(schedule='warmup_constant', warmup_steps=4)
  model = _small('sft')
  state, metrics, _ = _train('sft', model, _mesh(2, 2, 1), batches=[batch] * 2, settings=settings)
  params = model.init(jax.random.key(1))
  loss_fn = objectives.sft_objective(model)
  total, count, _ = loss_fn(params, batch)
  grads = jax.grad(lambda params: loss_fn(params, batch)[0] / count)(params)
  norm = lambda tree: np.sqrt(sum(np.sum(np.asarray(x, np.float64) ** 2) for x in jax.tree.leaves(tree)))
  expected = {
      'loss': total / count, 'count': count, 'grad_norm': norm(grads), 'param_norm': norm(params),
      'learning_rate': 0.25e-2, 'skipped': 0.0,
  }
  assert set(metrics[0]) == set(expected)
  for key, value in expected.items():
    np.testing.assert_allclose(metrics[0][key], value, rtol=1e-4, err_msg=key)
  np.testing.assert_allclose(metrics[1]['learning_rate'], 0.5e-2, rtol=1e-6)
  assert state['step'] == 2 and metrics[1]['loss'] < metrics[0]['loss']


# Mutations seen: the choice left out (NaN parameters); optimizer state moved on; step held back.
def test_an_update_that_is_not_finite_is_skipped():
  good, bad = _batches(2)
  bad = dict(bad, advantage=np.full_like(bad['advantage'], np.inf))
  name, mesh = 'grpo', _mesh(2, 2, 1)
  once, _, _ = _train(name, _small(name), mesh, batches=[good])
  state, metrics, step = _train(name, _small(name), mesh, batches=[good, bad])
  assert [m['skipped'] for m in metrics] == [0.0, 1.0]
  for (path, a), (_, b) in zip(sharding.leaf_paths(state), sharding.leaf_paths(once), strict=True):
    if path == 'step':
      assert (int(a), int(b)) == (2, 1)
    else:
      np.testing.assert_array_equal(a, b, err_msg=path)
  again, metrics, _ = _train(name, _small(name), mesh, batches=[good, bad, good])
  assert metrics[2]['skipped'] == 0 and np.isfinite(metrics[2]['loss'])
  assert optim.applied_updates(again['opt_state']) == 2
  assert step._cache_size() == 1


def test_an_all_masked_batch_moves_nothing_but_decay():
  batch = _batches(1)[0]
  batch['token_mask'] = np.zeros_like(batch['token_mask'])
  settings = tiny.optim_settings(weight_decay=0.0)
  model = _small('sft')
  state, metrics, _ = _train('sft', model, _mesh(2, 1, 1), batches=[batch], settings=settings)
  _close(state['params'], sharding.to_host(model.init(jax.random.key(1))), rtol=0, atol=1e-7)
  assert metrics[0]['loss'] == 0 and metrics[0]['grad_norm'] == 0 and metrics[0]['skipped'] == 0


def test_maxima_survive_accumulation():
  def loss_fn(params, batch):
    value = batch['x'] * params['scale'][0]
    return jnp.sum(value), jnp.float32(value.shape[0]), {
        'x_max': (jnp.max(batch['x']), jnp.float32(1)), 'x': (jnp.sum(batch['x']), jnp.float32(value.shape[0])),
    }

  class Model:
    def init(self, key):
      return {'norm': {'scale': jnp.ones(1)}}

  wrapped = lambda params, batch: loss_fn(params['norm'], batch)
  x = np.array([-4.0, -3.0, -2.0, -9.0], np.float32)
  for microbatches in (1, 2, 4):
    _, metrics, _ = _train(
        '', Model(), _mesh(1, 1, 1), batches=[{'x': x}], microbatches=microbatches, loss_fn=wrapped
    )
    assert metrics[0]['x_max'] == -2.0 and metrics[0]['x'] == -4.5


def test_the_state_is_donated():
  mesh, model, optimizer = _mesh(1, 2, 1), _small('sft'), optim.make_optimizer(SETTINGS)
  shardings = states.state_shardings(model, optimizer, tiny.RULES, mesh)
  params = states.create(model, optimizer, jax.random.key(1), shardings)['params']
  state = states.from_params(params, optimizer, shardings)
  step = update.make_step(
      objectives.sft_objective(model), optimizer, microbatches=1, mesh=mesh, shardings=shardings
  )
  kernel = state['params']['unembed']['kernel']
  step(state, update.put_batch(_batches(1)[0], mesh))
  assert kernel.is_deleted()
  # Mutation seen: from_params without its copy, which deletes the caller's (reference) parameters.
  assert not params['unembed']['kernel'].is_deleted()


@pytest.mark.parametrize(
    'num_rows, microbatches, said',
    [
        (8, 4, r'8 rows cannot be dealt over 4 microbatches x 4 devices .*multiple of 16'),
        (6, 1, r'multiple of 4'),
        (8, 0, r'microbatches: got 0'),
    ],
)
def test_rows_that_do_not_divide(num_rows, microbatches, said):
  with pytest.raises(ValueError, match=said):
    update.check_rows(num_rows, microbatches, _mesh(2, 2, 2))
