"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): keys and values come from a latent.

    c = norm(C x)                   the latent, `rank` numbers a token
    r = rope(R x)                   the rotated part of the key, one for all heads
    k_h = [K_h c ; r]     v_h = V_h c     q_h = [its first `nope` numbers ; rope(the rest)]

q comes from x, or from a normed latent of its own. Two forms, equal up to rounding:

*Expanded*, for a pass without a cache: k and v of every head, as above.

*Absorbed*, for a cache: since  q_h . K_h c = (K_h^T q_h) . c,  every head looks for [K_h^T q_h ; its rotated part]
among the [c ; r], which are one key for all heads and, in their first part, one value; V_h is applied to what comes
out. `attend` gets [c ; r] both as key and as value, so the cache holds it once: 576 numbers a token and layer in
DeepSeek-V2-Lite, where k and v of 16 heads would be 5120. It costs 2 (rank + rope) multiplications a head, query
and key instead of nope + rope + value.

Norms inside have eps = 1e-6 whatever the model's is, as in the published code.
"""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from spct_jax.models.config import BlockConfig, ModelConfig
from spct_jax.models.dense import whole
from spct_jax.models.primitives import RMSNorm, dense, rope

EPS = 1e-6


class LatentAttention(nn.Module):
  """`[B, T, D] -> [B, T, D]`.

      q/kernel [D,H,nope+rope], or q_down/kernel [D,q_rank], q_down_norm/scale, q_up/kernel [q_rank,H,nope+rope];
      kv_down/kernel [D,rank+rope], kv_down_norm/scale [rank], kv_up/kernel [rank,H,nope+value]; o/kernel [H,value,D]
  """

  model: ModelConfig
  block: BlockConfig

  def setup(self):
    c, latent = self.model, self.model.latent
    query = (c.heads, latent.nope + latent.rope)
    if latent.q_rank is None:
      self.q = dense(c, (c.width,), query)
    else:
      self.q_down = dense(c, (c.width,), (latent.q_rank,), c.qkv_bias)
      self.q_down_norm = RMSNorm(c, eps=EPS)
      self.q_up = dense(c, (latent.q_rank,), query)
    self.kv_down = dense(c, (c.width,), (latent.rank + latent.rope,), c.qkv_bias)
    self.kv_down_norm = RMSNorm(c, eps=EPS)
    self.kv_up = _Matrix((latent.rank, c.heads, latent.nope + latent.value), c.dtype, c.param_dtype)
    self.o = dense(c, (c.heads, latent.value), (c.width,), c.o_bias)

  def __call__(
      self, y: Float[Array, 'B T D'], positions: Int[Array, 'B T'], attend: Callable, cached: bool
  ):
    """`attend(q, k, v) -> (out, cache)`; returns `(what is added to the residual stream, cache)`."""
    latent = self.model.latent
    q = self.q(y) if latent.q_rank is None else self.q_up(self.q_down_norm(self.q_down(y)))
    q, q_turned = jnp.split(q, [latent.nope], axis=-1)
    c, turned = jnp.split(self.kv_down(y), [latent.rank], axis=-1)
    c = self.kv_down_norm(c)
    q_turned, turned = rope(q_turned, positions, self.block), rope(turned[:, :, None, :], positions, self.block)
    to_key, to_value = jnp.split(self.kv_up(), [latent.nope], axis=-1)
    if not cached:
      k = jnp.einsum('BTR,RHN->BTHN', c, to_key)
      k = jnp.concatenate([k, jnp.broadcast_to(turned, q_turned.shape)], axis=-1)
      v = jnp.einsum('BTR,RHV->BTHV', c, to_value)
      out, cache = attend(jnp.concatenate([q, q_turned], axis=-1), k, v)
    else:
      q = jnp.concatenate([jnp.einsum('BTHN,RHN->BTHR', q, to_key), q_turned], axis=-1)
      kept = jnp.concatenate([c[:, :, None, :], turned], axis=-1)
      out, cache = attend(q, kept, kept)
      out = jnp.einsum('BTHR,RHV->BTHV', out[..., : latent.rank], to_value)
    return self.o(out), cache


class _Matrix(nn.Module):
  """The parameters of a `Dense` as one matrix, for a product from either side; adapters are added to the kernel."""

  shape: tuple[int, ...]
  dtype: str
  param_dtype: str

  @nn.compact
  def __call__(self):
    init = nn.initializers.lecun_normal(in_axis=0, out_axis=tuple(range(1, len(self.shape))))
    kernel = self.param('kernel', init, self.shape, jnp.dtype(self.param_dtype))
    return whole(self, kernel).astype(self.dtype)
