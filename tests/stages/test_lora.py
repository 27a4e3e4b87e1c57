"""A whole scripted run on adapters: every training stage learns them, and the reference is the base with them off.

Mutations seen to fail here: the reference with its adapters on; a second copy of the base in GRPO; the sampler given
the base.
"""

import gc
import json

import jax
import numpy as np
import pytest

from spct_jax import records, sharding, stages
from spct_jax.models import unrolled
from spct_jax.stages import budget, fit, loading, samplers, workdir
from spct_jax.testing import scripted
from spct_jax.text import tokenizer as tokenizers
from spct_jax.train import checkpoint, lora


class Killed(BaseException):
  pass


def script(info):
  mark = (int(info.uid[1:]) * 3 + info.sample * 5 + info.visit * 11) % 10 + 1
  return scripted.verdict(info, tuple((mark + 3 * i) % 10 + 1 for i in range(len(info.order))))


@pytest.fixture
def config(config):
  for stage in ('rft', 'grpo', 'meta_rm'):
    config[stage].lora.rank, config[stage].lora.targets = 2, ('q', 'o', 'down')
  config.pipeline.stages = ('sample', 'rft', 'grpo', 'meta_rm')
  config.rft.lr = config.grpo.lr = 1e-2
  config.grpo.steps, config.grpo.checkpoint_every = 3, 2
  config.meta_rm.policy, config.meta_rm.steps = 'grpo', 1
  return config


@pytest.fixture
def go(config, tmp_path):
  """`go(seen, folder)` runs the pipeline; `seen(stage, params)` is told whenever a sampler is bound."""
  mesh = sharding.make_mesh({'data': 1, 'fsdp': 1, 'tensor': 1})
  tok = tokenizers.load(config.tokenizer.path)

  def run(seen=lambda stage, params: None, folder='w'):
    def bind(stage, params):
      seen(stage, params)
      return scripted.ScriptedEngine(tok, script, max_new_tokens=config.judge.max_new_tokens)

    with workdir.open_workdir(tmp_path / folder, config) as opened:
      stages.RUN['pipeline'](config, opened, mesh, bind)
      return tmp_path / folder, opened

  return run, tok, mesh


def size(tree):
  return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def bytes_held():
  """Bytes of all arrays on the one device, each buffer counted once."""
  gc.collect()
  arrays = [shard.data for array in jax.live_arrays() for shard in array.addressable_shards]
  return sum({array.unsafe_buffer_pointer(): array.nbytes for array in arrays}.values())


@pytest.mark.slow
def test_the_whole_of_it_on_adapters(go, config):
  run, tok, mesh = go
  live, bound = [], {}

  def seen(stage, params):
    bound[stage] = sharding.to_host(params)
    if stage == 'grpo':
      live.append((bytes_held(), size(params['frozen']), size(params['adapters'])))

  path, opened = run(seen)
  # In GRPO the base is there once: beside it are adapters, their two moments, and small things such as batches.
  assert len(live) == 3
  for found, base, adapters in live:
    assert found < 1.5 * base + 4 * adapters, (found, base, adapters)

  rows = [row for row in records.read_jsonl(path / 'metrics.jsonl') if row['stage'] == 'grpo']
  assert rows[0]['kl'] < 1e-9 and all(row['kl'] > 1e-6 for row in rows[1:])  # the reference's adapters stay off

  # A checkpoint of adapters is small, and what is made of it is base + s A B, stage upon stage.
  decoder = loading.model(config, tok)
  base = jax.tree.map(np.asarray, loading.params(config, 'base', decoder, opened, mesh))
  rft = sharding.to_host(loading.params(config, 'rft', decoder, opened, mesh))
  jax.tree.map(np.testing.assert_array_equal, bound['grpo']['frozen'], rft)
  grpo = sharding.to_host(loading.params(config, 'grpo', decoder, opened, mesh))
  jax.tree.map(np.testing.assert_array_equal, bound['meta_rm'], grpo)
  adapted = loading.learner(config, 'rft', decoder)
  with checkpoint.Checkpoints(path / 'rft' / 'checkpoint', keep=9) as saved:
    where = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), adapted.abstract_params())
    held = sharding.to_host(saved.load_params(adapted, where, key=jax.random.key(0)))
    meta = json.loads((path / 'rft' / 'checkpoint' / str(saved.latest_step()) / 'meta' / 'metadata').read_text())
  assert meta['init'] == 'base' and meta['lora']['rank'] == 2 and meta['lora']['alpha'] == 16.0
  for name, axes in (('q', 1), ('o', 2), ('down', 1)):
    pair = held['period']['0'][name]
    a, b = pair['lora_a'], pair['lora_b']
    delta = np.einsum('par,prb->pab', a.reshape(2, -1, 2), b.reshape(2, 2, -1)) * 8.0
    got = rft['period']['0'][name]['kernel'] - base['period']['0'][name]['kernel']
    np.testing.assert_allclose(got.reshape(delta.shape), delta, atol=1e-6)
    assert np.abs(delta).max() > 1e-3
  np.testing.assert_array_equal(rft['period']['0']['k']['kernel'], base['period']['0']['k']['kernel'])
  assert np.abs(grpo['period']['0']['q']['kernel'] - rft['period']['0']['q']['kernel']).max() > 1e-4

  # The sampler's view is those weights too, in its own dtype.
  trained = loading.learner(config, 'grpo', decoder)
  params = jax.tree.map(jax.numpy.asarray, bound['grpo'])
  config.model.sampler_dtype = 'bfloat16'
  view, cost = samplers.view(config, trained, mesh, params)
  merged = lora.merge(bound['grpo']['frozen'], bound['grpo']['adapters'], trained.settings)
  merged = unrolled.params(decoder.config, merged)
  for (name, leaf), (_, other) in zip(sharding.leaf_paths(view), sharding.leaf_paths(merged), strict=True):
    wanted = other if name.endswith('scale') else other.astype('bfloat16')
    assert leaf.dtype == wanted.dtype
    np.testing.assert_allclose(np.asarray(leaf, np.float32), np.asarray(wanted, np.float32), rtol=1e-2, atol=1e-6)
  assert cost['view_bytes'] > 0
  config.model.sampler_dtype = 'float32'

  table = {row.name: row.bytes for row in budget.rows(config, mesh, 'grpo', tok)}
  assert 'frozen reference' not in table and table['frozen parameters'] == size(base)
  assert table['adapters'] == table['gradients'] == size(bound['grpo']['adapters'])
  assert table["sampler's view of the parameters"] == size(base['period'])
  assert samplers.view(config, trained, mesh, params)[1]['view_bytes'] == size(base['period'])

  # The scalar head learns with the meta-RM's adapters.
  scalar = loading.model(config, tok, head_kind='scalar')
  meta = sharding.to_host(loading.params(config, 'meta_rm', scalar, opened, mesh))
  start = sharding.to_host(loading.params(config, 'base', scalar, opened, mesh))
  assert np.abs(meta['reward']['kernel'] - start['reward']['kernel']).max() > 1e-5


def test_killed_in_grpo_it_ends_in_the_same_bytes(go, config, monkeypatch):
  config.pipeline.stages, config.grpo.drop_too_easy = ('grpo',), False
  config.grpo.init = 'base'
  run, *_ = go
  whole, _ = run(folder='whole')
  save = fit.Session.save

  def dies(session, step, state):
    if step == 3:
      raise Killed
    return save(session, step, state)

  with monkeypatch.context() as patch:
    patch.setattr(fit.Session, 'save', dies)
    with pytest.raises(Killed):
      run(folder='killed')
  killed, _ = run(folder='killed')
  assert (killed / 'metrics.jsonl').read_bytes() == (whole / 'metrics.jsonl').read_bytes()
