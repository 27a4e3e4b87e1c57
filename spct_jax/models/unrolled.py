"""A decoder with its layers side by side in place of stacked: what a loop of decoding steps wants.

A scan over stacked layers slices each layer's weights and caches out of the stack, and inside a loop of
steps it does so for every token: the slices are copies as large as the model. Here every layer is a block of
the `head` group, with arrays of its own; `Transformer` and `kv_cache` then work as they are.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax

from spct_jax.models.config import ModelConfig
from spct_jax.models.transformer import Transformer


def model(stacked: Transformer) -> Transformer:
  """The same decoder for decoding: all of its blocks in `head`, nothing recomputed."""
  config = stacked.config
  flat = dataclasses.replace(config, head=config.layers, period=(), num_periods=0, remainder=(), remat=False)
  return dataclasses.replace(stacked, config=flat)


def alone(held: dict) -> bool:
  """Whether parameters have their layers side by side already."""
  return not {'period', 'remainder'} & held.keys()


def params(config: ModelConfig, held: dict, take: Callable[[Any, int], Any] = lambda leaf, i: leaf[i]) -> dict:
  """Parameters of `config`, stacked or side by side already, for the decoder that `model` gives.

  Layer i of a stacked leaf is `take(leaf, i)`, a copy; every other leaf is the one that came. A tree that holds a
  part of the blocks, as one of adapters does, gives the same part.
  """
  if alone(held):
    return held
  of = lambda group: held.get(group, {})
  layers = [of('head').get(str(j)) for j in range(len(config.head))]
  for i in range(config.num_periods):
    for j in range(len(config.period)):
      block = of('period').get(str(j))
      layers.append(None if block is None else jax.tree.map(lambda leaf: take(leaf, i), block))
  layers += [of('remainder').get(str(j)) for j in range(len(config.remainder))]
  ends = {name: leaf for name, leaf in held.items() if name not in ('head', 'period', 'remainder')}
  return {**ends, 'head': {str(j): layer for j, layer in enumerate(layers) if layer is not None}}


def consume(config: ModelConfig, held: dict) -> dict:
  """As `params`, and frees each stacked leaf as soon as its layers stand alone: there is never a second model."""
  if 'period' in held:
    apart = {}
    for j, block in held['period'].items():
      leaves, structure = jax.tree.flatten(block)
      for number, leaf in enumerate(leaves):
        leaves[number] = jax.block_until_ready([leaf[i] for i in range(config.num_periods)])
        leaf.delete()
      apart[j] = jax.tree.unflatten(structure, map(_Layers, leaves))
    held = {**held, 'period': apart}
  return params(config, held, take=lambda layers, i: layers.of[i])


@dataclasses.dataclass(frozen=True)
class _Layers:
  """The layers of one leaf; a leaf itself."""

  of: list
