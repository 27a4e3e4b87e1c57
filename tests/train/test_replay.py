"""Replay of kept tokens: importance ratios, the KL and their gradients, against exact expectations in numpy.

The world is a table: `logits[t] = table[tokens[t]]`, one categorical distribution for each last token, so that every
expectation is a sum. Tokens are drawn by `decoding.sample_kept` on a grid of uniforms, so that a mean over the draws
is the expectation up to the step of the grid: within 0.3 % with replay. Without (full-vocabulary log-probabilities)
the mean of ratio x f is 0.74 to 1.07 times what it should be, and that of k3 up to 0.38 too high, at a KL of 0.06.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spct_jax import sharding
from spct_jax.sampling import decoding
from spct_jax.testing import tiny
from spct_jax.train import batches, objectives
from spct_jax.types import Kept, Trajectory

V, CAP, TEMPERATURE, DRAWS = 12, 6, 0.8, 4096
TRUNCATIONS = {  # top_p, top_k, min_p; the last keeps more than the cap
    'top_p': (0.8, 0, 0.0),
    'top_k': (1.0, 4, 0.0),
    'min_p': (1.0, 0, 0.15),
    'both': (0.9, 5, 0.0),
    'capped': (0.99, 0, 0.0),
}


class Table:
  """A bigram model in float32, `params` [V, V]."""

  def hidden(self, params, tokens, lengths):
    return jax.nn.one_hot(tokens, V)

  def unembed(self, params, x):
    return x @ params


def tables(seed, spread=0.7):
  """Old, new and reference table."""
  rng = np.random.default_rng(seed)
  old = rng.normal(size=(V, V))
  return tuple((old + rng.normal(size=(V, V)) * noise).astype(np.float32) for noise in (0.0, spread, spread))


def softmax(x, ids=None):
  """float64 [V] at the temperature, zero outside `ids`."""
  x = x.astype(np.float64) / TEMPERATURE
  p = np.exp(x - x.max())
  if ids is not None:
    p = np.where(np.isin(np.arange(V), ids), p, 0)
  return p / p.sum()


@pytest.fixture(scope='module')
def scores():
  score = lambda kind: jax.jit(
      lambda table, batch: kind(Table(), table, batch, temperature=TEMPERATURE, chunk=0, entropy=False)[0][:, 0]
  )
  return {'replay': score(objectives.kept_scores), 'full': score(objectives.token_scores)}


@pytest.fixture(scope='module')
def draw():
  jitted = jax.jit(decoding.sample_kept, static_argnums=6)

  def drawn(table, context, truncation):
    """-> a batch of DRAWS rows `context ; token`, the tokens, their full log-probabilities, the kept ids."""
    full = lambda value, dtype=jnp.float32: jnp.full(DRAWS, value, dtype)
    top_p, top_k, min_p = truncation
    grid = jnp.asarray((np.arange(DRAWS) + 0.5) / DRAWS, jnp.float32)
    token, logp, kept = jitted(
        jnp.tile(table[context], (DRAWS, 1)), grid, full(TEMPERATURE), full(top_p), full(top_k, jnp.int32),
        full(min_p), CAP,
    )
    token, kept = np.asarray(token), jax.tree.map(np.asarray, kept)
    ids = tuple(v for v in kept.ids[0].tolist() if v >= 0)
    rows = [
        batches.Row('row', (context,), (int(token[i]),), None, None, Kept((ids,), (float(kept.logp[i]),), (9,)))
        for i in range(DRAWS)
    ]
    batch = batches.pad(rows, num_rows=DRAWS, buckets=(2,), pad_id=0, columns={}, replay_kept=CAP)
    return batch, token, np.asarray(logp), np.array(ids)

  return drawn


# Seen to fail when `kept_scores` is over the full vocabulary, when `sampler_logp` is the full one, and when the draw
# ignores the cap ('capped').
@pytest.mark.parametrize('name', TRUNCATIONS)
def test_importance_ratios_over_the_kept_tokens_are_unbiased(scores, draw, name):
  """E over the sampler of ratio x f is that of f under the new policy on the kept set; without replay it is not."""
  f = np.random.default_rng(1).normal(size=V) + 1
  (old, new, _), factors = tables(2), []
  for context in range(4):
    batch, token, logp, ids = draw(old, context, TRUNCATIONS[name])
    assert 2 <= len(ids) <= CAP and (name != 'capped' or len(ids) == CAP)
    exact = softmax(new[context], ids) @ f
    ratio = np.exp(np.asarray(scores['replay'](new, batch)) - batch['sampler_logp'][:, 0])
    np.testing.assert_allclose((ratio * f[token]).mean(), exact, rtol=3e-3)
    np.testing.assert_allclose(ratio.mean(), 1, rtol=3e-3)
    biased = np.exp(np.asarray(scores['full'](new, batch)) - logp)
    factors.append(softmax(new[context])[ids].sum() / softmax(old[context])[ids].sum())
    np.testing.assert_allclose((biased * f[token]).mean(), exact * factors[-1], rtol=3e-3)
  assert max(abs(np.array(factors) - 1)) > 0.02  # so that either test above fails on the other's ratios


# Seen to fail when `kept_scores` is over the full vocabulary.
@pytest.mark.parametrize('name', ['top_p', 'capped'])
def test_the_kl_is_that_of_the_distributions_that_are_sampled(scores, draw, name):
  policy, _, reference = tables(3, spread=1.5)
  off = []
  for context in range(8):
    batch, _, _, ids = draw(policy, context, TRUNCATIONS[name])
    p, r = softmax(policy[context], ids)[ids], softmax(reference[context], ids)[ids]
    exact = (p * np.log(p / r)).sum()
    k3 = {}
    for kind, score in scores.items():
      x = np.asarray(score(reference, batch), np.float64) - np.asarray(score(policy, batch))
      k3[kind] = (np.exp(x) - x - 1).mean()
    np.testing.assert_allclose(k3['replay'], exact, rtol=2e-3, atol=3e-4)
    rho = softmax(reference[context])[ids].sum() / softmax(policy[context])[ids].sum()
    np.testing.assert_allclose(k3['full'], exact + rho - 1 - np.log(rho), rtol=2e-3, atol=3e-4)
    off.append(k3['full'] - exact)
  assert max(off) > 0.02


def random_rows(seed):
  """Rows of tokens with kept sets of 1 to CAP tokens, and what old and reference policies gave them."""
  rng = np.random.default_rng(seed)
  rows = []
  for i, length in enumerate((5, 1, 7, 3)):
    completion = rng.integers(0, V, length)
    ids = []
    for token in completion:
      others = rng.permutation([v for v in range(V) if v != token])[: rng.integers(0, CAP)]
      ids.append(tuple(rng.permutation([token, *others]).tolist()))
    logp = tuple((-rng.random(length)).tolist())
    rows.append(batches.Row(
        f'row {i}', tuple(rng.integers(0, V, 1 + i).tolist()), tuple(completion.tolist()), logp,
        kept=Kept(tuple(ids), logp, (3,) * length),
    ))
  return rows


# Seen to fail when the gradient is that of the full softmax, when a set's padding counts as token 0, and when the
# sets of a chunk are those of the chunk before.
@pytest.mark.parametrize('chunk', [0, 3])
def test_the_gradient_is_exact(chunk):
  clip, beta, rows = 0.2, 0.3, random_rows(5)
  table, advantage = tables(6)[1], np.array([1.5, -0.7, 0.4, -1.2])
  batch = batches.pad(
      rows, num_rows=5, buckets=(12,), pad_id=0, columns={'advantage': advantage.astype(np.float32)}, replay_kept=CAP
  )
  rng = np.random.default_rng(7)
  mask = batch['token_mask']
  hidden = np.argwhere(mask)[4]  # a position whose set is unknown: over the full vocabulary
  batch['kept_ids'][tuple(hidden)] = -1
  logp = np.zeros(mask.shape)
  p = np.zeros((*mask.shape, V))
  for q, t in np.argwhere(mask):
    ids = batch['kept_ids'][q, t]
    p[q, t] = softmax(table[batch['tokens'][q, t]], ids[ids >= 0] if (ids >= 0).any() else None)
    logp[q, t] = np.log(p[q, t, batch['tokens'][q, t + 1]])
  for name in ('old_logp', 'ref_logp'):
    batch[name] = np.where(mask, logp + rng.normal(size=mask.shape) * 0.3, 0).astype(np.float32)

  total, expected, clipped = 0.0, np.zeros((V, V)), 0
  for q, t in np.argwhere(mask):
    a, share = advantage[q], 1 / mask[q].sum()
    ratio = np.exp(logp[q, t] - np.float64(batch['old_logp'][q, t]))
    x = np.float64(batch['ref_logp'][q, t]) - logp[q, t]
    cut = np.clip(ratio, 1 - clip, 1 + clip)
    total -= share * (min(ratio * a, cut * a) - beta * (np.exp(x) - x - 1))
    slope = (a * ratio if ratio * a <= cut * a else 0) - beta * (1 - np.exp(x))
    clipped += ratio * a > cut * a
    context, token = batch['tokens'][q, t], batch['tokens'][q, t + 1]
    expected[context] -= share * slope * ((np.arange(V) == token) - p[q, t]) / TEMPERATURE
  assert 0 < clipped < mask.sum()

  objective = objectives.grpo_objective(Table(), clip, beta, TEMPERATURE, chunk=chunk, replay=True)

  def split(table):
    total, *rest = objective(table, batch)
    return total, rest

  grad = jax.jit(jax.value_and_grad(split, has_aux=True))
  (got, (count, aux)), gradient = grad(jnp.asarray(table))
  np.testing.assert_allclose(got, total, rtol=1e-5)
  np.testing.assert_allclose(gradient, expected, atol=2e-6)
  assert count == 4
  mass = np.array([softmax(table[batch['tokens'][q, t]])[p[q, t] > 0].sum() for q, t in np.argwhere(mask)])
  np.testing.assert_allclose(aux['kept_mass'][0] / aux['kept_mass'][1], mass.mean(), rtol=1e-5)
  gap = np.abs(logp - batch['sampler_logp'])[mask]
  np.testing.assert_allclose(aux['logp_gap'][0] / aux['logp_gap'][1], gap.mean(), rtol=1e-4)


# Eight devices, the vocabulary over two of them: the ids are of the whole one.
def test_a_split_vocabulary_gives_the_same_scores():
  model = tiny.small_model()
  params = jax.jit(model.init)(jax.random.key(1))
  rows = random_rows(8)
  batch = batches.pad(rows * 2, num_rows=8, buckets=(12,), pad_id=0, columns={}, replay_kept=CAP)
  batch['kept_ids'] = np.where(batch['kept_ids'] >= 0, batch['kept_ids'] * 5, -1)  # ids to 55 of 61
  batch['tokens'] = batch['tokens'] * 5
  one = objectives.token_logp(model, sharding.make_mesh({'data': 1}), replay=True)(params, batch, np.float32(0.7))
  logits = np.asarray(model.apply({'params': params}, batch['tokens']), np.float64) / 0.7
  for q, t in np.argwhere(batch['token_mask']):
    ids = batch['kept_ids'][q, t]
    want = logits[q, t, batch['tokens'][q, t + 1]] - np.log(np.exp(logits[q, t, ids[ids >= 0]]).sum())
    np.testing.assert_allclose(one[q, t], want, atol=1e-5)
  mesh = sharding.make_mesh(dict(data=2, fsdp=2, tensor=2))
  spread = jax.device_put(params, sharding.tree_shardings(params, tiny.RULES, mesh))
  put = sharding.to_device(batch, sharding.batch_rows(mesh))
  many = objectives.token_logp(model, mesh, chunk=5, replay=True)(spread, put, np.float32(0.7))
  np.testing.assert_allclose(np.where(batch['token_mask'], many, 0), np.where(batch['token_mask'], one, 0), atol=1e-5)


def test_masked_rows_and_positions_without_a_set_have_finite_zero_gradients():
  batch = batches.pad(
      random_rows(5), num_rows=6, buckets=(12,), pad_id=0, columns={'advantage': np.ones(4, np.float32)},
      replay_kept=CAP,
  )
  batch['token_mask'][:] = False
  batch['kept_ids'][:] = -1
  batch |= {name: np.full((6, 12), np.nan, np.float32) for name in ('old_logp', 'ref_logp', 'sampler_logp')}
  objective = objectives.grpo_objective(Table(), 0.2, 0.3, TEMPERATURE, replay=True)
  total, gradient = jax.jit(jax.value_and_grad(lambda table: objective(table, batch)[0]))(jnp.asarray(tables(6)[1]))
  assert total == 0 and not np.asarray(gradient).any()


# Seen to fail when the column has a position too many before it.
def test_the_frame_of_a_batch():
  kept = Kept(ids=((7, 8, 3), (9,)), logp=(-0.25, 0.0), count=(5, 1))
  row = batches.Row('r', (5, 6), (8, 9), (-1.5, -0.75), kept=kept)
  batch = batches.pad([row], num_rows=2, buckets=(6,), pad_id=0, columns={}, replay_kept=3)
  none = [-1] * 3
  assert batch['kept_ids'].tolist() == [[none, [7, 8, 3], [9, -1, -1], none, none, none], [none] * 6]
  assert batch['sampler_logp'][0].tolist() == [0, -0.25, 0, 0, 0, 0]
  plain = batches.pad([row], num_rows=2, buckets=(6,), pad_id=0, columns={})
  assert plain['sampler_logp'][0].tolist() == [0, -1.5, -0.75, 0, 0, 0] and 'kept_ids' not in plain


def test_what_was_not_recorded_cannot_be_replayed():
  kept = Kept(ids=((7, 8, 3), (9,)), logp=(-0.25, 0.0), count=(5, 1))
  one = Trajectory('u', 0, 0, (0, 1), False, (5, 6), (8, 9), (-1.5, -0.75), 'text', None, 'no scores', kept)
  row = batches.from_trajectory(one)
  assert row.kept == kept and batches.from_trajectory(one, (1, 2)).kept is None
  pad = lambda row, width: batches.pad([row], num_rows=1, buckets=(6,), pad_id=0, columns={}, replay_kept=width)
  with pytest.raises(ValueError, match='u sample 0 visit 0: 3 kept tokens at a step, more than the 2 that are'):
    pad(row, 2)
  bare = batches.from_trajectory(dataclasses.replace(one, kept=None))
  with pytest.raises(ValueError, match='was not recorded, so it cannot be replayed; sample with an engine'):
    pad(bare, 3)
  with pytest.raises(ValueError, match='token 1, id 9, is not among the 1 that it was drawn from'):
    batches.from_trajectory(dataclasses.replace(one, kept=dataclasses.replace(kept, ids=((8,), (7,)))))
  with pytest.raises(ValueError, match='kept ids of 1 tokens for 2 completion'):
    batches.from_trajectory(dataclasses.replace(one, kept=dataclasses.replace(kept, ids=((8,),))))
  batch = batches.pad([bare], num_rows=1, buckets=(6,), pad_id=0, columns={'advantage': np.ones(1)})
  batch |= {'old_logp': batch['sampler_logp'], 'ref_logp': batch['sampler_logp']}
  with pytest.raises(ValueError, match="the batch has no column 'kept_ids'"):
    objectives.grpo_objective(Table(), 0.2, 0.3, 1.0, replay=True)(jnp.zeros((V, V)), batch)
