"""From logits to a token: temperature, truncation, and one inverse-CDF draw, without a sort.

With x the logits of one row, tau its temperature and w = exp((x - max x) / tau):

    top_k   keep the tokens whose logit is at least the k-th largest
    top_p   keep a token if the tokens above it hold less than `top_p` of the mass that top_k left
    min_p   keep the tokens with w >= min_p, that is, at least min_p times the likeliest
    token   = min {v : sum_{j <= v} w_j > uniform * sum_j w_j} over the tokens that are kept
    logp    = log softmax(x / tau)[token] over the full vocabulary, before truncation, float32

This is the order of the Hugging Face warpers (temperature, top_k, top_p, min_p), each one acting on the
renormalised survivors of those before it. Every setting is an array with one entry per row.

1. Tokens that tie at a threshold stay or go together; a sort would keep an arbitrary one of them.
2. The thresholds of top_k and top_p are found by bisection over the 32 bits of the logits: exact, and
   32 passes over the row instead of a sort. A batch in which no row asks for one skips it.
3. The draw is two-level: first a block of the vocabulary, then a token in it. Only a token of positive
   weight can be drawn, whatever rounding does to the running sums.
4. A temperature of 0 is greedy: the likeliest token, the lowest id on ties; its `logp` is at temperature 1.
5. A NaN logit counts as -inf, +inf as the largest float; a row without any finite logit is uniform,
   and if all of it is NaN its `logp` is NaN, so that a broken model cannot pass for a poor one.
6. Where only some tokens are `allowed`, those are all that the steps above see: the draw follows the model's own
   distribution among them (token by token, which is not its distribution among the whole texts that are allowed).
   `logp` stays that of the full vocabulary, at least the lowest float; where the model gives no allowed token a
   finite logit, the draw among them is uniform. A row must be allowed a token.

`sample_kept` also tells what the token was drawn from, so that a learner can form importance ratios over that
very set: ratios of full-vocabulary probabilities are biased, because the sampler never draws from those.

7. The set is what the draw can give: the tokens left with a positive weight. At most `cap` of them stay: where
   truncation leaves more, the likeliest do (the lowest ids on ties), as one more top_k behind min_p. So the set
   that is recorded is always the set that was drawn from, and `count`, the number before the cap, says where it
   cut. Where it did not, the token is the one that `sample` draws.
8. A greedy token was drawn from itself alone.
9. The ids come from `lax.top_k`: on a CPU it takes half the time of a compaction by running sums, and it orders
   them, so that the cap needs no search of its own.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

_BLOCK = 256  # tokens in a block of the two-level draw: about the square root of a vocabulary


class Kept(NamedTuple):
  """What a token was drawn from: C ids, the likeliest first, -1 behind the last; the drawn one is among them."""

  ids: Int[Array, 'R C']
  logp: Float[Array, ' R']  # of the token among them, at the sampling temperature: what the draw gave it
  count: Int[Array, ' R']  # that truncation kept; more than C where the cap cut


def sample(
    logits: Float[Array, 'R V'],
    uniform: Float[Array, ' R'],
    temperature: Float[Array, ' R'],
    top_p: Float[Array, ' R'],
    top_k: Int[Array, ' R'],
    min_p: Float[Array, ' R'],
    allowed: Bool[Array, 'R V'] | None = None,
) -> tuple[Int[Array, ' R'], Float[Array, ' R']]:
  """Draws one token a row; `uniform` is in [0, 1). Off: top_p = 1, top_k = 0, min_p = 0."""
  return sample_kept(logits, uniform, temperature, top_p, top_k, min_p, 0, allowed)[:2]


def sample_kept(
    logits: Float[Array, 'R V'],
    uniform: Float[Array, ' R'],
    temperature: Float[Array, ' R'],
    top_p: Float[Array, ' R'],
    top_k: Int[Array, ' R'],
    min_p: Float[Array, ' R'],
    cap: int,
    allowed: Bool[Array, 'R V'] | None = None,
) -> tuple[Int[Array, ' R'], Float[Array, ' R'], Kept | None]:
  """`sample` from at most `cap` tokens (1 to V, static), and which ones; a row that truncates nothing is cut too.

  With a cap of 0 nothing is cut and none are told: None.
  """
  raw = logits.astype(jnp.float32)
  logits = jnp.minimum(jnp.where(jnp.isnan(raw), -jnp.inf, raw), jnp.finfo(jnp.float32).max)
  top_R1 = logits.max(axis=1, keepdims=True)
  empty_R1 = top_R1 == -jnp.inf
  # What few batches need is behind a condition: each pass over the logits costs a tenth of the draw.
  no_row = lambda: jnp.zeros(logits.shape[0], bool)
  broken = jax.lax.cond(empty_R1.any(), lambda: jnp.isnan(raw).all(axis=1), no_row)
  greedy_R1 = (temperature <= 0)[:, None]
  # A subnormal temperature would be flushed to zero, and 0 / 0 is NaN for the likeliest token.
  scale_R1 = jnp.where(greedy_R1, 1.0, jnp.maximum(temperature, jnp.finfo(jnp.float32).tiny)[:, None])
  scaled = jnp.where(empty_R1, 0.0, (logits - top_R1) / scale_R1)
  weight = jnp.exp(scaled)
  open_logits, open_weight = (logits, weight) if allowed is None else _only(allowed, logits, scale_R1)

  def truncated():
    return jnp.where(truncate(open_logits, open_weight, top_p, top_k, min_p), open_weight, 0.0)

  kept = jax.lax.cond(((top_p < 1) | (top_k > 0) | (min_p > 0)).any(), truncated, lambda: open_weight)
  if cap:
    kept, ids, count = _cap(open_logits, kept, cap)
  drawn = _draw(kept, uniform)
  token = jnp.where(greedy_R1[:, 0], _likeliest(open_logits), drawn).astype(jnp.int32)
  of_token = lambda values: jnp.take_along_axis(values, token[:, None], axis=1)[:, 0]
  logp = of_token(scaled) - jnp.log(weight.sum(axis=1))
  if allowed is not None:
    logp = jnp.maximum(logp, jnp.finfo(jnp.float32).min)
  logp = jnp.where(broken, jnp.nan, logp)
  if not cap:
    return token, logp, None
  alone = jnp.where(jnp.arange(cap)[None, :] == 0, token[:, None], -1)
  return token, logp, Kept(
      ids=jnp.where(greedy_R1, alone, ids),
      logp=jnp.where(greedy_R1[:, 0], 0.0, jnp.log(of_token(kept)) - jnp.log(kept.sum(axis=1))),
      count=jnp.where(greedy_R1[:, 0], 1, count),
  )


def _cap(logits, weight, cap):
  """-> the weights without those behind the `cap` likeliest, the ids of the others, how many were positive."""
  positive, least = weight > 0, jnp.finfo(jnp.float32).min
  # top_k puts 0.0 above -0.0, which are one logit; and a token without weight comes behind one of -inf.
  logit = jnp.where(logits == 0, 0.0, jnp.maximum(logits, least))
  best, ids = jax.lax.top_k(jnp.where(positive, logit, -jnp.inf), cap)
  count = positive.sum(axis=1)

  def cut():
    last, place = best[:, -1:], ids[:, -1:]
    inside = (logit > last) | ((logit == last) & (jnp.arange(logit.shape[1])[None, :] <= place))
    return jnp.where(inside, weight, 0.0)

  weight = jax.lax.cond((count > cap).any(), cut, lambda: weight)
  return weight, jnp.where(best > -jnp.inf, ids, -1), count


def _only(allowed, logits, scale_R1):
  """Logits and weights with -inf and 0 for what is not allowed; all alike where no allowed one is finite."""
  inside = jnp.where(allowed, logits, -jnp.inf)
  top_R1 = inside.max(axis=1, keepdims=True)
  empty_R1 = top_R1 == -jnp.inf
  inside = jnp.where(empty_R1 & allowed, 0.0, inside)
  return inside, jnp.where(allowed, jnp.exp((inside - jnp.where(empty_R1, 0.0, top_R1)) / scale_R1), 0.0)


def truncate(
    logits: Float[Array, 'R V'],
    weight: Float[Array, 'R V'],
    top_p: Float[Array, ' R'],
    top_k: Int[Array, ' R'],
    min_p: Float[Array, ' R'],
) -> Bool[Array, 'R V']:
  """Which tokens may be drawn. `weight` is proportional to the probabilities, the likeliest token has 1."""
  order = _ordered_bits(logits)
  everything = jnp.full((logits.shape[0], 1), jnp.iinfo(jnp.int32).min, jnp.int32)
  k_R1, p_R1 = top_k[:, None], top_p[:, None]
  use_k_R1 = (k_R1 > 0) & (k_R1 < logits.shape[1])
  use_p_R1 = p_R1 < 1

  def least_k():
    enough = lambda bits_R1: (order > bits_R1).sum(axis=1, keepdims=True) < k_R1
    return jnp.where(use_k_R1, _bisect(order, enough), everything)

  keep = order >= jax.lax.cond(use_k_R1.any(), least_k, lambda: everything)

  def least_p():
    left = jnp.where(keep, weight, 0.0)
    wanted_R1 = p_R1 * left.sum(axis=1, keepdims=True)
    enough = lambda bits_R1: jnp.where(order > bits_R1, left, 0.0).sum(axis=1, keepdims=True) < wanted_R1
    return jnp.where(use_p_R1, _bisect(order, enough), everything)

  keep &= order >= jax.lax.cond(use_p_R1.any(), least_p, lambda: everything)
  return keep & (weight >= jnp.minimum(min_p, 1.0)[:, None])


def _likeliest(x: Float[Array, 'R V']) -> Int[Array, ' R']:
  """argmax, the lowest on ties, in two levels: over a whole row of 32,768 XLA's own takes a CPU 15 times as long."""
  rows, size = x.shape
  blocks = jnp.pad(x, ((0, 0), (0, -size % _BLOCK)), constant_values=-jnp.inf).reshape(rows, -1, _BLOCK)
  block = jnp.argmax(blocks.max(axis=2), axis=1)
  inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
  return block * _BLOCK + jnp.argmax(inside, axis=1)


def _ordered_bits(x: Float[Array, 'R V']) -> Int[Array, 'R V']:
  """Integers in the order of the floats; both zeros map to one integer."""
  bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.int32)
  return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)


def _bisect(order: Int[Array, 'R V'], enough) -> Int[Array, 'R 1']:
  """The least integer for which `enough` holds, row by row; never above the row's largest.

  It is always one of the row's own values: between two values, the tokens above do not change.
  """
  def halve(_, bounds):
    low, high = bounds
    middle = (low & high) + ((low ^ high) >> 1)  # their mean rounded down, which cannot overflow
    ok = enough(middle)
    return jnp.where(ok, low, jnp.minimum(middle + 1, high)), jnp.where(ok, middle, high)

  bounds = order.min(axis=1, keepdims=True), order.max(axis=1, keepdims=True)
  return jax.lax.fori_loop(0, 32, halve, bounds)[1]


def _draw(weight: Float[Array, 'R V'], uniform: Float[Array, ' R']) -> Int[Array, ' R']:
  rows, size = weight.shape
  blocks = jnp.pad(weight, ((0, 0), (0, -size % _BLOCK))).reshape(rows, -1, _BLOCK)
  mass = blocks.sum(axis=2)
  block, rest = _pick(mass, uniform * mass.sum(axis=1))
  inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
  place, _ = _pick(inside, rest)
  return block * _BLOCK + place


def _pick(mass, target):
  """The first positive entry whose running sum passes `target`, and what of `target` is left inside it."""
  total = jnp.cumsum(mass, axis=1)
  positive = mass > 0  # rounding may move a running sum across an entry that holds nothing
  passed = positive & (total > target[:, None])
  last = mass.shape[1] - 1 - jnp.argmax(positive[:, ::-1], axis=1)
  index = jnp.where(passed.any(axis=1), jnp.argmax(passed, axis=1), last)
  here = lambda values: jnp.take_along_axis(values, index[:, None], axis=1)[:, 0]
  return index, target - (here(total) - here(mass))
