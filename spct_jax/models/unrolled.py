"""A decoder with its layers side by side in place of stacked: what a loop of decoding steps wants.

A scan over stacked layers slices each layer's weights and caches out of the stack, and inside a loop of
steps it does so for every token: the slices are copies as large as the model. Here every layer is a block of
the `head` group, with arrays of its own; `Transformer` and `kv_cache` then work as they are.
"""

import dataclasses

import jax

from spct_jax.models.config import ModelConfig
from spct_jax.models.transformer import Transformer


def model(stacked: Transformer) -> Transformer:
  """The same decoder for decoding: all of its blocks in `head`, nothing recomputed."""
  config = stacked.config
  flat = dataclasses.replace(config, head=config.layers, period=(), num_periods=0, remainder=(), remat=False)
  return dataclasses.replace(stacked, config=flat)


def params(config: ModelConfig, stacked: dict) -> dict:
  """Parameters of `config` for the decoder that `model` gives. The leaves of its period are copied."""
  layers = [stacked['head'][str(j)] for j in range(len(config.head))]
  for i in range(config.num_periods):
    layers += [jax.tree.map(lambda leaf: leaf[i], stacked['period'][str(j)]) for j in range(len(config.period))]
  layers += [stacked['remainder'][str(j)] for j in range(len(config.remainder))]
  ends = {name: leaf for name, leaf in stacked.items() if name not in ('head', 'period', 'remainder')}
  return {**ends, 'head': {str(j): layer for j, layer in enumerate(layers)}}
