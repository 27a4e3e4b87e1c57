"""Which sampled trajectories rejective fine-tuning keeps (SPCT 2.3: rejection and hinted sampling).

A wrong trajectory goes. An item whose non-hinted trajectories are all right is too easy: they all
go. A hinted trajectory is judged alone, so it stays if it is right, whatever became of the others.

Where the paper is silent:
1. All the right trajectories of an item are kept, not one of them.
2. An item without any non-hinted trajectory is not too easy.

Padding where items have different numbers of samples: `correct` False and `hinted` True; it is
dropped, and it keeps no item from being too easy.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Bool

from spct_jax.masked import Array


@jax.jit
def too_easy(correct: Bool[Array, 'B K'], hinted: Bool[Array, 'B K']) -> Bool[Array, ' B']:
  """Items whose non-hinted samples are all right: also the items that the RL data leaves out (SPCT
  2.5)."""
  correct, hinted = jnp.asarray(correct).astype(bool), jnp.asarray(hinted).astype(bool)
  return jnp.all(correct | hinted, axis=1) & jnp.any(~hinted, axis=1)


@jax.jit
def keep(correct: Bool[Array, 'B K'], hinted: Bool[Array, 'B K']) -> Bool[Array, 'B K']:
  """Which samples to train on.

      correct   1 1 1 | 1      hinted   0 0 0 | 1      keep   0 0 0 | 1   too easy; the hint stands alone
      correct   1 0 1 | 0      hinted   0 0 0 | 1      keep   1 0 1 | 0
  """
  correct, hinted = jnp.asarray(correct).astype(bool), jnp.asarray(hinted).astype(bool)
  return correct & (hinted | ~too_easy(correct, hinted)[:, None])
