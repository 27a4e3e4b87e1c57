"""Causal attention without an array of all queries by all keys: blocks of both, and a running softmax.

For a block of queries the blocks of keys that any of them may see are visited in turn. With the largest
score t, the mass l and the value a so far (float32), a block of scores s with values v gives

    t' = max(t, max s)     l' = l exp(t - t') + sum exp(s - t')     a' = a exp(t - t') + sum exp(s - t') v

and a / l in the end (arXiv 2205.14135 without its kernel). Blocks behind the diagonal or wholly before the
window are never computed. Made for prefill: it has no derivative in reverse mode (the number of blocks
is not known when it is traced), which `attention.dot_product` has.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from spct_jax.models import attention

BLOCK = 128  # queries and keys of a block: its scores stay in a core's cache


def causal(
    q: Float[Array, 'B T H d'],
    k: Float[Array, 'B T M d'],
    v: Float[Array, 'B T M e'],
    scale: float,
    window: int | None = None,
    softcap: int | float | None = None,
    block: int = BLOCK,
) -> Float[Array, 'B T H e']:
  """Query t sees keys t - window + 1 to t (all up to t without a window). The result has the dtype of `q`.

  Right padding needs no mask: real queries stand before it. `scale` and `softcap` as in `attention.dot_product`.
  """
  (B, T, H, _), M, e = q.shape, k.shape[2], v.shape[-1]
  block = min(block, T)
  count = -(-T // block)
  pad = lambda x: jnp.pad(x, ((0, 0), (0, count * block - T), (0, 0), (0, 0)))
  q = pad(q).reshape(B, count, block, M, H // M, -1).transpose(1, 0, 3, 4, 2, 5)  # [count, B, M, g, block, d]
  k, v = (pad(x.astype(q.dtype)).swapaxes(1, 2) for x in (k, v))  # [B, M, count * block, d]
  offset = jnp.arange(block)

  def queries(args):
    i, q = args
    first = jnp.int32(0) if window is None else jnp.maximum(i * block - window + 1, 0) // block

    def keys(j, carry):
      top, mass, value = carry
      take = lambda x: jax.lax.dynamic_slice_in_dim(x, j * block, block, axis=2)
      scores = jnp.einsum('BMgqd,BMkd->BMgqk', q, take(k), preferred_element_type=jnp.float32)
      distance = (i - j) * block + offset[:, None] - offset[None, :]
      seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
      # -inf against a finite start: exp(s - t) is 0 also where a query sees nothing of a block.
      scores = jnp.where(seen[None, None, None], attention.capped(scores * scale, softcap), -jnp.inf)
      best = jnp.maximum(top, scores.max(axis=-1))
      weights, kept = jnp.exp(scores - best[..., None]), jnp.exp(top - best)
      more = jnp.einsum('BMgqk,BMke->BMgqe', weights.astype(q.dtype), take(v), preferred_element_type=jnp.float32)
      return best, kept * mass + weights.sum(axis=-1), kept[..., None] * value + more

    shape = q.shape[:-1]
    start = (
        jnp.full(shape, jnp.finfo(jnp.float32).min), jnp.zeros(shape, jnp.float32), jnp.zeros((*shape, e), jnp.float32)
    )
    _, mass, value = jax.lax.fori_loop(first, i + 1, keys, start)
    return (value / mass[..., None]).astype(q.dtype)

  out = jax.lax.map(queries, (jnp.arange(count, dtype=jnp.int32), q))
  return out.transpose(1, 0, 4, 2, 3, 5).reshape(B, count * block, H, e)[:, :T]
