"""Chi-square tests on the tokens of the compiled engine, for each truncation, with mixed rows, after refills.

Every task is one sample of a known two-token distribution p(a) p(b | a): the logits come from the
uncached model, the truncation from a sort in float64. Rows are few, so nearly all tasks run on refilled
rows. Fixed seeds; a test fails below a p-value of 1e-4, or when any token outside the support appears.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from spct_jax.testing import tiny

SETTINGS = {  # temperature, top_p, top_k, min_p
    'none': (1.0, 1.0, 0, 0.0),
    'top_k': (1.0, 1.0, 3, 0.0),
    'top_p': (1.0, 0.7, 0, 0.0),
    'min_p': (1.0, 1.0, 0, 0.3),
    'temperature': (0.5, 1.0, 0, 0.0),
    'combined': (1.5, 0.93, 9, 0.25),
}
SAMPLES = 2400


def chi_square(counts, expected):
  """p-value with neighbouring rare cells pooled until each holds at least 8 expected."""
  order = np.argsort(expected, kind='stable')
  counts, expected = counts[order], expected[order]
  bins = np.floor(np.cumsum(expected) / 8).astype(int)
  bins = np.minimum(bins, max(bins.max() - 1, 0))
  observed, wanted = np.bincount(bins, counts), np.bincount(bins, expected)
  observed, wanted = observed[wanted > 0], wanted[wanted > 0]
  return scipy.stats.chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue


@pytest.fixture(scope='module')
def small(rig, oracle):
  """All settings mixed in one batch of 14,400 two-token tasks on 200 rows: task q has setting q mod 6."""
  model = tiny.small_model(vocab_size=13)
  params = jax.jit(model.init)(jax.random.key(2))
  prompts = rig.make_prompts(13, lengths=(4, 1), P=4)
  Q = SAMPLES * len(SETTINGS)
  tasks = rig.make_tasks(np.arange(Q) // len(SETTINGS) % 2, np.arange(Q), tuple(SETTINGS.values()))
  got = rig.engine(model, rows=200, T=2, eos_ids=(12,)).generate(params, prompts, tasks)

  def logits(prompt):
    """[V] for the first token, [V, V] for the second after each first."""
    n = prompts.length[prompt]
    whole = np.concatenate([np.tile(prompts.tokens[prompt, :n], (13, 1)), np.arange(13)[:, None]], axis=1)
    out = np.asarray(model.apply({'params': params}, jnp.asarray(whole)))
    return out[0, n - 1], out[:, n]

  def joint(prompt, setting):
    first, second = logits(prompt)
    p = np.zeros((13, 14))  # column 13: no second token, because the first ended the sequence
    p[:, :13] = oracle(first, *setting)[:, None] * np.stack([oracle(row, *setting) for row in second])
    p[12] = np.eye(14)[13] * oracle(first, *setting)[12]
    return p

  return got, tasks, joint


# Seen to fail when a threshold of top_k or top_p is one token off, when a row takes the settings of the row
# above it, when uniforms are keyed by the row, without the token index or without the sample, and when
# `min_p` is applied to the untempered probabilities ('combined').
@pytest.mark.parametrize('prompt', [0, 1])
@pytest.mark.parametrize('name', SETTINGS)
def test_tokens_follow_the_truncated_distribution(small, name, prompt):
  got, tasks, joint = small
  mine = (np.arange(len(tasks.prompt)) % len(SETTINGS) == list(SETTINGS).index(name)) & (tasks.prompt == prompt)
  second = np.where(got.token_mask[mine, 1], got.tokens[mine, 1], 13)
  counts = np.zeros((13, 14))
  np.add.at(counts, (got.tokens[mine, 0], second), 1)
  p = joint(prompt, SETTINGS[name])
  assert not counts[p == 0].any()
  assert not (counts[p * counts.sum() > 20] == 0).any()
  assert chi_square(counts[p > 0], p[p > 0] * counts.sum()) > 1e-4


# Seen to fail when the cap leaves the draw alone, and when it is one token off.
def test_a_capped_set_is_what_is_drawn(rig, oracle):
  """A row keeps its `kept` likeliest of what truncation leaves, and draws from those; `none` is cut too."""
  settings = [SETTINGS[name] for name in ('none', 'top_p', 'combined')]
  model, Q = tiny.small_model(vocab_size=13), 1200 * 3
  params = jax.jit(model.init)(jax.random.key(2))
  prompts = rig.make_prompts(13, lengths=(4,), P=4)
  tasks = rig.make_tasks(np.zeros(Q, int), np.arange(Q), settings)
  got = rig.engine(model, rows=100, T=1, eos_ids=(12,), kept=4).generate(params, prompts, tasks)
  logits = np.asarray(model.apply({'params': params}, jnp.asarray(prompts.tokens)))[0, -1]
  for i, setting in enumerate(settings):
    p = oracle(logits, *setting)
    assert (p > 0).sum() == got.kept.count[i, 0] > 4
    p = np.where(p >= np.sort(p)[-4], p, 0) / np.sort(p)[-4:].sum()
    mine = got.tokens[i::3, 0]
    assert set(mine.tolist()) == set(np.flatnonzero(p)) == set(got.kept.ids[i, 0].tolist())
    np.testing.assert_allclose(got.kept.logp[i::3, 0], np.log(p[mine]), atol=1e-5)
    counts = np.bincount(mine, minlength=13)
    assert chi_square(counts[p > 0], p[p > 0] * len(mine)) > 1e-4


LARGE = {
    'none': (1.0, 1.0, 0, 0.0),
    'top_k': (0.7, 1.0, 40, 0.0),
    'top_p': (0.25, 0.6, 0, 0.0),
    'min_p': (0.3, 1.0, 0, 0.1),
}


@pytest.fixture(scope='module')
def large(rig):
  """33,000 tokens: over 32k, and no multiple of the block of the two-level draw."""
  model = tiny.small_model(vocab_size=33000)
  params = jax.jit(model.init)(jax.random.key(3))
  prompts = rig.make_prompts(33000, lengths=(3,), P=4)
  Q = 700 * len(LARGE)
  tasks = rig.make_tasks(np.zeros(Q, int), np.arange(Q), tuple(LARGE.values()))
  got = rig.engine(model, rows=64, T=1, eos_ids=()).generate(params, prompts, tasks)
  logits = np.asarray(model.apply({'params': params}, jnp.asarray(prompts.tokens[:, :3])))[0, -1]
  return got, logits


# Seen to fail when the place inside a block ignores what is left of the uniform.
@pytest.mark.parametrize('name', LARGE)
def test_a_vocabulary_over_32k(large, oracle, name):
  got, logits = large
  tokens = got.tokens[list(LARGE).index(name) :: len(LARGE), 0]
  p = oracle(logits, *LARGE[name])
  counts = np.bincount(tokens, minlength=33000)
  assert not counts[p == 0].any()
  assert chi_square(counts[p > 0], p[p > 0] * len(tokens)) > 1e-4
  by_id = np.array_split(np.arange(33000), 60)  # neighbours by id: what an error in the two levels would move
  expected = np.array([p[part].sum() for part in by_id]) * len(tokens)
  observed = np.array([counts[part].sum() for part in by_id])
  assert chi_square(observed[expected > 0], expected[expected > 0]) > 1e-4
