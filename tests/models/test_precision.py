"""What must be float32 although the model computes in bfloat16 (design decision 7).

Mutations seen to fail, one per test: attention scores accumulated in the dtype of q; rotary positions cast to
bfloat16; the reward computed in bfloat16; gradients of microbatches summed in bfloat16.
"""

import jax
import jax.numpy as jnp
import numpy as np

from spct_jax import sharding
from spct_jax.models import attention, primitives, reward_head
from spct_jax.models.config import BlockConfig
from spct_jax.train import optim, update


def test_scores_of_attention_are_float32():
  rng = np.random.default_rng(0)
  q = rng.normal(size=(1, 1, 1, 64)) * 4
  k = np.repeat(q, 8, axis=1) + rng.normal(size=(1, 8, 1, 64)) * 0.25  # scores near 1000, where bfloat16 steps by 4
  v = np.eye(8)[None, :, None, :].repeat(8, axis=-1)
  q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in (q, k, v))
  got = np.asarray(attention.dot_product(q, k, v, jnp.ones((1, 1, 8), bool), scale=64**-0.5, softcap=None), np.float64)
  wide = [np.asarray(x, np.float64) for x in (q, k, v)]
  scores = np.einsum('bthd,bshd->bts', wide[0], wide[1]) * 64**-0.5
  weights = np.exp(scores - scores.max())
  expected = np.einsum('bts,bshd->bthd', weights / weights.sum(), wide[2])
  np.testing.assert_allclose(got, expected, atol=0.01)


def test_positions_beyond_256_differ():
  x = jnp.ones((1, 2, 1, 8), jnp.bfloat16)
  turned = primitives.rope(x, jnp.asarray([[256, 257]]), BlockConfig())
  assert not np.array_equal(np.asarray(turned[0, 0], np.float32), np.asarray(turned[0, 1], np.float32))


def test_rewards_are_not_rounded_to_ties():
  params = {'kernel': jnp.ones((2, 1), jnp.bfloat16)}
  x = jnp.asarray([[100.0, 0.25], [100.0, 0.125]], jnp.bfloat16)
  np.testing.assert_array_equal(np.asarray(reward_head.reward(params, x)), [100.25, 100.125])


def test_gradients_of_microbatches_are_summed_in_float32():
  """Microbatches of gradient 1: in bfloat16 the running sum stays at 256 once it is there, and 512 rows need more."""
  settings = optim.OptimSettings(
      schedule='constant', learning_rate=1.0, warmup_steps=0, total_steps=1, end_fraction=0.0, b1=0.0, b2=0.0,
      eps=1.0, weight_decay=0.0, clip_norm=0.0,
  )
  mesh = sharding.make_mesh({'data': 1})
  where = sharding.replicated(mesh)
  optimizer = optim.make_optimizer(settings)
  params = {'kernel': jnp.zeros((1,), jnp.bfloat16)}
  state = {'params': params, 'opt_state': optimizer.transform.init(params), 'step': jnp.int32(0)}
  loss = lambda p, batch: (jnp.sum(p['kernel'].astype(jnp.float32)) * batch['x'].sum(), jnp.float32(1), {})
  step = update.make_step(
      loss, optimizer, microbatches=512, mesh=mesh, shardings=jax.tree.map(lambda _: where, state)
  )
  _, metrics = step(jax.device_put(state, where), update.put_batch({'x': np.ones(512, np.float32)}, mesh))
  # The sum of 512 gradients of 1 over a count of 512: a norm of exactly 1.
  assert float(metrics['grad_norm']) == 1.0
