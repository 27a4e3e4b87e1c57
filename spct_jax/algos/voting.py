"""Votes over the samples of an item, and what a vote earns (SPCT 2.6 and 2.8, Eq 14).

    S*_i = sum over samples of w_j S_ij,   the winner is the greatest S*

w is `valid` for plain voting, and what `meta_rm` selects for guided voting. Scores are in the
response's own order: the shuffle of each sample is undone before they come here.

Where the paper is silent:
1. Ties cost half in expectation for n = 2 (the paper shuffles and takes the first maximum):
   `credit` gives exactly that expectation, 1/m for a tie of m with the gold one among them.
   `winner` draws one.
2. Samples that did not parse do not vote; a vote without any voter earns 0.
3. n = 1: the mean vote above the threshold means 1, below it 0, exactly on it half of each.

`decided` says when votes that are still to come can no longer change the outcome; `early` builds on it.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Num, Shaped

from spct_jax.masked import Array, Number


@jax.jit
def vote(
    scores: Num[Array, 'B K N'], weights: Shaped[Array, 'B K'], response_mask: Bool[Array, 'B N']
) -> Float[Array, 'B N']:
  """Totals, float32, exact for integers up to 2^24; absent responses -inf, present ones 0 if nobody
  votes.

  `weights` are bool or numbers; what is not above 0 (NaN too) does not vote, and its scores may be
  anything.
  """
  scores, response_mask = jnp.asarray(scores), jnp.asarray(response_mask)
  weights_BK = voting_weights(weights)

  def add_sample(j, totals_BN):
    weight_B1 = jax.lax.dynamic_index_in_dim(weights_BK, j, axis=1)
    score_BN = jax.lax.dynamic_index_in_dim(scores, j, axis=1, keepdims=False).astype(jnp.float32)
    return totals_BN + jnp.where(weight_B1 > 0, score_BN, 0.0) * weight_B1

  # On a CPU the sum over the middle axis of [B, K, N] is ten times slower than these K additions.
  samples = scores.shape[1]
  zeros_BN = jnp.zeros(response_mask.shape, jnp.float32)
  totals_BN = jax.lax.fori_loop(0, samples, add_sample, zeros_BN, unroll=max(1, min(samples, 32)))
  return jnp.where(response_mask, totals_BN, -jnp.inf)


def voting_weights(weights: Shaped[Array, 'B K']) -> Float[Array, 'B K']:
  """Weights as `vote` uses them: float32, 0 for all that is not above 0. Their sum over K is
  `weight_sum`."""
  weights = jnp.asarray(weights).astype(jnp.float32)
  return jnp.where(weights > 0, weights, 0.0)


@jax.jit
def credit(
    totals: Float[Array, 'B N'],
    label: Num[Array, ' B'],
    response_mask: Bool[Array, 'B N'],
    voted: Bool[Array, ' B'],
    weight_sum: Num[Array, ' B'],
    threshold: Number = 0.5,
) -> Float[Array, ' B']:
  """What each vote earns in expectation, 0..1: 1/m where the gold response is one of m tied
  winners.

  `voted`: at least one sample voted. `weight_sum`: total weight of the voters; only rows with n ==
  1 need it, for the mean vote, and their label is 0 or 1. A row without a label earns 0.
  """
  totals, label, voted = jnp.asarray(totals), jnp.asarray(label), jnp.asarray(voted)
  response_mask = jnp.asarray(response_mask)
  top_BN = _tops(totals, response_mask)
  is_gold_BN = jnp.arange(totals.shape[1])[None] == label[:, None]
  shared_B = 1.0 / jnp.maximum(jnp.sum(top_BN, axis=1), 1).astype(jnp.float32)
  best_of_n_B = jnp.where(jnp.any(top_BN & is_gold_BN, axis=1), shared_B, 0.0)
  mean_B = _mean_vote(totals, response_mask, weight_sum)
  says_one_B = jnp.where(mean_B > threshold, 1.0, jnp.where(mean_B == threshold, 0.5, 0.0))
  single_B = jnp.where(label == 1, says_one_B, jnp.where(label == 0, 1.0 - says_one_B, 0.0))
  n_B = jnp.sum(response_mask, axis=1)
  return jnp.where(voted, jnp.where(n_B == 1, single_B, best_of_n_B), 0.0)


@jax.jit
def tied(
    totals: Float[Array, 'B N'],
    response_mask: Bool[Array, 'B N'],
    voted: Bool[Array, ' B'],
    weight_sum: Num[Array, ' B'],
    threshold: Number = 0.5,
) -> Bool[Array, ' B']:
  """Votes that did not decide: several responses share the top, or with n == 1 the mean is on the
  threshold."""
  totals, response_mask = jnp.asarray(totals), jnp.asarray(response_mask)
  shared_B = jnp.sum(_tops(totals, response_mask), axis=1) > 1
  on_threshold_B = _mean_vote(totals, response_mask, weight_sum) == threshold
  n_B = jnp.sum(response_mask, axis=1)
  return jnp.asarray(voted) & jnp.where(n_B == 1, on_threshold_B, shared_B)


@jax.jit
def winner(
    totals: Float[Array, 'B N'], response_mask: Bool[Array, 'B N'], uniform: Float[Array, ' B']
) -> Int[Array, ' B']:
  """Index of the winner; ties are drawn with `uniform` in [0, 1), each of the m tied with
  probability 1/m.

  -1 where there is no response at all.
  """
  totals, response_mask = jnp.asarray(totals), jnp.asarray(response_mask)
  top_BN = _tops(totals, response_mask)
  m_B = jnp.sum(top_BN, axis=1)
  drawn_B = jnp.minimum((jnp.asarray(uniform) * m_B.astype(jnp.float32)).astype(jnp.int32), m_B - 1)
  chosen_BN = top_BN & (jnp.cumsum(top_BN, axis=1) == drawn_B[:, None] + 1)
  return jnp.where(m_B > 0, jnp.argmax(chosen_BN, axis=1), -1).astype(jnp.int32)


def decided(
    totals: Num[Array, 'B N'],
    voters: Num[Array, ' B'],
    remaining: Num[Array, ' B'],
    response_mask: Bool[Array, 'B N'],
    low: Number | Num[Array, ' B'],
    high: Number | Num[Array, ' B'],
    threshold: Number = 0.5,
) -> Bool[Array, ' B']:
  """Whether no outcome of the `remaining` votes changes who wins: the winner stays the same and alone.

  `totals` are those of `vote` over the `voters[b]` samples that voted so far, each of weight 1. A vote
  to come gives every response any number of low..high, or does not parse and adds nothing. It is True
  exactly if all completions have one outcome, so that `credit` and `winner` are those of the full vote:

      n >= 2   the leader is ahead of every other by more than remaining * (high - low)
      n == 1   the mean stays on one side of the threshold even if all of them vote low, or all high:
               fewer voters leave it nearer to where it is, which is between low and high too

  Votes that nobody cast stay undecided until none remains, and so does a tie. NumPy in, NumPy out: a
  host may ask while the devices work.
  """
  xp = np if isinstance(totals, np.ndarray) else jnp
  full = lambda value: xp.broadcast_to(xp.asarray(value, xp.float32), voters.shape)
  totals, voters, remaining = (xp.asarray(x).astype(xp.float32) for x in (totals, voters, remaining))
  low, high = full(low), full(high)
  shown_BN = xp.where(response_mask, totals, -xp.inf)
  best_B1 = xp.max(shown_BN, axis=1, keepdims=True)
  top_BN = (shown_BN == best_B1) & response_mask
  ahead_BN = xp.where(response_mask & ~top_BN, best_B1 - xp.where(response_mask, totals, 0.0), xp.inf)
  clear_B = xp.min(ahead_BN, axis=1) > remaining * (high - low)
  alone_B = (xp.sum(top_BN, axis=1) == 1) | (high == low)

  total_B = xp.sum(xp.where(response_mask, totals, 0.0), axis=1)
  mean = lambda total, number: total / xp.maximum(number, 1.0)  # as `credit` divides; it rises with the exact quotient
  least = mean(total_B + remaining * low, voters + remaining)
  most = mean(total_B + remaining * high, voters + remaining)
  one_side_B = (least > threshold) | (most < threshold) | ((least == threshold) & (most == threshold))
  single_B = xp.sum(response_mask, axis=1) == 1
  return (remaining == 0) | ((voters > 0) & xp.where(single_B, one_side_B, clear_B & alone_B))


def _tops(totals: Float[Array, 'B N'], response_mask: Bool[Array, 'B N']) -> Bool[Array, 'B N']:
  """The present responses that share the greatest total."""
  shown_BN = jnp.where(response_mask, totals, -jnp.inf)
  return (shown_BN == jnp.max(shown_BN, axis=1, keepdims=True)) & response_mask


def _mean_vote(
    totals: Float[Array, 'B N'], response_mask: Bool[Array, 'B N'], weight_sum: Num[Array, ' B']
) -> Float[Array, ' B']:
  """The mean score of the only response of a row with n == 1 (elsewhere the number means
  nothing)."""
  weight_sum = jnp.asarray(weight_sum).astype(jnp.float32)
  total_B = jnp.sum(jnp.where(response_mask, totals, 0.0), axis=1)
  return total_B / jnp.where(weight_sum > 0, weight_sum, 1.0)
