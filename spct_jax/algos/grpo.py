"""Rule reward, group advantages and the GRPO loss (SPCT 2.4 and 2.5, Eq 11 and 15).

    reward      +1 if Eq 10 holds, -1 otherwise
    advantage   (reward - mean) / (std + eps) within the K samples of one prompt
    J           mean over sequences of
                  1/|o| sum over t of  min(rho A, clip(rho, 1-c, 1+c) A) - beta KL
    rho         exp(logp - old_logp)
    KL          k3 = exp(x) - x - 1 with x = ref_logp - logp: unbiased, never negative, in the loss
                and not in the reward

The loss is -J. The length mean stands inside the sum over sequences, as in the original GRPO.

Where the paper is silent, and where we depart:
1. The standard deviation is that of the population; `eps` is added to it.
2. A group whose rewards are all equal gives exact zeros (rounding in the mean could leave a
   spurious signal that the small `eps` would blow up).
3. Both log-ratios are cut at +-30 before the exponential. It changes only ratios above 1e13, which
   would overflow and turn the whole gradient into NaN (0 times infinity behind the minimum).
4. k3 is summed as a series for |x| < 0.1: the closed form cancels there, and float32 makes it
   negative.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Num

from spct_jax import masked
from spct_jax.masked import Array, Number

_MAX_LOG_RATIO = 30.0
_LEAST_LOG_RATIO = -1e4  # exp of it is 0; k3 is linear there and must keep its slope


@jax.jit
def reward(correct: Bool[Array, '*s']) -> Float[Array, '*s']:
  """+1 for the right, -1 for all others, unparsed ones among them (Eq 11)."""
  return jnp.where(jnp.asarray(correct), 1.0, -1.0).astype(jnp.float32)


@jax.jit
def has_signal(reward: Num[Array, 'B K']) -> Bool[Array, ' B']:
  """Groups whose rewards differ; in the others no policy gradient arises and only the KL acts."""
  reward = jnp.asarray(reward)
  return jnp.max(reward, axis=1) > jnp.min(reward, axis=1)


@jax.jit
def advantages(reward: Num[Array, 'B K'], eps: Number = 1e-6) -> Float[Array, 'B K']:
  """Group-normalised rewards, float32; a group of one, or without signal, gives zeros.

  reward [1, -1, -1, -1] gives [1.732, -0.577, -0.577, -0.577].
  """
  reward = jnp.asarray(reward).astype(jnp.float32)
  everyone = jnp.ones(reward.shape, bool)
  centred_BK = reward - masked.mean(reward, everyone, axis=1, keepdims=True)
  spread_B1 = masked.std(reward, everyone, axis=1, keepdims=True)
  return jnp.where(has_signal(reward)[:, None], centred_BK / (spread_B1 + eps), 0.0)


def kl_k3(logp: Float[Array, '*s'], ref_logp: Float[Array, '*s']) -> Float[Array, '*s']:
  """The k3 estimate of KL(policy || reference) per token, float32, >= 0."""
  x = _log_ratio(ref_logp, logp)
  small = jnp.abs(x) < 0.1
  near = jnp.where(small, x, 0.0)
  series = near * near * (1 / 2 + near * (1 / 6 + near * (1 / 24 + near * (1 / 120 + near / 720))))
  return jnp.where(small, series, jnp.expm1(x) - x)


def loss(
    logp: Float[Array, '*seq T'],
    old_logp: Float[Array, '*seq T'],
    ref_logp: Float[Array, '*seq T'],
    advantage: Float[Array, '*seq'],
    token_mask: Bool[Array, '*seq T'],
    clip_eps: Number = 0.2,
    kl_coef: Number = 0.08,
) -> tuple[Float[Array, ''], Float[Array, '']]:
  """-J as (sum over sequences of their token means, number of sequences with a token), float32.

  `logp` alone carries a gradient. Sequences are flat `[Q, T]` or grouped `[B, K, T]`; all
  log-probabilities are at the sampling temperature. What `token_mask` hides may be NaN or infinite.
  """
  token_mask = jnp.asarray(token_mask)
  logp, old_logp, ref_logp = (_shown(x, token_mask) for x in (logp, old_logp, ref_logp))
  old_logp = jax.lax.stop_gradient(old_logp)
  ref_logp = jax.lax.stop_gradient(ref_logp)
  advantage = jax.lax.stop_gradient(jnp.asarray(advantage).astype(jnp.float32))[..., None]
  ratio = jnp.exp(_log_ratio(logp, old_logp))
  surrogate = jnp.minimum(
      ratio * advantage, jnp.clip(ratio, 1 - clip_eps, 1 + clip_eps) * advantage
  )
  objective = surrogate - kl_coef * kl_k3(logp, ref_logp)
  per_sequence = masked.mean(objective, token_mask, axis=-1)
  return -jnp.sum(per_sequence), jnp.sum(jnp.any(token_mask, axis=-1)).astype(jnp.float32)


def diagnostics(
    logp: Float[Array, '*seq T'],
    old_logp: Float[Array, '*seq T'],
    ref_logp: Float[Array, '*seq T'],
    advantage: Float[Array, '*seq'],
    token_mask: Bool[Array, '*seq T'],
    clip_eps: Number = 0.2,
) -> dict[str, tuple[Float[Array, ''], Float[Array, '']]]:
  """What to log beside the loss, each as (sum over tokens, number of tokens), without a gradient.

  kl: k3 to the reference. ratio: rho. clip_fraction: tokens whose policy gradient the clip has cut
  off. logp_gap: |logp - old_logp|, at the first update after a rollout the distance between learner
  and sampler.
  """
  token_mask = jnp.asarray(token_mask)
  logp, old_logp, ref_logp = (
      jax.lax.stop_gradient(_shown(x, token_mask)) for x in (logp, old_logp, ref_logp)
  )
  advantage = jnp.asarray(advantage)[..., None]
  ratio = jnp.exp(_log_ratio(logp, old_logp))
  clipped = ((advantage > 0) & (ratio > 1 + clip_eps)) | ((advantage < 0) & (ratio < 1 - clip_eps))
  tokens = masked.count(token_mask).astype(jnp.float32)
  per_token = {
      'kl': kl_k3(logp, ref_logp),
      'ratio': ratio,
      'clip_fraction': clipped.astype(jnp.float32),
      'logp_gap': jnp.abs(logp - old_logp),
  }
  return {name: (masked.sum(x, token_mask), tokens) for name, x in per_token.items()}


def _shown(x: Float[Array, '*s'], mask: Bool[Array, '*s']) -> Float[Array, '*s']:
  """Hidden entries become 0 before anything is computed from them, so that their NaN meets no
  gradient."""
  return jnp.where(mask, jnp.asarray(x).astype(jnp.float32), 0.0)


def _log_ratio(above: Float[Array, '*s'], below: Float[Array, '*s']) -> Float[Array, '*s']:
  difference = jnp.asarray(above).astype(jnp.float32) - jnp.asarray(below).astype(jnp.float32)
  return jnp.clip(difference, _LEAST_LOG_RATIO, _MAX_LOG_RATIO)
