"""Parity with the PyTorch implementations of `transformers`: logits and gradients of random tiny models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spct_jax.models.config import BlockConfig, ModelConfig
from spct_jax.models.rope import Llama3Scaling
from spct_jax.models.transformer import Transformer

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

D, H, M, HD, F, V, L = 16, 4, 2, 6, 20, 19, 3
SIZES = dict(
    vocab_size=V, hidden_size=D, num_attention_heads=H, num_key_value_heads=M, head_dim=HD, intermediate_size=F,
    num_hidden_layers=L, max_position_embeddings=64, rms_norm_eps=1e-5, attn_implementation='eager',
)
LLAMA3 = dict(
    rope_type='llama3', rope_theta=500.0, factor=4.0, low_freq_factor=1.0, high_freq_factor=3.0,
    original_max_position_embeddings=16,
)
CASES = {
    'llama': ('Llama', dict(tie_word_embeddings=False), dict(), BlockConfig()),
    'llama tied': ('Llama', dict(tie_word_embeddings=True), dict(tied=True), BlockConfig()),
    'llama3 rope': (
        'Llama', dict(rope_parameters=LLAMA3), dict(),
        BlockConfig(rope_theta=500.0, rope_scaling=Llama3Scaling(4.0, 1.0, 3.0, 16)),
    ),
    'mistral window': ('Mistral', dict(sliding_window=4), dict(), BlockConfig(window=4)),
    'qwen2': ('Qwen2', dict(head_dim=D // H), dict(head_dim=D // H, qkv_bias=True), BlockConfig()),
    'qwen3 tied': ('Qwen3', dict(tie_word_embeddings=True), dict(tied=True, qk_norm=True), BlockConfig()),
}


def torch_model(family, options):
  torch.manual_seed(0)
  config = getattr(transformers, family + 'Config')(**{**SIZES, **options})
  model = getattr(transformers, family + 'ForCausalLM')(config).eval()
  with torch.no_grad():
    for parameter in model.parameters():  # norms and biases too: at 1 and 0 they would hide a missing one
      parameter.add_(0.1 * torch.randn(parameter.shape))
  return model


def to_params(tensors, config):
  """Tensors (or gradients) by their PyTorch names into our tree."""
  tensors = {k: v.detach().numpy() for k, v in tensors.items()}

  def heads(name, count):
    out = {'kernel': stack(name + '.weight').swapaxes(1, 2).reshape(L, D, count, config.head_dim)}
    if config.qkv_bias:
      out['bias'] = stack(name + '.bias').reshape(L, count, config.head_dim)
    return out

  def stack(name):
    return np.stack([tensors[f'model.layers.{i}.{name}'] for i in range(L)])

  block = {
      'attn_norm': {'scale': stack('input_layernorm.weight')},
      'q': heads('self_attn.q_proj', H), 'k': heads('self_attn.k_proj', M), 'v': heads('self_attn.v_proj', M),
      'o': {'kernel': stack('self_attn.o_proj.weight').swapaxes(1, 2).reshape(L, H, config.head_dim, D)},
      'mlp_norm': {'scale': stack('post_attention_layernorm.weight')},
  }
  for ours, theirs in (('gate', 'gate_proj'), ('up', 'up_proj'), ('down', 'down_proj')):
    block[ours] = {'kernel': stack(f'mlp.{theirs}.weight').swapaxes(1, 2)}
  if config.qk_norm:
    for name in ('q_norm', 'k_norm'):
      block[name] = {'scale': stack(f'self_attn.{name}.weight')}
  params = {
      'embed': {'table': tensors['model.embed_tokens.weight']}, 'period': {'0': block},
      'final_norm': {'scale': tensors['model.norm.weight']},
  }
  if not config.tied:
    params['unembed'] = {'kernel': tensors['lm_head.weight'].T}
  return params


@pytest.mark.parametrize('name', CASES)
def test_logits_and_gradients(name):
  # Seen to fail: the bias of k dropped (qwen2); the window one short (mistral).
  family, options, ours, block = CASES[name]
  reference = torch_model(family, options)
  config = ModelConfig(
      **{**dict(vocab_size=V, width=D, heads=H, kv_heads=M, head_dim=HD, ffn=F), **ours},
      period=(block,), num_periods=L, norm_eps=1e-5,
  )
  model = Transformer(config)
  tensors = dict(reference.named_parameters())
  params = jax.tree.map(jnp.asarray, to_params(tensors, config))
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, model.abstract_params())
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, V, (2, 9)).astype(np.int32)
  lengths = np.array([9, 6], np.int32)
  real = np.arange(9)[None, :] < lengths[:, None]
  weight = rng.normal(size=(2, 9, V)).astype(np.float32) * real[:, :, None]

  attention_mask = torch.tensor(real.astype(np.int64))
  theirs = reference(torch.tensor(tokens, dtype=torch.long), attention_mask=attention_mask).logits
  (theirs * torch.tensor(weight)).sum().backward()
  want = to_params({k: v.grad for k, v in tensors.items()}, config)

  def total(params):
    logits = model.apply({'params': params}, tokens, lengths)
    return (logits * weight).sum(), logits

  got, logits = jax.jit(jax.grad(total, has_aux=True))(params)
  np.testing.assert_allclose(np.asarray(logits)[real], theirs.detach().numpy()[real], atol=1e-4)
  close = lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4, rtol=2e-4)
  jax.tree.map(close, got, jax.tree.map(jnp.asarray, want))
