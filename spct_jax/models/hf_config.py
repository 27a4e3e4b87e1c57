"""Between a Hugging Face `config.json` and a `ModelConfig`: one row of FAMILIES for each `model_type`.

A row names the classes, says which choices of the decoder the family makes and which fields of the file hold
the others. What `transformers` reads from a file is the measure, its defaults for absent fields included; fields
that it does not read for a family mean nothing here either.

A setting that `transformers` computes for a family and this decoder does not is an error: a model that loads and is
slightly wrong is the worst outcome. So is one that was surely meant, but is lost on `transformers` by its spelling.
`write` reads back what it wrote and compares.
"""

import dataclasses
import math
from typing import Any

from spct_jax.models import hf_sparse
from spct_jax.models.config import BlockConfig, ModelConfig
from spct_jax.models.rope import LinearScaling, Llama3Scaling, RopeScaling, YarnScaling

# Rotary models have no length of their own, but the file must state one; servers take it as their limit.
MAX_POSITIONS = 32768

# Their names of our activations; the first of each is the one that is written.
ACTIVATIONS = {
    'silu': 'silu', 'swish': 'silu', 'gelu_pytorch_tanh': 'gelu_tanh', 'gelu_new': 'gelu_tanh', 'gelu': 'gelu',
    'relu': 'relu',
}
FULL, SLIDING = 'full_attention', 'sliding_attention'


@dataclasses.dataclass(frozen=True)
class Family:
  """A row of FAMILIES.

  heads: class name -> kind of head.
  fixed: fields of ModelConfig that every model of the family has.
  fields: field of the file -> (field of ModelConfig, its value where the file has none).
  absent: other fields' values where the file has none (a null in the file may mean something else).
  attention_bias: 'qkv' always on q, k and v; 'file' on q, k, v and o if the file says so; 'none' never.
  activation: the field that names it, and its value where the file has none.
  windows: a key of WINDOWS. rope: a key of ROPES.
  divides: `transformers` refuses a width that is no multiple of the number of heads.
  """

  heads: dict[str, str]
  absent: dict[str, Any]
  fixed: dict[str, Any] = dataclasses.field(default_factory=dict)
  fields: dict[str, tuple[str, Any]] = dataclasses.field(default_factory=dict)
  attention_bias: str = 'none'
  activation: tuple[str, str] = ('hidden_act', 'silu')
  windows: str = 'none'
  rope: str = 'one'
  divides: bool = False


def _heads(causal, scalar=None):
  return {causal + 'ForCausalLM': 'lm', (scalar or causal) + 'ForSequenceClassification': 'scalar'}


_GEMMA = dict(norm_plus_one=True, post_norms=True, embed_scaled=True)
_GEMMA_ABSENT = dict(num_key_value_heads=4, head_dim=256, sliding_window=4096, tie_word_embeddings=True)
FAMILIES = {
    'llama': Family(
        _heads('Llama'),
        absent=dict(max_position_embeddings=2048),
        fields={'mlp_bias': ('mlp_bias', False)},
        attention_bias='file',
        divides=True,
    ),
    'mistral': Family(
        _heads('Mistral'),
        absent=dict(num_key_value_heads=8, max_position_embeddings=131072, sliding_window=4096),
        windows='same',
    ),
    'qwen2': Family(
        _heads('Qwen2'),
        absent=dict(num_key_value_heads=32, max_position_embeddings=32768, sliding_window=4096),
        attention_bias='qkv',
        windows='switched',
    ),
    'qwen3': Family(
        _heads('Qwen3'),
        absent=dict(num_key_value_heads=32, head_dim=128, max_position_embeddings=32768, sliding_window=4096),
        fixed=dict(qk_norm=True),
        attention_bias='file',
        windows='switched',
    ),
    'gemma2': Family(
        _heads('Gemma2'),
        absent=dict(**_GEMMA_ABSENT, max_position_embeddings=8192),
        fixed=_GEMMA,
        fields={
            'query_pre_attn_scalar': ('query_scalar', 256),
            'attn_logit_softcapping': ('attn_softcap', 50.0),
            'final_logit_softcapping': ('logit_softcap', 30.0),
        },
        attention_bias='file',
        activation=('hidden_activation', 'gelu_pytorch_tanh'),
        windows='alternating',
        divides=True,
    ),
    'gemma3_text': Family(
        # `transformers` has a field attn_logit_softcapping for it too, but computes no such cap.
        _heads('Gemma3', 'Gemma3Text'),
        absent=dict(**_GEMMA_ABSENT, max_position_embeddings=131072, sliding_window_pattern=6),
        fixed=dict(**_GEMMA, qk_norm=True),
        fields={
            'query_pre_attn_scalar': ('query_scalar', 256),
            'final_logit_softcapping': ('logit_softcap', None),
        },
        attention_bias='file',
        activation=('hidden_activation', 'gelu_pytorch_tanh'),
        windows='pattern',
        rope='by type',
        divides=True,
    ),
    'mixtral': Family(
        _heads('Mixtral'),
        absent=dict(
            num_key_value_heads=8, max_position_embeddings=131072, sliding_window=None, rms_norm_eps=1e-5,
            rope_theta=1000000.0, num_local_experts=8, num_experts_per_tok=2,
        ),
        windows='same',
    ),
    'qwen3_moe': Family(
        _heads('Qwen3Moe'),
        absent=dict(
            num_key_value_heads=4, max_position_embeddings=32768, sliding_window=4096, num_experts=128,
            num_experts_per_tok=8, moe_intermediate_size=768, decoder_sparse_step=1,
        ),
        fixed=dict(qk_norm=True),
        attention_bias='file',
        windows='all or none',
    ),
    'deepseek_v2': Family(
        _heads('DeepseekV2'),
        absent=dict(
            max_position_embeddings=2048, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128,
            qk_rope_head_dim=64, v_head_dim=128, first_k_dense_replace=0, n_routed_experts=64, n_shared_experts=2,
            moe_intermediate_size=1407, topk_method='greedy', routed_scaling_factor=1.0,
        ),
        fields={'mlp_bias': ('mlp_bias', False)},
        attention_bias='file',
        divides=True,
    ),
}


# --- reading


def read(where: str, fields: Any, *, dtype: str = 'float32') -> ModelConfig:
  """The decoder that a `config.json` describes; `where` names it in errors.

  What the file leaves out has the default that `transformers` gives it.
  """
  try:
    return _read(fields, dtype)
  except ValueError as error:
    raise ValueError(f'{where}: {error}') from None
  except (AttributeError, KeyError, IndexError, TypeError, ArithmeticError) as error:
    # Any field can be of any type, and each is used as what it should be.
    raise ValueError(
        f'{where}: a field is not of the type that `transformers` writes ({type(error).__name__}: {error})'
    ) from error


def _read(fields, dtype) -> ModelConfig:
  if not isinstance(fields, dict):
    raise ValueError(f'it holds {_short(fields)}; a model configuration is a table {{"field": value, ...}}')
  _check(fields, _KINDS)
  for name in ('quantization_config', 'compression_config'):
    if fields.get(name):
      raise ValueError(
          f'{name} is {_short(fields[name])}; quantised weights are not read. Give the folder of the model as it was '
          'before, or dequantise it where it was made and save it in bfloat16, without this field'
      )
  name, head_kind = _architecture(fields)
  family = FAMILIES[name]
  for field in ('vocab_size', 'hidden_size', 'num_attention_heads', 'intermediate_size', 'num_hidden_layers'):
    if field not in fields:
      raise ValueError(f'the field {field!r} is missing; it is no complete model configuration')
    if type(fields[field]) is not int or fields[field] < 1:
      raise ValueError(f'{field} is {fields[field]!r}; needs a positive integer')
  fields = family.absent | fields
  _require(fields, 'use_bidirectional_attention', False)
  if head_kind == 'scalar':
    _require({'num_labels': _num_labels(fields)}, 'num_labels', 1)
  heads, width = fields['num_attention_heads'], fields['hidden_size']
  bias = family.attention_bias == 'qkv' or family.attention_bias == 'file' and _given(fields, 'attention_bias', False)
  head, period, num_periods, remainder = group(_blocks(name, fields))
  latent = hf_sparse.latent(name, fields)
  if latent is not None:  # its own fields say how large a head is
    fields = fields | {'num_key_value_heads': heads, 'head_dim': latent.nope + latent.rope}
  return ModelConfig(
      vocab_size=fields['vocab_size'],
      width=width,
      heads=heads,
      kv_heads=_given(fields, 'num_key_value_heads', heads),
      head_dim=_given(fields, 'head_dim', family.absent.get('head_dim', width // heads)),
      ffn=fields['intermediate_size'],
      head=head,
      period=period,
      num_periods=num_periods,
      remainder=remainder,
      tied=_given(fields, 'tie_word_embeddings', False),
      norm_eps=_given(fields, 'rms_norm_eps', 1e-6),
      qkv_bias=bias,
      o_bias=bias and family.attention_bias == 'file',
      activation=_activation(family, fields),
      head_kind=head_kind,
      dtype=dtype,
      param_dtype=dtype,
      family=name,
      latent=latent,
      **family.fixed,
      **{ours: fields.get(field, default) for field, (ours, default) in family.fields.items()},
  )


def _check(fields, kinds):
  for words, (fits, names) in kinds.items():
    for name in names.split():
      if fields.get(name) is not None and not fits(fields[name]):
        raise ValueError(f'{name} is {_short(fields[name])}; needs {words}, or null')


def _number(value):
  return type(value) in (int, float) and math.isfinite(value)


def _positive(value):
  return type(value) is int and value > 0


# What fields must be that need not be there: in words, a test of it, and the fields.
_KINDS = {
    'a list': (lambda value: isinstance(value, list), 'architectures layer_types mlp_only_layers'),
    'a table': (lambda value: isinstance(value, dict), 'rope_scaling rope_parameters id2label'),
    'a name': (
        lambda value: isinstance(value, str), 'model_type hidden_act hidden_activation topk_method scoring_func'
    ),
    'true or false': (
        lambda value: isinstance(value, bool),
        'tie_word_embeddings attention_bias mlp_bias use_sliding_window use_bidirectional_attention norm_topk_prob',
    ),
    'a number': (
        _number,
        'rms_norm_eps rope_theta rope_local_base_freq query_pre_attn_scalar attn_logit_softcapping '
        'final_logit_softcapping routed_scaling_factor',
    ),
    'a positive whole number': (
        _positive,
        'num_key_value_heads head_dim max_position_embeddings original_max_position_embeddings sliding_window_pattern',
    ),
    'a whole number from 0 on': (lambda value: type(value) is int and value >= 0, 'max_window_layers num_labels'),
}
_ROPE_KINDS = {
    'a name': (lambda value: isinstance(value, str), 'rope_type type'),
    'a number': (
        _number,
        'rope_theta factor low_freq_factor high_freq_factor beta_fast beta_slow attention_factor mscale mscale_all_dim',
    ),
    'a positive whole number': (_positive, 'original_max_position_embeddings'),
    'true or false': (lambda value: isinstance(value, bool), 'truncate'),
}


def _short(value):
  text = repr(value)
  return text if len(text) <= 60 else f'{text[:60]}...'


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


def _architecture(fields):
  """(model_type, kind of head)."""
  names, model_type = fields.get('architectures'), fields.get('model_type')
  if not names:
    names = [cls for name, family in FAMILIES.items() if name == model_type for cls in family.heads][:1]
  for name, family in FAMILIES.items():
    if names and names[0] in family.heads and model_type in (None, name):
      return name, family.heads[names[0]]
  if model_type == 'gemma3':
    raise ValueError(
        f'model_type gemma3 ({names[0] if names else None}) reads images too, which this decoder does not; save its '
        'language model by itself, with its text_config, as gemma3_text'
    )
  known = (f'{name} ({", ".join(family.heads)})' for name, family in FAMILIES.items())
  raise ValueError(
      f'unsupported architecture {names[0] if names else None!r} (model_type {model_type!r}); supported are '
      + ', '.join(known)
  )


def _blocks(name, fields):
  windows = WINDOWS[FAMILIES[name].windows](fields)
  wrong = [window for window in windows if window is not None and (type(window) is not int or window < 1)]
  if wrong:
    raise ValueError(f'sliding_window is {_short(wrong[0])}; needs a positive whole number, or null')
  ropes = ROPES[FAMILIES[name].rope](fields)
  experts = hf_sparse.experts(name, fields)
  return tuple(
      BlockConfig(window, *ropes[FULL if window is None else SLIDING], some) for window, some in zip(windows, experts)
  )


def _activation(family, fields):
  name, default = family.activation
  got = _given(fields, name, default)
  if got not in ACTIVATIONS:
    raise ValueError(f'{name} is {got!r}; this decoder computes {", ".join(ACTIVATIONS)}')
  return ACTIVATIONS[got]


def _given(fields, name, default):
  return default if fields.get(name) is None else fields[name]


def _require(fields, name, allowed):
  got = _given(fields, name, allowed)
  if got != allowed:
    raise ValueError(f'{name} is {got!r}; this decoder computes {name}={allowed!r} only')


def _num_labels(fields):
  return len(fields['id2label']) if fields.get('id2label') else _given(fields, 'num_labels', 2)


# --- windows: one per layer, None = global


def _no_windows(fields):
  return [None] * fields['num_hidden_layers']


def _same_windows(fields):
  return [fields['sliding_window']] * fields['num_hidden_layers']


def _all_windows(fields):
  """Qwen 3's mixtures: a switch, and then every layer is local."""
  window = fields['sliding_window'] if _given(fields, 'use_sliding_window', False) else None
  return [window] * fields['num_hidden_layers']


def _switched_windows(fields):
  """Qwen: a switch, and without types local layers from `max_window_layers` on."""
  window = fields['sliding_window'] if _given(fields, 'use_sliding_window', False) else None
  full = fields['num_hidden_layers'] if window is None else _given(fields, 'max_window_layers', 28)
  types = [FULL if i < full else SLIDING for i in range(fields['num_hidden_layers'])]
  return _windows_of_types(fields, types, window)


def _alternating_windows(fields):
  """Gemma 2: without types, every second layer is global."""
  return _pattern_windows(fields | {'sliding_window_pattern': 2})


def _pattern_windows(fields):
  """Gemma 3: without types, every `sliding_window_pattern`-th layer is global."""
  every = fields['sliding_window_pattern']
  if every is None and fields.get('layer_types') is None:
    raise ValueError('sliding_window_pattern is null; needs a positive whole number, or layer_types in its place')
  types = [SLIDING if every and (i + 1) % every else FULL for i in range(fields['num_hidden_layers'])]
  return _windows_of_types(fields, types, fields['sliding_window'])


def _windows_of_types(fields, default, window):
  types, layers = _given(fields, 'layer_types', default), fields['num_hidden_layers']
  unknown = sorted(set(types) - {FULL, SLIDING})
  if unknown or len(types) != layers:
    raise ValueError(
        f'layer_types has {len(types)} entries for {layers} layers, unknown kinds {unknown}; the kinds '
        f'are {FULL} and {SLIDING}'
    )
  if window is None and SLIDING in types:
    raise ValueError(
        f'layer_types has {SLIDING} layers, but sliding_window is off; give both (and use_sliding_window '
        'where the family has it) or neither'
    )
  return [window if kind == SLIDING else None for kind in types]


WINDOWS = {
    'none': _no_windows, 'same': _same_windows, 'all or none': _all_windows, 'switched': _switched_windows,
    'alternating': _alternating_windows, 'pattern': _pattern_windows,
}


# --- rotary embeddings: {kind of layer: (theta, scaling)}


def _one_rope(fields):
  found = fields.get('rope_scaling') or fields.get('rope_parameters') or {}
  nested = sorted(name for name, value in found.items() if isinstance(value, dict))
  if nested:
    raise ValueError(
        f'rope_parameters differ by layer type ({", ".join(nested)}); this family has one setting for all '
        'layers'
    )
  theta = _given(found, 'rope_theta', _given(fields, 'rope_theta', 10000.0))
  # Where a file has the original length outside too, that one counts.
  original = fields.get('original_max_position_embeddings')
  if original is not None:
    found = found | {'original_max_position_embeddings': original}
  rope = theta, _scaling(fields, found, found.get('truncate', True))
  return {FULL: rope, SLIDING: rope}


def _ropes_by_type(fields):
  """Gemma 3: nested by layer type, or older: scaling and `rope_theta` global, `rope_local_base_freq` local."""
  found = fields.get('rope_parameters') or {}
  older = fields.get('rope_scaling') or {}
  if older.get('type', 'default') != 'default' and older.get('rope_type') is None:
    # It puts them upon a table that says `rope_type` default already, and computes no scaling.
    raise ValueError(
        f"rope_scaling is {_short(older)}; for this family `transformers` reads 'rope_type' only, and nothing of "
        "'type'. Write 'rope_type' in its place, or take rope_scaling out if the model was trained without"
    )
  for kind in (FULL, SLIDING):
    if not isinstance(found.get(kind), (dict, type(None))):
      raise ValueError(f'{kind} of rope_parameters is {_short(found[kind])}; needs a table, or null')
  _check(found, _ROPE_KINDS)
  full = (found.get(FULL) or {}) | older
  local = found.get(SLIDING) or {}
  out = {}
  for kind, inner, outer, default in (
      (FULL, full, 'rope_theta', 1000000.0), (SLIDING, local, 'rope_local_base_freq', 10000.0)
  ):
    # `transformers` looks for `truncate` beside the layer types, not in them.
    scaling = _scaling(fields, inner, found.get('truncate', True))
    out[kind] = _given(inner, 'rope_theta', _given(fields, outer, default)), scaling
  return out


ROPES = {'one': _one_rope, 'by type': _ropes_by_type}


def _scaling(fields, found, truncate) -> RopeScaling | None:
  _check(found, _ROPE_KINDS)
  kind = _given(found, 'rope_type', _given(found, 'type', 'default'))
  _require({**fields, **found}, 'partial_rotary_factor', 1.0)
  need = {
      'default': (), 'linear': ('factor',), 'llama3': ('factor', 'low_freq_factor', 'high_freq_factor'),
      'yarn': (),
  }
  if kind not in need:
    raise ValueError(f'rotary scaling {kind!r} is not supported; supported are {", ".join(need)}')
  missing = [name for name in need[kind] if found.get(name) is None]
  if missing:
    raise ValueError(f'rotary scaling {kind} lacks {", ".join(missing)}')
  original = _given(found, 'original_max_position_embeddings', fields['max_position_embeddings'])
  if kind == 'linear':
    return LinearScaling(found['factor'])
  if kind == 'llama3':
    return Llama3Scaling(found['factor'], found['low_freq_factor'], found['high_freq_factor'], original)
  if kind == 'yarn':
    return YarnScaling(
        factor=_given(found, 'factor', fields['max_position_embeddings'] / original),
        original_length=original,
        beta_fast=found.get('beta_fast') or 32,
        beta_slow=found.get('beta_slow') or 1,
        attention_factor=found.get('attention_factor'),
        mscale=found.get('mscale'),
        mscale_all_dim=found.get('mscale_all_dim'),
        truncate=bool(truncate),
    )
  return None


# --- writing


def write(config: ModelConfig) -> dict[str, Any]:
  """The `config.json` of a decoder, or a ValueError if no family computes the same."""
  problems = {}
  for name in sorted(FAMILIES, key=lambda name: name != config.family):
    fields = _fields(name, config)
    problems[name] = _differences(name, fields, config)
    if not problems[name]:
      return fields
  shown = '; '.join(f'{name} differs in {", ".join(differ)}' for name, differ in problems.items())
  raise ValueError(
      f'this decoder has no Hugging Face twin: {shown}. Keep it in its checkpoint format, or choose a configuration '
      'of one family'
  )


def _differences(name, fields, config):
  """Fields of ModelConfig in which the written file, read back, is another decoder."""
  if FAMILIES[name].divides and config.width % config.heads:
    return ['width (no multiple of heads)']
  try:
    again = _meaning(read('config.json', fields))
  except ValueError as error:
    return [f'settings ({error})']
  wanted = _meaning(config)
  return [field for field in wanted if wanted[field] != again[field]]


def _meaning(config):
  """What the decoder computes: its fields without how layers are grouped, padded, stored and named."""
  free = ('head', 'period', 'num_periods', 'remainder', 'vocab_multiple', 'dtype', 'param_dtype', 'remat', 'family')
  out = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in free}
  out['query_scalar'] = config.head_dim if config.query_scalar is None else config.query_scalar
  for name in ('window', 'rope_theta', 'rope_scaling', 'experts'):
    out[f'layers with their {name}'] = [getattr(block, name) for block in config.layers]
  return out


def _fields(name, config):
  """The file of this family that is closest to the decoder."""
  family = FAMILIES[name]
  windows = [block.window for block in config.layers]
  fields = {
      'architectures': [next(cls for cls, kind in family.heads.items() if kind == config.head_kind)],
      'model_type': name,
      'vocab_size': config.vocab_size,
      'hidden_size': config.width,
      'num_attention_heads': config.heads,
      'num_key_value_heads': config.kv_heads,
      'head_dim': config.head_dim,
      'intermediate_size': config.ffn,
      'num_hidden_layers': config.num_layers,
      'tie_word_embeddings': config.tied,
      'rms_norm_eps': config.norm_eps,
      family.activation[0]: next(theirs for theirs, ours in ACTIVATIONS.items() if ours == config.activation),
      'max_position_embeddings': MAX_POSITIONS,
      'torch_dtype': config.param_dtype,
  }
  for theirs, (ours, _) in family.fields.items():
    fields[theirs] = getattr(config, ours)
  if 'query_pre_attn_scalar' in fields:  # never null there, and an integer
    fields['query_pre_attn_scalar'] = int(config.query_scalar or config.head_dim)
  if family.attention_bias == 'file':
    fields['attention_bias'] = config.qkv_bias
  sliding = next((window for window in windows if window is not None), None)
  if family.windows == 'same':
    fields['sliding_window'] = sliding
  if family.windows in ('switched', 'all or none'):
    fields |= {'use_sliding_window': sliding is not None, 'sliding_window': sliding}
  if family.windows in ('alternating', 'pattern'):
    # `transformers` makes the local mask even where no layer uses it, so there is always a window.
    fields |= {'sliding_window': family.absent['sliding_window'] if sliding is None else sliding}
  if family.windows in ('switched', 'alternating', 'pattern'):
    fields['layer_types'] = [FULL if window is None else SLIDING for window in windows]
  if config.head_kind == 'scalar':
    fields |= {'num_labels': 1, 'id2label': {'0': 'LABEL_0'}, 'label2id': {'LABEL_0': 0}}
  if name == 'deepseek_v2':
    del fields['head_dim']  # `transformers` means another size by it
  return fields | hf_sparse.written(name, config) | _rope_fields(family, config)


def _rope_fields(family, config):
  """In the older spelling, which older software reads too, wherever that can say it."""
  full = next((b for b in config.layers if b.window is None), config.layers[0])
  local = next((b for b in config.layers if b.window is not None), config.layers[0])
  fields = {'rope_theta': full.rope_theta}
  scaling = full.rope_scaling
  if scaling is not None:
    fields['rope_scaling'] = _scaling_fields(scaling)
    if scaling.kind != 'linear':
      fields['max_position_embeddings'] = round(scaling.original_length * scaling.factor)
  if family.rope == 'by type':
    fields['rope_local_base_freq'] = local.rope_theta
    truncate = all(getattr(block.rope_scaling, 'truncate', True) for block in config.layers)
    if local.rope_scaling is not None or not truncate:
      kinds = {
          kind: {'rope_theta': block.rope_theta, **_scaling_fields(block.rope_scaling)}
          for kind, block in ((FULL, full), (SLIDING, local))
      }
      fields = {**fields, 'rope_parameters': kinds if truncate else {**kinds, 'truncate': False}}
      fields.pop('rope_scaling', None)
  return fields


def _scaling_fields(scaling):
  if scaling is None:
    return {'rope_type': 'default'}
  fields = {'rope_type': scaling.kind, 'factor': scaling.factor}
  if scaling.kind == 'llama3':
    fields |= {'low_freq_factor': scaling.low, 'high_freq_factor': scaling.high}
  if scaling.kind == 'yarn':
    fields |= {'beta_fast': scaling.beta_fast, 'beta_slow': scaling.beta_slow, 'truncate': scaling.truncate}
    optional = ('attention_factor', 'mscale', 'mscale_all_dim')
    fields |= {name: getattr(scaling, name) for name in optional if getattr(scaling, name) is not None}
  if scaling.kind != 'linear':
    fields['original_max_position_embeddings'] = scaling.original_length
  return fields
