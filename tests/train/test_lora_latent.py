"""Adapters on latent attention: the kernel that is used from both sides, and rotary pairs in the PEFT layout."""

import jax
import numpy as np
import safetensors.numpy

from spct_jax.models import hf
from spct_jax.models.config import BlockConfig, Experts, Latent, ModelConfig
from spct_jax.models.transformer import Transformer
from spct_jax.train import lora, peft

MODEL = Transformer(ModelConfig(
    vocab_size=11, width=8, heads=2, kv_heads=2, head_dim=7, ffn=6, head=(BlockConfig(),),
    period=(BlockConfig(experts=Experts(count=3, top_k=2, ffn=4, shared_ffn=4)),), num_periods=1,
    latent=Latent(rank=4, nope=3, rope=4, value=3),
))
SETTINGS = lora.Settings(rank=2, alpha=3.0, targets=('q', 'kv_down', 'kv_up', 'mla/o'), rslora=False)


def noise(tree, seed):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda leaf: (0.5 * rng.normal(size=leaf.shape)).astype(np.float32), tree)


def test_what_merged_kernels_compute_and_what_peft_adds(tmp_path):
  # Seen to fail: kv_up read without its adapters; the rows of lora_b left in our order.
  base = noise(MODEL.abstract_params(), 0)
  adapted = lora.Adapted(MODEL, SETTINGS)
  adapters = noise(adapted.abstract_params(), 1)
  merged = lora.merge(base, adapters, SETTINGS)
  tokens = np.array([[1, 7, 3, 2, 9, 4]])

  @jax.jit
  def run(params, merged):
    joined = {'params': adapted.join(params)}
    return (
        adapted.apply({'params': params}, tokens), MODEL.apply(joined, tokens, cache=MODEL.init_cache(1, 6))[0],
        MODEL.apply({'params': merged}, tokens),
    )

  beside, cached, want = run({'frozen': base, 'adapters': adapters}, merged)
  np.testing.assert_allclose(beside, want, atol=1e-5 * np.abs(want).max())
  np.testing.assert_allclose(cached, want, atol=1e-5 * np.abs(want).max())

  hf.save(tmp_path / 'base', MODEL, base)
  hf.save(tmp_path / 'merged', MODEL, merged)
  peft.save(tmp_path / 'adapter', adapted, adapters, tmp_path / 'base')
  before, after = (
      safetensors.numpy.load_file(tmp_path / name / 'model.safetensors') for name in ('base', 'merged')
  )
  pairs = safetensors.numpy.load_file(tmp_path / 'adapter/adapter_model.safetensors')
  changed = {name for name in after if not np.array_equal(before[name], after[name])}
  assert len(changed) == 8 == len(pairs) / 2
  for name in changed:
    a, b = (pairs[f'base_model.model.{name.removesuffix("weight")}lora_{x}.weight'] for x in 'AB')
    np.testing.assert_allclose(before[name] + 1.5 * b @ a, after[name], atol=1e-6)
  again, loaded = peft.load(tmp_path / 'adapter', MODEL)
  assert set(again.settings.targets) == {'mla/q', 'mla/kv_down', 'mla/kv_up', 'mla/o'}
  jax.tree.map(np.testing.assert_array_equal, loaded, adapters)
