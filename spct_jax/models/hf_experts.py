"""Experts and latent attention in Hugging Face files: names of their tensors, and the layouts there are.

A file has three matrices per expert, `[out, in]`; ours are stacked, so a leaf `[E, D, F]` (`[P, E, D, F]` below a
period) is made of E (P lists of E) tensors, and whoever holds a few experts reads theirs only.

1. `transformers` 5 holds the experts of a layer in two tensors, gate_up_proj [E, 2F, D] and down_proj [E, D, F]. Its
   `save_pretrained` writes one per expert all the same, and so do we; but a file of the state dict as it is held is
   read too: a part of a fused tensor is a range of bytes like any tensor.
2. DeepSeek's rotary pairs lie side by side in the file, (2i, 2i + 1); ours are halves, (i, i + n / 2). The rows that
   make them move on the way in and back on the way out.
3. `transformers` keeps the router of DeepSeek-V2 in float32 where the file has another dtype than the model, in a
   bfloat16 model too; so do we.
"""

import dataclasses

import numpy as np

from spct_jax.models.config import ModelConfig
from spct_jax.models.hf_files import DTYPES, Tensor

# As `hf_names.BLOCK`; {} is the number of the expert.
BLOCK = {
    'mla/q/kernel': ('self_attn.q_proj.weight', 1),
    'mla/q_down/kernel': ('self_attn.q_a_proj.weight', 1),
    'mla/q_down/bias': ('self_attn.q_a_proj.bias', 0),
    'mla/q_down_norm/scale': ('self_attn.q_a_layernorm.weight', 0),
    'mla/q_up/kernel': ('self_attn.q_b_proj.weight', 1),
    'mla/kv_down/kernel': ('self_attn.kv_a_proj_with_mqa.weight', 1),
    'mla/kv_down/bias': ('self_attn.kv_a_proj_with_mqa.bias', 0),
    'mla/kv_down_norm/scale': ('self_attn.kv_a_layernorm.weight', 0),
    'mla/kv_up/kernel': ('self_attn.kv_b_proj.weight', 1),
    'mla/o/kernel': ('self_attn.o_proj.weight', 2),
    'mla/o/bias': ('self_attn.o_proj.bias', 0),
    'moe/router/kernel': ('mlp.gate.weight', 1),
    'moe/experts/gate/kernel': ('mlp.experts.{}.gate_proj.weight', 1),
    'moe/experts/up/kernel': ('mlp.experts.{}.up_proj.weight', 1),
    'moe/experts/down/kernel': ('mlp.experts.{}.down_proj.weight', 1),
    'moe/shared/gate/kernel': ('mlp.shared_experts.gate_proj.weight', 1),
    'moe/shared/gate/bias': ('mlp.shared_experts.gate_proj.bias', 0),
    'moe/shared/up/kernel': ('mlp.shared_experts.up_proj.weight', 1),
    'moe/shared/up/bias': ('mlp.shared_experts.up_proj.bias', 0),
    'moe/shared/down/kernel': ('mlp.shared_experts.down_proj.weight', 1),
    'moe/shared/down/bias': ('mlp.shared_experts.down_proj.bias', 0),
}
# Mixtral's own; it is the family with experts that has neither latents nor norms on q and k.
MIXTRAL = {
    'moe/router/kernel': ('block_sparse_moe.gate.weight', 1),
    'moe/experts/gate/kernel': ('block_sparse_moe.experts.{}.w1.weight', 1),
    'moe/experts/up/kernel': ('block_sparse_moe.experts.{}.w3.weight', 1),
    'moe/experts/down/kernel': ('block_sparse_moe.experts.{}.w2.weight', 1),
}
_ROUTER = 'mlp.gate.weight'


def block(config: ModelConfig) -> dict[str, tuple[str, int]]:
  """The part of the table of a block's leaves that is this module's."""
  return BLOCK if config.latent is not None or config.qk_norm else BLOCK | MIXTRAL


def each(config: ModelConfig, layer: int, name: str) -> str | list[str]:
  """The tensor of one layer called `name`, or those of its experts."""
  name = f'model.layers.{layer}.{name}'
  if '{}' not in name:
    return name
  return [name.format(e) for e in range(config.layers[layer].experts.count)]


def pairs(config: ModelConfig, leaf: str) -> int:
  """How many of the last numbers of a leaf are rotary pairs that lie side by side in the file."""
  turned = ('mla/q/kernel', 'mla/q_up/kernel', 'mla/kv_down/kernel', 'mla/kv_down/bias')
  return config.latent.rope if leaf in turned else 0


def to_halves(value: np.ndarray, pairs: int) -> np.ndarray:
  """The last `pairs` numbers of the last axis as our leaves have them: `a0 b0 a1 b1` becomes `a0 a1 b0 b1`."""
  rest, turned = np.split(value, [value.shape[-1] - pairs], axis=-1)
  return np.concatenate([rest, turned[..., ::2], turned[..., 1::2]], axis=-1)


def to_pairs(value: np.ndarray, pairs: int) -> np.ndarray:
  """The last `pairs` numbers of the last axis as the file has them: `a0 a1 b0 b1` becomes `a0 b0 a1 b1`."""
  rest, first, second = np.split(value, [value.shape[-1] - pairs, value.shape[-1] - pairs // 2], axis=-1)
  turned = np.stack([first, second], axis=-1).reshape(*value.shape[:-1], pairs)
  return np.concatenate([rest, turned], axis=-1)


def unfuse(tensors: dict[str, Tensor], config: ModelConfig) -> None:
  """Puts the parts of fused tensors in their place, under the names that a saved file has."""
  names = block(config)
  for i, layer in enumerate(config.layers):
    prefix, experts = f'model.layers.{i}.', layer.experts
    if experts is None:
      continue
    ways = {
        f'{prefix}mlp.experts.gate_up_proj': (('gate', 'up'), (2 * experts.ffn, config.width)),
        f'{prefix}mlp.experts.down_proj': (('down',), (config.width, experts.ffn)),
    }
    for fused, (leaves, shape) in ways.items():
      if fused not in tensors or tensors[fused].shape != (experts.count, *shape):
        continue
      whole = tensors.pop(fused)
      nbytes = whole.nbytes // (experts.count * len(leaves))
      for n in range(experts.count * len(leaves)):
        e, part = divmod(n, len(leaves))
        name = prefix + names[f'moe/experts/{leaves[part]}/kernel'][0].format(e)
        tensors[name] = dataclasses.replace(
            whole, name=name, shape=(shape[0] // len(leaves), shape[1]), begin=whole.begin + n * nbytes, nbytes=nbytes
        )
    router = prefix + names['moe/router/kernel'][0]
    if prefix + _ROUTER in tensors and router not in tensors:
      tensors[router] = dataclasses.replace(tensors.pop(prefix + _ROUTER), name=router)


def with_routers(config: ModelConfig, tensors: dict[str, Tensor]) -> ModelConfig:
  """The decoder with routers of the dtype in which `transformers` holds them."""
  if config.latent is None:
    return config
  found = {
      str(DTYPES[tensors[name].dtype])
      for i, layer in enumerate(config.layers) if layer.experts is not None
      for name in [f'model.layers.{i}.{_ROUTER}'] if name in tensors and tensors[name].dtype in DTYPES
  }
  # A model of 16 bits is read into another of 16 bits with its routers in float32.
  if 'float32' not in found and (config.param_dtype == 'float32' or found <= {config.param_dtype}):
    return config

  def routed(layer):
    if layer.experts is None:
      return layer
    return dataclasses.replace(layer, experts=dataclasses.replace(layer.experts, router_dtype='float32'))

  return dataclasses.replace(
      config, **{name: tuple(map(routed, getattr(config, name))) for name in ('head', 'period', 'remainder')}
  )


def stored(config: ModelConfig, path: str, dtype: np.dtype) -> np.dtype:
  """The dtype of a leaf's tensors in a file that has `dtype` otherwise."""
  if not path.endswith('moe/router/kernel'):
    return dtype
  own = {layer.experts.router_dtype for layer in config.layers if layer.experts is not None} - {None}
  return np.dtype(own.pop()) if own else dtype
