"""Statistics over the True entries of a mask, with what every loss and rate in this project needs
of them.

What a mask hides never matters: NaN, infinities and huge numbers there change neither a value nor a
gradient. An empty mask gives 0 and a gradient of 0. `x` and `mask` have one shape, because a `[2,
3]` beside a `[2, 1]` would broadcast in silence. Means, variances and deviations are float32
whatever the dtype of `x`.

    x     3  1  nan  4  1e30  5
    mask  1  1   0   1   0    1      mean 3.25, max 5, min 1, sum 13
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Num, Shaped

Array = jax.Array | np.ndarray
Number = float | int | np.number | Num[Array, '']


def count(
    mask: Bool[Array, '*s'], axis: int | None = None, keepdims: bool = False
) -> Int[Array, '...']:
  """How many entries count."""
  return jnp.sum(jnp.asarray(mask), axis=axis, dtype=jnp.int32, keepdims=keepdims)


def sum(
    x: Shaped[Array, '*s'], mask: Bool[Array, '*s'], axis: int | None = None, keepdims: bool = False
) -> Shaped[Array, '...']:
  """Integers and bools add up as integers, floats as float32."""
  return jnp.sum(_shown(x, mask), axis=axis, keepdims=keepdims)


def mean(
    x: Shaped[Array, '*s'], mask: Bool[Array, '*s'], axis: int | None = None, keepdims: bool = False
) -> Float[Array, '...']:
  total = sum(x, mask, axis, keepdims).astype(jnp.float32)
  return total / jnp.maximum(count(mask, axis, keepdims), 1).astype(jnp.float32)


def var(
    x: Shaped[Array, '*s'],
    mask: Bool[Array, '*s'],
    axis: int | None = None,
    keepdims: bool = False,
    ddof: int = 0,
) -> Float[Array, '...']:
  """`ddof` 0 is the population, 1 the sample; with no more than `ddof` entries it is 0."""
  x = _shown(x, mask).astype(jnp.float32)
  centre = jnp.broadcast_to(mean(x, mask, axis, keepdims=True), x.shape)
  total = sum(jnp.square(x - centre), mask, axis, keepdims)
  entries = count(mask, axis, keepdims) - ddof
  return jnp.where(entries > 0, total / jnp.maximum(entries, 1).astype(jnp.float32), 0.0)


def std(
    x: Shaped[Array, '*s'],
    mask: Bool[Array, '*s'],
    axis: int | None = None,
    keepdims: bool = False,
    ddof: int = 0,
) -> Float[Array, '...']:
  """The root of `var`; where that is 0 the gradient is 0 too, not the infinite slope of the
  root."""
  variance = var(x, mask, axis, keepdims, ddof)
  spread = variance > 0
  return jnp.where(spread, jnp.sqrt(jnp.where(spread, variance, 1.0)), 0.0)


def max(
    x: Shaped[Array, '*s'], mask: Bool[Array, '*s'], axis: int | None = None, keepdims: bool = False
) -> Shaped[Array, '...']:
  """The greatest entry in the dtype of `x`; 0 where the mask is empty."""
  x = jnp.asarray(x)
  top = jnp.max(jnp.where(mask, x, _limits(x.dtype)[0]), axis=axis, keepdims=keepdims)
  return jnp.where(count(mask, axis, keepdims) > 0, top, jnp.zeros_like(top))


def min(
    x: Shaped[Array, '*s'], mask: Bool[Array, '*s'], axis: int | None = None, keepdims: bool = False
) -> Shaped[Array, '...']:
  """The least entry in the dtype of `x`; 0 where the mask is empty."""
  x = jnp.asarray(x)
  low = jnp.min(jnp.where(mask, x, _limits(x.dtype)[1]), axis=axis, keepdims=keepdims)
  return jnp.where(count(mask, axis, keepdims) > 0, low, jnp.zeros_like(low))


def _shown(x: Shaped[Array, '*s'], mask: Bool[Array, '*s']) -> Shaped[Array, '*s']:
  """`x` with zeros under the mask. The gradient of `where` is 0 there, so nothing hidden can come
  back."""
  x = jnp.asarray(x)
  if jnp.issubdtype(x.dtype, jnp.floating):
    x = x.astype(jnp.float32)
  return jnp.where(mask, x, jnp.zeros_like(x))


def _limits(dtype) -> tuple:
  """The values that lose to, and beat, all others of a dtype."""
  if jnp.issubdtype(dtype, jnp.floating):
    return jnp.array(-jnp.inf, dtype), jnp.array(jnp.inf, dtype)
  if dtype == jnp.bool_:
    return jnp.array(False), jnp.array(True)
  info = jnp.iinfo(dtype)
  return jnp.array(info.min, dtype), jnp.array(info.max, dtype)
