"""What a Hugging Face `config.json` says of experts and latent attention, and how it is said again.

| model_type | experts are in | weights of the chosen |
|---|---|---|
| mixtral     | every layer | divided by their sum |
| qwen3_moe   | every `decoder_sparse_step`-th layer that is not among `mlp_only_layers` | divided if `norm_topk_prob` |
| deepseek_v2 | every layer from `first_k_dense_replace` on | times `routed_scaling_factor` |

Where `transformers` and DeepSeek's published code differ, this is what `transformers` computes:

1. It does not read DeepSeek's `norm_topk_prob` and `moe_layer_freq`. The published code divides the weights with the
   first (instead of multiplying them) and leaves layers dense with the second. The released models have false and 1.
2. It derives YaRN's magnitude from `mscale` only where `mscale_all_dim` is there too. The released models have both,
   and alike, so that the magnitude is 1 and scores are multiplied by (0.1 mscale_all_dim ln(factor) + 1)^2 instead.
"""

from typing import Any

from spct_jax.models.config import Experts, Latent, ModelConfig


def _mixtral(fields):
  experts = Experts(
      count=_count(fields, 'num_experts', 'num_local_experts'),
      top_k=_count(fields, 'num_experts_per_tok'),
      ffn=fields['intermediate_size'],
      renormalise=True,
  )
  return [experts] * fields['num_hidden_layers']


def _mixtral_fields(config, experts, sparse):
  return {'num_local_experts': experts.count, 'num_experts_per_tok': experts.top_k}


def _qwen3(fields):
  step, dense = fields['decoder_sparse_step'], fields.get('mlp_only_layers') or ()
  if not all(type(i) is int for i in dense):
    raise ValueError(f'mlp_only_layers is {dense!r}; needs a list of numbers of layers')
  if type(step) is not int or step < 1:
    raise ValueError(f'decoder_sparse_step is {step!r}; needs a positive integer')
  sparse = [i not in dense and (i + 1) % step == 0 for i in range(fields['num_hidden_layers'])]
  if not any(sparse):
    return [None] * len(sparse)
  experts = Experts(
      count=_count(fields, 'num_local_experts', 'num_experts'),
      top_k=_count(fields, 'num_experts_per_tok'),
      ffn=_count(fields, 'moe_intermediate_size'),
      renormalise=bool(fields.get('norm_topk_prob')),
  )
  return [experts if there else None for there in sparse]


def _qwen3_fields(config, experts, sparse):
  return {
      'num_experts': experts.count,
      'num_experts_per_tok': experts.top_k,
      'moe_intermediate_size': experts.ffn,
      'norm_topk_prob': experts.renormalise,
      'decoder_sparse_step': 1,
      'mlp_only_layers': [i for i, there in enumerate(sparse) if not there],
  }


def _deepseek(fields):
  layers, dense = fields['num_hidden_layers'], fields['first_k_dense_replace']
  if type(dense) is not int or dense < 0:
    raise ValueError(f'first_k_dense_replace is {dense!r}; needs a number of layers')
  if dense >= layers:
    return [None] * layers
  if fields.get('scoring_func', 'softmax') != 'softmax':
    raise ValueError(f'scoring_func is {fields["scoring_func"]!r}; this decoder computes softmax only')
  methods = ('greedy', 'group_limited_greedy')
  if fields['topk_method'] not in methods:
    raise ValueError(f'topk_method is {fields["topk_method"]!r}; supported are {", ".join(methods)}')
  if fields['routed_scaling_factor'] is None:
    raise ValueError('routed_scaling_factor is null; needs a number, 1.0 for none')
  limited = fields['topk_method'] == 'group_limited_greedy'
  ffn = _count(fields, 'moe_intermediate_size')
  experts = Experts(
      count=_count(fields, 'num_experts', 'n_routed_experts'),
      top_k=_count(fields, 'num_experts_per_tok'),
      ffn=ffn,
      shared_ffn=ffn * _count(fields, 'n_shared_experts'),
      scale=fields['routed_scaling_factor'],
      groups=_count(fields, 'n_group') if limited else 1,
      top_groups=_count(fields, 'topk_group') if limited else 1,
  )
  return [None] * dense + [experts] * (layers - dense)


def _deepseek_fields(config, experts, sparse):
  latent = config.latent
  return {
      'first_k_dense_replace': sparse.index(True) if True in sparse else len(sparse),
      'moe_layer_freq': 1,
      'n_routed_experts': experts.count,
      'num_experts_per_tok': experts.top_k,
      'moe_intermediate_size': experts.ffn,
      'n_shared_experts': experts.shared_ffn // experts.ffn,
      'routed_scaling_factor': experts.scale,
      'norm_topk_prob': False,
      'scoring_func': 'softmax',
      'topk_method': 'greedy' if experts.groups == 1 else 'group_limited_greedy',
      'n_group': experts.groups,
      'topk_group': experts.top_groups,
      'q_lora_rank': latent.q_rank,
      'kv_lora_rank': latent.rank,
      'qk_nope_head_dim': latent.nope,
      'qk_rope_head_dim': latent.rope,
      'v_head_dim': latent.value,
  }


# model_type -> (experts of each layer, None where it has none, from the file; the fields that say so).
KINDS = {
    'mixtral': (_mixtral, _mixtral_fields), 'qwen3_moe': (_qwen3, _qwen3_fields),
    'deepseek_v2': (_deepseek, _deepseek_fields),
}


def experts(model_type: str, fields: dict[str, Any]) -> list[Experts | None]:
  """The experts of each layer; ValueError for settings that this decoder does not compute."""
  if model_type not in KINDS:
    return [None] * fields['num_hidden_layers']
  return KINDS[model_type][0](fields)


def latent(model_type: str, fields: dict[str, Any]) -> Latent | None:
  """The latent attention of the family that has it."""
  if model_type != 'deepseek_v2':
    return None
  if fields.get('num_key_value_heads') not in (None, fields['num_attention_heads']):
    raise ValueError(
        f'num_key_value_heads is {fields["num_key_value_heads"]}; with latent attention every head has its '
        f'own key, so it is num_attention_heads, {fields["num_attention_heads"]}'
    )
  rope = fields.get('rope_scaling') or fields.get('rope_parameters') or {}
  kind = rope.get('rope_type') or rope.get('type') or 'default'
  if rope.get('mscale_all_dim') and kind not in ('yarn', 'default'):
    raise ValueError('mscale_all_dim with rotary scaling other than yarn is not supported')
  return Latent(
      rank=_count(fields, 'kv_lora_rank'),
      nope=_count(fields, 'qk_nope_head_dim'),
      rope=_count(fields, 'qk_rope_head_dim'),
      value=_count(fields, 'v_head_dim'),
      q_rank=None if fields['q_lora_rank'] is None else _count(fields, 'q_lora_rank'),
  )


def written(model_type: str, config: ModelConfig) -> dict[str, Any]:
  """The fields of the file of this family that is closest to the decoder."""
  if model_type not in KINDS or (model_type == 'deepseek_v2' and config.latent is None):
    return {}
  every = [layer.experts for layer in config.layers]
  sparse = [layer is not None for layer in every]
  # Without experts anywhere their sizes do not matter, but some must be there.
  one = next((layer for layer in every if layer is not None), Experts(1, 1, config.ffn, shared_ffn=config.ffn))
  return KINDS[model_type][1](config, one, sparse)


def _count(fields, *names):
  """The first of the fields that is there, which must be a positive integer.

  Where a file has two names of the number of experts, the first is the one that `transformers` takes.
  """
  found = [name for name in names if fields.get(name) is not None]
  if not found:
    raise ValueError(f'the field {names[0]!r} is missing; this family needs it')
  value = fields[found[0]]
  if type(value) is not int or value < 1:
    raise ValueError(f'{found[0]} is {value!r}; needs a positive integer')
  return value
