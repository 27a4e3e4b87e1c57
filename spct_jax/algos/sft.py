"""Next-token loss on the tokens that the model is to write: RFT (SPCT 2.3) and general chat data.

    L = -sum over the True tokens of log p(token), with the number of those tokens

Every token counts alike, whatever the length of its sequence; prompts carry no loss.
"""

import jax.numpy as jnp
from jaxtyping import Bool, Float

from spct_jax import masked
from spct_jax.masked import Array


def loss(
    logp: Float[Array, '*seq T'], token_mask: Bool[Array, '*seq T']
) -> tuple[Float[Array, ''], Float[Array, '']]:
  """(sum, number of tokens), float32.

  logp         nan  -.5  -.2  -.3  nan  -inf
  token_mask    0    1    1    1    0    0       (1.0, 3)
  """
  return -masked.sum(logp, token_mask), masked.count(token_mask).astype(jnp.float32)
