"""The scalar head: a linear map of the final hidden state of the last real token to one number.

    r = kernel^T norm(x[lengths - 1])

the value a reward model or the meta-RM (SPCT section 2.6) gives a whole sequence. A row of length 0 is
a padding row: it gets the value at index 0, finite and meant to be masked.

There is no bias: sequence-classification heads of other software have none, so a trained one would be lost on export.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from spct_jax.models.config import ModelConfig

Array = jax.Array | np.ndarray


def init(key: jax.Array, config: ModelConfig) -> dict:
  """{'kernel': [D, 1]}; rewards of a fresh head have about unit scale."""
  dtype = jnp.dtype(config.param_dtype)
  kernel = jax.random.normal(key, (config.width, 1), dtype) * config.width**-0.5
  return {'kernel': kernel.astype(dtype)}


def last_token(x: Float[Array, 'B T D'], lengths: Int[Array, ' B']) -> Float[Array, 'B D']:
  """`x[b, lengths[b] - 1]`: of six tokens with `lengths = 4`, the one at index 3."""
  index = jnp.clip(lengths - 1, 0, x.shape[1] - 1)
  return jnp.take_along_axis(x, index[:, None, None], axis=1)[:, 0, :]


def reward(params: dict, x: Float[Array, 'B D']) -> Float[Array, ' B']:
  """float32, whatever the model computes in: rewards are compared, and bfloat16 ties them."""
  # The default precision of a float32 product is bfloat16 on TPUs and TF32 on GPUs.
  kernel = params['kernel'].astype(jnp.float32)
  return jnp.matmul(x.astype(jnp.float32), kernel, precision='highest')[:, 0]
