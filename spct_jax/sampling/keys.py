"""The engine's randomness: one uniform number per token, named by what is sampled, not by where it runs.

    key(task)        = fold_in(... key(seed), stage, visit, uid[0], uid[1], sample)
    uniform(task, t) = U[0, 1) from fold_in(key(task), t)

A task's numbers therefore depend on no row, batch, refill order, device count or resume point
(decision 6). `visit` counts epochs, so an item that is met again draws anew. The generator is named
(threefry), so that a process-wide default of JAX cannot change the numbers.
"""

import hashlib

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt32
import numpy as np


def root_key(seed: int, stage: str) -> Key[Array, '']:
  """The key of all that a stage of a run samples."""
  if not 0 <= seed < 2**32:
    raise ValueError(f'seed: got {seed}; it must be from 0 to 2**32 - 1.')
  word = int.from_bytes(hashlib.blake2b(stage.encode(), digest_size=4).digest(), 'little')
  key = jax.random.key(np.uint32(seed), impl='threefry2x32')
  return jax.random.fold_in(key, np.uint32(word))


def task_keys(
    seed: int,
    stage: str,
    uid: UInt32[Array | np.ndarray, 'Q 2'],
    visit: Int[Array | np.ndarray, ' Q'],
    sample: Int[Array | np.ndarray, ' Q'],
) -> Key[Array, ' Q']:
  """One key per task; `uid` is the stable 64-bit hash of the item's uid."""
  return fold_tasks(root_key(seed, stage), uid, visit, sample)


def fold_tasks(
    root: Key[Array, ''],
    uid: UInt32[Array | np.ndarray, 'Q 2'],
    visit: Int[Array | np.ndarray, ' Q'],
    sample: Int[Array | np.ndarray, ' Q'],
) -> Key[Array, ' Q']:
  """The part of `task_keys` that can be traced."""
  words = [visit, uid[:, 0], uid[:, 1], sample]
  words = jnp.stack([jnp.asarray(word).astype(jnp.uint32) for word in words], axis=1)

  def fold(word):
    key = root
    for i in range(word.shape[0]):
      key = jax.random.fold_in(key, word[i])
    return key

  return jax.vmap(fold)(words)


def uniform(keys: Key[Array, ' Q'], t: Int[Array | np.ndarray, ' Q']) -> Float[Array, ' Q']:
  """The number in [0, 1) that draws token `t` of each task."""
  one = lambda key, index: jax.random.uniform(jax.random.fold_in(key, index), dtype=jnp.float32)
  return jax.vmap(one)(keys, jnp.asarray(t).astype(jnp.uint32))
