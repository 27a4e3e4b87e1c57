"""Which samples are right: Eq 10 of the SPCT paper, the only definition of "right" in this project.

    n >= 2   right iff the gold response scores strictly higher than each other (a tie is wrong)
    n == 1   right iff the score equals the gold score

RFT filtering, the rule reward and the targets of the meta-RM all start from this one array.

Where the paper is silent:
1. A sample that did not parse is wrong.
2. An item without a label (negative, or no index of a present response) has no right sample.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Num

from spct_jax.masked import Array


@jax.jit
def correct(
    scores: Num[Array, 'B K N'],
    valid: Bool[Array, 'B K'],
    label: Num[Array, ' B'],
    response_mask: Bool[Array, 'B N'],
) -> Bool[Array, 'B K']:
  """Eq 10 for rows of any mix of n; n is the number of True in a row of `response_mask`.

  `label` is the index of the best response where n >= 2, and the gold score where n == 1.

      scores          label  response_mask   right
      [8, 7, 8, 1]      2      1 1 1 1       no: response 0 ties with the gold one
      [5, 7, 8, 7]      2      1 1 1 1       yes
      [5, 7, 8, 7]      1      1 1 0 0       yes: the last two are padding
      [1, 9, 9, 9]      1      1 0 0 0       yes: n == 1 and the score is the gold score
  """
  scores, valid = jnp.asarray(scores), jnp.asarray(valid)
  # A mask of 0 and 1 as integers is meant as bool, but its ~ would be truthy everywhere.
  label, response_mask = jnp.asarray(label), jnp.asarray(response_mask).astype(bool)
  valid = jnp.asarray(valid).astype(bool)
  responses = response_mask.shape[1]
  single_B1 = jnp.sum(response_mask, axis=1, keepdims=True) == 1
  is_gold_BN = jnp.where(
      single_B1,
      response_mask,
      (jnp.arange(responses)[None] == label[:, None]) & response_mask,
  )
  gold_BK1 = jnp.sum(jnp.where(is_gold_BN[:, None], scores, 0), axis=2, keepdims=True)
  beaten_BKN = gold_BK1 > scores
  wins_BK = jnp.all(beaten_BKN | (is_gold_BN | ~response_mask)[:, None], axis=2)
  equals_BK = gold_BK1[..., 0] == label[:, None]
  has_gold_B1 = jnp.any(is_gold_BN, axis=1, keepdims=True) & (label >= 0)[:, None]
  return valid & has_gold_B1 & jnp.where(single_B1, equals_BK, wins_BK)
