"""Rotary embeddings and windows of files in every spelling, against what `transformers` makes of the same file."""

import json

import jax
import numpy as np
import pytest

from spct_jax.models import hf, hf_config, rope

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

SIZES = dict(
    vocab_size=19, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=16, intermediate_size=20,
    num_hidden_layers=4, max_position_embeddings=96, sliding_window=3,
)
YARN = dict(rope_type='yarn', factor=3.0, original_max_position_embeddings=40)
LLAMA3 = dict(rope_type='llama3', factor=4.0, low_freq_factor=1.0, high_freq_factor=3.0)
FILES = {
    'nothing': dict(),
    'old theta': dict(rope_theta=77.0),
    'old type': dict(rope_theta=77.0, rope_scaling=dict(type='linear', factor=2.0)),
    'old null': dict(rope_theta=77.0, rope_scaling=None),
    'theta outside the new': dict(rope_theta=77.0, rope_parameters=dict(rope_type='linear', factor=2.0)),
    'theta on both sides': dict(rope_theta=77.0, rope_parameters=dict(rope_type='linear', factor=2.0, rope_theta=55.0)),
    'both': dict(
        rope_theta=77.0, rope_scaling=dict(rope_type='linear', factor=2.0), rope_parameters=dict(rope_theta=5.0, **YARN)
    ),
    'length by default': dict(rope_scaling=LLAMA3),
    'length outside': dict(rope_scaling=LLAMA3, original_max_position_embeddings=24),
    'length on both sides': dict(rope_parameters=YARN, original_max_position_embeddings=24),
    'factor from the lengths': dict(rope_parameters=dict(YARN, factor=None)),
    'zero betas': dict(rope_parameters=dict(YARN, beta_fast=0, beta_slow=None)),
    'no truncation': dict(rope_parameters=dict(YARN, truncate=False, beta_fast=8, beta_slow=0.6)),
    'null truncation': dict(rope_parameters=dict(YARN, truncate=None, beta_fast=8, beta_slow=0.6)),
    'one mscale': dict(rope_parameters=dict(YARN, mscale=0.5)),
    'factor below one': dict(rope_parameters=dict(YARN, factor=0.5)),
}
GEMMA3 = {
    'nothing': dict(),
    'published': dict(
        rope_theta=1e6, rope_local_base_freq=1e4, rope_scaling=dict(rope_type='linear', factor=8.0),
        sliding_window_pattern=3,
    ),
    'nested': dict(rope_parameters=dict(
        full_attention=dict(YARN, rope_theta=99.0), sliding_attention=dict(rope_type='default', rope_theta=11.0))),
    'truncate inside': dict(rope_parameters=dict(
        full_attention=dict(YARN, rope_theta=99.0, truncate=False, beta_fast=8, beta_slow=0.6))),
    'truncate beside': dict(rope_parameters=dict(
        full_attention=dict(YARN, rope_theta=99.0, beta_fast=8, beta_slow=0.6), truncate=False)),
    'half nested': dict(rope_local_base_freq=7.0, rope_parameters=dict(full_attention=dict(rope_type='default'))),
    'null': dict(rope_parameters=dict(full_attention=None, sliding_attention=dict(rope_type='linear', factor=2.0))),
}
MODELS = {
    'llama': 'LlamaModel', 'mistral': 'MistralModel', 'qwen2': 'Qwen2Model', 'qwen3': 'Qwen3Model',
    'gemma2': 'Gemma2Model', 'gemma3_text': 'Gemma3TextModel',
}
CASES = [(family, name) for family in MODELS for name in (GEMMA3 if family == 'gemma3_text' else FILES)]


@pytest.mark.parametrize('family, name', CASES)
def test_rotary_embeddings_of_every_spelling(family, name, tmp_path):
  options = (GEMMA3 if family == 'gemma3_text' else FILES)[name]
  fields = {**SIZES, 'model_type': family, **options}
  (tmp_path / 'config.json').write_text(json.dumps(fields))
  config = transformers.AutoConfig.from_pretrained(tmp_path)
  with torch.device('cpu'):
    module = getattr(transformers, MODELS[family])(config).rotary_emb
  ours = hf_config.read('config.json', json.loads((tmp_path / 'config.json').read_text()))
  types = getattr(config, 'layer_types', None) or ['full_attention'] * 4
  for block, kind in zip(ours.layers, types, strict=True):
    if family == 'gemma3_text':
      want, size = getattr(module, f'{kind}_inv_freq'), getattr(module, f'{kind}_attention_scaling')
    else:
      want, size = module.inv_freq, module.attention_scaling
    got = rope.frequencies(16, block.rope_theta, block.rope_scaling)
    np.testing.assert_allclose(got, want.numpy(), rtol=2e-6)
    assert rope.magnitude(block.rope_scaling) == pytest.approx(size)
    if family != 'mistral':
      assert (block.window is not None) == (kind == 'sliding_attention')
  again = transformers.AutoConfig.for_model(**hf_config.write(ours))
  assert hf_config.read('written', json.loads(again.to_json_string(use_diff=False))) == ours


@pytest.mark.parametrize('family', ['qwen2', 'qwen3'])
@pytest.mark.parametrize(
    'options', [dict(), dict(use_sliding_window=True), dict(use_sliding_window=True, max_window_layers=2),
                dict(use_sliding_window=True, max_window_layers=0, sliding_window=None),
                dict(use_sliding_window=False, max_window_layers=0)]
)
def test_windows_of_qwen(family, options):
  fields = {**SIZES, 'model_type': family, **options}
  config = transformers.AutoConfig.for_model(**fields)
  want = [config.sliding_window if kind == 'sliding_attention' else None for kind in config.layer_types]
  assert [block.window for block in hf_config.read('config.json', fields).layers] == want


@pytest.mark.parametrize('family', MODELS)
def test_defaults_of_absent_fields(family):
  sizes = dict(vocab_size=19, hidden_size=4096, num_attention_heads=32, intermediate_size=20, num_hidden_layers=3)
  theirs = transformers.AutoConfig.for_model(model_type=family, **sizes)
  ours = hf_config.read('config.json', {**sizes, 'model_type': family})
  full = json.loads(theirs.to_json_string(use_diff=False))
  assert hf_config.read('full', full) == ours
  assert ours.tied == theirs.tie_word_embeddings and ours.kv_heads == theirs.num_key_value_heads


LONG = dict(original_max_position_embeddings=8192, rope_theta=500000.0)
FAR = {
    'plain': dict(rope_type='default', rope_theta=1e6),
    'linear': dict(rope_type='linear', factor=3.0, rope_theta=10000.0),
    'llama3': dict(LLAMA3, **LONG),
    'yarn': dict(YARN, **LONG),
}


@pytest.mark.parametrize('name', FAR)
def test_logits_at_far_positions(name, tmp_path):
  # Seen to fail: frequencies computed in float64 and rounded once.
  fields = {**SIZES, 'num_hidden_layers': 2, 'head_dim': 64, 'max_position_embeddings': 131072}
  torch.manual_seed(0)
  reference = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields, rope_parameters=FAR[name])).eval()
  with torch.no_grad():
    for parameter in reference.parameters():
      parameter.mul_(10.0 if parameter.ndim > 1 else 1.0)  # so that attention chooses
  reference.save_pretrained(tmp_path)
  model, params = hf.load(tmp_path)
  run = jax.jit(lambda tokens, positions: model.apply({'params': params}, tokens, positions=positions))
  tokens = np.random.default_rng(0).integers(0, 19, (1, 24))
  for first in (0, 30000, 120000):
    positions = np.arange(24)[None, :] + first
    with torch.no_grad():
      want = reference(torch.tensor(tokens), position_ids=torch.tensor(positions)).logits.numpy()
    got = np.asarray(run(tokens.astype(np.int32), positions.astype(np.int32)))
    assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max(), first
