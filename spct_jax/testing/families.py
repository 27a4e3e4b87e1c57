"""Tiny Hugging Face models of drawn sizes, family by family: a `config.json`, and values for the tensors.

Plain dicts and numpy, so that tests with `torch`, tests without it and the golden fixtures draw the same models.
Imported by tests only.
"""

import numpy as np

from spct_jax.models.hf_config import FAMILIES

DRAWN = tuple(FAMILIES)


def config(family: str, seed: int, *, head_kind: str = 'lm') -> dict:
  """The `config.json` of the `seed`-th model of a family.

  In any six seeds in a row there are multi-head, multi-query and grouped-query models, tied and untied ones, and
  every rotary scaling (of which Gemma 3 draws one for its local layers too).
  """
  rng = np.random.default_rng([seed, *family.encode()])
  pick = lambda *values: values[rng.integers(len(values))]
  kv_heads, groups = ((pick(2, 3), 1), (1, pick(2, 3, 4)), (2, pick(2, 3)))[seed % 3]
  heads, head_dim = kv_heads * groups, pick(4, 6, 8, 10)
  # `transformers` wants a multiple of the number of heads in some families; never heads * head_dim.
  width = heads * pick(*(n for n in (3, 4, 5, 7) if n != head_dim and (heads * n) % 2 == 0 or n == 5))
  row = FAMILIES[family]
  layers = int(rng.integers(2 if family in ('deepseek_v2', 'qwen3_moe') else 1, 10 if row.windows == 'pattern' else 8))
  fields = {
      'architectures': [next(cls for cls, kind in row.heads.items() if kind == head_kind)],
      'model_type': family,
      'vocab_size': int(2 * rng.integers(15, 40) + 1),
      'hidden_size': width,
      'num_attention_heads': heads,
      'num_key_value_heads': kv_heads,
      'head_dim': head_dim,
      'intermediate_size': int(rng.integers(5, 40)),
      'num_hidden_layers': layers,
      'tie_word_embeddings': seed % 2 == 0,
      'rms_norm_eps': pick(1e-6, 1e-5),
      'max_position_embeddings': 256,
      'pad_token_id': None,
      'bos_token_id': None,
      'eos_token_id': None,
      row.activation[0]: pick(row.activation[1], row.activation[1], 'gelu_pytorch_tanh', 'gelu', 'silu'),
  }
  if row.attention_bias == 'file':
    fields['attention_bias'] = pick(True, False)
  if family == 'llama':
    fields['mlp_bias'] = pick(True, False)
  window = int(rng.integers(2, 6))
  if row.windows == 'all or none':
    fields |= {'use_sliding_window': pick(True, False), 'sliding_window': window}
  if row.windows == 'same':
    fields['sliding_window'] = pick(window, window, None)
  if row.windows == 'switched' and pick(True, False):
    fields |= {'use_sliding_window': True, 'sliding_window': window, 'max_window_layers': int(rng.integers(layers + 1))}
  if row.windows in ('alternating', 'pattern'):
    fields['sliding_window'] = window
  if row.windows == 'pattern' and pick(True, False):
    fields['layer_types'] = [pick('sliding_attention', 'full_attention') for _ in range(layers)]
  if 'query_pre_attn_scalar' in row.fields:
    fields['query_pre_attn_scalar'] = int(rng.integers(3, 30))
    fields['final_logit_softcapping'] = pick(None, *2 * [float(rng.uniform(5, 15))])
  if 'attn_logit_softcapping' in row.fields:
    fields['attn_logit_softcapping'] = pick(None, *2 * [float(rng.uniform(0.5, 5))])
  ropes = _ropes(rng, pick)
  if row.rope == 'one':
    # DeepSeek's first is the one of its released models.
    fields['rope_parameters'] = ropes[(seed + 4 * (family == 'deepseek_v2')) % len(ropes)]
  elif seed % 2:
    plain = ropes[seed % len(ropes)]
    fields |= {'rope_theta': plain.pop('rope_theta'), 'rope_local_base_freq': float(rng.uniform(5, 50))}
    if plain['rope_type'] != 'default':
      fields['rope_scaling'] = plain
  else:
    fields['rope_parameters'] = {
        'full_attention': ropes[seed % len(ropes)], 'sliding_attention': _ropes(rng, pick)[seed // 2 % len(ropes)],
    }
  fields |= _experts(family, rng, pick, layers, seed)
  if family == 'deepseek_v2':
    fields['num_key_value_heads'] = heads
    del fields['head_dim']
  if head_kind == 'scalar':
    fields |= {'num_labels': 1, 'id2label': {'0': 'LABEL_0'}, 'label2id': {'LABEL_0': 0}, 'pad_token_id': 0}
  return fields


def _experts(family, rng, pick, layers, seed):
  """Mixtures of few experts, of which some are chosen; latent attention with and without a latent for queries."""
  if family not in ('mixtral', 'qwen3_moe', 'deepseek_v2'):
    return {}
  count, ffn = pick(3, 4, 6), int(rng.integers(5, 20))
  # Of one that is renormalised the weight is 1, and the router's gradient nothing but rounding.
  top_k = int(rng.integers(1 if family == 'deepseek_v2' else 2, count))
  if family == 'mixtral':
    return {'num_local_experts': count, 'num_experts_per_tok': top_k}
  if family == 'qwen3_moe':
    return {
        'num_experts': count, 'num_experts_per_tok': top_k, 'moe_intermediate_size': ffn,
        'norm_topk_prob': pick(True, False), 'decoder_sparse_step': 1 + seed % 2,
        'mlp_only_layers': [i for i in range(layers) if i != 1 and pick(True, False, False)],
    }
  # Even sizes: where a row's parts begin at odd places, `transformers` cannot turn them.
  groups = pick(2, 3)
  limited = {
      'topk_method': 'group_limited_greedy', 'n_group': groups, 'topk_group': groups - 1,
      'n_routed_experts': groups * count, 'num_experts_per_tok': min(top_k, count),
  }
  greedy = {'topk_method': 'greedy', 'n_routed_experts': count, 'num_experts_per_tok': top_k}
  return {
      **(limited if seed % 2 else greedy),
      'moe_intermediate_size': ffn, 'n_shared_experts': pick(1, 2), 'first_k_dense_replace': (1, 0, 2)[seed % 3],
      'routed_scaling_factor': pick(1.0, 2.5), 'norm_topk_prob': False,
      'q_lora_rank': pick(5, 7) if seed // 2 % 2 else None, 'kv_lora_rank': pick(6, 8), 'qk_nope_head_dim': pick(2, 6),
      'qk_rope_head_dim': pick(4, 6), 'v_head_dim': pick(4, 7),
  }


def _ropes(rng, pick):
  """One of each kind of rotary embedding, with bases and lengths that tiny models and short rows feel."""
  theta, factor = lambda: float(rng.uniform(20, 500)), lambda: float(rng.uniform(1.5, 8))
  yarn = {
      'rope_type': 'yarn', 'rope_theta': theta(), 'factor': factor(),
      'original_max_position_embeddings': int(rng.integers(8, 40)),
  }
  return (
      {'rope_type': 'default', 'rope_theta': theta()},
      {'rope_type': 'linear', 'rope_theta': theta(), 'factor': factor()},
      {
          'rope_type': 'llama3', 'rope_theta': theta(), 'factor': factor(), 'low_freq_factor': 1.0,
          'high_freq_factor': float(rng.uniform(1.5, 5)), 'original_max_position_embeddings': int(rng.integers(8, 40)),
      },
      yarn,
      {
          **yarn, 'beta_fast': float(rng.uniform(4, 16)), 'beta_slow': float(rng.uniform(0.5, 2)),
          'truncate': pick(True, False), 'mscale': 0.7, 'mscale_all_dim': pick(0.3, 0.7, 1.0),
      },
      {**yarn, 'attention_factor': float(rng.uniform(0.8, 1.3))},
  )


def tensor(family: str, name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
  """Values of one tensor of the file, float32: kernels by their fan-in, norms and biases away from where they start."""
  rng = np.random.default_rng([seed, *name.encode()])
  draw = rng.normal(size=shape)
  if len(shape) > 1:
    size = 0.2 if 'embed_tokens' in name else shape[-1] ** -0.5
    if name.endswith('.gate.weight'):  # a router that decides clearly: where two experts tie, rounding chooses
      size *= 3
    if name.endswith('_b_proj.weight'):  # what is made of a latent, which is normed: small, or models magnify rounding
      size *= 0.7
    return (1.5 * size * draw).astype(np.float32)
  one = 'norm' in name and not FAMILIES[family].fixed.get('norm_plus_one', False)
  return (0.3 * draw + one).astype(np.float32)
