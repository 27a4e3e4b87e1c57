"""Grouped-query attention under an explicit mask, and the masks.

    softmax(cap tanh(scale q k^T / cap), over the keys that the mask allows) v        without a cap: of scale q k^T

Scores and softmax are float32. A query that may see no key at all gets zeros, never NaN: such rows are
padding, but a NaN there would reach every parameter through the backward pass.

The mask of six tokens, `lengths = 4` and `window = 2` (a query sees itself and one before it):

    query 0  1 . . . . .
    query 1  1 1 . . . .
    query 2  . 1 1 . . .
    query 3  . . 1 1 . .
    query 4  . . . 1 . .      padding: its own key is masked
    query 5  . . . . . .      padding: nothing left to see, so zeros
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

Array = jax.Array | np.ndarray


def dot_product(
    q: Float[Array, 'B T H hk'],
    k: Float[Array, 'B S M hk'],
    v: Float[Array, 'B S M hv'],
    mask: Bool[Array, 'B T S'],
    *,
    scale: float,
    softcap: int | float | None,
) -> Float[Array, 'B T H hv']:
  """Query head h reads key/value head `h // (H // M)`. The result has the dtype of `q`."""
  B, T, H, hk = q.shape
  M = k.shape[2]
  q = q.reshape(B, T, M, H // M, hk)
  # Queries before groups: the order in which the product comes out, so that no scores are moved to turn it.
  scores = jnp.einsum('BTMGd,BSMd->BMTGS', q, k.astype(q.dtype), preferred_element_type=jnp.float32)
  mask = mask[:, None, :, None, :]
  # The most negative finite number, not -inf: exp(-inf - -inf) is NaN where a row is fully masked.
  scores = jnp.where(mask, capped(scores * scale, softcap), jnp.finfo(jnp.float32).min)
  weights = jnp.where(mask, jax.nn.softmax(scores, axis=-1), 0.0).astype(q.dtype)
  return jnp.einsum('BMTGS,BSMd->BTMGd', weights, v.astype(q.dtype)).reshape(B, T, H, v.shape[-1])


def capped(x: Float[Array, '...'], cap: int | float | None) -> Float[Array, '...']:
  """Softly bounded to -cap ... cap; unchanged without a cap (Gemma 2, arXiv 2408.00118, section 2)."""
  return x if cap is None else cap * jnp.tanh(x / cap)


def causal_mask(
    T: int, lengths: Int[Array, ' B'] | None, segments: Int[Array, 'B T'] | None
) -> Bool[Array, 'b T T']:
  """Which key each query sees: no later index, no padding, its own segment only.

  `b` is 1 if nothing is per row, and B otherwise.
  """
  index = jnp.arange(T)
  mask = (index[:, None] >= index[None, :])[None]
  if lengths is not None:
    mask = mask & (index[None, :] < lengths[:, None])[:, None, :]
  if segments is not None:
    mask = mask & (segments[:, :, None] == segments[:, None, :]) & (segments > 0)[:, None, :]
  return mask


def window_mask(
    mask: Bool[Array, 'b T S'], window: int | None, query: Int[Array, 'B T'], key: Int[Array, 'B S']
) -> Bool[Array, 'b2 T S']:
  """Narrows `mask` to the keys whose position is fewer than `window` before the query's."""
  if window is None:
    return mask
  return mask & (query[:, :, None] - key[:, None, :] < window)


def segment_positions(segments: Int[Array, 'B T']) -> Int[Array, 'B T']:
  """Positions that restart wherever the segment changes: `1 1 1 2 2 0` gives `0 1 2 0 1 0`."""
  index = jnp.arange(segments.shape[1])[None, :]
  starts = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
  return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
