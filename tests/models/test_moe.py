"""Mixture of experts: routing and sums against a plain float64 numpy reading, token by token."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from spct_jax import pages, sharding
from spct_jax.models import moe
from spct_jax.models.config import BlockConfig, Experts, ModelConfig
from tests.models.oracles import numpy_moe

MODEL = ModelConfig(
    vocab_size=7, width=8, heads=2, kv_heads=2, head_dim=4, ffn=6, period=(BlockConfig(),), num_periods=1
)
KINDS = {
    'as they are': Experts(count=6, top_k=3, ffn=5),
    'mixtral': Experts(count=4, top_k=2, ffn=5, renormalise=True),
    'shared, scaled': Experts(count=6, top_k=2, ffn=5, shared_ffn=10, scale=2.5),
    'groups': Experts(count=12, top_k=3, ffn=5, shared_ffn=5, scale=16.0, groups=4, top_groups=2),
    'all of them': Experts(count=3, top_k=3, ffn=4, renormalise=True),
    'one of many': Experts(count=40, top_k=1, ffn=4),
}

pytestmark = pytest.mark.usefixtures('compiled_quickly')


def drawn(experts, seed, tokens):
  """Parameters with a router that decides clearly, and tokens."""
  layer = moe.MoE(MODEL, experts)
  rng = np.random.default_rng(seed)
  params = jax.eval_shape(layer.init, jax.random.key(0), jnp.zeros((1, 1, MODEL.width)))['params']
  params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.5, leaf.dtype), params)
  params['router']['kernel'] *= 3
  return layer, params, jnp.asarray(rng.normal(size=(1, tokens, MODEL.width)), jnp.float32)


@pytest.mark.parametrize('name', KINDS)
def test_numpy(name):
  # Seen to fail: renormalisation dropped (mixtral); the shared experts dropped; the scale dropped; groups ignored.
  experts = KINDS[name]
  layer, params, x = drawn(experts, seed=len(name), tokens=37)
  got = jax.jit(layer.apply)({'params': params}, x)[0]
  want = numpy_moe(params, x[0], experts)
  np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def test_ties_go_to_the_earlier_expert():
  weights, chosen = moe.choose(jnp.array([[0.0, 1.0, 1.0, 1.0], [2.0, 0.0, 2.0, 0.0]]), Experts(4, 2, 1))
  np.testing.assert_array_equal(chosen, [[1, 2], [0, 2]])
  assert weights.dtype == jnp.float32
  _, chosen = moe.choose(jnp.array([[0.0, 1.0, 5.0, 0.0, 5.0, 4.0]]), Experts(6, 2, 1, groups=3, top_groups=1))
  np.testing.assert_array_equal(chosen, [[2, 3]])


def test_layout():
  # The example of the docstring, with its blocks of two.
  chosen = jnp.array([[1], [0], [1], [1], [0]])
  expert, used, row = moe._layout(chosen, 2, size=2)
  assert int(used) == 3
  np.testing.assert_array_equal(expert[:3], [0, 1, 1])
  np.testing.assert_array_equal(row, [2, 0, 3, 4, 1])


@pytest.mark.parametrize('loads', ['drawn', 'all to one', 'none to the first'])
def test_gradients_of_every_form(loads):
  # Seen to fail: `at[e].add` made `at[e].set`; the last block of an expert left out.
  E, K, D, F, N = 5, 2, 6, 4, 45
  rng = np.random.default_rng(1)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  leaves = normal(N, D), normal(E, D, F), normal(E, D, F), normal(E, F, D)
  logits = normal(N, E) + {'drawn': 0.0, 'all to one': 9.0, 'none to the first': -9.0}[loads] * jnp.eye(E)[:1]
  weights, chosen = moe.choose(logits, Experts(E, K, F))
  cotangent = normal(N, K, D)

  def every(x, gate, up, down):
    picked = jax.nn.one_hot(chosen, E)
    each = jax.vmap(functools.partial(moe._mlp, 'silu'), (None, 0, 0, 0), 1)(x, gate, up, down)
    return jnp.einsum('NED,NKE->NKD', each, picked)

  want, pull = jax.vjp(jax.jit(every), *leaves)
  want = (want, *pull(cotangent))
  forms = {
      'chosen by platform': lambda *a: moe.expert_outputs('silu', *a, chosen),
      'ragged': lambda *a: moe._ragged('silu', *a, chosen),
  }
  for form, function in forms.items():
    got, pull = jax.vjp(jax.jit(function), *leaves)
    for a, b in zip((got, *pull(cotangent)), want):
      np.testing.assert_allclose(a, b, atol=2e-5, err_msg=form)


def test_a_token_depends_on_itself_alone():
  layer, params, x = drawn(KINDS['groups'], seed=3, tokens=40)
  apply = jax.jit(layer.apply)
  whole = apply({'params': params}, x)
  others = jnp.where(jnp.arange(40)[None, :, None] < 25, x, 1e3)  # all on one expert
  np.testing.assert_allclose(apply({'params': params}, others)[:, :25], whole[:, :25], atol=1e-5)
  grads = jax.jit(jax.grad(lambda x: layer.apply({'params': params}, x)[:, :25].sum()))(others)
  assert not np.any(grads[:, 25:]) and np.isfinite(grads).all()


def test_low_precision_keeps_float32_routing():
  # Seen to fail: logits in bfloat16, where the two experts tie and the earlier one wins.
  model = dataclasses.replace(MODEL, dtype='bfloat16', param_dtype='bfloat16')
  layer = moe.MoE(model, Experts(count=2, top_k=1, ffn=3))
  x = jnp.ones((1, 1, 8), jnp.bfloat16)
  params = jax.jit(layer.init)(jax.random.key(0), x)['params']
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype('bfloat16')}
  router = np.zeros((8, 2), np.float32)
  router[:2, 0], router[:2, 1] = (256, 0), (256, 1)  # 256 and 257
  params['router']['kernel'] = jnp.asarray(router, jnp.bfloat16)
  params['experts']['down']['kernel'] = params['experts']['down']['kernel'].at[0].set(0)
  assert np.any(layer.apply({'params': params}, x))


@pytest.mark.parametrize('experts_over', ['ffn', 'experts'])
def test_mesh(experts_over):
  experts = Experts(count=8, top_k=3, ffn=6, shared_ffn=8, groups=4, top_groups=2)
  layer, params, x = drawn(experts, seed=5, tokens=36)
  x = jnp.reshape(x, (4, 9, 8))
  mesh = sharding.make_mesh({'data': 2, 'fsdp': 2, 'tensor': 2})
  rules = pages.sharding().rules
  if experts_over == 'experts':
    rules = ((r'/experts/(gate|up|down)/kernel$', ('tensor', 'fsdp', None)), *rules)

  def loss(params, x):
    out = layer.apply({'params': params}, x)
    return (out * jnp.sin(jnp.arange(out.size)).reshape(out.shape)).sum(), out

  f = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
  want = f(params, x)
  places = sharding.tree_shardings({'moe': params}, rules, mesh)['moe']
  assert places['experts']['gate']['kernel'].spec == PartitionSpec(
      *((None, 'fsdp', 'tensor') if experts_over == 'ffn' else ('tensor', 'fsdp', None))
  )
  got = f(sharding.to_device(params, places), sharding.to_device(x, sharding.batch_rows(mesh)))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, want)


@pytest.mark.parametrize('fields', [
    dict(top_k=0), dict(top_k=9), dict(ffn=0), dict(groups=3), dict(groups=4, top_groups=5),
    dict(groups=4, top_groups=1, top_k=3),
])
def test_impossible_experts(fields):
  with pytest.raises(ValueError, match='experts'):
    Experts(**{**dict(count=8, top_k=2, ffn=4), **fields})
