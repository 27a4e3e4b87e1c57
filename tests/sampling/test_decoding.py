"""Truncation against a sort-based numpy oracle and against the Hugging Face warpers; the draw itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spct_jax.sampling import decoding

sample = jax.jit(lambda *arguments: decoding.sample(*arguments))
truncate = jax.jit(decoding.truncate)

SETTINGS = {  # temperature, top_p, top_k, min_p
    'none': (1.0, 1.0, 0, 0.0),
    'top_k': (1.0, 1.0, 7, 0.0),
    'top_p': (1.0, 0.8, 0, 0.0),
    'min_p': (1.0, 1.0, 0, 0.1),
    'temperature': (0.6, 1.0, 0, 0.0),
    'combined': (1.4, 0.9, 20, 0.05),
}


def arrays(settings):
  temperature, top_p, top_k, min_p = zip(*settings)
  real = lambda x: jnp.asarray(x, jnp.float32)
  return real(temperature), real(top_p), jnp.asarray(top_k, jnp.int32), real(min_p)


def support(logits, settings):
  """The tokens that `truncate` leaves in, at the temperature of `settings`."""
  temperature, top_p, top_k, min_p = arrays(settings)
  scaled = (logits - logits.max(axis=1, keepdims=True)) / temperature[:, None]
  return np.asarray(truncate(jnp.asarray(logits), jnp.exp(scaled), top_p, top_k, min_p))


def random_logits(rows, vocabulary, seed=0, scale=2.0):
  return (np.random.default_rng(seed).normal(size=(rows, vocabulary)) * scale).astype(np.float32)


# Seen to fail when `_bisect` returns the next integer up, when a tie is cut, when top_k counts `>=` instead
# of `>`, and when the mass wanted by top_p is of the full row instead of the survivors of top_k.
@pytest.mark.parametrize('vocabulary', [5, 300, 1031])
def test_support_equals_sorted_oracle_with_mixed_rows(oracle, vocabulary):
  settings = list(SETTINGS.values()) + [(0.3, 0.99, 3, 0.3), (1.0, 0.01, 0, 0.0), (2.0, 1.0, 1, 0.0)]
  logits = random_logits(len(settings), vocabulary)
  want = np.stack([oracle(row, *setting) > 0 for row, setting in zip(logits, settings)])
  np.testing.assert_array_equal(support(logits, settings), want)


@pytest.mark.parametrize('name', ['top_k', 'top_p', 'min_p', 'combined'])
def test_support_equals_hugging_face_warpers(name):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  temperature, top_p, top_k, min_p = SETTINGS[name]
  logits = random_logits(32, 500, seed=1)
  scores = transformers.TemperatureLogitsWarper(temperature)(None, torch.tensor(logits))
  if top_k:
    scores = transformers.TopKLogitsWarper(top_k)(None, scores)
  if top_p < 1:
    scores = transformers.TopPLogitsWarper(top_p)(None, scores)
  if min_p:
    scores = transformers.MinPLogitsWarper(min_p)(None, scores)
  np.testing.assert_array_equal(support(logits, [SETTINGS[name]] * 32), np.isfinite(scores.numpy()))


def test_ties_at_a_threshold_stay_together():
  logits = np.array([[3.0, 1.0, 2.0, 2.0, 2.0, 0.0]], np.float32)
  np.testing.assert_array_equal(support(logits, [(1.0, 1.0, 2, 0.0)])[0], [1, 0, 1, 1, 1, 0])
  # the top token holds 0.44 of the mass, the three next 0.16 each
  np.testing.assert_array_equal(support(logits, [(1.0, 0.5, 0, 0.0)])[0], [1, 0, 1, 1, 1, 0])
  np.testing.assert_array_equal(support(np.zeros((1, 6), np.float32), [(1.0, 0.1, 1, 0.0)])[0], [1] * 6)
  zeros = np.array([[0.0, -0.0, -1.0]], np.float32)
  np.testing.assert_array_equal(support(zeros, [(1.0, 1.0, 1, 0.0)])[0], [1, 1, 0])


# Seen to fail when the draw takes the first running sum >= the target (a uniform of 0 then picks token 0
# even where it has no weight) and when `_pick` lacks its fallback to the last positive entry.
@pytest.mark.parametrize('uniform', [0.0, 1e-30, 0.5, 1 - 2**-24, 1.0])
def test_extreme_uniforms_never_draw_a_token_without_weight(oracle, uniform):
  settings = list(SETTINGS.values())
  logits = random_logits(len(settings), 1000, seed=2)
  logits[:, :3] = -np.inf
  logits[:, -300:] = -np.inf
  u = jnp.full(len(settings), uniform, jnp.float32)
  token, logp = sample(jnp.asarray(logits), u, *arrays(settings))
  for row, setting, one in zip(logits, settings, np.asarray(token)):
    assert oracle(row, *setting)[one] > 0
  assert np.isfinite(np.asarray(logp)).all()


# Seen to fail when the last, partial block is left out, and when the place inside a block ignores the rest.
def test_the_draw_inverts_the_cumulative_distribution(oracle):
  """A grid of uniforms hits every token as often as its share of the grid."""
  logits = np.tile(random_logits(1, 600, seed=3, scale=1.0), (20000, 1))
  grid = (np.arange(20000) + 0.5) / 20000
  token, _ = sample(
      jnp.asarray(logits), jnp.asarray(grid, jnp.float32), *arrays([SETTINGS['combined']] * 20000)
  )
  counts = np.bincount(np.asarray(token), minlength=600)
  assert np.abs(counts - 20000 * oracle(logits[0], *SETTINGS['combined'])).max() <= 1.5


def test_greedy_takes_the_lowest_id_on_ties_at_temperature_one():
  logits = np.array([[0.0, 2.0, 2.0, 1.0]], np.float32)
  token, logp = sample(jnp.asarray(logits), jnp.asarray([0.99]), *arrays([(0.0, 0.5, 2, 0.5)]))
  assert token[0] == 1
  np.testing.assert_allclose(logp[0], jax.nn.log_softmax(logits[0])[1], rtol=1e-6)
  far = np.full((2, 600), -1.0, np.float32)
  far[0, [300, 255, 590]], far[1, [599, 512]] = 0.5, 0.5  # equal in different blocks of the two levels
  token, _ = sample(jnp.asarray(far), jnp.zeros(2), *arrays([(0.0, 1.0, 0, 0.0)] * 2))
  assert token.tolist() == [255, 512]


# Seen to fail when the log-probability is renormalised over the tokens that truncation left.
def test_logp_is_of_the_full_vocabulary_at_the_sampling_temperature():
  settings = list(SETTINGS.values())
  logits = random_logits(len(settings), 400, seed=4)
  u = jnp.linspace(0.1, 0.9, len(settings), dtype=jnp.float32)
  token, logp = sample(jnp.asarray(logits), u, *arrays(settings))
  for i, (temperature, *_) in enumerate(settings):
    scaled = logits[i].astype(np.float64) / temperature
    want = scaled[token[i]] - np.log(np.exp(scaled - scaled.max()).sum()) - scaled.max()
    np.testing.assert_allclose(logp[i], want, atol=2e-6)


@pytest.mark.parametrize('temperature', [0.0, 1e-40, 1e-6, 1.0, 1e6])
def test_not_a_number_and_infinity_are_survived(temperature):
  big = np.finfo(np.float32).max
  logits = np.array([
      [np.nan, 1.0, -np.inf, 0.0], [np.inf, 0.0, 0.0, 0.0], [-np.inf] * 4, [np.nan] * 4, [big, -big, big, 0.0],
  ], np.float32)
  token, logp = sample(
      jnp.asarray(logits), jnp.full(5, 0.7), *arrays([(temperature, 0.9, 2, 0.01)] * 5)
  )
  # Only a row that is all NaN has no log-probability: a broken model must not pass for a poor one.
  assert np.isfinite(np.asarray(logp)).tolist() == [True, True, True, False, True]
  assert np.asarray(token)[0] in (1, 3) and np.asarray(token)[4] in (0, 2)
  if temperature <= 1:
    assert np.asarray(token)[1] == 0


def test_one_compiled_program_serves_every_setting():
  jitted = jax.jit(lambda *arguments: decoding.sample(*arguments))
  logits = jnp.asarray(random_logits(2, 64))
  for setting in SETTINGS.values():
    jitted(logits, jnp.asarray([0.2, 0.8]), *arrays([setting, SETTINGS['none']]))
  assert jitted._cache_size() == 1
