"""The mixtures' folders beyond `test_parity`: state dicts as `transformers` holds them, settings it does not read."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from spct_jax.models import hf
from spct_jax.testing import families

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')


def reference(fields, dtype=torch.float32):
  settings = transformers.AutoConfig.for_model(**fields)
  model = transformers.AutoModelForCausalLM.from_config(settings, experts_implementation='eager', dtype=dtype).eval()
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      parameter.copy_(torch.tensor(families.tensor(settings.model_type, name, tuple(parameter.shape), 0)))
  return model


@pytest.mark.parametrize('family', ['mixtral', 'qwen3_moe', 'deepseek_v2'])
def test_a_state_dict_as_it_is_held(family, tmp_path):
  model = reference(families.config(family, 0))
  model.save_pretrained(tmp_path)
  _, want = hf.load(tmp_path)
  held = {name: value.numpy() for name, value in model.state_dict().items()}
  assert any(name.endswith('gate_up_proj') for name in held)
  safetensors.numpy.save_file(held, tmp_path / 'model.safetensors')
  jax.tree.map(np.testing.assert_array_equal, hf.load(tmp_path)[1], want)


def test_settings_of_deepseek_that_transformers_does_not_read(tmp_path):
  """The published code would divide the weights, and leave every second layer dense."""
  fields = families.config('deepseek_v2', 0)
  plain, other = (
      reference({**fields, 'norm_topk_prob': norm, 'moe_layer_freq': every}) for norm, every in ((False, 1), (True, 2))
  )
  tokens = np.random.default_rng(0).integers(1, 30, (1, 9))
  with torch.no_grad():
    want = other(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_array_equal(plain(torch.tensor(tokens)).logits.numpy(), want)
  other.save_pretrained(tmp_path)
  assert json.loads((tmp_path / 'config.json').read_text())['norm_topk_prob']
  model, params = hf.load(tmp_path)
  got = jax.jit(model.apply)({'params': params}, tokens)
  np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


def test_routers_in_bfloat16_models(tmp_path):
  """DeepSeek's stay in float32, the others' do not; files and what is loaded from them agree bit for bit."""
  for family in ('mixtral', 'deepseek_v2'):
    folder = tmp_path / family
    reference(families.config(family, 0)).save_pretrained(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model, params = hf.load(folder, dtype='bfloat16')
    hf.save(tmp_path / f'{family} again', model, params)
    theirs.save_pretrained(tmp_path / f'{family} theirs')
    ours, want = (
        safetensors.numpy.load_file(tmp_path / f'{family} {who}' / 'model.safetensors') for who in ('again', 'theirs')
    )
    assert {n: (v.dtype, v.tobytes()) for n, v in ours.items()} == {n: (v.dtype, v.tobytes()) for n, v in want.items()}
    routers = {str(value.dtype) for name, value in ours.items() if name.endswith('gate.weight')}
    assert routers == {'float32' if family == 'deepseek_v2' else 'bfloat16'}
