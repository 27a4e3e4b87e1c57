"""One decoder block, pre-norm; with `post_norms` what it adds to the residual stream is normed too.

    x = x + post(o(attend(rope(q(norm(x))), rope(k(norm(x))), v(norm(x)))))
    x = x + post(down(act(gate(norm(x))) * up(norm(x))))

Grouped queries are arXiv 2305.13245, the gated MLP 2002.05202, norms behind the two parts 2408.00118; `mla` and `moe`
stand in for attention and MLP where the config says so. The block is put together from the choices of its configs,
never by family. `attend` comes from outside, so the block knows neither mask nor cache.
"""

from collections.abc import Callable

import flax.linen as nn

from spct_jax.models.config import BlockConfig, ModelConfig
from spct_jax.models.mla import LatentAttention
from spct_jax.models.moe import MoE
from spct_jax.models.primitives import ACTIVATIONS, RMSNorm, dense, rope


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
    # The attention part: latent, or grouped queries.
    if c.latent is not None:
      self.mla = LatentAttention(c, self.block)
    else:
      self.q = dense(c, (c.width,), (c.heads, c.head_dim), c.qkv_bias)
      self.k = dense(c, (c.width,), (c.kv_heads, c.head_dim), c.qkv_bias)
      self.v = dense(c, (c.width,), (c.kv_heads, c.head_dim), c.qkv_bias)
      self.o = dense(c, (c.heads, c.head_dim), (c.width,), c.o_bias)
      if c.qk_norm:
        self.q_norm = RMSNorm(c)
        self.k_norm = RMSNorm(c)
    # The feed-forward part: experts, or one dense network.
    if self.block.experts is not None:
      self.moe = MoE(c, self.block.experts)
    else:
      self.gate = dense(c, (c.width,), (c.ffn,), c.mlp_bias)
      self.up = dense(c, (c.width,), (c.ffn,), c.mlp_bias)
      self.down = dense(c, (c.ffn,), (c.width,), c.mlp_bias)

  def __call__(self, x, positions, attend: Callable, cached: bool):
    """`attend(q, k, v) -> (out, cache)`, which stores k and v if `cached`; returns `(x, cache)`."""
    y, cache = self._attention(self.attn_norm(x), positions, attend, cached)
    x = x + (self.attn_post_norm(y) if self.model.post_norms else y)
    y = self._feed_forward(self.mlp_norm(x))
    return x + (self.mlp_post_norm(y) if self.model.post_norms else y), cache

  def _attention(self, y, positions, attend, cached):
    if self.model.latent is not None:
      return self.mla(y, positions, attend, cached)
    q, k, v = self.q(y), self.k(y), self.v(y)
    if self.model.qk_norm:
      q, k = self.q_norm(q), self.k_norm(k)
    out, cache = attend(rope(q, positions, self.block), rope(k, positions, self.block), v)
    return self.o(out), cache

  def _feed_forward(self, y):
    if self.block.experts is not None:
      return self.moe(y)
    return self.down(ACTIVATIONS[self.model.activation](self.gate(y)) * self.up(y))
