"""What is measured on judgements: accuracy, its interval, ties, flips, slots, ROC-AUC, baselines.

    accuracy at k   the K samples of an item, in pool order, are cut into K // k disjoint blocks (a
                    remainder is left out); each block votes (Eq 14) and earns the credit of
                    `voting.credit`; an item's credit is the mean over its blocks, the accuracy the
                    mean over items
    stderr          standard deviation of the items' credits (ddof 1) / sqrt(items): clustered by
                    item, since the blocks of one item are not independent; 0 for a single item,
                    which says nothing about spread
    interval        95 %, Wilson's score interval at the effective number of votes
                    n* = p (1 - p) / stderr^2, at most the votes cast. Where stderr is 0 (all right,
                    all wrong, all alike) n* is the number of items, so that 0 % and 100 % have
                    honest intervals inside [0, 1]

An item without a label is left out of every accuracy; one whose samples did not parse stays in,
with credit 0. Rates over arrays are float32 and can be jitted; `summary` and `accuracy_at_k` end on
the host in float64, so that 0.7 is written 0.7.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Num, Shaped

from spct_jax import masked
from spct_jax.algos import meta_rm, voting
from spct_jax.masked import Array, Number

_Z95 = 1.959963984540054


def accuracy_at_k(
    scores: Num[Array, 'B K N'],
    valid: Bool[Array, 'B K'],
    label: Num[Array, ' B'],
    response_mask: Bool[Array, 'B N'],
    k: int | np.integer,
    meta_score: Num[Array, 'B K'] | None = None,
    k_meta: int | np.integer | None = None,
    temperature: Number | None = None,
    row_mask: Bool[Array, ' B'] | None = None,
    threshold: Number = 0.5,
) -> dict:
  """Accuracy of votes of k samples, with what belongs beside it.

  Without `meta_score` all valid samples vote. With it the vote is guided within each block: hard by
  `k_meta` samples (None: half of k, at least 1), or soft if `temperature` is given. `row_mask` is
  False for items to leave out.

  Returns the keys of `summary`, and: ties (share of the votes cast that did not decide),
  parse_failure (share of samples that did not parse), blocks, credit float64[B] per item, and
  counted bool[B]: the items behind the accuracy.
  """
  pool = valid.shape[1]
  if not 1 <= k <= pool:
    raise ValueError(
        f'k is {k}, but each item has {pool} samples: k must be in 1..{pool}. Draw more samples.'
    )
  if meta_score is None and (k_meta is not None or temperature is not None):
    raise ValueError(
        'k_meta and temperature guide a vote by meta_score, but meta_score is None. '
        'Give the meta scores too.'
    )
  if k_meta is not None and temperature is not None:
    raise ValueError(
        f'k_meta is {k_meta} and temperature {temperature}: a vote is guided hard (k_meta) or soft '
        '(temperature). Leave one of them None.'
    )
  if k_meta is not None and not 1 <= k_meta <= k:
    raise ValueError(f'k_meta is {k_meta}, but a vote has {k} samples: it must be in 1..{k}.')
  counted = np.asarray(labelled(label, response_mask))
  if row_mask is not None:
    counted = counted & np.asarray(row_mask)
  votes = _votes_at_k(
      scores, valid, label, response_mask, meta_score,
      k=int(k), k_meta=None if k_meta is None else int(k_meta),
      temperature=None if temperature is None else float(temperature), threshold=float(threshold),
  )  # fmt: skip
  credit_BG, tied_BG, voted_BG = (np.asarray(x) for x in votes)
  blocks = pool // k
  credit = credit_BG.mean(axis=1, dtype=np.float64)
  used = np.asarray(valid)[counted, : blocks * k]
  cast = int(voted_BG[counted].sum())
  return summary(credit, counted, votes=blocks) | {
      'ties': int(tied_BG[counted].sum()) / cast if cast else 0.0,
      'parse_failure': float(1 - used.mean(dtype=np.float64)) if used.size else 0.0,
      'blocks': blocks,
      'credit': credit,
      'counted': counted,
  }


def summary(
    credit: Num[Array, ' B'], counted: Bool[Array, ' B'], votes: int = 1
) -> dict[str, float | int]:
  """accuracy, stderr, low, high (the 95 % interval) and items, from one credit in 0..1 per item.

  `votes`: how many votes each credit is the mean of. No item at all: accuracy 0 and the interval
  [0, 1].
  """
  credit = np.asarray(credit, np.float64)[np.asarray(counted)]
  items = int(credit.size)
  if not items:
    return {'accuracy': 0.0, 'stderr': 0.0, 'low': 0.0, 'high': 1.0, 'items': 0}
  accuracy = float(credit.mean())
  alike = bool(np.all(credit == credit[0]))
  stderr = 0.0 if alike else float(credit.std(ddof=1) / math.sqrt(items))
  effective = items if alike else min(accuracy * (1 - accuracy) / stderr**2, items * votes)
  low, high = wilson(accuracy, effective)
  return {'accuracy': accuracy, 'stderr': stderr, 'low': low, 'high': high, 'items': items}


def paired(
    credit: Num[Array, ' B'], other: Num[Array, ' B'], counted: Bool[Array, ' B']
) -> dict[str, float | int]:
  """How much more `credit` earns than `other`, item by item: gain, stderr, low, high and items.

  Both are credits of the same items, so what makes an item easy or hard for both cancels. The gain
  is in -1..1; stderr is the standard deviation of the items' differences (ddof 1) / sqrt(items); the
  interval is the normal one, 95 %. Where all differences are alike it would have no width: then
  Wilson's bound for a share never seen in `items` trials is put on either side. No item at all: gain
  0 and the interval [-1, 1].
  """
  difference = (np.asarray(credit, np.float64) - np.asarray(other, np.float64))[np.asarray(counted)]
  items = int(difference.size)
  if not items:
    return {'gain': 0.0, 'stderr': 0.0, 'low': -1.0, 'high': 1.0, 'items': 0}
  gain = float(difference.mean())
  alike = bool(np.all(difference == difference[0]))
  stderr = 0.0 if alike else float(difference.std(ddof=1) / math.sqrt(items))
  half = wilson(0.0, items)[1] if alike else _Z95 * stderr
  low, high = max(-1.0, gain - half), min(1.0, gain + half)
  return {'gain': gain, 'stderr': stderr, 'low': low, 'high': high, 'items': items}


def wilson(share: Number, number: Number) -> tuple[float, float]:
  """Wilson's 95 % score interval of a share seen in `number` trials, which may be a fraction."""
  z2 = _Z95**2
  centre = (share + z2 / (2 * number)) / (1 + z2 / number)
  half = _Z95 * math.sqrt(share * (1 - share) / number + z2 / (4 * number**2)) / (1 + z2 / number)
  return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


@jax.jit
def labelled(label: Num[Array, ' B'], response_mask: Bool[Array, 'B N']) -> Bool[Array, ' B']:
  """Items with a usable label: index of a present response, or for n = 1 a score not below 0."""
  label, response_mask = jnp.asarray(label), jnp.asarray(response_mask)
  single_B = jnp.sum(response_mask, axis=1) == 1
  is_gold_BN = (jnp.arange(response_mask.shape[1])[None] == label[:, None]) & response_mask
  return jnp.where(single_B, label >= 0, jnp.any(is_gold_BN, axis=1))


@jax.jit
def tie_rate(
    scores: Num[Array, 'B K N'], valid: Bool[Array, 'B K'], response_mask: Bool[Array, 'B N']
) -> Float[Array, '']:
  """Share of the valid samples of items with n >= 2 whose highest score is shared."""
  top_BKN = _verdicts(scores, response_mask)
  several_B1 = jnp.sum(jnp.asarray(response_mask), axis=1, keepdims=True) > 1
  return masked.mean(jnp.sum(top_BKN, axis=2) > 1, jnp.asarray(valid) & several_B1)


@jax.jit
def parse_failure_rate(
    valid: Bool[Array, 'B K'], sample_mask: Bool[Array, 'B K'] | None = None
) -> Float[Array, '']:
  """Share of samples that did not parse, of those in `sample_mask` (None: of all)."""
  valid = jnp.asarray(valid).astype(bool)
  return masked.mean(~valid, jnp.ones(valid.shape, bool) if sample_mask is None else sample_mask)


@jax.jit
def order_flip_rate(
    scores: Num[Array, 'B K N'],
    valid: Bool[Array, 'B K'],
    response_mask: Bool[Array, 'B N'],
    order: Int[Array, 'B K N'],
) -> Float[Array, '']:
  """How often the verdict changes with the order: 1 - position consistency.

  Over the pairs of valid samples of an item that were shown in different orders, the share whose
  verdicts differ; the mean of that over the items with such a pair. A verdict is the set of
  responses with the highest score, so a tie against a clear winner is a change. `order[b, k, slot]`
  is the response shown in that slot, -1 beyond the last.
  """
  order = jnp.asarray(order)
  different_BKK = jnp.any(order[:, :, None] != order[:, None], axis=3)
  return _disagreement(scores, valid, response_mask, different_BKK)


@jax.jit
def resample_flip_rate(
    scores: Num[Array, 'B K N'],
    valid: Bool[Array, 'B K'],
    response_mask: Bool[Array, 'B N'],
    order: Int[Array, 'B K N'],
) -> Float[Array, '']:
  """The same for pairs shown in one order: how much of `order_flip_rate` is sampling noise."""
  order = jnp.asarray(order)
  same_BKK = jnp.all(order[:, :, None] == order[:, None], axis=3)
  return _disagreement(scores, valid, response_mask, same_BKK)


@jax.jit
def score_histogram(
    scores: Num[Array, 'B K N'], valid: Bool[Array, 'B K'], response_mask: Bool[Array, 'B N']
) -> Int[Array, '11']:
  """How many shown scores were 0, 1, ..., 10, after rounding; others are not counted."""
  scores = jnp.asarray(scores)
  shown_BKN = jnp.asarray(valid)[..., None] & jnp.asarray(response_mask)[:, None]
  value = jnp.round(jnp.where(shown_BKN, scores, -1).astype(jnp.float32))
  return jnp.stack([jnp.sum(value == score, dtype=jnp.int32) for score in range(11)])


@jax.jit
def accuracy_by_slot(
    correct: Shaped[Array, 'B K'],
    order: Int[Array, 'B K N'],
    label: Num[Array, ' B'],
    response_mask: Bool[Array, 'B N'],
    sample_mask: Bool[Array, 'B K'] | None = None,
) -> tuple[Float[Array, ' N'], Int[Array, ' N']]:
  """(mean of `correct`, number of samples) by the slot in which the gold response was shown.

  Items with n >= 2 and a label only, and of them the samples in `sample_mask` (None: all). A judge
  without position bias is equally right in all slots. An empty slot has mean 0 and number 0.
  """
  correct, order = jnp.asarray(correct), jnp.asarray(order)
  several_B = jnp.sum(jnp.asarray(response_mask), axis=1) > 1
  counts_B = several_B & labelled(label, response_mask)
  gold_BKN = (order == jnp.asarray(label)[:, None, None]) & counts_B[:, None, None]
  if sample_mask is not None:
    gold_BKN = gold_BKN & jnp.asarray(sample_mask)[..., None]
  right_BKN = jnp.where(gold_BKN, correct[..., None].astype(jnp.float32), 0.0)
  number_N = jnp.sum(gold_BKN, axis=(0, 1), dtype=jnp.int32)
  return jnp.sum(right_BKN, axis=(0, 1)) / jnp.maximum(number_N, 1).astype(jnp.float32), number_N


@jax.jit
def roc_auc(
    score: Num[Array, ' Q'], positive: Bool[Array, ' Q'], row_mask: Bool[Array, ' Q'] | None = None
) -> Float[Array, '']:
  """Probability that a positive row scores above a negative one, ties counting half.

  NaN if either kind is absent. A row without a score (NaN) must be left out by `row_mask`.
  """
  score, positive = jnp.asarray(score).astype(jnp.float32), jnp.asarray(positive)
  row_mask = jnp.ones(positive.shape, bool) if row_mask is None else jnp.asarray(row_mask)
  negative = row_mask & ~positive
  positive = row_mask & positive
  negatives = jnp.sum(negative)
  ladder = jnp.sort(jnp.where(negative, score, jnp.inf))
  # All but the negatives stand on top of the ladder as +inf: a score of +inf must not count them.
  below, upto = (
      jnp.minimum(jnp.searchsorted(ladder, score, side=side), negatives)
      for side in ('left', 'right')
  )
  chance = (below + upto).astype(jnp.float32) / (
      2.0 * jnp.maximum(negatives, 1).astype(jnp.float32)
  )
  return jnp.where((negatives > 0) & jnp.any(positive), masked.mean(chance, positive), jnp.nan)


@jax.jit
def trivial_baselines(
    lengths: Num[Array, 'B N'], label: Num[Array, ' B'], response_mask: Bool[Array, 'B N']
) -> dict[str, Float[Array, ' B']]:
  """Credit per item, for `summary`, of picking the longest, shortest, first or a random response.

  Equal lengths share the credit, 1/m. With n = 1 there is nothing to choose, and each of them is a
  coin: 0.5.
  """
  lengths, response_mask = jnp.asarray(lengths).astype(jnp.float32), jnp.asarray(response_mask)
  known_B = labelled(label, response_mask)
  single_B = jnp.sum(response_mask, axis=1) == 1
  gold_BN = jnp.arange(lengths.shape[1])[None] == jnp.asarray(label)[:, None]
  present_BN = response_mask.astype(jnp.float32)
  measures = {
      'longest': lengths,
      'shortest': -lengths,
      'first': jnp.broadcast_to(-jnp.arange(lengths.shape[1], dtype=jnp.float32), lengths.shape),
      'random': present_BN,
  }

  def credit(measure_BN):
    shown_BN = jnp.where(response_mask, measure_BN, -jnp.inf)
    picked_BN = response_mask & (shown_BN == jnp.max(shown_BN, axis=1, keepdims=True))
    share_B = jnp.any(picked_BN & gold_BN, axis=1) / jnp.maximum(jnp.sum(picked_BN, axis=1), 1)
    return jnp.where(known_B, jnp.where(single_B, 0.5, share_B), 0.0).astype(jnp.float32)

  return {name: credit(measure) for name, measure in measures.items()}


@functools.partial(jax.jit, static_argnames=('k', 'k_meta', 'temperature', 'threshold'))
def _votes_at_k(
    scores, valid, label, response_mask, meta_score, *, k, k_meta, temperature, threshold
):
  """(credit, tied, voted) of each of the G = K // k blocks of an item, `[B, G]`."""
  items, pool, responses = scores.shape
  blocks = pool // k
  block_scores = scores[:, : blocks * k].reshape(items * blocks, k, responses)
  block_valid = valid[:, : blocks * k].reshape(items * blocks, k)
  block_label = jnp.repeat(label, blocks, axis=0)
  block_mask = jnp.repeat(response_mask, blocks, axis=0)
  if meta_score is None:
    weights = block_valid
  else:
    block_meta = meta_score[:, : blocks * k].reshape(items * blocks, k)
    if temperature is None:
      weights = meta_rm.top_k(
          block_meta, block_valid, meta_rm.half(k) if k_meta is None else k_meta
      )
    else:
      weights = meta_rm.soft_weights(block_meta, block_valid, temperature)
  weights = voting.voting_weights(weights)
  weight_sum = jnp.sum(weights, axis=1)
  voted = weight_sum > 0
  totals = voting.vote(block_scores, weights, block_mask)
  credit = voting.credit(totals, block_label, block_mask, voted, weight_sum, threshold)
  tied = voting.tied(totals, block_mask, voted, weight_sum, threshold)
  return tuple(x.reshape(items, blocks) for x in (credit, tied, voted))


def _verdicts(
    scores: Num[Array, 'B K N'], response_mask: Bool[Array, 'B N']
) -> Bool[Array, 'B K N']:
  """The responses that each sample scores highest."""
  present_B1N = jnp.asarray(response_mask)[:, None]
  shown_BKN = jnp.where(present_B1N, jnp.asarray(scores).astype(jnp.float32), -jnp.inf)
  return present_B1N & (shown_BKN == jnp.max(shown_BKN, axis=2, keepdims=True))


def _disagreement(
    scores: Num[Array, 'B K N'],
    valid: Bool[Array, 'B K'],
    response_mask: Bool[Array, 'B N'],
    pairs: Bool[Array, 'B K K'],
) -> Float[Array, '']:
  """Mean over items of the share of `pairs` of valid samples whose verdicts differ; n >= 2 only."""
  valid, response_mask = jnp.asarray(valid), jnp.asarray(response_mask)
  top_BKN = _verdicts(scores, response_mask)
  differ_BKK = jnp.any(top_BKN[:, :, None] != top_BKN[:, None], axis=3)
  samples = valid.shape[1]
  once_1KK = (jnp.arange(samples)[:, None] < jnp.arange(samples)[None])[None]
  several_B11 = (jnp.sum(response_mask, axis=1) > 1)[:, None, None]
  pairs = pairs & valid[:, :, None] & valid[:, None] & once_1KK & several_B11
  number_B = jnp.sum(pairs, axis=(1, 2))
  changed_B = jnp.sum(differ_BKK & pairs, axis=(1, 2)) / jnp.maximum(number_B, 1)
  return masked.mean(changed_B, number_B > 0)
