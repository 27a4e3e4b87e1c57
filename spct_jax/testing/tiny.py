"""The smallest model in which nothing is missing, and sharding rules for it. Imported by tests only.

Head layers, a period of two kinds of block, a remainder, grouped queries; every size divides over a
mesh of data=2, fsdp=2, tensor=2, and with `kv_heads=8` over tensor=8 too.
"""

import dataclasses

import numpy as np

from spct_jax.models.config import BlockConfig, ModelConfig
from spct_jax.models.transformer import Transformer
from spct_jax.train import batches
from spct_jax.train import optim

LOCAL, GLOBAL = BlockConfig(window=4), BlockConfig(rope_theta=50000.0)

RULES = (
    ('(^|/)embed/table$', ('tensor', 'fsdp')),
    ('(^|/)unembed/kernel$', ('fsdp', 'tensor')),
    ('/(q|k|v)/kernel$', ('fsdp', 'tensor', None)),
    ('/(q|k|v)/bias$', ('tensor', None)),
    ('/o/kernel$', ('tensor', None, 'fsdp')),
    ('/(gate|up)/kernel$', ('fsdp', 'tensor')),
    ('/down/kernel$', ('tensor', 'fsdp')),
    ('/(q|k|v|gate|up)/lora_a$', ('fsdp', None)),
    ('/(q|k|v)/lora_b$', (None, 'tensor', None)),
    ('/(gate|up)/lora_b$', (None, 'tensor')),
    ('/o/lora_a$', ('tensor', None, None)),
    ('/down/lora_a$', ('tensor', None)),
    ('/(o|down)/lora_b$', (None, 'fsdp')),
    ('(^|/)reward/kernel$', ('fsdp', None)),
    ('norm/scale$', ()),
    ('(^|/)[0-9]+/(k|v)$', (('data', 'fsdp'), 'tensor', None, None)),  # cache [B, M, S, hd]
)


def model_config(
    *,
    head_kind: str = 'lm',
    vocab_size: int = 61,
    kv_heads: int = 2,
    tied: bool = False,
    qkv_bias: bool = True,
    remat: bool = False,
    dtype: str = 'float32',
) -> ModelConfig:
  return ModelConfig(
      vocab_size=vocab_size,
      vocab_multiple=8,
      width=32,
      heads=8,
      kv_heads=kv_heads,
      head_dim=8,
      ffn=64,
      head=(GLOBAL,),
      period=(LOCAL, GLOBAL),
      num_periods=2,
      remainder=(LOCAL,),
      tied=tied,
      norm_eps=1e-6,
      qkv_bias=qkv_bias,
      qk_norm=False,
      head_kind=head_kind,
      dtype=dtype,
      param_dtype='float32',
      remat=remat,
  )


def small_model(*, head_kind: str = 'lm', vocab_size: int = 61, remat: bool = False) -> Transformer:
  """One block in one scan, for tests that compile often; every size divides over 8 devices on any axis."""
  config = ModelConfig(
      vocab_size=vocab_size,
      vocab_multiple=8,
      width=16,
      heads=8,
      kv_heads=8,
      head_dim=2,
      ffn=32,
      head=(),
      period=(GLOBAL,),
      num_periods=2,
      remainder=(),
      tied=False,
      norm_eps=1e-6,
      qkv_bias=False,
      qk_norm=False,
      head_kind=head_kind,
      dtype='float32',
      param_dtype='float32',
      remat=remat,
  )
  return Transformer(config)


def optim_settings(**changes: float | int | str) -> optim.OptimSettings:
  """Constant learning rate, clipping and decay on; `changes` replace fields."""
  settings = optim.OptimSettings(
      schedule='constant',
      learning_rate=1e-2,
      warmup_steps=0,
      total_steps=100,
      end_fraction=0.0,
      b1=0.9,
      b2=0.95,
      eps=1e-8,
      weight_decay=0.1,
      clip_norm=1.0,
  )
  return dataclasses.replace(settings, **changes)


def learner_batch(
    *, num_rows: int, real_rows: int, seed: int, length: int = 16, vocab_size: int = 61
) -> dict[str, np.ndarray]:
  """A random batch with the columns of every objective; completions differ much in length."""
  rng = np.random.default_rng(seed)
  rows = []
  for i in range(real_rows):
    prompt = rng.integers(1, vocab_size, rng.integers(1, length // 2))
    completion = rng.integers(1, vocab_size, 1 + i % (length - len(prompt)))
    logp = rng.uniform(-5, -3, len(completion))
    rows.append(batches.Row(f'row {i}', tuple(prompt.tolist()), tuple(completion.tolist()), tuple(logp.tolist())))
  batch = batches.pad(
      rows,
      num_rows=num_rows,
      buckets=(length,),
      pad_id=0,
      columns={
          'advantage': rng.normal(size=real_rows).astype(np.float32),
          'target': rng.integers(0, 2, real_rows).astype(bool),
      },
  )
  for name in ('old_logp', 'ref_logp'):
    noise = rng.normal(size=batch['sampler_logp'].shape) * 0.1
    batch[name] = (batch['sampler_logp'] + noise).astype(np.float32) * batch['token_mask']
  return batch
