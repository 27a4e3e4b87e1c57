"""State is born sharded, and nothing large is whole on a device."""

import math

import jax
import numpy as np
import pytest

from spct_jax import sharding
from spct_jax.models import kv_cache
from spct_jax.models.transformer import Transformer
from spct_jax.testing import tiny
from spct_jax.train import optim
from spct_jax.train import state as states

LARGE = 1024  # bytes; the tiny model's kernels have 2 to 16 KB, its norm scales 128 to 256 bytes

OPTIMIZER = optim.make_optimizer(tiny.optim_settings())


def _mesh(data, fsdp, tensor):
  return sharding.make_mesh({'data': data, 'fsdp': fsdp, 'tensor': tensor})


def _whole_and_large(tree, shardings):
  return [
      path
      for (path, leaf), (_, where) in zip(
          sharding.leaf_paths(tree), sharding.leaf_paths(shardings), strict=True
      )
      if _bytes(leaf.shape, leaf.dtype) >= LARGE and where.shard_shape(leaf.shape) == leaf.shape
  ]


def _bytes(shape, dtype):
  return math.prod(shape) * np.dtype(dtype).itemsize


# Mutations seen: the rule of the down kernels, of the table, or of the optimizer's moments set to ().
@pytest.mark.parametrize('kind', ['lm', 'scalar'])
@pytest.mark.parametrize('sizes', [(2, 2, 2), (1, 8, 1)])
def test_no_large_leaf_is_whole_on_a_device(kind, sizes):
  mesh, model = _mesh(*sizes), Transformer(tiny.model_config(head_kind=kind))
  abstract = states.abstract_state(model, OPTIMIZER)
  shardings = states.state_shardings(model, OPTIMIZER, tiny.RULES, mesh)
  assert _whole_and_large(abstract, shardings) == []
  large = [path for path, leaf in sharding.leaf_paths(abstract) if _bytes(leaf.shape, leaf.dtype) >= LARGE]
  assert len(large) > 60 and any(path.startswith('opt_state') for path in large)
  total = sum(_bytes(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(abstract))
  assert sharding.bytes_per_device(abstract, shardings) < 1.3 * total / (sizes[1] * sizes[2])


# Mutation seen: no out_shardings.
def test_state_is_born_where_its_shardings_say():
  mesh, model = _mesh(2, 2, 2), Transformer(tiny.model_config())
  shardings = states.state_shardings(model, OPTIMIZER, tiny.RULES, mesh)
  state = states.create(model, OPTIMIZER, jax.random.key(0), shardings)
  for (path, leaf), (_, where) in zip(sharding.leaf_paths(state), sharding.leaf_paths(shardings), strict=True):
    assert leaf.sharding == where, path
    assert leaf.addressable_shards[0].data.shape == where.shard_shape(leaf.shape), path
  assert state['step'] == 0 and state['step'].dtype == np.int32


def test_a_whole_leaf_would_be_seen():
  rules = (('opt_state/.*down/kernel$', ()), *tiny.RULES)
  model = Transformer(tiny.model_config())
  shardings = states.state_shardings(model, OPTIMIZER, rules, _mesh(2, 2, 2))
  found = _whole_and_large(states.abstract_state(model, OPTIMIZER), shardings)
  assert found and all('opt_state' in path and 'down/kernel' in path for path in found)


# Mutation seen: the cache's rule set to ().
def test_no_large_cache_leaf_is_whole_on_a_device():
  mesh, config = _mesh(2, 2, 2), tiny.model_config()
  def make():
    return kv_cache.init(config, 8, 16)

  shardings = sharding.tree_shardings(jax.eval_shape(make), tiny.RULES, mesh)
  cache = jax.jit(make, out_shardings=shardings)()
  assert _whole_and_large(cache, shardings) == []
  assert {leaf.addressable_shards[0].data.nbytes * 8 == leaf.nbytes for leaf in jax.tree.leaves(cache)} == {True}


def test_moments_lie_where_their_parameters_lie():
  mesh, model = _mesh(2, 2, 2), Transformer(tiny.model_config())
  shardings = states.state_shardings(model, OPTIMIZER, tiny.RULES, mesh)
  specs = {path: where.spec for path, where in sharding.leaf_paths(shardings)}
  params = [path for path in specs if path.startswith('params/')]
  for path in params:
    for moment in ('mu', 'nu'):
      assert specs[f'opt_state/1/{moment}/{path.removeprefix("params/")}'] == specs[path]
  assert len(specs) == 3 * len(params) + 3  # and two counts and the step


def test_values_do_not_depend_on_the_mesh():
  model = tiny.small_model()
  made = []
  for sizes in ((1, 1, 1), (2, 2, 2)):
    shardings = states.state_shardings(model, OPTIMIZER, tiny.RULES, _mesh(*sizes))
    made.append(sharding.to_host(states.create(model, OPTIMIZER, jax.random.key(3), shardings)))
  for a, b in zip(*map(jax.tree.leaves, made), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def test_errors_name_the_leaf():
  model = Transformer(tiny.model_config())
  with pytest.raises(ValueError, match=r"no sharding rule matches '(params|opt_state)/.*down/kernel'"):
    rules = tuple(rule for rule in tiny.RULES if 'down' not in rule[0])
    states.state_shardings(model, OPTIMIZER, rules, _mesh(2, 2, 2))
  with pytest.raises(ValueError, match=r"k/bias' with shape .*2.* cannot be split 8 ways over tensor=8"):
    states.state_shardings(model, OPTIMIZER, tiny.RULES, _mesh(1, 1, 8))
