"""Leaves of our tree and tensors of a Hugging Face file: their names, and the values from one to the other.

The file has one tensor per layer, `[out, in]`; the tree of `transformer` has kernels `[in, out]` with the
heads as an axis of their own, stacked over the period. Rotary pairs are half-split in both, so no row moves; for
experts and latent attention, where one does, see `hf_experts`.

The padding rows of the vocabulary (`vocab_multiple`) stay out of the file.
"""

import math

import numpy as np

from spct_jax.models import hf_experts
from spct_jax.models.config import ModelConfig

# Leaf of a block -> (tensor of a layer, how many of our axes the tensor's input axis stands for; 0 = no kernel).
BLOCK = {
    'attn_norm/scale': ('input_layernorm.weight', 0),
    'q/kernel': ('self_attn.q_proj.weight', 1),
    'q/bias': ('self_attn.q_proj.bias', 0),
    'k/kernel': ('self_attn.k_proj.weight', 1),
    'k/bias': ('self_attn.k_proj.bias', 0),
    'v/kernel': ('self_attn.v_proj.weight', 1),
    'v/bias': ('self_attn.v_proj.bias', 0),
    'q_norm/scale': ('self_attn.q_norm.weight', 0),
    'k_norm/scale': ('self_attn.k_norm.weight', 0),
    'o/kernel': ('self_attn.o_proj.weight', 2),
    'o/bias': ('self_attn.o_proj.bias', 0),
    'mlp_norm/scale': ('post_attention_layernorm.weight', 0),
    'gate/kernel': ('mlp.gate_proj.weight', 1),
    'gate/bias': ('mlp.gate_proj.bias', 0),
    'up/kernel': ('mlp.up_proj.weight', 1),
    'up/bias': ('mlp.up_proj.bias', 0),
    'down/kernel': ('mlp.down_proj.weight', 1),
    'down/bias': ('mlp.down_proj.bias', 0),
}
# With `post_norms`: what others call the norm in front of the MLP is here the one behind attention.
POST_NORMS = {
    'attn_post_norm/scale': ('post_attention_layernorm.weight', 0),
    'mlp_norm/scale': ('pre_feedforward_layernorm.weight', 0),
    'mlp_post_norm/scale': ('post_feedforward_layernorm.weight', 0),
}
ENDS = {
    'embed/table': ('model.embed_tokens.weight', 0),
    'final_norm/scale': ('model.norm.weight', 0),
    'unembed/kernel': ('lm_head.weight', 1),
    'reward/kernel': ('score.weight', 1),
}


def tensors_of(config: ModelConfig, path: str) -> tuple[str | list, int]:
  """(name, axes) of the leaf at `path`; (names, axes) of a stacked leaf, one name per place of its first dimension.

  With two stacked dimensions, periods and experts, they are lists of names.
  """
  if path in ENDS:
    return ENDS[path]
  group, j, leaf = path.split('/', 2)
  table = BLOCK | POST_NORMS if config.post_norms else BLOCK
  name, axes = (table | hf_experts.block(config))[leaf]
  first, period = len(config.head), len(config.period)
  start = {'head': 0, 'period': first, 'remainder': first + period * config.num_periods}[group] + int(j)
  if group != 'period':
    return hf_experts.each(config, start, name), axes
  return [hf_experts.each(config, start + i * period, name) for i in range(config.num_periods)], axes


def depth(names: str | list) -> int:
  """How many stacked dimensions a leaf has whose tensors are called `names`."""
  return 0 if isinstance(names, str) else 1 + depth(names[0])


def pairs(config: ModelConfig, path: str) -> int:
  """How many of the last numbers of the leaf at `path` are rotary pairs, side by side in the file and halves here."""
  return 0 if path in ENDS else hf_experts.pairs(config, path.split('/', 2)[2])


def ours(value: np.ndarray, shape: tuple[int, ...], axes: int, dtype, pairs: int = 0) -> np.ndarray:
  """A tensor of the file as a leaf (of one layer) of `shape`; the vocabulary padded with zeros."""
  value = value if axes == 0 else value.T
  if value.size < np.prod(shape):
    value = np.pad(value, [(0, want - got) for want, got in zip(shape, value.shape)])
  return np.ascontiguousarray(hf_experts.to_halves(value.reshape(shape), pairs)).astype(dtype)


def theirs(config: ModelConfig, path: str, value: np.ndarray) -> np.ndarray:
  """A leaf (of one layer) as the tensor of the file."""
  if path == 'embed/table':
    value = value[: config.vocab_size]
  if path == 'unembed/kernel':
    value = value[:, : config.vocab_size]
  _, axes = tensors_of(config, path)
  if pairs(config, path):
    value = hf_experts.to_pairs(value, pairs(config, path))
  if axes == 0:
    return np.ascontiguousarray(value if path == 'embed/table' else value.reshape(-1))
  return np.ascontiguousarray(value.reshape(int(np.prod(value.shape[:axes])), -1).T)


def file_shape(config: ModelConfig, path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
  """The shape that the leaf (of one layer) at `path`, of `shape`, has in the file: what `theirs` gives."""
  if path == 'embed/table':
    return (config.vocab_size, *shape[1:])
  if path == 'unembed/kernel':
    shape = (shape[0], config.vocab_size)
  _, axes = tensors_of(config, path)
  outputs = math.prod(shape[axes:])
  return (outputs, math.prod(shape[:axes])) if axes else (outputs,)
