"""Kernels and caches in eight bits, for reading only: what a step of decoding waits for is memory.

    w ~ q step        q = round(w / step) int8, -127 to 127;  step = max |w| / 127 float32

symmetric, with one step for all numbers that meet in one sum, so that it is multiplied once, behind the product:

    kernel  [*in, *out]   step [*out]       x kernel ~ (x q) step
    table   [V, D]        step [V]          of tied embeddings: row v is what token v enters as, and a column of the logits
    keys    [B, M, S, d]  step [B, M, S]    of a token and head: (Q q^T) step;   values: (weights step) q

What is multiplied is q in the dtype of the other side, products are summed in float32, and rounded once behind the step.
Float are: norms, biases and routers, which are small; the table of untied embeddings, of which a step reads a row per
token; latent attention's `kv_up`, which is multiplied from both sides (one percent of such a model).

There is no derivative with respect to such leaves: the learner never has them.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8 as Bytes

from spct_jax.models import hf_names
from spct_jax.models.config import ModelConfig

LARGEST = 127
_FLOAT = ('router/kernel', 'kv_up/kernel', 'reward/kernel')


class Int8(NamedTuple):
  """`values` int8 and `step` float32, of whose axes it lacks those that share a step."""

  values: jax.Array
  step: jax.Array

  @property
  def shape(self) -> tuple[int, ...]:
    return self.values.shape


def rounded(x: Float[Array, '...'], axes: tuple[int, ...]) -> Int8:
  """One step for all numbers along `axes`; it is 1, and all are 0, where none is above 127 times the least float."""
  x = x.astype(jnp.float32)
  most = jnp.abs(x).max(axis=axes, keepdims=True)
  # A subnormal step would be flushed to zero, and 0 / 0 is NaN.
  step = jnp.where(most > LARGEST * jnp.finfo(jnp.float32).tiny, most, LARGEST) / LARGEST
  values = jnp.clip(jnp.round(x / step), -LARGEST, LARGEST).astype(jnp.int8)
  return Int8(values, step.reshape([size for axis, size in enumerate(step.shape) if axis not in axes]))


def plain(x: Array | Int8) -> Float[Array, '...'] | Bytes[Array, '...']:
  """What enters a product in the place of `x`."""
  return x.values if isinstance(x, Int8) else x


def floats(x: Array | Int8, dtype: Any) -> Float[Array, '...']:
  """The numbers that `x`, whose last axis shares a step, stands for."""
  return (x.values * x.step[..., None]).astype(dtype) if isinstance(x, Int8) else x.astype(dtype)


def kept(tree: Any, changing: jax.Array) -> Any:
  """The tree, inside of a loop that reads it; `changing` is any number that the loop changes.

  A compiler sees that the tree does not change, and would make floats of it once, before the loop: a float model
  beside the small one, to be read at every step. What it believes to change it leaves where it is. Without a leaf in
  eight bits nothing is done.
  """
  if not any(leaf.dtype == jnp.int8 for leaf in jax.tree.leaves(tree)):
    return tree
  return jax.lax.optimization_barrier((tree, changing))[0]


def inputs(config: ModelConfig, path: str) -> tuple[int, ...]:
  """The axes of the leaf at `path` that share a step; () where it stays float. Layers are side by side (`unrolled`)."""
  if path == 'embed/table':
    return (1,) if config.tied else ()
  if not path.endswith('/kernel') or path.endswith(_FLOAT):
    return ()
  names, axes = hf_names.tensors_of(config, path)
  first = hf_names.depth(names)  # the axis of experts
  return tuple(range(first, first + axes))


def quantise(config: ModelConfig, params: dict) -> dict:
  """The parameters with int8 kernels and a 'step' beside each. `config` and `params` have their layers side by side."""

  def walk(path, node):
    out = {}
    for name, leaf in node.items():
      here = f'{path}{name}'
      if isinstance(leaf, dict):
        out[name] = walk(f'{here}/', leaf)
      elif axes := inputs(config, here):
        out[name], out['step'] = rounded(leaf, axes)
      else:
        out[name] = leaf
    return out

  return walk('', params)
