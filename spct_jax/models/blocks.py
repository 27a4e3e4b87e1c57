"""One decoder block, pre-norm; with `post_norms` what it adds to the residual stream is normed too.

    x = x + post(o(attend(rope(q(norm(x))), rope(k(norm(x))), v(norm(x)))))
    x = x + post(down(act(gate(norm(x))) * up(norm(x))))

RMSNorm is arXiv 1910.07467, rotary embedding 2104.09864, grouped queries 2305.13245, the gated MLP 2002.05202,
norms behind the two parts 2408.00118. The block is put together from the choices of its configs, never by family.

`attend` comes from outside, so the block knows neither mask nor cache. Rotary embedding turns the pairs
(i, i + head_dim / 2), the convention of Hugging Face checkpoints, not the paper's (2i, 2i + 1). Norms,
rotations and the activation are float32.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from spct_jax.models.config import BlockConfig, ModelConfig
from spct_jax.models.rope import frequencies, magnitude

ACTIVATIONS = {
    'silu': jax.nn.silu,
    'gelu_tanh': lambda x: jax.nn.gelu(x, approximate=True),
    'gelu': lambda x: jax.nn.gelu(x, approximate=False),
    'relu': jax.nn.relu,
}


def rope(
    x: Float[Array, 'B T H hd'], positions: Int[Array, 'B T'], block: BlockConfig
) -> Float[Array, 'B T H hd']:
  """Turns pair (i, i + hd / 2) of every head by `position * frequency_i`."""
  inverse = frequencies(x.shape[-1], block.rope_theta, block.rope_scaling)
  # float32: a bfloat16 position is wrong from 257 on.
  angle = positions[:, :, None, None].astype(jnp.float32) * inverse[None, None, None, :]
  size = magnitude(block.rope_scaling)
  cos, sin = size * jnp.cos(angle), size * jnp.sin(angle)
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return turned.astype(x.dtype)


class RMSNorm(nn.Module):
  """x / sqrt(mean(x^2) + eps) * scale over the last axis, in float32; (1 + scale) with `norm_plus_one`."""

  model: ModelConfig

  @nn.compact
  def __call__(self, x):
    dtype = jnp.dtype(self.model.param_dtype)
    start = nn.initializers.zeros if self.model.norm_plus_one else nn.initializers.ones
    scale = self.param('scale', start, (x.shape[-1],), dtype)
    x = x.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.model.norm_eps)
    scale = jnp.expand_dims(scale.astype(jnp.float32), range(x.ndim - 1)) + self.model.norm_plus_one
    return (x * scale).astype(self.model.dtype)


class Block(nn.Module):
  """One layer. The parameter tree is listed in `transformer`."""

  model: ModelConfig
  block: BlockConfig

  def setup(self):
    c = self.model
    self.attn_norm = RMSNorm(c)
    self.mlp_norm = RMSNorm(c)
    if c.post_norms:
      self.attn_post_norm = RMSNorm(c)
      self.mlp_post_norm = RMSNorm(c)
    # The attention part: grouped queries.
    self.q = self._dense((c.heads, c.head_dim), bias=c.qkv_bias)
    self.k = self._dense((c.kv_heads, c.head_dim), bias=c.qkv_bias)
    self.v = self._dense((c.kv_heads, c.head_dim), bias=c.qkv_bias)
    self.o = self._dense(c.width, axis=(-2, -1), bias=c.o_bias)
    if c.qk_norm:
      self.q_norm = RMSNorm(c)
      self.k_norm = RMSNorm(c)
    # The feed-forward part: dense.
    self.gate = self._dense(c.ffn, bias=c.mlp_bias)
    self.up = self._dense(c.ffn, bias=c.mlp_bias)
    self.down = self._dense(c.width, bias=c.mlp_bias)

  def _dense(self, features, axis=-1, bias=False):
    return nn.DenseGeneral(
        features, axis=axis, use_bias=bias, dtype=jnp.dtype(self.model.dtype),
        param_dtype=jnp.dtype(self.model.param_dtype),
    )

  def __call__(self, x, positions, attend: Callable):
    """`attend(q, k, v) -> (out, cache)`; returns `(x, cache)`."""
    y, cache = self._attention(self.attn_norm(x), positions, attend)
    x = x + (self.attn_post_norm(y) if self.model.post_norms else y)
    y = self._feed_forward(self.mlp_norm(x))
    return x + (self.mlp_post_norm(y) if self.model.post_norms else y), cache

  def _attention(self, y, positions, attend):
    q, k, v = self.q(y), self.k(y), self.v(y)
    if self.model.qk_norm:
      q, k = self.q_norm(q), self.k_norm(k)
    out, cache = attend(rope(q, positions, self.block), rope(k, positions, self.block), v)
    return self.o(out), cache

  def _feed_forward(self, y):
    # Evaluated in float32 and rounded once: step by step in bfloat16 a tanh GELU loses more than the matrices do.
    gate = ACTIVATIONS[self.model.activation](self.gate(y).astype(jnp.float32)).astype(y.dtype)
    return self.down(gate * self.up(y))
