"""The rules of the config pages cut every large array on a mesh with all three axes.

Mutations seen to fail: the embedding's rule set to (None, None); the cache rule to (None, None, None, None).
"""

import math

import jax
import pytest

from spct_jax import sharding
from spct_jax.models import kv_cache, unrolled
from spct_jax.stages import loading, samplers
from spct_jax.text import tokenizer
from spct_jax.train import optim, state as states

from configs import spct_small

LARGE = 4096  # bytes



def leaves(tree, shardings):
  for (path, leaf), (_, where) in zip(sharding.leaf_paths(tree), sharding.leaf_paths(shardings)):
    yield path, math.prod(leaf.shape) * leaf.dtype.itemsize, where


@pytest.mark.parametrize('arg', ['', 'smoke'])
@pytest.mark.parametrize('stage', ['sft', 'rft', 'grpo', 'meta_rm'])
@pytest.mark.parametrize('tied', [True, False])
def test_no_large_learner_leaf_is_replicated(arg, stage, tied):
  config = spct_small.get_config(arg)
  config.model.tied = tied
  mesh = sharding.make_mesh({'data': 2, 'fsdp': 2, 'tensor': 2})
  decoder = loading.model(
      config, tokenizer.load(config.tokenizer.path), head_kind='scalar' if stage == 'meta_rm' else 'lm'
  )
  optimizer = optim.make_optimizer(loading.optim_settings(config[stage]))
  abstract = states.abstract_state(decoder, optimizer)
  layout = states.state_shardings(decoder, optimizer, loading.rules(config.sharding.rules), mesh)
  large = [(path, where) for path, size, where in leaves(abstract, layout) if size >= LARGE]
  assert len(large) > 15
  for path, where in large:
    assert not where.is_fully_replicated, path


@pytest.mark.parametrize('arg', ['', 'smoke'])
def test_no_large_cache_leaf_is_replicated(arg):
  config = spct_small.get_config(arg)
  mesh = sharding.make_mesh({'data': 2, 'fsdp': 2, 'tensor': 2})
  tok = tokenizer.load(config.tokenizer.path)
  engine = samplers.engine(config, loading.model(config, tok), tok, mesh, 'sample')
  layouts = engine.cache_shardings(config.judge.chunk_prompts, config.judge.buckets[-1])
  for name, length in (('prompt', config.judge.buckets[-1]), ('rows', config.judge.max_new_tokens)):
    shapes = jax.eval_shape(lambda n=length: kv_cache.init(unrolled.model(engine.model).config, 8, n))
    found = list(leaves(shapes, layouts[name]))
    assert found
    for path, _, where in found:
      assert not where.is_fully_replicated, (name, path)
      assert where.spec[-2] == 'tensor' or 'tensor' in where.spec, path
