"""What the parts of a block are made of: projections, RMSNorm, rotation, activations.

RMSNorm is arXiv 1910.07467, rotary embedding 2104.09864. Rotation turns the pairs (i, i + head_dim / 2), not the
paper's (2i, 2i + 1). Norms, rotations and activations are float32 and rounded once.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from spct_jax.models.config import BlockConfig, ModelConfig
from spct_jax.models.dense import Dense
from spct_jax.models.rope import frequencies, magnitude


def _rounded_once(function):
  # Step by step in bfloat16, a GELU's powers and tanh lose more than the matrices around it.
  return lambda x: function(x.astype(jnp.float32)).astype(x.dtype)


ACTIVATIONS = {
    'silu': _rounded_once(jax.nn.silu),
    'gelu_tanh': _rounded_once(lambda x: jax.nn.gelu(x, approximate=True)),
    'gelu': _rounded_once(lambda x: jax.nn.gelu(x, approximate=False)),
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
  eps: float | None = None  # None: the model's

  @nn.compact
  def __call__(self, x):
    eps = self.model.norm_eps if self.eps is None else self.eps
    dtype = jnp.dtype(self.model.param_dtype)
    start = nn.initializers.zeros if self.model.norm_plus_one else nn.initializers.ones
    scale = self.param('scale', start, (x.shape[-1],), dtype)
    x = x.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    scale = jnp.expand_dims(scale.astype(jnp.float32), range(x.ndim - 1)) + self.model.norm_plus_one
    return (x * scale).astype(self.model.dtype)


def dense(config: ModelConfig, inputs: tuple[int, ...], outputs: tuple[int, ...], bias: bool = False) -> Dense:
  """A projection in the model's dtypes."""
  return Dense(inputs, outputs, config.dtype, config.param_dtype, bias)
