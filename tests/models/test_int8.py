"""Eight bits: a model whose matrices are q step, computed on q; keys and values likewise."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spct_jax import sharding
from spct_jax.models import int8, kv_cache, unrolled
from spct_jax.models.config import BlockConfig, Experts, Latent, ModelConfig
from spct_jax.models.kv_cache import LayerRef
from spct_jax.models.transformer import Transformer
from spct_jax.testing import tiny

pytestmark = pytest.mark.usefixtures('compiled_quickly')

SPARSE = ModelConfig(
    vocab_size=61, vocab_multiple=8, width=16, heads=4, kv_heads=4, head_dim=10, ffn=12, head=(BlockConfig(),),
    period=(BlockConfig(experts=Experts(count=6, top_k=2, ffn=6, shared_ffn=8)),), num_periods=1,
    latent=Latent(rank=8, nope=6, rope=4, value=4, q_rank=6),
)
TIED = dataclasses.replace(
    tiny.model_config(tied=True), period=(tiny.LOCAL,), remainder=(), post_norms=True, logit_softcap=5.0,
    embed_scaled=True,
)
MODELS = {'tied': TIED, 'untied and sparse': SPARSE}


def drawn(config):
  """Side by side, with channels of very different sizes, biases and scales away from where they start."""
  flat = unrolled.model(Transformer(config))
  params = jax.jit(flat.init)(jax.random.key(0))

  def noisy(number, leaf):
    one, two = jax.random.split(jax.random.fold_in(jax.random.key(1), number))
    size = jnp.exp(jax.random.normal(two, leaf.shape[-1:]))
    return leaf + 0.1 * jax.random.normal(one, leaf.shape) * jnp.expand_dims(size, range(leaf.ndim - 1))

  leaves, structure = jax.tree.flatten(params)
  return flat, jax.tree.unflatten(structure, [noisy(*pair) for pair in enumerate(leaves)])


def undone(config, tree):
  """float32 of q step, by hand."""
  leaves = dict(sharding.leaf_paths(tree))
  out = {}
  for path, leaf in leaves.items():
    if axes := int8.inputs(config, path):
      step = np.expand_dims(leaves[path.rpartition('/')[0] + '/step'], axes)
      assert leaf.dtype == jnp.int8 and step.ndim == leaf.ndim
      leaf = np.asarray(leaf, np.float32) * step
    if not path.endswith('/step'):
      out[path] = leaf
  names = sharding.leaf_paths(jax.eval_shape(Transformer(config).init, jax.random.key(0)))
  return jax.tree.unflatten(
      jax.tree.structure(jax.eval_shape(Transformer(config).init, jax.random.key(0))), [out[path] for path, _ in names]
  )


# Seen to fail: the step left out or taken over the outputs in `Dense` and in the experts, the row's step left out of
# the embedding, one step for all experts.
@pytest.mark.parametrize('name', MODELS)
def test_a_model_in_eight_bits_is_the_model_of_what_they_stand_for(name):
  flat, params = drawn(MODELS[name])
  small = jax.jit(int8.quantise, static_argnums=0)(flat.config, params)
  large = undone(flat.config, small)
  tokens = np.random.default_rng(0).integers(0, 61, (3, 7)).astype(np.int32)
  apply = jax.jit(lambda params: flat.apply({'params': params}, tokens))
  np.testing.assert_allclose(apply(small), apply(large), atol=3e-5, rtol=1e-4)
  # Latent attention has another form for a cache.
  cached = jax.jit(lambda params: flat.apply({'params': params}, tokens, cache=flat.init_cache(3, 7))[0])
  np.testing.assert_allclose(cached(small), apply(large), atol=5e-5, rtol=1e-4)

  kept = {path for path, leaf in sharding.leaf_paths(small) if leaf.dtype == jnp.int8}
  names = {path if path.count('/') == 1 else path.split('/')[-2] for path in kept}
  assert not {'router', 'kv_up', 'reward'} & names and ('embed/table' in names) == flat.config.tied
  assert ({'q', 'v', 'o', 'down'} if name == 'tied' else {'q_up', 'kv_down', 'o', 'gate', 'unembed/kernel'}) <= names
  assert int8.inputs(flat.config, 'reward/kernel') == ()
  for path, leaf in sharding.leaf_paths(large):
    before = np.asarray(dict(sharding.leaf_paths(params))[path])
    if axes := int8.inputs(flat.config, path):
      # Half a step at most, where a channel's largest is 127 steps.
      assert (np.abs(leaf - before) <= 0.501 / 127 * np.abs(before).max(axis=axes, keepdims=True)).all(), path
    else:
      np.testing.assert_array_equal(leaf, before)


def test_zero_and_tiny_channels_are_no_trouble():
  x = jnp.array([[0.0, 1e-44, 1e-37, 3e38], [0.0, -1e-44, -5e-39, 1e38]])
  found = int8.rounded(x, (0,))
  assert found.values.tolist() == [[0, 0, 0, 127], [0, 0, 0, 42]] and found.step[:3].tolist() == [1, 1, 1]
  np.testing.assert_allclose(found.step[3], 3e38 / 127, rtol=1e-6)


def test_a_cache_in_eight_bits_gives_back_what_was_written():
  # Seen to fail: the step of one head for all, and steps written at other rows than their values.
  config = tiny.model_config()
  rng = np.random.default_rng(0)
  k, v = (jnp.asarray(rng.normal(size=(3, 2, 2, 8)) * np.exp(rng.normal(size=(3, 2, 2, 1))), jnp.float32) for _ in 'kv')
  ref = LayerRef('period', 1, jnp.asarray(1), tiny.GLOBAL)
  real = lambda pair: np.asarray(pair.values, np.float32) * np.asarray(pair.step)[..., None]
  one = kv_cache.init(config, 3, 5, 'int8')
  for index in (1, np.array([0, 3, 2])):
    keys, values = kv_cache.read(kv_cache.write(one, ref, k, v, jnp.asarray(index)), ref)
    for got, new in ((real(keys), k), (real(values), v)):
      for b, start in enumerate(np.broadcast_to(index, (3,))):
        want = np.zeros((2, 5, 8), np.float32)
        want[:, start : start + 2] = np.swapaxes(new[b], 0, 1)
        assert (np.abs(got[b] - want) <= np.abs(want).max(axis=-1, keepdims=True) * 0.501 / 127).all()
  rows = jnp.asarray([[1, 9], [0, 1]])
  whole = lambda x: jnp.repeat(x[:1], 5, axis=1)[:, :5].reshape(1, 5, 2, 8) + jnp.arange(4.0).reshape(4, 1, 1, 1)
  new = whole(k).reshape(2, 2, 5, 2, 8)
  keys, _ = kv_cache.read(kv_cache.write_rows(kv_cache.init(config, 4, 5, 'int8'), ref, new, new, rows), ref)
  for row, source in ((1, new[0, 0]), (2, new[1, 0]), (3, new[1, 1])):
    want = np.swapaxes(source, 0, 1)
    assert (np.abs(real(keys)[row] - want) <= np.abs(want).max(axis=-1, keepdims=True) * 0.501 / 127).all()
  assert not real(keys)[0].any()
