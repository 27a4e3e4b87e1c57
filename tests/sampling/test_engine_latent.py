"""The engine with latent attention and experts: the cache holds latents, and nothing else changes."""

import dataclasses

import jax
import numpy as np
import pytest

from spct_jax import pages, sharding

pytestmark = pytest.mark.usefixtures('compiled_quickly')


# The engine attends to latents, the learner's pass to the keys and values made from them.
# Seen to fail: the value taken from the end of the latent.
def test_logp_is_that_of_the_learner_and_of_eight_devices(latent):
  page = pages.sharding()
  engine = latent.engine(latent.model, rows=3)
  one = engine.generate(latent.params, latent.prompts, latent.tasks)
  logits = latent.learner_logits(one, latent.prompts, latent.tasks)
  logp = np.asarray(jax.nn.log_softmax(logits, axis=-1))
  logp = np.take_along_axis(logp, one.tokens[..., None], axis=-1)[..., 0]
  np.testing.assert_allclose(one.logp[one.token_mask], logp[one.token_mask], atol=1e-5)

  mesh = sharding.make_mesh(dict(data=2, fsdp=2, tensor=2))
  params = sharding.to_device(latent.params, sharding.tree_shardings(latent.params, page.sampler_rules, mesh))
  engine = dataclasses.replace(engine, mesh=mesh, cache_rules=page.cache_rules)
  many = engine.generate(params, latent.prompts, latent.tasks)
  np.testing.assert_array_equal(many.tokens, one.tokens)
  np.testing.assert_allclose(many.logp, one.logp, atol=1e-4)
  shapes = jax.tree.map(lambda where: where.spec, engine.cache_shardings(5, 8))
  assert shapes['rows']['head']['0']['latent'] == jax.P(('data', 'fsdp'), None, None, None)
