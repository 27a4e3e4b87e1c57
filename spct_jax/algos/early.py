"""How many of an item's K votes are needed: votes that stop once their winner is known.

The votes of an item are looked at in sample order. The vote stops after the first t samples for which

    exact         no outcome of the other K - t changes the winner (`voting.decided`): the winner is that of
                  the full vote, always
    statistical   the same, or a sequential test says so at level alpha (`surely`): the winner is another than
                  that of the full vote with probability at most alpha, item by item

so the number of votes is a function of the samples alone: not of how many rows ran, or in which order they ended.

The test bets against each way in which the full vote may turn out otherwise (sampling without replacement,
Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting", JRSS B 86, 2024, section 5).
Let d_k >= -a be what sample k adds to the margin of response i over j, and suppose the margin of all K is not
above 0. Then, given the first k - 1, the others have at most the mean m_k, and the capital of a bettor who
risks the share c of it every time,

    m_k = -(d_1 + ... + d_(k-1)) / (K - k + 1)        C_k = C_(k-1) (1 + c (d_k - m_k) / (m_k + a)),

does not grow in expectation, so that it ever reaches 1 / delta with probability at most delta (Ville). Ours is
the mean capital over some c. Response i is named once it leads and its capital against every other is n / alpha:
a union over the at most n responses that do not win alone. With n = 1 the two sides of the threshold take the
place of responses. Nothing is supposed about the judge but that its K samples are exchangeable, as samples with
an order each of their own, or all of one order, are; `balanced` orders are not. A sample that did not parse
adds nothing to any margin, here as in the full vote.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int, Num

from spct_jax.algos import voting
from spct_jax.masked import Array, Number

_SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the capital that is at risk: small ones win on narrow margins, large on wide


def votes_needed(
    scores: Num[Array, 'B K N'],
    valid: Bool[Array, 'B K'],
    known: Int[Array, ' B'],
    response_mask: Bool[Array, 'B N'],
    low: Number | Num[Array, ' B'],
    high: Number | Num[Array, ' B'],
    threshold: Number = 0.5,
    alpha: float | None = None,
) -> Int[Array, ' B']:
  """After how many samples, in sample order, each vote stops; K where the `known[b]` first do not decide it.

  Scores of samples that are not valid or not known may be anything. `alpha` None is the exact rule.
  """
  xp = np if isinstance(scores, np.ndarray) else jnp
  B, K, N = scores.shape
  flat = lambda x: x.reshape(B * (K + 1), *x.shape[2:])
  every = lambda x: xp.repeat(xp.asarray(x), K + 1, axis=0) if np.ndim(x) else x
  totals = _sums(xp, xp.where(valid[:, :, None], scores, 0).astype(xp.float32))
  voters = _sums(xp, valid.astype(xp.float32))
  after = xp.arange(K + 1)
  stops = voting.decided(
      flat(totals), flat(voters), flat(xp.broadcast_to((K - after)[None, :], voters.shape)), every(response_mask),
      every(low), every(high), threshold,
  ).reshape(B, K + 1)
  if alpha is not None:
    stops = stops | surely(scores, valid, response_mask, low, high, threshold, alpha)
  stops = stops & (after[None, :] <= known[:, None])
  return xp.where(stops.any(axis=1), xp.argmax(stops, axis=1), K).astype(xp.int32)


def surely(
    scores: Num[Array, 'B K N'],
    valid: Bool[Array, 'B K'],
    response_mask: Bool[Array, 'B N'],
    low: Number | Num[Array, ' B'],
    high: Number | Num[Array, ' B'],
    threshold: Number,
    alpha: float,
) -> Bool[Array, 'B K+1']:
  """Whether the first t of K samples name a winner by the sequential test, t = 0..K."""
  if not 0 < alpha < 1:
    raise ValueError(f'alpha: got {alpha}; allowed: above 0, below 1, the chance of another winner than the full vote')
  xp = np if isinstance(scores, np.ndarray) else jnp
  full = lambda value: xp.broadcast_to(xp.asarray(value, xp.float32), (scores.shape[0],))
  low, high = full(low), full(high)
  seen = xp.where(valid[:, :, None] & response_mask[:, None], scores, 0).astype(xp.float32)
  n = response_mask.sum(axis=1)

  margin = seen[:, :, :, None] - seen[:, :, None, :]
  won = _wins(xp, margin, (high - low)[:, None, None], xp.log(xp.maximum(n, 1) / alpha)[:, None, None, None])
  rival = response_mask[:, None, :] & ~xp.eye(scores.shape[2], dtype=bool)[None]  # [B, i, j]
  named = (won | ~rival[:, None]).all(axis=3) & response_mask[:, None]

  over = xp.where(valid, seen.sum(axis=2) - threshold, 0.0)  # of the only response
  sides = xp.stack([over, -over], axis=2)
  floors = xp.maximum(xp.stack([threshold - low, high - threshold], axis=1), 0.0)
  side = _wins(xp, sides, floors, math.log(2 / alpha))
  return xp.where((n == 1)[:, None], side.any(axis=2), named.any(axis=2))


def _wins(xp, margin, floor, log_needed):
  """bool[B, K + 1, ...]: the sum of the first t margins is above 0, and the capital is what is needed.

  margin [B, K, ...] is at least -floor [B, ...].
  """
  K = margin.shape[1]
  left = (K - xp.arange(K)).reshape(1, K, *[1] * (margin.ndim - 2)).astype(xp.float32)
  sums = _sums(xp, margin)
  before = sums[:, :-1]
  room = floor[:, None] * left - before  # (m + a) * left: below 0 the others cannot make up for it
  gain = left * margin + before
  certain = (room < 0) | ((room == 0) & (gain > 0))
  odds = xp.maximum(gain / xp.where(room > 0, room, 1.0), -1.0)  # below it only where there is no such margin
  odds = xp.where(room > 0, odds, 0.0)
  logs = xp.stack([_sums(xp, xp.log1p(share * odds)) for share in _SHARES])
  capital = xp.log(xp.mean(xp.exp(xp.minimum(logs, 80.0)), axis=0))
  return ((capital >= log_needed) | (_sums(xp, certain.astype(xp.float32)) > 0)) & (sums > 0)


def _sums(xp, x):
  """Over the first 0, 1, ..., K of axis 1."""
  return xp.concatenate([xp.zeros_like(x[:, :1]), xp.cumsum(x, axis=1)], axis=1)
