"""Rewards, advantages, k3 and the GRPO loss: against loops, against torch, and under every mask.

Mutations seen to fail here: sample instead of population std; zeros of groups without signal
dropped (rewards of 0.1); per-sequence sum instead of mean; `max` for `min` in the surrogate; sign
of the KL; its direction; the log-ratio left uncut; `_shown` removed; k3 in its closed form only;
the clip applied to one side; `old_logp` with a gradient.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spct_jax.algos import grpo

NAN, INF = np.float32('nan'), np.float32('inf')


def loop_loss(logp, old, ref, advantage, mask, clip_eps, beta):
  """Eq 15, sequence by sequence and token by token, in double precision."""
  total, sequences = 0.0, 0
  for i in range(len(logp)):
    tokens = [t for t in range(len(logp[i])) if mask[i][t]]
    if not tokens:
      continue
    sequences += 1
    inner = 0.0
    for t in tokens:
      rho = math.exp(logp[i][t] - old[i][t])
      clipped = min(max(rho, 1 - clip_eps), 1 + clip_eps)
      x = ref[i][t] - logp[i][t]
      inner += min(rho * advantage[i], clipped * advantage[i]) - beta * (math.exp(x) - x - 1)
    total += inner / len(tokens)
  return -total, sequences


def batch(seed, rows=5, length=6, spread=0.6):
  rng = np.random.default_rng(seed)
  logp = -rng.random((rows, length)).astype(np.float32) * 3
  old = logp + rng.normal(size=logp.shape).astype(np.float32) * np.float32(spread)
  ref = logp + rng.normal(size=logp.shape).astype(np.float32) * np.float32(spread)
  advantage = rng.choice([-1.7320508, -0.57735, 0.0, 0.57735, 1.7320508], rows).astype(np.float32)
  lengths = rng.integers(0, length + 1, rows)
  mask = np.arange(length)[None] < lengths[:, None]
  return logp, old, ref, advantage, mask


def test_reward_is_plus_or_minus_one():
  got = grpo.reward(np.array([[True, False], [False, True]]))
  assert got.dtype == jnp.float32
  np.testing.assert_array_equal(got, [[1, -1], [-1, 1]])


@pytest.mark.parametrize(
    'right, expected',
    [
        (0, [0, 0, 0, 0]),
        (1, [1.7320508, -0.5773503, -0.5773503, -0.5773503]),
        (2, [1, 1, -1, -1]),
        (3, [0.5773503, 0.5773503, 0.5773503, -1.7320508]),
        (4, [0, 0, 0, 0]),
    ],
)
def test_the_advantages_of_groups_of_four(right, expected):
  reward = np.array([[1.0] * right + [-1.0] * (4 - right)], np.float32)
  np.testing.assert_allclose(grpo.advantages(reward)[0], expected, atol=4e-6)


@pytest.mark.parametrize('group', range(1, 9))
def test_advantages_of_every_group(group):
  rewards = np.array(list(itertools.product([-1.0, 1.0], repeat=group)), np.float32)
  got = np.asarray(jax.jit(grpo.advantages)(rewards))
  for row, values in zip(got, rewards.tolist()):
    mean = sum(values) / group
    std = math.sqrt(sum((v - mean) ** 2 for v in values) / group)
    if std == 0:
      assert (row == 0).all()  # exactly: no signal, no gradient
    else:
      np.testing.assert_allclose(
          row, [(v - mean) / (std + 1e-6) for v in values], rtol=1e-5, atol=1e-6
      )
  np.testing.assert_array_equal(
      grpo.has_signal(rewards), [len(set(v)) > 1 for v in rewards.tolist()]
  )


@pytest.mark.parametrize('group', [1, 3, 6, 7])
def test_equal_rewards_that_round_give_exact_zeros(group):
  rewards = np.repeat(np.float32([[0.1], [0.3], [1e-3], [7.7]]), group, axis=1)
  assert (np.asarray(jax.jit(grpo.advantages)(rewards)) == 0).all()


def test_advantages_take_an_eps_and_integers():
  got = np.asarray(grpo.advantages(np.array([[1, -1]]), eps=1))
  np.testing.assert_allclose(got, [[0.5, -0.5]])


def test_k3_is_never_negative_and_exact():
  x = np.concatenate(
      [np.linspace(-20, 20, 4001), np.logspace(-12, 0, 500), -np.logspace(-12, 0, 500), [0.0]]
  )
  x = x.astype(np.float32)
  got = np.asarray(grpo.kl_k3(np.zeros_like(x), x))
  assert (got >= 0).all()
  for value, estimate in zip(x.tolist(), got.tolist()):
    exact = math.expm1(value) - value
    if abs(value) < 1e-3:  # the closed form cancels in double too
      exact = value**2 / 2 + value**3 / 6
    assert math.isclose(estimate, exact, rel_tol=2e-5, abs_tol=1e-30), value


def test_k3_has_the_gradient_of_its_formula():
  x = np.concatenate([np.linspace(-3, 3, 601), [0.1, -0.1, 0.0999, -0.0999]]).astype(np.float32)
  gradient = jax.vmap(jax.grad(lambda logp, ref: grpo.kl_k3(logp[None], ref[None])[0]))(
      jnp.zeros_like(x), x
  )
  np.testing.assert_allclose(gradient, -np.expm1(x.astype(np.float64)), rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize('seed', range(12))
def test_the_loss_against_the_loop(seed):
  logp, old, ref, advantage, mask = batch(seed)
  clip_eps, beta = [(0.2, 0.08), (0.1, 0.0), (0.3, 0.5)][seed % 3]
  expected, sequences = loop_loss(
      *(x.tolist() for x in (logp, old, ref, advantage, mask)), clip_eps, beta
  )
  rng = np.random.default_rng(seed)
  dirty = [
      np.where(mask, x, rng.choice([NAN, INF, -INF, np.float32(3e38)], mask.shape))
      for x in (logp, old, ref)
  ]
  for arrays in ((logp, old, ref), dirty):
    total, count = grpo.loss(*arrays, advantage, mask, clip_eps=clip_eps, kl_coef=beta)
    np.testing.assert_allclose(float(total), expected, rtol=2e-5, atol=2e-6)
    assert float(count) == sequences


def test_one_token_by_hand():
  # rho = e^0.5 = 1.6487; A = 2: the clip holds at 1.2 -> 2.4; x = 0.3: k3 = 1.34986 - 1.3 = 0.04986
  one = lambda v: np.array([[v]], np.float32)
  total, count = grpo.loss(
      one(-1.0), one(-1.5), one(-0.7), np.float32([2]), one(1) > 0, clip_eps=0.2, kl_coef=0.08
  )
  np.testing.assert_allclose(float(total), -(2.4 - 0.08 * (math.exp(0.3) - 1.3)), rtol=1e-6)
  assert float(count) == 1
  # A < 0 with rho above: not clipped (the pessimistic side)
  total, _ = grpo.loss(one(-1.0), one(-1.5), one(-1.0), np.float32([-2]), one(1) > 0)
  np.testing.assert_allclose(float(total), 2 * math.exp(0.5), rtol=1e-6)


def test_long_sequences_weigh_no_more_than_short_ones():
  logp = np.zeros((2, 4), np.float32)
  mask = np.array([[1, 0, 0, 0], [1, 1, 1, 1]], bool)
  total, count = grpo.loss(logp, logp, logp, np.float32([1, -1]), mask)
  assert (float(total), float(count)) == (0.0, 2.0)  # a token mean would give +3


def test_groups_and_flat_sequences_agree():
  logp, old, ref, advantage, mask = batch(3, rows=6)
  flat = grpo.loss(logp, old, ref, advantage, mask)
  grouped = [x.reshape(2, 3, *x.shape[1:]) for x in (logp, old, ref, advantage, mask)]
  np.testing.assert_allclose(np.asarray(grpo.loss(*grouped)), np.asarray(flat), rtol=1e-6)


def test_microbatches_add_up():
  arrays = batch(4, rows=6)
  whole = grpo.loss(*arrays)
  parts = [grpo.loss(*(x[i : i + 2] for x in arrays)) for i in (0, 2, 4)]
  np.testing.assert_allclose(np.asarray(whole), np.sum(np.asarray(parts), axis=0), rtol=1e-5)


@pytest.mark.parametrize('garbage', [NAN, INF, -INF, np.float32(3e38)])
def test_finite_gradients_under_every_mask(garbage):
  logp, old, ref, advantage, _ = batch(5, rows=2, length=4)
  advantage = np.float32([1.5, -0.5])
  gradients = jax.jit(
      jax.grad(lambda a, b, c, d, mask: grpo.loss(a, b, c, d, mask)[0], argnums=(0, 1, 2, 3))
  )
  for pattern in itertools.product([False, True], repeat=8):
    mask = np.array(pattern).reshape(2, 4)
    hidden = [np.where(mask, x, garbage) for x in (logp, old, ref)]
    with_logp, *others = (np.asarray(g) for g in gradients(*hidden, advantage, mask))
    assert np.isfinite(with_logp).all() and (with_logp[~mask] == 0).all(), pattern
    assert all((g == 0).all() for g in others)  # stopped: old, reference and advantage


def test_an_overflowing_ratio_poisons_nothing():
  both = jax.jit(
      jax.value_and_grad(lambda x, old, a: grpo.loss(x, old, old, a, np.ones((1, 2), bool))[0])
  )
  for gap, sign, advantage in itertools.product((50, 200, 1e6, INF), (1, -1), (1.0, -1.0, 0.0)):
    logp = np.array([[-1.0, -2.0]], np.float32)
    old = logp - np.float32([[sign * gap, 0]])
    value, gradient = both(logp, old, np.float32([advantage]))
    assert np.isfinite(float(value)) and np.isfinite(np.asarray(gradient)).all()


def torch_loss(logp, old, ref, advantage, mask, clip_eps, beta):
  """As the public trainers write it: per-token loss, masked mean per sequence, mean over sequences;
  with autograd."""
  torch = pytest.importorskip('torch')
  logp, old, ref, advantage = (
      torch.tensor(x, dtype=torch.float64) for x in (logp, old, ref, advantage)
  )
  mask = torch.tensor(mask.astype(np.float64))
  logp.requires_grad_(True)
  kl = torch.exp(ref - logp) - (ref - logp) - 1
  coefficient = torch.exp(logp - old)
  first = coefficient * advantage.unsqueeze(1)
  second = torch.clamp(coefficient, 1 - clip_eps, 1 + clip_eps) * advantage.unsqueeze(1)
  per_token = -torch.min(first, second) + beta * kl
  loss = ((per_token * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()
  loss.backward()
  return loss.item(), logp.grad.numpy()


@pytest.mark.parametrize('seed', range(4))
def test_value_and_gradient_against_torch(seed):
  logp, old, ref, advantage, mask = batch(seed, rows=8, length=7)
  mask[:, 0] = True  # there the mean over sequences needs no care for empty ones
  expected, expected_gradient = torch_loss(logp, old, ref, advantage, mask, 0.2, 0.08)

  def mean_loss(x):
    total, count = grpo.loss(x, old, ref, advantage, mask, clip_eps=0.2, kl_coef=0.08)
    return total / count

  value, gradient = jax.jit(jax.value_and_grad(mean_loss))(logp)
  np.testing.assert_allclose(float(value), expected, rtol=2e-5, atol=2e-6)
  np.testing.assert_allclose(np.asarray(gradient), expected_gradient, rtol=2e-4, atol=2e-6)


def test_diagnostics_by_loop():
  logp, old, ref, advantage, mask = batch(6)
  dirty = [np.where(mask, x, NAN) for x in (logp, old, ref)]
  got = grpo.diagnostics(*dirty, advantage, mask, clip_eps=0.2)
  expected = dict(kl=0.0, ratio=0.0, clip_fraction=0.0, logp_gap=0.0)
  for i, t in zip(*np.nonzero(mask)):
    rho, x = math.exp(logp[i, t] - old[i, t]), float(ref[i, t]) - float(logp[i, t])
    expected['kl'] += math.exp(x) - x - 1
    expected['ratio'] += rho
    expected['logp_gap'] += abs(float(logp[i, t]) - float(old[i, t]))
    expected['clip_fraction'] += (advantage[i] > 0 and rho > 1.2) or (
        advantage[i] < 0 and rho < 0.8
    )
  assert set(got) == set(expected) and expected['clip_fraction'] > 0
  for name, (total, count) in got.items():
    np.testing.assert_allclose(float(total), expected[name], rtol=2e-5, err_msg=name)
    assert float(count) == mask.sum()


def test_the_clip_fraction_is_where_the_policy_gradient_vanishes():
  logp, old, _, advantage, mask = batch(7, rows=20)
  mask[:] = True
  advantage[advantage == 0] = 1.0
  gradient = jax.grad(lambda x: grpo.loss(x, old, logp, advantage, mask, kl_coef=0.0)[0])(logp)
  clipped, tokens = grpo.diagnostics(logp, old, logp, advantage, mask)['clip_fraction']
  assert 0 < float(clipped) == (np.asarray(gradient) == 0).sum() < float(tokens)
