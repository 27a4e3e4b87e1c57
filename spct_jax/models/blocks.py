"""One decoder block, pre-norm.

    x = x + o(attend(rope(q(norm(x))), rope(k(norm(x))), v(norm(x))))
    x = x + down(silu(gate(norm(x))) * up(norm(x)))

RMSNorm is arXiv 1910.07467, rotary embedding 2104.09864, grouped queries 2305.13245, the gated MLP 2002.05202.

`attend` comes from outside, so the block knows neither mask nor cache. Rotary embedding turns the pairs
(i, i + head_dim / 2), the convention of Hugging Face checkpoints, not the paper's (2i, 2i + 1). Norms
and rotations are float32.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from spct_jax.models.config import BlockConfig, ModelConfig, RopeScaling
from spct_jax.models.dense import Dense


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
  """float32[head_dim / 2]: radians per position of each pair."""
  inverse = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
  if scaling is not None:
    # Turns within the original context: under `low` of them the wave is stretched, over `high` it is kept.
    turns = scaling.original_length * inverse / (2 * np.pi)
    kept = np.clip((turns - scaling.low) / (scaling.high - scaling.low), 0.0, 1.0)
    inverse = kept * inverse + (1 - kept) * inverse / scaling.factor
  return inverse.astype(np.float32)


def rope(
    x: Float[Array, 'B T H hd'], positions: Int[Array, 'B T'], block: BlockConfig
) -> Float[Array, 'B T H hd']:
  """Turns pair (i, i + hd / 2) of every head by `position * frequency_i`."""
  inverse = frequencies(x.shape[-1], block.rope_theta, block.rope_scaling)
  # float32: a bfloat16 position is wrong from 257 on.
  angle = positions[:, :, None, None].astype(jnp.float32) * inverse[None, None, None, :]
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return turned.astype(x.dtype)


class RMSNorm(nn.Module):
  """x / sqrt(mean(x^2) + eps) * scale over the last axis, in float32."""

  model: ModelConfig

  @nn.compact
  def __call__(self, x):
    dtype = jnp.dtype(self.model.param_dtype)
    scale = self.param('scale', nn.initializers.ones, (x.shape[-1],), dtype)
    x = x.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.model.norm_eps)
    scale = jnp.expand_dims(scale.astype(jnp.float32), range(x.ndim - 1))
    return (x * scale).astype(self.model.dtype)


class Block(nn.Module):
  """One layer. The parameter tree is listed in `transformer`."""

  model: ModelConfig
  block: BlockConfig

  def setup(self):
    c = self.model
    self.attn_norm = RMSNorm(c)
    self.q = self._dense((c.heads, c.head_dim), bias=c.qkv_bias)
    self.k = self._dense((c.kv_heads, c.head_dim), bias=c.qkv_bias)
    self.v = self._dense((c.kv_heads, c.head_dim), bias=c.qkv_bias)
    self.o = self._dense(c.width, axis=(-2, -1))
    if c.qk_norm:
      self.q_norm = RMSNorm(c)
      self.k_norm = RMSNorm(c)
    self.mlp_norm = RMSNorm(c)
    self.gate = self._dense(c.ffn)
    self.up = self._dense(c.ffn)
    self.down = self._dense(c.width)

  def _dense(self, features, axis=-1, bias=False):
    return Dense(
        features, axis=axis, use_bias=bias, dtype=jnp.dtype(self.model.dtype),
        param_dtype=jnp.dtype(self.model.param_dtype),
    )

  def __call__(self, x, positions, attend: Callable):
    """`attend(q, k, v) -> (out, cache)`; returns `(x, cache)`."""
    y = self.attn_norm(x)
    q, k, v = self.q(y), self.k(y), self.v(y)
    if self.model.qk_norm:
      q, k = self.q_norm(q), self.k_norm(k)
    out, cache = attend(rope(q, positions, self.block), rope(k, positions, self.block), v)
    x = x + self.o(out)
    y = self.mlp_norm(x)
    return x + self.down(jax.nn.silu(self.gate(y)) * self.up(y)), cache
