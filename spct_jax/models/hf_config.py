"""Between a Hugging Face `config.json` and a `ModelConfig`, for the families that are this decoder.

| model_type | bias on q, k, v | norm on q, k | windows |
|---|---|---|---|
| llama   | no  | no  | none |
| mistral | no  | no  | one for all layers |
| qwen2   | yes | no  | per layer |
| qwen3   | no  | yes | per layer |

A setting that this decoder does not compute is an error, never ignored: a model that loads and is
slightly wrong is the worst outcome.
"""

from typing import Any

from spct_jax.models.config import BlockConfig, ModelConfig
from spct_jax.models.rope import Llama3Scaling

CLASSES = {'llama': 'Llama', 'mistral': 'Mistral', 'qwen2': 'Qwen2', 'qwen3': 'Qwen3'}
HEADS = {'ForCausalLM': 'lm', 'ForSequenceClassification': 'scalar'}

# Rotary models have no length of their own, but the file must state one; servers take it as their limit.
MAX_POSITIONS = 32768


def read(where: str, fields: dict[str, Any], *, dtype: str = 'float32') -> ModelConfig:
  """The decoder that a `config.json` describes; `where` names it in errors.

  What the file leaves out has the default that `transformers` gives it.
  """
  family, head_kind = _architecture(where, fields)
  for name in ('vocab_size', 'hidden_size', 'num_attention_heads', 'intermediate_size', 'num_hidden_layers'):
    if name not in fields:
      raise ValueError(f'{where}: the field {name!r} is missing; it is no complete model configuration')
  _require(where, fields, 'hidden_act', 'silu', 'silu')
  _require(where, fields, 'mlp_bias', False, False)
  _require(where, fields, 'attention_bias', family == 'qwen2', family == 'qwen2')
  if head_kind == 'scalar':
    _require(where, {'num_labels': _num_labels(fields)}, 'num_labels', 2, 1)
  heads, width = fields['num_attention_heads'], fields['hidden_size']
  theta, scaling = _rope(where, fields)
  blocks = tuple(BlockConfig(window, theta, scaling) for window in _windows(where, family, fields))
  head, period, num_periods, remainder = group(blocks)
  return ModelConfig(
      vocab_size=fields['vocab_size'],
      width=width,
      heads=heads,
      kv_heads=_given(fields, 'num_key_value_heads', heads),
      head_dim=_given(fields, 'head_dim', 128 if family == 'qwen3' else width // heads),
      ffn=fields['intermediate_size'],
      head=head,
      period=period,
      num_periods=num_periods,
      remainder=remainder,
      tied=_given(fields, 'tie_word_embeddings', False),
      norm_eps=_given(fields, 'rms_norm_eps', 1e-6),
      qkv_bias=family == 'qwen2',
      qk_norm=family == 'qwen3',
      head_kind=head_kind,
      dtype=dtype,
      param_dtype=dtype,
  )


def write(config: ModelConfig) -> dict[str, Any]:
  """The `config.json` of a decoder, or a ValueError if no family computes the same."""
  family = _family(config)
  windows = [block.window for block in config.layers]
  block = config.layers[0]
  fields = {
      'architectures': [CLASSES[family] + next(k for k, v in HEADS.items() if v == config.head_kind)],
      'model_type': family,
      'vocab_size': config.vocab_size,
      'hidden_size': config.width,
      'num_attention_heads': config.heads,
      'num_key_value_heads': config.kv_heads,
      'head_dim': config.head_dim,
      'intermediate_size': config.ffn,
      'num_hidden_layers': config.num_layers,
      'tie_word_embeddings': config.tied,
      'rms_norm_eps': config.norm_eps,
      'hidden_act': 'silu',
      'rope_theta': block.rope_theta,
      'max_position_embeddings': MAX_POSITIONS,
      'torch_dtype': config.param_dtype,
  }
  if block.rope_scaling is not None:
    s = block.rope_scaling
    fields['rope_scaling'] = {
        'rope_type': 'llama3', 'factor': s.factor, 'low_freq_factor': s.low, 'high_freq_factor': s.high,
        'original_max_position_embeddings': s.original_length,
    }
    fields['max_position_embeddings'] = int(s.original_length * s.factor)
  if family == 'mistral':
    fields['sliding_window'] = windows[0]
  if family in ('qwen2', 'qwen3'):
    sliding = max((w for w in windows if w is not None), default=None)
    fields |= {
        'use_sliding_window': sliding is not None,
        'sliding_window': sliding,
        'layer_types': ['full_attention' if w is None else 'sliding_attention' for w in windows],
    }
  if config.head_kind == 'scalar':
    fields |= {'num_labels': 1, 'id2label': {'0': 'LABEL_0'}, 'label2id': {'LABEL_0': 0}}
  return fields


def group(blocks: tuple[BlockConfig, ...]):
  """(head, period, num_periods, remainder) of a list of layers, with the fewest blocks to compile.

  `aaaaaa` is `a` six times; `ababab` is `ab` three times; `aabbbb` is a head `aa` and `b` four times.
  """
  best, L = None, len(blocks)
  for first in range(L):
    for size in range(1, L - first + 1):
      repeats = 1
      while blocks[first : first + size] == blocks[first + repeats * size : first + (repeats + 1) * size]:
        repeats += 1
      cost = L - (repeats - 1) * size
      if best is None or cost < best[0]:
        best = (cost, first, size, repeats)
  _, first, size, repeats = best
  return blocks[:first], blocks[first : first + size], repeats, blocks[first + repeats * size :]


def _architecture(where, fields):
  known = [cls + head for cls in CLASSES.values() for head in HEADS]
  names = fields.get('architectures') or [CLASSES.get(fields.get('model_type'), '?') + 'ForCausalLM']
  for family, cls in CLASSES.items():
    for suffix, head_kind in HEADS.items():
      if names[0] == cls + suffix:
        return family, head_kind
  raise ValueError(
      f'{where}: unsupported architecture {names[0]!r} (model_type {fields.get("model_type")!r}); supported are '
      + ', '.join(known)
  )


def _family(config):
  windows = {block.window for block in config.layers}
  kinds = {(block.rope_theta, block.rope_scaling) for block in config.layers}
  sizes = windows - {None}
  plain = not config.qkv_bias and not config.qk_norm
  if len(kinds) > 1:
    problem = 'its blocks have different rotary embeddings'
  elif config.qkv_bias and config.qk_norm:
    problem = 'it has both qkv_bias (qwen2) and qk_norm (qwen3)'
  elif len(sizes) > 1:
    problem = f'its blocks have windows of several sizes, {sorted(sizes)}'
  elif plain and len(windows) > 1:
    problem = 'it mixes local and global attention, which needs qkv_bias (qwen2) or qk_norm (qwen3)'
  else:
    return 'qwen2' if config.qkv_bias else 'qwen3' if config.qk_norm else 'mistral' if sizes else 'llama'
  raise ValueError(
      f'this decoder has no Hugging Face twin: {problem}; families are {", ".join(CLASSES)}. Keep it in its '
      'checkpoint format, or choose a configuration of one family'
  )


def _given(fields, name, default):
  return default if fields.get(name) is None else fields[name]


def _require(where, fields, name, default, allowed):
  got = _given(fields, name, default)
  if got != allowed:
    raise ValueError(f'{where}: {name} is {got!r}; this decoder computes {name}={allowed!r} only')


def _num_labels(fields):
  return len(fields['id2label']) if fields.get('id2label') else _given(fields, 'num_labels', 2)


def _rope(where, fields):
  """(theta, scaling) from `rope_parameters` or from the older `rope_theta` and `rope_scaling`."""
  found = {'rope_theta': fields.get('rope_theta')} | (fields.get('rope_scaling') or {})
  found |= fields.get('rope_parameters') or {}
  nested = sorted(name for name, value in found.items() if isinstance(value, dict))
  if nested:
    raise ValueError(
        f'{where}: rope_parameters differ by layer type ({", ".join(nested)}); supported is one setting for all layers'
    )
  theta = _given(found, 'rope_theta', 10000.0)
  kind = _given(found, 'rope_type', _given(found, 'type', 'default'))
  _require(where, {**fields, **found}, 'partial_rotary_factor', 1.0, 1.0)
  if kind == 'default':
    return theta, None
  if kind != 'llama3':
    raise ValueError(f'{where}: rotary scaling {kind!r} is not supported; supported are default and llama3')
  names = ('factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings')
  missing = [name for name in names if name not in found]
  if missing:
    raise ValueError(f'{where}: rotary scaling llama3 lacks {", ".join(missing)}')
  return theta, Llama3Scaling(*(found[name] for name in names))


def _windows(where, family, fields):
  # An absent key is transformers' default, 4096; a null one is global attention.
  layers, window = fields['num_hidden_layers'], fields.get('sliding_window', 4096)
  if family == 'llama':
    return [None] * layers
  if family == 'mistral':
    return [window] * layers
  if not _given(fields, 'use_sliding_window', False):
    return [None] * layers
  types = fields.get('layer_types')
  if types is None:
    full = _given(fields, 'max_window_layers', 28)
    types = ['full_attention' if i < full else 'sliding_attention' for i in range(layers)]
  unknown = sorted(set(types) - {'full_attention', 'sliding_attention'})
  if unknown or len(types) != layers:
    raise ValueError(
        f'{where}: layer_types has {len(types)} entries for {layers} layers, unknown kinds {unknown}; the kinds '
        'are full_attention and sliding_attention'
    )
  return [window if kind == 'sliding_attention' else None for kind in types]
