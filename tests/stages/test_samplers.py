"""The sampler's view of the parameters: the decoder's own layout, made once, and never twice in memory."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spct_jax import pages, sharding
from spct_jax.models import unrolled
from spct_jax.models.config import BlockConfig
from spct_jax.models.transformer import Transformer
from spct_jax.sampling import loop
from spct_jax.stages import budget, loading, samplers
from spct_jax.testing import tiny
from spct_jax.text import tokenizer as tokenizers
from spct_jax.types import PromptBatch, Tasks

pytestmark = pytest.mark.usefixtures('compiled_quickly')


@pytest.fixture(scope='module')
def params():
  return jax.jit(Transformer(tiny.model_config()).init)(jax.random.key(0))


def pointers(tree):
  return {path: leaf.unsafe_buffer_pointer() for path, leaf in sharding.leaf_paths(tree)}


def run_of(config):
  """Three tasks of two prompts."""
  prompts = PromptBatch(np.ones((2, 4), np.int32), np.array([4, 3], np.int32), np.ones(2, bool))
  one = np.ones(3, np.float32)
  return prompts, Tasks(
      prompt=np.array([0, 0, 1], np.int32), uid=np.ones((3, 2), np.uint32), visit=np.zeros(3, np.int32),
      sample=np.arange(3, dtype=np.int32), temperature=one, top_p=one, top_k=np.zeros(3, np.int32), min_p=0 * one,
      row_mask=np.ones(3, bool),
  )


# Seen to fail: `own` without its look at the dtype, so that the learner's float32 comes back; layers of a scan in the
# place of single ones (`take` left at its default in `own`).
def test_what_stands_alone_is_the_learners_and_the_rest_is_counted(small_config, params):
  config, mesh = small_config, sharding.make_mesh({'data': 1})
  params = jax.device_put(params, sharding.replicated(mesh))
  decoder = Transformer(tiny.model_config())
  made, cost = samplers.view(config, decoder, mesh, params)
  stacked = sum(leaf.nbytes for leaf in jax.tree.leaves(params['period']))
  assert cost['view_bytes'] == stacked and cost['view_seconds'] > 0
  want = unrolled.params(decoder.config, params)
  jax.tree.map(np.testing.assert_array_equal, made, want)
  mine, theirs = pointers(made), pointers(params)
  assert mine['embed/table'] == theirs['embed/table'] and mine['head/0/q/kernel'] == theirs['head/0/q/kernel']
  assert mine['head/5/q/kernel'] == theirs['remainder/0/q/kernel']
  assert not {mine[f'head/{i}/q/kernel'] for i in range(1, 5)} & set(theirs.values())

  flat = unrolled.model(decoder)
  again, cost = samplers.view(config, flat, mesh, made)  # a model without a period: nothing is copied
  assert cost == {'view_bytes': 0.0, 'view_seconds': 0.0} and pointers(again) == pointers(made)

  config.model.sampler_dtype = 'bfloat16'
  made, cost = samplers.view(config, flat, mesh, again)
  dtypes = {path: leaf.dtype for path, leaf in sharding.leaf_paths(made)}
  assert all(dtype == (jnp.float32 if path.endswith('scale') else jnp.bfloat16) for path, dtype in dtypes.items())
  assert pointers(made)['final_norm/scale'] == pointers(again)['final_norm/scale']


# Seen to fail: the parameters that stand alone given to `loop.start` too.
def test_a_launch_copies_no_parameter(small_config, params):
  mesh = sharding.make_mesh({'data': 1})
  tok = tokenizers.load(small_config.tokenizer.path)
  decoder = Transformer(tiny.model_config(vocab_size=tok.vocab_size))
  params = jax.device_put(jax.jit(decoder.init)(jax.random.key(0)), sharding.replicated(mesh))
  view, _ = samplers.view(small_config, decoder, mesh, params)
  engine = samplers.engine(small_config, decoder, tok, mesh, 'sample')
  _, given, _ = engine._begin(view, *run_of(small_config), None)
  assert pointers(given[2]) == pointers(view)
  one = engine.generate(view, *run_of(small_config))
  two = engine.generate(params, *run_of(small_config))  # stacked parameters still serve
  np.testing.assert_array_equal(one.tokens, two.tokens)
  np.testing.assert_array_equal(one.logp, two.logp)


# Seen to fail: no sharing (two views at once), a strong reference in place of the weak one (the view outlives its
# engines), and a view found by its leaves' ids alone.
def test_stages_that_run_together_share_a_view_that_dies_with_them(small_config):
  mesh = sharding.make_mesh({'data': 1})
  tok = tokenizers.load(small_config.tokenizer.path)
  decoder = loading.model(small_config, tok)
  params = loading.params(small_config, 'base', decoder, None, mesh)
  bind = samplers.generator(small_config, decoder, tok, mesh, None)
  gc.collect()
  before = len(jax.live_arrays())
  first = bind('evaluate', params)
  assert bind.cost['view_bytes'] == sum(leaf.nbytes for leaf in jax.tree.leaves(params['period']))
  made = len(jax.live_arrays())
  second = bind('greedy', params)
  assert bind.cost['view_bytes'] == 0 and len(jax.live_arrays()) == made > before
  del first, second
  gc.collect()
  assert len(jax.live_arrays()) == before
  other = jax.tree.map(lambda leaf: leaf + 1, params)
  third = bind('greedy', params)
  fourth = bind('evaluate', other)
  assert bind.cost['view_bytes'] > 0
  del third, fourth


@pytest.mark.parametrize('axes', [{'data': 1}, {'data': 2, 'fsdp': 2, 'tensor': 2}])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_the_plan_counts_what_is_made(small_config, axes, dtype):
  small_config.model.sampler_dtype = dtype
  small_config.model.head_windows = (0,)
  mesh = sharding.make_mesh(axes)
  tok = tokenizers.load(small_config.tokenizer.path)
  decoder = loading.model(small_config, tok)
  params = loading.params(small_config, 'base', decoder, None, mesh)
  _, cost = samplers.view(small_config, decoder, mesh, params)
  table = {row.name: row.bytes for row in budget.rows(small_config, mesh, 'evaluate', tok)}
  assert table["sampler's view of the parameters"] == cost['view_bytes'] > 0


def test_layers_taken_apart_leave_no_stack_behind(params):
  own = jax.tree.map(jnp.copy, params)
  stacks = jax.tree.leaves(own['period'])
  apart = unrolled.consume(tiny.model_config(), own)
  jax.tree.map(np.testing.assert_array_equal, apart, unrolled.params(tiny.model_config(), params))
  assert all(leaf.is_deleted() for leaf in stacks)
  assert unrolled.params(tiny.model_config(), apart) is apart
