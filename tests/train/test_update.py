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
    'grpo': lambda model: objectives.grpo_objective(model, 0.2, 0.08, 0.7, chunk=5),
    'meta_rm': lambda model: objectives.meta_rm_objective(model),
}
# Adam divides by |g|, which turns rounding into sign flips where g is 0: a coarse eps keeps comparisons fair.
SETTINGS = tiny.optim_settings(eps=1e-3, schedule='warmup_constant', warmup_steps=4)
OPTIMIZER = optim.make_optimizer(SETTINGS)


def _mesh(data, fsdp, tensor):
  return sharding.make_mesh({'data': data, 'fsdp': fsdp, 'tensor': tensor})


@functools.cache
def _model(name, size):
  kind = 'scalar' if name == 'meta_rm' else 'lm'
  if size == 'small':
    return tiny.small_model(head_kind=kind)
  return Transformer(tiny.model_config(head_kind=kind, remat=True))


@functools.cache
def _program(name, size, sizes, microbatches):
  mesh, model = _mesh(*sizes), _model(name, size)
  shardings = states.state_shardings(model, OPTIMIZER, tiny.RULES, mesh)
  loss_fn = OBJECTIVES[name](model)
  step = update.make_step(
      loss_fn, OPTIMIZER, microbatches=microbatches, mesh=mesh, shardings=shardings
  )
  return mesh, shardings, step


@functools.cache
def _start(name, size):
  model = _model(name, size)
  shardings = states.state_shardings(model, OPTIMIZER, tiny.RULES, _mesh(1, 1, 1))
  return sharding.to_host(states.create(model, OPTIMIZER, jax.random.key(1), shardings))


def _train(name, batches, *, size='small', sizes=(1, 1, 1), microbatches=1):
  """(state, list of metrics) on the host, after a step on each batch."""
  mesh, shardings, step = _program(name, size, sizes, microbatches)
  state, metrics = sharding.to_device(_start(name, size), shardings), []
  for batch in batches:
    state, more = step(state, update.put_batch(batch, mesh))
    metrics.append({key: float(value) for key, value in more.items()})
  assert step._cache_size() == 1  # whatever was run on this program before
  return sharding.to_host(state), metrics


def _batches(count=2):
  return [tiny.learner_batch(num_rows=8, real_rows=7, seed=seed) for seed in range(count)]


def _close(ours, theirs, rtol, atol):
  for (path, a), (_, b) in zip(sharding.leaf_paths(ours), sharding.leaf_paths(theirs), strict=True):
    np.testing.assert_allclose(a, b, rtol=rtol, atol=atol, err_msg=path)


# Mutation seen: the denominator multiplied by the number of shards that hold rows.
@pytest.mark.parametrize(
    'name, size, sizes',
    [
        ('sft', 'whole', (2, 2, 2)),
        ('sft', 'small', (1, 8, 1)),
        ('sft', 'small', (1, 1, 8)),
        ('grpo', 'small', (2, 2, 2)),
        ('meta_rm', 'small', (8, 1, 1)),
    ],
)
def test_eight_devices_are_one(name, size, sizes):
  state, metrics = _train(name, _batches(), size=size, sizes=sizes)
  one_state, one_metrics = _train(name, _batches(), size=size)
  _close(state['params'], one_state['params'], rtol=1e-4, atol=1e-5)
  _close(state['opt_state'], one_state['opt_state'], rtol=1e-4, atol=1e-5)
  for ours, theirs in zip(metrics, one_metrics, strict=True):
    assert set(ours) == set(theirs)
    for key in theirs:
      np.testing.assert_allclose(ours[key], theirs[key], rtol=1e-4, atol=1e-5, err_msg=key)


# Mutations seen: the mean of the microbatches' means; the first microbatch left out.
@pytest.mark.parametrize('name, microbatches', [('sft', 4), ('grpo', 2), ('meta_rm', 4)])
def test_microbatches_change_nothing(name, microbatches):
  batch = _batches(1)[0]
  tokens = [batch['token_mask'][i::microbatches].sum() for i in range(microbatches)]
  assert len(set(tokens)) > 1, 'the microbatches must hold different numbers of tokens'
  whole, whole_metrics = _train(name, [batch])
  split, split_metrics = _train(name, [batch], sizes=(2, 1, 1), microbatches=microbatches)
  _close(split['params'], whole['params'], rtol=1e-5, atol=2e-6)
  _close(split['opt_state'], whole['opt_state'], rtol=1e-4, atol=1e-6)
  for key, value in whole_metrics[0].items():
    np.testing.assert_allclose(split_metrics[0][key], value, rtol=1e-4, atol=1e-6, err_msg=key)


def test_a_mean_of_means_would_be_seen():
  """On the batch of the test above a mean of means is wrong by far more than its tolerance."""
  batch, model = _batches(1)[0], _model('sft', 'small')
  parts = [{key: value[i::4] for key, value in batch.items()} for i in range(4)]
  loss_fn = jax.jit(objectives.sft_objective(model))
  sums = [loss_fn(_start('sft', 'small')['params'], part)[:2] for part in parts]
  exact = sum(total for total, _ in sums) / sum(count for _, count in sums)
  of_means = sum(total / count for total, count in sums) / 4
  assert abs(float(exact - of_means)) > 1e-3


@pytest.mark.parametrize('name', ['sft', 'grpo', 'meta_rm'])
def test_padding_rows_change_no_bit(name):
  batch = tiny.learner_batch(num_rows=8, real_rows=5, seed=5)
  noisy = {key: value.copy() for key, value in batch.items()}
  noisy['tokens'][5:] = 23
  noisy['lengths'][5:] = 9
  noisy['advantage'][5:] = 100.0
  noisy['target'][5:] = True
  for key in ('old_logp', 'ref_logp', 'sampler_logp'):
    noisy[key][5:] = np.nan
  clean, clean_metrics = _train(name, [batch])
  other, other_metrics = _train(name, [noisy])
  _close(other['params'], clean['params'], rtol=0, atol=0)
  assert clean_metrics == other_metrics


# Mutation seen: the sum divided by the number of rows.
def test_logged_numbers():
  batch, model = _batches(1)[0], _model('sft', 'small')
  state, metrics = _train('sft', [batch] * 2)
  params, loss_fn = _start('sft', 'small')['params'], objectives.sft_objective(model)
  (total, count), grads = jax.jit(
      jax.value_and_grad(lambda params: loss_fn(params, batch)[:2], has_aux=True)
  )(params)

  def norm(tree):
    return np.sqrt(sum(np.sum(np.asarray(x, np.float64) ** 2) for x in jax.tree.leaves(tree)))

  expected = {
      'loss': total / count, 'count': count, 'grad_norm': norm(grads) / count, 'param_norm': norm(params),
      'learning_rate': 0.25e-2, 'skipped': 0.0,
  }
  assert set(metrics[0]) == set(expected)
  for key, value in expected.items():
    np.testing.assert_allclose(metrics[0][key], value, rtol=1e-4, err_msg=key)
  np.testing.assert_allclose(metrics[1]['learning_rate'], 0.5e-2, rtol=1e-6)
  assert state['step'] == 2 and metrics[1]['loss'] < metrics[0]['loss']


# Mutations seen: the update taken all the same; the optimizer state moved on; `step` held back.
def test_an_update_that_is_not_finite_is_skipped():
  good, bad = _batches(2)
  bad = dict(bad, advantage=np.full_like(bad['advantage'], np.inf))
  once, _ = _train('grpo', [good], sizes=(2, 2, 2))
  state, metrics = _train('grpo', [good, bad], sizes=(2, 2, 2))
  assert [m['skipped'] for m in metrics] == [0.0, 1.0]
  for (path, a), (_, b) in zip(sharding.leaf_paths(state), sharding.leaf_paths(once), strict=True):
    if path == 'step':
      assert (int(a), int(b)) == (2, 1)
    else:
      np.testing.assert_array_equal(a, b, err_msg=path)
  again, metrics = _train('grpo', [good, bad, good], sizes=(2, 2, 2))
  assert metrics[2]['skipped'] == 0 and np.isfinite(metrics[2]['loss'])
  assert optim.applied_updates(again['opt_state']) == 2 and again['step'] == 3


def test_an_all_masked_batch_only_decays():
  batch = _batches(1)[0]
  batch['token_mask'] = np.zeros_like(batch['token_mask'])
  state, metrics = _train('sft', [batch])
  start = _start('sft', 'small')['params']
  for (path, a), (_, b) in zip(sharding.leaf_paths(state['params']), sharding.leaf_paths(start), strict=True):
    kept = 1.0 if path.endswith(('scale', 'bias')) else 1 - 0.25e-2 * 0.1
    np.testing.assert_allclose(a, b * kept, rtol=1e-6, err_msg=path)
  assert metrics[0]['loss'] == 0 and metrics[0]['grad_norm'] == 0 and metrics[0]['skipped'] == 0


# Mutation seen: maxima added up.
def test_maxima_survive_accumulation():
  def loss_fn(params, batch):
    value = batch['x'] * params['norm']['scale'][0]
    return jnp.sum(value), jnp.float32(value.shape[0]), {
        'x_max': (jnp.max(batch['x']), jnp.float32(1)), 'x': (jnp.sum(batch['x']), jnp.float32(value.shape[0])),
    }

  class Model:
    def init(self, key):
      return {'norm': {'scale': jnp.ones(1)}}

  mesh, x = _mesh(1, 1, 1), np.array([-4.0, -3.0, -2.0, -9.0], np.float32)
  shardings = states.state_shardings(Model(), OPTIMIZER, tiny.RULES, mesh)
  for microbatches in (1, 4):
    step = update.make_step(loss_fn, OPTIMIZER, microbatches=microbatches, mesh=mesh, shardings=shardings)
    state = states.create(Model(), OPTIMIZER, jax.random.key(0), shardings)
    metrics = step(state, update.put_batch({'x': x}, mesh))[1]
    assert metrics['x_max'] == -2.0 and metrics['x'] == -4.5


# Mutations seen: no donation; the caller's own arrays put into the state.
def test_the_state_is_donated_and_the_reference_is_not():
  mesh, shardings, step = _program('sft', 'small', (1, 8, 1), 1)
  params = sharding.to_device(_start('sft', 'small')['params'], shardings['params'])
  state = states.from_params(params, OPTIMIZER, shardings)
  mine = state['params']['unembed']['kernel']
  step(state, update.put_batch(_batches(1)[0], mesh))
  assert mine.is_deleted() and not params['unembed']['kernel'].is_deleted()
  np.testing.assert_array_equal(params['unembed']['kernel'], _start('sft', 'small')['params']['unembed']['kernel'])


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
