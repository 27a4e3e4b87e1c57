"""Per-token scores against numpy, chunks against the whole, masked batches, padding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spct_jax import sharding
from spct_jax.testing import tiny
from spct_jax.train import batches
from spct_jax.train import objectives

MODEL, SCALAR = tiny.small_model(), tiny.small_model(head_kind='scalar')


@functools.cache
def _params(kind):
  return {'lm': MODEL, 'scalar': SCALAR}[kind].init(jax.random.key(0))


def _batch(seed=0, rows=4, **kwargs):
  return tiny.learner_batch(num_rows=rows, real_rows=rows, seed=seed, **kwargs)


@jax.jit
def _logits(params, tokens):
  return MODEL.apply({'params': params}, tokens)


def _numpy_scores(batch, temperature):
  """Row by row: softmax of the logits of the row alone, without the lengths that the objectives pass."""
  logp, entropy = np.zeros(batch['tokens'].shape), np.zeros(batch['tokens'].shape)
  for q, n in enumerate(batch['lengths']):
    row = batch['tokens'][q, :n]
    logits = np.asarray(_logits(_params('lm'), batch['tokens'][q : q + 1])[0], np.float64) / temperature
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    for t in range(n - 1):
      logp[q, t] = np.log(probs[t, row[t + 1]])
      entropy[q, t] = -(probs[t] * np.log(probs[t])).sum()
  return logp, entropy


# Mutations seen: target t instead of t + 1; no division by the temperature; entropy of unnormalised logits.
@pytest.mark.parametrize('temperature, chunk', [(1.0, 0), (0.5, 4), (2.0, 5)])
def test_token_scores_are_the_softmax_of_numpy(temperature, chunk):
  batch = _batch()
  logp, entropy = jax.jit(
      lambda params, batch: objectives.token_scores(
          MODEL, params, batch, temperature=temperature, chunk=chunk, entropy=True
      )
  )(_params('lm'), batch)
  expected_logp, expected_entropy = _numpy_scores(batch, temperature)
  real = np.arange(16)[None] < batch['lengths'][:, None] - 1
  np.testing.assert_allclose(np.where(real, logp, 0), expected_logp, atol=2e-5)
  np.testing.assert_allclose(np.where(real, entropy, 0), expected_entropy, atol=2e-5)
  assert np.all(np.asarray(logp)[:, -1] == 0)


# Mutation seen: a division by temperature 0.
def test_temperature_zero_is_scored_at_one():
  batch, mesh = _batch(), sharding.make_mesh({'data': 4})
  logp = objectives.token_logp(MODEL, mesh)
  scores = [logp(_params('lm'), batch, np.float32(t)) for t in (0.0, 1.0, 0.5)]
  np.testing.assert_array_equal(scores[0], scores[1])
  assert np.abs(np.asarray(scores[0] - scores[2])).max() > 0.1
  assert logp._cache_size() == 1  # the temperature is an argument, not a constant
  assert scores[0].sharding.spec == sharding.batch_rows(mesh).spec


def test_chunks_change_no_gradient():
  batch = _batch()
  def grads(chunk):
    objective = objectives.grpo_objective(MODEL, 0.2, 0.08, 0.7, chunk=chunk)
    return jax.jit(jax.grad(lambda params: objective(params, batch)[0]))(_params('lm'))
  for a, b in zip(jax.tree.leaves(grads(0)), jax.tree.leaves(grads(6))):
    np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5)


# Mutation seen: the loss over prompts too.
def test_sft_loss_is_minus_the_completion_logp():
  batch = _batch()
  total, count, aux = jax.jit(objectives.sft_objective(MODEL))(_params('lm'), batch)
  expected, _ = _numpy_scores(batch, 1.0)
  np.testing.assert_allclose(total, -expected[batch['token_mask']].sum(), rtol=1e-5)
  assert count == batch['token_mask'].sum() and not aux


# Mutations seen: `Row.learnt` ignored; `learnt` one position later.
def test_what_is_not_learnt_is_context_and_no_target():
  def batch(*completion):
    row = batches.Row('r', (5, 6), completion, learnt=(True, False, True, False, False))
    return batches.pad([row], num_rows=1, buckets=(16,), pad_id=0, columns={})

  objective = objectives.sft_objective(MODEL)
  grads = jax.jit(jax.value_and_grad(lambda params, batch: objective(params, batch)[0]))
  base = grads(_params('lm'), batch(11, 12, 13, 14, 15))
  # The last two are nobody's context: what they are changes no bit.
  for a, b in zip(jax.tree.leaves(base), jax.tree.leaves(grads(_params('lm'), batch(11, 12, 13, 24, 25)))):
    np.testing.assert_array_equal(a, b)
  # The second is context of the third, and nothing else: the loss is that of the first and third alone.
  other = grads(_params('lm'), batch(11, 22, 13, 14, 15))
  assert any(np.abs(np.asarray(a - b)).max() > 1e-4 for a, b in zip(*map(jax.tree.leaves, (base[1], other[1]))))
  for (total, _), second in ((base, 12), (other, 22)):
    tokens = np.array([[5, 6, 11, second, 13]], np.int32)
    logp = jax.nn.log_softmax(_logits(_params('lm'), tokens)[0])
    np.testing.assert_allclose(total, -(logp[1, 11] + logp[3, 13]), rtol=1e-5)


# Mutations seen: old_logp and ref_logp exchanged; gap against old_logp instead of the sampler's.
def test_grpo_by_numpy():
  batch = _batch()
  total, count, aux = jax.jit(objectives.grpo_objective(MODEL, 0.2, 0.3, 0.8))(_params('lm'), batch)
  logp, entropy = _numpy_scores(batch, 0.8)
  mask = batch['token_mask']
  expected = 0.0
  for q in range(4):
    m = mask[q]
    ratio = np.exp(logp[q, m] - batch['old_logp'][q, m].astype(np.float64))
    x = batch['ref_logp'][q, m].astype(np.float64) - logp[q, m]
    a = batch['advantage'][q]
    surrogate = np.minimum(ratio * a, np.clip(ratio, 0.8, 1.2) * a)
    expected -= (surrogate - 0.3 * (np.exp(x) - x - 1)).mean()
  np.testing.assert_allclose(total, expected, rtol=1e-4)
  assert count == 4
  gap = np.abs(logp - batch['sampler_logp'])[mask]
  np.testing.assert_allclose(aux['logp_gap'][0] / aux['logp_gap'][1], gap.mean(), rtol=1e-4)
  np.testing.assert_allclose(aux['logp_gap_max'][0], gap.max(), rtol=1e-4)
  np.testing.assert_allclose(aux['entropy'][0] / aux['entropy'][1], entropy[mask].mean(), rtol=1e-4)
  assert {'kl', 'ratio', 'clip_fraction'} < set(aux)


def test_meta_rm_by_numpy():
  batch = _batch()
  batch['row_mask'] = np.array([True, True, False, True])
  total, count, aux = jax.jit(objectives.meta_rm_objective(SCALAR))(_params('scalar'), batch)
  logit = SCALAR.apply({'params': _params('scalar')}, batch['tokens'], lengths=batch['lengths'])
  logit = np.asarray(logit, np.float64)
  sign = np.where(batch['target'], 1, -1)
  np.testing.assert_allclose(total, np.log1p(np.exp(-sign * logit))[batch['row_mask']].sum(), rtol=1e-5)
  right = (logit > 0) == batch['target']
  assert count == 3 and aux['accuracy'] == (right[batch['row_mask']].sum(), 3)


def _objectives():
  return {
      'sft': (objectives.sft_objective(MODEL), 'lm'),
      'grpo': (objectives.grpo_objective(MODEL, 0.2, 0.08, 0.7), 'lm'),
      'meta_rm': (objectives.meta_rm_objective(SCALAR), 'scalar'),
  }


# Mutation seen: the objective of the meta-RM without its row_mask.
@pytest.mark.parametrize('name', ['sft', 'grpo', 'meta_rm'])
def test_padding_rows_and_padding_tokens_add_nothing(name):
  loss_fn, kind = _objectives()[name]
  full = _batch(rows=4)
  padded = {key: np.concatenate([value, np.zeros_like(value)]) for key, value in full.items()}
  padded['lengths'][4:] = 1
  padded['advantage'][4:] = 100.0
  if name == 'sft':  # and a longer bucket
    wide = {k: np.pad(v, ((0, 0), (0, 8)), constant_values=17 if k == 'tokens' else 0) if v.ndim == 2 else v
            for k, v in padded.items()}
    padded = wide
  grad = jax.jit(jax.value_and_grad(lambda params, batch: loss_fn(params, batch)[:2], has_aux=True))
  for a, b in zip(*(jax.tree.leaves(grad(_params(kind), batch)) for batch in (full, padded))):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', ['sft', 'grpo', 'meta_rm'])
def test_an_all_masked_batch_has_finite_zero_gradients(name):
  loss_fn, kind = _objectives()[name]
  batch = _batch()
  batch['token_mask'] = np.zeros_like(batch['token_mask'])
  batch['row_mask'] = np.zeros_like(batch['row_mask'])
  batch['sampler_logp'] = np.full_like(batch['sampler_logp'], np.nan)
  def split(params):
    total, count, aux = loss_fn(params, batch)
    return total, (count, aux)

  (total, (count, aux)), grads = jax.jit(jax.value_and_grad(split, has_aux=True))(_params(kind))
  assert total == 0 and count == 0
  assert all(np.all(np.asarray(g) == 0) for g in jax.tree.leaves(grads))
  assert all(np.isfinite(total) for total, _ in aux.values())


def test_a_missing_column_is_named():
  batch = {name: value for name, value in _batch().items() if name != 'ref_logp'}
  with pytest.raises(ValueError, match="no column 'ref_logp'; this objective needs token_mask, advantage"):
    objectives.grpo_objective(MODEL, 0.2, 0.08, 1.0)(_params('lm'), batch)


def test_learner_scores_what_a_sampler_would_record():
  """The frame, end to end: the log-probability of each sampled token, drawn step by step from the model."""
  rng, prompt, completion, recorded = np.random.default_rng(3), [5, 7, 9], [], []
  for _ in range(4):
    so_far = prompt + completion
    logits = _logits(_params('lm'), np.array([so_far + [0] * (16 - len(so_far))]))[0, len(so_far) - 1] / 0.6
    logp = np.asarray(jax.nn.log_softmax(logits))
    token = int(rng.choice(61, p=np.exp(logp) / np.exp(logp).sum()))
    recorded.append(float(logp[token]))
    completion.append(token)
  row = batches.Row('one', tuple(prompt), tuple(completion), tuple(recorded))
  batch = batches.pad([row], num_rows=1, buckets=(12,), pad_id=0, columns={})
  logp = objectives.token_logp(MODEL, sharding.make_mesh({}))(_params('lm'), batch, 0.6)
  np.testing.assert_allclose(jnp.where(batch['token_mask'], logp, 0), batch['sampler_logp'], atol=1e-5)
