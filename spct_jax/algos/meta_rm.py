"""The meta-RM: its loss, and which samples vote when it guides the vote (SPCT 2.7).

The meta-RM reads a whole trajectory and gives one logit; the target is Eq 10 of that trajectory's
scores and the loss binary cross-entropy. Guided voting lets the `k_meta` samples of highest logit
vote, half of them by default.

Where the paper is silent, and where we depart:
1. Equal logits: the earlier sample goes first. `half` rounds down, and is never below 1.
2. A sample that did not parse never votes and takes no place; where fewer than `k_meta` parsed, all
   of them vote.
3. A NaN logit counts as minus infinity: such a sample votes only after all others that parsed.
4. `soft_weights` is ours: it weighs each vote with its probability of being right instead of
   cutting at `k_meta`.
"""

import operator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Num

from spct_jax import masked
from spct_jax.masked import Array, Number


def loss(
    logit: Float[Array, ' Q'], target: Bool[Array, ' Q'], row_mask: Bool[Array, ' Q']
) -> tuple[Float[Array, ''], Float[Array, '']]:
  """Binary cross-entropy on logits as (sum, number of rows), float32; right is True."""
  row_mask = jnp.asarray(row_mask)
  logit = jnp.where(row_mask, jnp.asarray(logit).astype(jnp.float32), 0.0)
  surprise = jax.nn.softplus(jnp.where(jnp.asarray(target), -logit, logit))
  return masked.sum(surprise, row_mask), masked.count(row_mask).astype(jnp.float32)


def half(k: int) -> int:
  """The paper's default for `k_meta`: half of the samples, and at k = 1 the one sample."""
  return max(1, k // 2)


def top_k(
    meta_score: Num[Array, 'B K'],
    valid: Bool[Array, 'B K'],
    k_meta: int | np.integer | Int[Array, ''],
) -> Bool[Array, 'B K']:
  """The samples that vote: the `k_meta` valid ones of highest logit.

  `k_meta` in 1..K; a number outside raises ValueError, unless it is traced: then less than 1
  selects none.

      meta_score   0.3  1.7  nan  1.7  0.3
      valid         1    1    1    0    1       k_meta 2: samples 1 and 0;  3: and 4;  4 or 5: and 2
  """
  meta_score, valid = jnp.asarray(meta_score), jnp.asarray(valid).astype(bool)
  samples = valid.shape[1]
  if not isinstance(k_meta, jax.core.Tracer):
    k_meta = operator.index(k_meta)
    if not 1 <= k_meta <= samples:
      raise ValueError(
          f'k_meta is {k_meta}, but each item has {samples} samples: it must be in 1..{samples}. '
          'Lower k_meta, or draw more samples.'
      )
  return _top_k(meta_score, valid, k_meta)


@jax.jit
def _top_k(
    meta_score: Num[Array, 'B K'], valid: Bool[Array, 'B K'], k_meta: Int[Array, '']
) -> Bool[Array, 'B K']:
  samples = valid.shape[1]
  score_BK = _comparable(meta_score)
  places_1K = jnp.arange(samples)[None]

  def count_ahead(j, rank_BK):
    other_B1 = jax.lax.dynamic_index_in_dim(score_BK, j, axis=1)
    votes_B1 = jax.lax.dynamic_index_in_dim(valid, j, axis=1)
    ahead_BK = jnp.where(places_1K > j, other_B1 >= score_BK, other_B1 > score_BK) & votes_B1
    return rank_BK + ahead_BK.astype(jnp.int32)

  # Rank by comparing all pairs: exact for ties, and at K = 32 many times as fast as a sort.
  rank_BK = jax.lax.fori_loop(
      0, samples, count_ahead, jnp.zeros(valid.shape, jnp.int32), unroll=max(1, min(samples, 32))
  )
  return valid & (rank_BK < k_meta)


def soft_weights(
    meta_score: Num[Array, 'B K'], valid: Bool[Array, 'B K'], temperature: Number
) -> Float[Array, 'B K']:
  """sigmoid(logit / temperature) up to one positive factor an item, which changes no vote; 0 where
  not valid.

  The factor makes the best sample's weight 1, so that an item whose logits are all far below zero
  keeps its vote instead of underflowing to none. `temperature` > 0; a NaN logit weighs 0, unless
  all are NaN: then all weigh 1.
  """
  if not isinstance(temperature, jax.core.Tracer) and not temperature > 0:
    raise ValueError(
        f'temperature of the soft weights is {temperature}: it must be above 0, as 1.0.'
    )
  return _soft_weights(meta_score, valid, temperature)


@jax.jit
def _soft_weights(
    meta_score: Num[Array, 'B K'], valid: Bool[Array, 'B K'], temperature: Number
) -> Float[Array, 'B K']:
  valid = jnp.asarray(valid)
  score_BK = _comparable(jnp.asarray(meta_score)).astype(jnp.float32)
  log_weight_BK = jnp.where(valid, jax.nn.log_sigmoid(score_BK / temperature), -jnp.inf)
  best_B1 = jnp.max(log_weight_BK, axis=1, keepdims=True)
  best_B1 = jnp.where(jnp.isneginf(best_B1), 0.0, best_B1)
  nothing_B1 = jnp.all(jnp.isneginf(log_weight_BK), axis=1, keepdims=True)
  return jnp.where(valid, jnp.where(nothing_B1, 1.0, jnp.exp(log_weight_BK - best_B1)), 0.0)


def _comparable(meta_score: Num[Array, 'B K']) -> Num[Array, 'B K']:
  """NaN would lose every comparison in both directions and so share a rank with everyone."""
  if jnp.issubdtype(meta_score.dtype, jnp.floating):
    return jnp.where(jnp.isnan(meta_score), -jnp.inf, meta_score)
  return meta_score
