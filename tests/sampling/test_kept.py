"""What truncated sampling drew from, as recorded: against a sort in numpy, with ties and caps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spct_jax.sampling import decoding

SETTINGS = {  # temperature, top_p, top_k, min_p
    'none': (1.0, 1.0, 0, 0.0),
    'top_k': (0.8, 1.0, 7, 0.0),
    'top_p': (1.0, 0.8, 0, 0.0),
    'min_p': (1.3, 1.0, 0, 0.1),
    'top_k, top_p': (1.0, 0.9, 12, 0.0),
    'top_p, min_p': (0.7, 0.95, 0, 0.02),
    'combined': (1.4, 0.9, 20, 0.05),
}
REPEATS = 8

sample = jax.jit(lambda *arguments: decoding.sample(*arguments))
sample_kept = jax.jit(lambda *arguments: decoding.sample_kept(*arguments), static_argnums=6)


def arrays(settings):
  temperature, top_p, top_k, min_p = zip(*settings)
  real = lambda x: jnp.asarray(x, jnp.float32)
  return real(temperature), real(top_p), jnp.asarray(top_k, jnp.int32), real(min_p)


def batch(vocabulary):
  """Rows of every setting; the logits of half of them are whole numbers, zeros of both signs among them."""
  settings = list(SETTINGS.values()) * REPEATS
  rng = np.random.default_rng(vocabulary)
  logits = (rng.normal(size=(len(settings), vocabulary)) * 2).astype(np.float32)
  tied = np.round(logits)
  tied = np.where(tied == 0, rng.choice(np.float32([0.0, -0.0]), logits.shape), tied)
  logits = np.where(np.arange(len(settings))[:, None] % 2, tied, logits)
  return settings, logits, rng.random(len(settings)).astype(np.float32)


# Seen to fail when the cap is cut at its value alone (ties stay), when -0.0 ranks below 0.0, when the drawn weights
# are not those of the cap, when `count` is taken behind it, and when `logp` is of the tokens before it.
@pytest.mark.parametrize('vocabulary, cap', [(11, 11), (300, 4), (1031, 40)])
def test_kept_tokens_equal_the_sorted_oracle(kept_oracle, vocabulary, cap):
  settings, logits, uniform = batch(vocabulary)
  token, logp, kept = sample_kept(jnp.asarray(logits), jnp.asarray(uniform), *arrays(settings), cap)
  plain_token, plain_logp = sample(jnp.asarray(logits), jnp.asarray(uniform), *arrays(settings))
  assert kept.ids.shape == (len(settings), cap)
  cut = 0
  for row, setting in enumerate(settings):
    ids, count, p = kept_oracle(logits[row], setting, cap)
    assert kept.ids[row].tolist() == ids + [-1] * (cap - len(ids))
    assert kept.count[row] == count
    one = int(token[row])
    assert one in ids
    np.testing.assert_allclose(kept.logp[row], np.log(p[one]), atol=2e-6)
    if count <= cap:  # recording changes nothing that is drawn
      assert (one, logp[row]) == (plain_token[row], plain_logp[row])
    cut += count > cap
  assert cut > 0 or cap == vocabulary


# Seen to fail when the cap leaves the draw alone.
def test_a_capped_draw_inverts_the_distribution_of_what_is_recorded(kept_oracle):
  """A grid of uniforms hits each recorded token as often as its share of the grid, and no other token."""
  size, cap, setting = 20000, 5, (1.2, 0.9, 0, 0.0)
  logits = np.round(np.random.default_rng(3).normal(size=(1, 600)).astype(np.float32) * 4) / 4
  rows = jnp.asarray(np.tile(logits, (size, 1)))
  grid = jnp.asarray((np.arange(size) + 0.5) / size, jnp.float32)
  token, _, kept = sample_kept(rows, grid, *arrays([setting] * size), cap)
  ids, count, p = kept_oracle(logits[0], setting, cap)
  assert count > 4 * cap and len({v for v in p.values()}) < cap  # far over the cap, whose border is inside a tie
  counts = np.bincount(np.asarray(token), minlength=600)
  want = np.zeros(600)
  want[list(p)] = list(p.values())
  assert np.abs(counts - size * want).max() <= 1.5
  np.testing.assert_allclose(np.asarray(kept.logp), np.log(want[np.asarray(token)]), atol=2e-6)


def test_a_greedy_token_was_drawn_from_itself():
  logits = np.array([[0.0, 2.0, 2.0, 1.0]] * 5, np.float32)
  settings = [(0.0, 0.5, 2, 0.5), (0.0, 1.0, 0, 0.0)] * 2 + [(0.0, 1.0, 3, 0.0)]
  token, logp, kept = sample_kept(jnp.asarray(logits), jnp.full(5, 0.99), *arrays(settings), 3)
  assert token.tolist() == [1] * 5 and kept.ids.tolist() == [[1, -1, -1]] * 5
  assert kept.count.tolist() == [1] * 5 and kept.logp.tolist() == [0] * 5
  np.testing.assert_allclose(logp, jax.nn.log_softmax(logits)[:, 1], rtol=1e-6)  # `logp` is of the full vocabulary


# Seen to fail when tokens of weight 0 count as kept.
def test_the_set_is_what_can_be_drawn_whatever_the_logits_are():
  inf, big = np.inf, np.finfo(np.float32).max
  logits = np.array([
      [np.nan, 1.0, -inf, 0.0], [inf, 0.0, 0.0, 0.0], [-inf] * 4, [0.0, -500.0, 0.0, -600.0], [-big, big, -inf, -big],
  ], np.float32)
  token, _, kept = sample_kept(jnp.asarray(logits), jnp.full(5, 0.7), *arrays([(1.0, 1.0, 4, 0.0)] * 5), 3)
  assert kept.ids.tolist() == [[1, 3, -1], [0, -1, -1], [0, 1, 2], [0, 2, -1], [1, -1, -1]]
  assert kept.count.tolist() == [2, 1, 4, 2, 1]
  assert all(one in ids for one, ids in zip(token.tolist(), kept.ids.tolist()))
  np.testing.assert_allclose(kept.logp[2], -np.log(3), rtol=1e-6)  # a row of -inf is uniform, over the cap
