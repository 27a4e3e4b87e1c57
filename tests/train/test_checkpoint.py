"""Checkpoints: the same bits, another mesh, killed saves, the next stage's head."""

import functools
import shutil

import jax
import numpy as np
import pytest

from spct_jax import sharding
from spct_jax.models.transformer import Transformer
from spct_jax.testing import tiny
from spct_jax.train import checkpoint
from spct_jax.train import objectives
from spct_jax.train import optim
from spct_jax.train import state as states
from spct_jax.train import update

MODEL = tiny.small_model()
OPTIMIZER = optim.make_optimizer(tiny.optim_settings(schedule='cosine', warmup_steps=2, total_steps=6))


def _mesh(data, fsdp, tensor):
  return sharding.make_mesh({'data': data, 'fsdp': fsdp, 'tensor': tensor})


@functools.cache
def _setup(sizes):
  mesh = _mesh(*sizes)
  shardings = states.state_shardings(MODEL, OPTIMIZER, tiny.RULES, mesh)
  step = update.make_step(
      objectives.sft_objective(MODEL), OPTIMIZER, microbatches=2, mesh=mesh, shardings=shardings
  )
  return mesh, shardings, step


def _batch(i, mesh):
  return update.put_batch(tiny.learner_batch(num_rows=8, real_rows=8, seed=i), mesh)


@functools.cache
def _start():
  return sharding.to_host(states.create(MODEL, OPTIMIZER, jax.random.key(1), _setup((1, 1, 1))[1]))


def _new(shardings):
  return sharding.to_device(_start(), shardings)


def _abstract():
  return states.abstract_state(MODEL, OPTIMIZER)


def _assert_same_bits(ours, theirs):
  ours, theirs = sharding.to_host(ours), sharding.to_host(theirs)
  for (path, a), (_, b) in zip(sharding.leaf_paths(ours), sharding.leaf_paths(theirs), strict=True):
    assert a.dtype == b.dtype and a.tobytes() == b.tobytes(), path


# Mutations seen: the optimizer state born anew on restore; `step` restored as 0.
def test_resumed_is_uninterrupted(tmp_path):
  mesh, shardings, step = _setup((2, 2, 1))
  state = _new(shardings)
  with checkpoint.Checkpoints(tmp_path / 'c', keep=2) as checkpoints:
    for i in range(4):
      state, _ = step(state, _batch(i, mesh))
      if i == 1:
        checkpoints.save(2, state, {'seen': [1, 2], 'seed': 7})
  with checkpoint.Checkpoints(tmp_path / 'c', keep=2) as checkpoints:
    assert checkpoints.latest_step() == 2
    resumed, meta = checkpoints.restore(_abstract(), shardings)
  assert meta == {'seen': [1, 2], 'seed': 7} and resumed['step'] == 2
  for i in (2, 3):
    resumed, _ = step(resumed, _batch(i, mesh))
  _assert_same_bits(resumed, state)
  assert step._cache_size() == 1  # and restoring costs no second compilation


# Mutation seen: float16 on the way.
@pytest.mark.parametrize('sizes', [(1, 8, 1), (2, 2, 2), (1, 1, 1)])
def test_restored_onto_another_mesh(tmp_path, sizes):
  mesh, shardings, step = _setup((2, 2, 1))
  state, _ = step(_new(shardings), _batch(0, mesh))
  _, elsewhere, _ = _setup(sizes)
  with checkpoint.Checkpoints(tmp_path, keep=1) as checkpoints:
    checkpoints.save(1, state, {})
    moved, _ = checkpoints.restore(_abstract(), elsewhere)
  _assert_same_bits(moved, state)
  for (path, leaf), (_, where) in zip(sharding.leaf_paths(moved), sharding.leaf_paths(elsewhere), strict=True):
    assert leaf.sharding == where, path


def test_the_newest_are_kept_and_a_save_is_not_overwritten(tmp_path):
  _, shardings, _ = _setup((1, 2, 1))
  state = _new(shardings)
  with checkpoint.Checkpoints(tmp_path, keep=2) as checkpoints:
    for step in (1, 2, 3):
      checkpoints.save(step, state, {'step': step})
    checkpoints.save(3, state, {'step': 'again'})
    assert checkpoints.latest_step() == 3
    assert checkpoints.restore(_abstract(), shardings)[1] == {'step': 3}
    assert checkpoints.restore(_abstract(), shardings, step=2)[1] == {'step': 2}
    with pytest.raises(ValueError, match=r'no checkpoint of step 1; it has \[2, 3\]'):
      checkpoints.restore(_abstract(), shardings, step=1)


# Mutation seen: the newest folder by name taken for the newest checkpoint.
def test_a_killed_save_is_ignored(tmp_path):
  _, shardings, _ = _setup((1, 2, 1))
  state = _new(shardings)
  with checkpoint.Checkpoints(tmp_path, keep=3) as checkpoints:
    checkpoints.save(1, state, {'step': 1})
    final = tmp_path / '1'
    # What a save leaves that dies before its rename: the temporary folder, and less than all of its files.
    partial = tmp_path / '2.orbax-checkpoint-tmp-17'
    shutil.copytree(final, partial)
    shutil.rmtree(partial / 'rest')
  with checkpoint.Checkpoints(tmp_path, keep=3) as checkpoints:
    assert checkpoints.latest_step() == 1
    restored, meta = checkpoints.restore(_abstract(), shardings)
    assert meta == {'step': 1}
    checkpoints.save(2, state, {'step': 2})  # and the same step can be saved after all
    assert checkpoints.latest_step() == 2
  _assert_same_bits(restored, state)


def test_params_alone_for_the_next_stage(tmp_path):
  _, shardings, _ = _setup((1, 2, 1))
  state = _new(shardings)
  with checkpoint.Checkpoints(tmp_path, keep=1) as checkpoints:
    checkpoints.save(1, state, {})
  mesh = _mesh(2, 2, 2)
  where = sharding.tree_shardings(_abstract()['params'], tiny.RULES, mesh)
  params = checkpoint.load_params(tmp_path, MODEL, where, key=jax.random.key(9))
  _assert_same_bits(params, state['params'])
  assert params['unembed']['kernel'].sharding == where['unembed']['kernel']


# Mutation seen: the whole scalar model drawn fresh.
def test_a_scalar_head_starts_from_a_language_model(tmp_path):
  _, shardings, _ = _setup((1, 2, 1))
  state = _new(shardings)
  with checkpoint.Checkpoints(tmp_path, keep=1) as checkpoints:
    checkpoints.save(1, state, {})
  model = tiny.small_model(head_kind='scalar')
  where = sharding.tree_shardings(model.abstract_params(), tiny.RULES, _mesh(2, 2, 2))
  params = checkpoint.load_params(tmp_path, model, where, key=jax.random.key(9))
  assert set(params) == {'embed', 'period', 'final_norm', 'reward'}
  _assert_same_bits({k: v for k, v in params.items() if k != 'reward'},
                    {k: v for k, v in state['params'].items() if k != 'unembed'})
  fresh = model.init(jax.random.key(9))['reward']
  np.testing.assert_allclose(params['reward']['kernel'], fresh['kernel'], rtol=1e-6)
  assert params['reward']['kernel'].sharding == where['reward']['kernel']


def test_errors(tmp_path):
  _, shardings, _ = _setup((1, 2, 1))
  other = Transformer(tiny.model_config())
  where = sharding.tree_shardings(other.abstract_params(), tiny.RULES, _mesh(1, 2, 1))
  with pytest.raises(ValueError, match='no checkpoint folder'):
    checkpoint.load_params(tmp_path / 'absent', MODEL, shardings['params'], key=jax.random.key(0))
  assert not (tmp_path / 'absent').exists()
  with pytest.raises(ValueError, match='keep: got 0'):
    checkpoint.Checkpoints(tmp_path / 'c', keep=0)
  with checkpoint.Checkpoints(tmp_path / 'c', keep=1) as checkpoints:
    assert checkpoints.latest_step() is None
    with pytest.raises(ValueError, match='holds no complete checkpoint; run the stage'):
      checkpoints.restore(_abstract(), shardings)
    checkpoints.save(1, _new(shardings), {})
    with pytest.raises(ValueError, match=r"is of another model: it has no 'head'"):
      checkpoints.load_params(other, where, key=jax.random.key(0))
    wide = tiny.small_model(vocab_size=99)
    where = states.state_shardings(wide, OPTIMIZER, tiny.RULES, _mesh(1, 2, 1))
    with pytest.raises(ValueError, match=r'params/embed/table has shape \(64, 16\), and the model wants shape \(104'):
      checkpoints.restore(states.abstract_state(wide, OPTIMIZER), where)
