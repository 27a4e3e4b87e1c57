"""Adapters against numpy, against merged weights and against the base that they leave alone.

Mutations seen to fail here: the scale as rank / alpha, without rsLoRA's root, on A as well as B, left out of the merged
weights; B not zero at the start; the dtype of the merged weights ignored. Gradients of the base are seen by the test
of shapes where they are taken, which it does itself.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.extend import core
import numpy as np
import pytest

from spct_jax import pages, sharding
from spct_jax.models.config import Experts, Latent
from spct_jax.models.dense import Dense
from spct_jax.models.transformer import Transformer
from spct_jax.testing import tiny
from spct_jax.train import checkpoint, lora, objectives, optim, peft, state as states, update

ALL = ('q', 'k', 'v', 'o', 'gate', 'up', 'down')
SETTINGS = lora.Settings(rank=2, alpha=6.0, targets=ALL, rslora=False)
OPTIMIZER = optim.make_optimizer(tiny.optim_settings())
ONE = {'data': 1, 'fsdp': 1, 'tensor': 1}


def filled(adapters, seed=0):
  """Adapters as training leaves them: nothing is zero."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.3, jnp.float32), adapters)


@pytest.mark.parametrize('inputs, outputs', [((6,), (3, 2)), ((3, 2), (6,)), ((6,), (5,))])
@pytest.mark.parametrize('rslora, scale', [(False, 6 / 4), (True, 6 / 2)])
def test_forward_and_gradients_by_numpy(inputs, outputs, rslora, scale):
  rng = np.random.default_rng(1)
  n_in, n_out, r = int(np.prod(inputs)), int(np.prod(outputs)), 4
  x, w, g = rng.normal(size=(7, n_in)), rng.normal(size=(n_in, n_out)), rng.normal(size=(7, n_out))
  a, b = rng.normal(size=(n_in, r)), rng.normal(size=(r, n_out))
  settings = lora.Settings(r, 6.0, ('q',), rslora)
  base = {'q': {'kernel': jnp.asarray(w.reshape(*inputs, *outputs), jnp.float32)}}
  pair = {'lora_a': a.reshape(*inputs, r), 'lora_b': b.reshape(r, *outputs)}
  pair = {name: jnp.asarray(leaf, jnp.float32) for name, leaf in pair.items()}
  dense = Dense(inputs, outputs, 'float32', 'float32')

  def total(adapters):
    joined = lora.Adapted(None, settings).join({'frozen': base, 'adapters': adapters})
    y = dense.apply({'params': joined['q']}, jnp.asarray(x.reshape(7, *inputs), jnp.float32)).reshape(7, n_out)
    return jnp.sum(y * jnp.asarray(g, jnp.float32)), y

  (_, y), grads = jax.value_and_grad(total, has_aux=True)({'q': pair})
  near = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
  near(y, x @ w + scale * x @ a @ b)
  near(grads['q']['lora_a'].reshape(n_in, r), scale * x.T @ g @ b.T)
  near(grads['q']['lora_b'].reshape(r, n_out), scale * (x @ a).T @ g)
  merged = lora.merge(base, {'q': pair}, settings)
  near(merged['q']['kernel'].reshape(n_in, n_out), w + scale * a @ b)


@pytest.mark.parametrize('head_kind', ['lm', 'scalar'])
def test_it_starts_as_the_base_and_computes_what_the_merged_weights_do(head_kind):
  model = tiny.small_model(head_kind=head_kind) if head_kind == 'scalar' else Transformer(tiny.model_config())
  adapted = lora.Adapted(model, SETTINGS)
  base = jax.jit(model.init)(jax.random.key(0))
  start = jax.jit(adapted.start)(jax.random.key(1), base)
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(start))
  tokens = np.random.default_rng(0).integers(0, 61, (2, 9))
  lengths = np.asarray([9, 5])
  plain = jax.jit(lambda params: model.apply({'params': params}, tokens, lengths=lengths))
  out = jax.jit(lambda adapters: adapted.apply({'params': {'frozen': base, 'adapters': adapters}}, tokens, lengths))
  np.testing.assert_array_equal(out(start), plain(base))
  for path, leaf in sharding.leaf_paths(start):
    if path.endswith('lora_a'):
      assert np.std(leaf) > 0
  moved = filled(start)
  if head_kind == 'scalar':
    assert set(start['reward']) == {'kernel'}
  merged = jax.jit(lora.merge, static_argnums=2)(base, moved, SETTINGS)
  assert np.abs(out(moved) - plain(base)).max() > 0.1
  np.testing.assert_allclose(out(moved), plain(merged), rtol=1e-4, atol=1e-4)
  untouched = lambda tree: {p: leaf for p, leaf in sharding.leaf_paths(tree) if not p.endswith('kernel')}
  for path, leaf in untouched(merged).items():
    np.testing.assert_array_equal(leaf, untouched(base)[path])


def test_each_expert_and_the_latent_have_their_own(tmp_path):
  latent = Latent(rank=8, nope=4, rope=4, value=6, q_rank=None)
  experts = Experts(count=3, top_k=2, ffn=12, renormalise=True, groups=1, top_groups=1, scale=1.0, shared_ffn=10)
  plain = tiny.small_model().config
  model = Transformer(dataclasses.replace(
      plain, latent=latent, head_dim=8, period=(dataclasses.replace(plain.period[0], experts=experts),)
  ))
  settings = lora.Settings(2, 4.0, ('q', 'kv_up', 'experts/gate', 'experts/down', 'shared/up'), False)
  assert not [path for path in lora.kernels(model) if 'router' in path]
  adapted = lora.Adapted(model, settings)
  base = jax.jit(model.init)(jax.random.key(0))
  start = jax.jit(adapted.init)(jax.random.key(1))
  assert start['period']['0']['moe']['experts']['gate']['lora_b'].shape == (2, 3, 2, 12)
  tokens = np.random.default_rng(0).integers(0, 61, (2, 9))
  out = jax.jit(lambda adapters: adapted.apply({'params': {'frozen': base, 'adapters': adapters}}, tokens))
  plain = jax.jit(lambda params: model.apply({'params': params}, tokens))
  np.testing.assert_array_equal(out(start), plain(base))
  moved = filled(start)
  merged = jax.jit(lora.merge, static_argnums=2)(base, moved, settings)
  np.testing.assert_allclose(out(moved), plain(merged), rtol=1e-4, atol=1e-4)
  gradients = jax.jit(jax.grad(lambda adapters: jnp.sum(out(adapters)[:, :, :7])))(moved)
  assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients))
  mesh = sharding.make_mesh({'data': 2, 'fsdp': 2, 'tensor': 2})
  spec = sharding.tree_shardings(adapted.abstract_params(), pages.sharding().rules, mesh)
  assert tuple(spec['period']['0']['moe']['experts']['gate']['lora_b'].spec) == (None, None, None, 'tensor')
  with pytest.raises(ValueError, match='is adapted in a mixture of experts, where PEFT knows attention alone'):
    peft.save(tmp_path / 'adapter', adapted, moved, 'base')


def test_a_bfloat16_base_does_not_round_the_adapters_away():
  model = Transformer(dataclasses.replace(tiny.small_model().config, param_dtype='bfloat16'))
  settings = dataclasses.replace(SETTINGS, targets=('gate',))
  base = {'period': {'0': {'gate': {'kernel': jnp.ones((2, 16, 32), jnp.bfloat16)}}}}
  small = lora.Adapted(model, settings).init(jax.random.key(0))
  small = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 1e-2), small)
  step = 3 * 2 * 1e-4  # alpha / rank times the rank's two products
  assert lora.merge(base, small, settings)['period']['0']['gate']['kernel'].dtype == jnp.bfloat16
  wide = lora.merge(base, small, settings, 'float32')['period']['0']['gate']['kernel']
  np.testing.assert_allclose(wide, 1 + step, rtol=1e-6)


def build(mesh, *, microbatches=1):
  """(the base, a state of adapters, the step, a batch) on a mesh."""
  model = tiny.small_model(remat=True)
  adapted = lora.Adapted(model, SETTINGS)
  base = jax.jit(model.init, out_shardings=sharding.tree_shardings(model.abstract_params(), tiny.RULES, mesh))(
      jax.random.key(0)
  )
  places = states.state_shardings(adapted, OPTIMIZER, tiny.RULES, mesh)
  adapters = filled(adapted.abstract_params())
  state = states.from_params(adapters, OPTIMIZER, places)
  step = update.make_step(
      objectives.sft_objective(adapted), OPTIMIZER, microbatches=microbatches, mesh=mesh, shardings=places, frozen=base
  )
  return base, state, step, update.put_batch(tiny.learner_batch(num_rows=8, real_rows=7, seed=0), mesh)


def test_a_step_moves_the_adapters_alone_on_any_mesh_and_in_any_number_of_parts():
  found = []
  for shape, parts in ((ONE, 1), ({'data': 2, 'fsdp': 2, 'tensor': 2}, 2)):
    base, state, step, batch = build(sharding.make_mesh(shape), microbatches=parts)
    before, begun = sharding.to_host(base), sharding.to_host(state['params'])
    state, metrics = step(state, batch)
    jax.tree.map(np.testing.assert_array_equal, sharding.to_host(base), before)
    after = sharding.to_host(state['params'])
    assert all(np.abs(a - b).max() > 1e-4 for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(begun)))
    # State and optimizer know nothing of the base.
    leaves = [path for path, leaf in sharding.leaf_paths(state) if leaf.ndim]
    assert leaves and all(path.endswith(lora.PAIR) for path in leaves)
    found.append((after, float(metrics['loss']), float(metrics['grad_norm'])))
  (one, *numbers), (other, *others) = found
  np.testing.assert_allclose(others, numbers, rtol=1e-4)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), other, one)


def shapes_of(jaxpr):
  """The shapes of all that a program computes, in whatever it calls."""
  for equation in jaxpr.eqns:
    for value in equation.outvars:
      yield tuple(value.aval.shape)
    for inner in core.jaxprs_in_params(equation.params):
      yield from shapes_of(inner)


def test_no_gradient_of_the_size_of_a_kernel_is_computed():
  model = tiny.small_model(remat=True)
  base, batch = model.init(jax.random.key(0)), tiny.learner_batch(num_rows=8, real_rows=7, seed=0)
  adapted = lora.Adapted(model, dataclasses.replace(SETTINGS, targets=('gate', 'down')))
  adapters = filled(adapted.abstract_params())
  loss = objectives.sft_objective(adapted)
  of_adapters = lambda adapters: loss({'frozen': base, 'adapters': adapters}, batch)[0]
  of_all = lambda params: loss(params, batch)[0]
  kernels = {tuple(base['period']['0'][name]['kernel'].shape[1:]) for name in ('gate', 'down')}
  computed = set(shapes_of(jax.make_jaxpr(jax.grad(of_adapters))(adapters).jaxpr))
  assert not computed & kernels, computed & kernels
  # The test sees them where they are.
  everything = set(shapes_of(jax.make_jaxpr(jax.grad(of_all))({'frozen': base, 'adapters': adapters}).jaxpr))
  assert everything & kernels


def test_adapters_are_split_as_their_kernels_are():
  mesh = sharding.make_mesh({'data': 2, 'fsdp': 2, 'tensor': 2})
  adapted = lora.Adapted(Transformer(tiny.model_config()), SETTINGS)
  for rules in (pages.sharding().rules, tiny.RULES):
    places = sharding.tree_shardings(adapted.abstract_params(), rules, mesh)
    spec = {path: tuple(place.spec) for path, place in sharding.leaf_paths(places)}
    block = 'period/1/'
    assert spec[block + 'q/lora_a'] == (None, 'fsdp', None) and spec[block + 'q/lora_b'] == (None, None, 'tensor', None)
    assert spec[block + 'o/lora_a'] == (None, 'tensor', None, None) and spec[block + 'o/lora_b'] == (None, None, 'fsdp')
    assert spec[block + 'down/lora_a'] == (None, 'tensor', None) and spec[block + 'up/lora_b'] == (None, None, 'tensor')


def test_a_checkpoint_holds_adapters_only_and_continues(tmp_path):
  mesh = sharding.make_mesh(ONE)
  base, state, step, batch = build(mesh)
  state, _ = step(state, batch)
  kept = sharding.to_host(state)
  with checkpoint.Checkpoints(tmp_path / 'c', keep=1) as saved:
    saved.save(1, state, {'stage': 'x'})
  whole, _ = step(state, batch)
  adapted = lora.Adapted(tiny.small_model(remat=True), SETTINGS)
  abstract = states.abstract_state(adapted, OPTIMIZER)
  with checkpoint.Checkpoints(tmp_path / 'c', keep=1) as saved:
    restored, _ = saved.restore(  # which refuses a leaf too many
        abstract, states.state_shardings(adapted, OPTIMIZER, tiny.RULES, mesh)
    )
  jax.tree.map(np.testing.assert_array_equal, sharding.to_host(restored), kept)
  again, _ = step(restored, batch)
  jax.tree.map(np.testing.assert_array_equal, sharding.to_host(again), sharding.to_host(whole))


@pytest.mark.parametrize('fields, words', [
    ({'rank': 0}, 'lora.rank: got 0; allowed: a whole number of at least 1'),
    ({'rank': 2.0}, 'lora.rank: got 2.0'),
    ({'alpha': 0.0}, 'lora.alpha: got 0.0'),
    ({'alpha': float('nan')}, 'lora.alpha: got nan'),
    ({'targets': ()}, 'lora.targets: got ()'),
    ({'targets': ('q', 'q')}, "lora.targets: got ('q', 'q')"),
    ({'targets': ('q', 'gates')}, "lora.targets: got 'gates'; this model has down, gate, k, o, q, up, v"),
    ({'targets': ('q', 'attn_norm')}, "got 'attn_norm'; this model has"),
])  # fmt: skip
def test_what_cannot_be_is_refused(fields, words):
  with pytest.raises(ValueError) as caught:
    settings = dataclasses.replace(SETTINGS, **fields)
    lora.adapted(tiny.small_model(), settings)
  assert words in str(caught.value)
