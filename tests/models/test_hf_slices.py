"""Loading onto a mesh: the values of a plain load under any rules, each byte read once, and no memory beyond them."""

import concurrent.futures
import dataclasses
import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import pytest

from spct_jax import sharding
from spct_jax.models import hf, hf_files, hf_names, hf_slices
from spct_jax.models.config import BlockConfig, ModelConfig
from spct_jax.models.transformer import Transformer

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = ModelConfig(
    vocab_size=61, width=16, heads=4, kv_heads=2, head_dim=4, ffn=24, qkv_bias=True, head=(BlockConfig(),),
    period=(BlockConfig(window=3), BlockConfig()), num_periods=2, remainder=(BlockConfig(),),
)  # fmt: skip
RULES = (
    ('scale$', ()), ('table$', ('tensor', 'fsdp')), ('unembed/kernel$', ('fsdp', 'tensor')),
    ('(q|k|v)/kernel$', ('fsdp', 'tensor', None)), ('(q|k|v)/bias$', ('tensor', None)),
    ('o/kernel$', ('tensor', None, 'fsdp')), ('(gate|up)/kernel$', ('fsdp', 'tensor')),
    ('down/kernel$', ('tensor', 'fsdp')),
)  # fmt: skip


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  rng = np.random.default_rng(0)
  shapes = Transformer(CONFIG).abstract_params()
  params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), shapes)
  path = tmp_path_factory.mktemp('model')
  hf.save(path, Transformer(CONFIG), params, shard_bytes=6000)
  return path


@pytest.fixture(scope='module')
def plain(folder):
  return hf.load(folder, vocab_multiple=8)[1]


OTHERS = {
    'fully sharded, heads over tensor': RULES,
    'replicated': (('', ()),),
    # The numbers of a head and the periods themselves are cut, which no rectangle of the file is.
    'inner dimensions': (
        ('(q|k|v)/kernel$', (None, None, 'tensor')), ('(q|k|v)/bias$', (None, 'tensor')),
        ('o/kernel$', (None, 'tensor', 'fsdp')),
        ('period.*(gate|up)/kernel$', ('fsdp', None, 'tensor')), ('(gate|up)/kernel$', (None, 'tensor')), ('', ()),
    ),
    'one axis for two': (
        ('table$', (('data', 'tensor', 'fsdp'), None)), ('down/kernel$', (None, ('fsdp', 'tensor'))), ('', ()),
    ),
}  # fmt: skip


# Mutations seen to fail: the padding rows left unset; a box placed at the start of the leaf.
@pytest.mark.parametrize('name', OTHERS)
def test_any_rules_give_the_plain_values_and_read_each_byte_once(folder, plain, name, monkeypatch):
  mesh = sharding.make_mesh({'data': 2, 'fsdp': 2, 'tensor': 2})
  opened = watch(monkeypatch)
  model, placed = hf.load(folder, mesh=mesh, rules=OTHERS[name])
  assert model.config.vocab_multiple == 8
  jax.tree.map(np.testing.assert_array_equal, placed, plain)
  places = sharding.tree_shardings(model.abstract_params(), OTHERS[name], mesh)
  assert jax.tree.all(jax.tree.map(lambda leaf, place: leaf.sharding == place, placed, places))
  assert opened[0].bytes_read == sum(tensor.nbytes for tensor in opened[0].tensors.values())


def watch(monkeypatch):
  """The `Weights` that loads open, so that what they read can be counted."""
  opened = []

  class Watched(hf_files.Weights):
    def __init__(self, folder):
      super().__init__(folder)
      opened.append(self)

  monkeypatch.setattr(hf, 'Weights', Watched)
  return opened


# Mutation seen to fail: the slice put at 0 always.
def test_an_accelerator_gets_a_stacked_leaf_slice_by_slice(folder, plain):
  mesh = sharding.make_mesh({'data': 2, 'fsdp': 2, 'tensor': 2})
  model = Transformer(dataclasses.replace(hf.read_config(folder), vocab_multiple=8))
  layouts = sharding.tree_shardings(model.abstract_params(), RULES, mesh)['period']
  with hf_files.Weights(folder) as weights, concurrent.futures.ThreadPoolExecutor(2) as pool:
    for path in ('period/1/q/kernel', 'period/0/down/kernel', 'period/0/attn_norm/scale'):
      want, place = plain, {'period': layouts}
      for key in path.split('/'):
        want, place = want[key], place[key]
      names, axes = hf_names.tensors_of(model.config, path)
      got = hf_slices.by_slices(weights, names, axes, want.shape, 'float32', place, pool)
      np.testing.assert_array_equal(got, want)
      assert got.sharding.is_equivalent_to(place, got.ndim)


# Mutation seen to fail: names taken from one level only.
def test_a_leaf_of_many_tensors_over_two_leading_dimensions(tmp_path):
  """[periods, experts, in, out] of one tensor [out, in] each, the experts cut over devices."""
  import safetensors.numpy
  values = np.random.default_rng(0).normal(size=(3, 4, 6, 2)).astype(np.float32)
  names = [[f'layers.{p}.experts.{e}.weight' for e in range(4)] for p in range(3)]
  tensors = {names[p][e]: np.ascontiguousarray(values[p, e].T) for p in range(3) for e in range(4)}
  safetensors.numpy.save_file(tensors, tmp_path / 'model.safetensors')
  mesh = sharding.make_mesh({'data': 1, 'fsdp': 2, 'tensor': 4})
  with hf_files.Weights(tmp_path) as weights, concurrent.futures.ThreadPoolExecutor(2) as pool:
    for spec in ((None, 'tensor', 'fsdp', None), (None, None, None, 'fsdp'), ()):
      place = NamedSharding(mesh, PartitionSpec(*spec))
      for way in (hf_slices.fill, hf_slices.by_slices):
        np.testing.assert_array_equal(way(weights, names, 1, values.shape, np.dtype('float32'), place, pool), values)


def test_what_was_loaded_is_nobody_else_s_memory(folder):
  """Replicas and donated updates of loaded arrays change nothing else."""
  mesh = sharding.make_mesh({'data': 8})
  _, params = hf.load(folder, mesh=mesh, rules=(('', ()),))
  table = np.array(params['embed']['table'])
  other = params['embed']['table'].addressable_shards[5].data
  doubled = jax.jit(lambda x: 2 * x, donate_argnums=0)(params['embed']['table'].addressable_shards[0].data)
  np.testing.assert_array_equal(doubled, 2 * table)
  np.testing.assert_array_equal(other, table)


# --- processes of their own

BIG = {
    'architectures': ['Qwen2ForCausalLM'], 'model_type': 'qwen2', 'vocab_size': 8192, 'hidden_size': 512,
    'num_hidden_layers': 8, 'num_attention_heads': 8, 'num_key_value_heads': 4, 'intermediate_size': 2048,
    'tie_word_embeddings': True,
}  # fmt: skip


def make(folder, fields):
  """A folder of `fields` with bfloat16 tensors that all differ."""
  from spct_jax.models import hf_config, hf_folder
  config, entries = hf_config.read('config.json', fields), []
  for path, leaf in sharding.leaf_paths(Transformer(config).abstract_params()):
    names, _ = hf_names.tensors_of(config, path)
    names, shape = ([names], leaf.shape) if isinstance(names, str) else (names, leaf.shape[1:])
    entries += [(name, 'bfloat16', hf_names.file_shape(config, path, shape)) for name in names]
  bf16 = hf_files.DTYPES['BF16']
  values = (np.full(shape, i, np.dtype('uint16')).view(bf16) for i, (_, _, shape) in enumerate(entries))
  folder.mkdir()
  hf_folder.write_tensors(folder / 'model.safetensors', entries, values)
  (folder / 'config.json').write_text(json.dumps(fields))
  return max(2 * int(np.prod(shape)) for _, _, shape in entries)


LOAD = '''
import json, sys
import jax
sys.path.insert(0, {root!r})
if {port}:
  jax.distributed.initialize('127.0.0.1:{port}', 2, int(sys.argv[1]))
from spct_jax import sharding
from spct_jax.models import hf, hf_files
opened = []
class Watched(hf_files.Weights):
  def __init__(self, folder):
    super().__init__(folder)
    opened.append(self)
hf.Weights = Watched
mesh = sharding.make_mesh({mesh})
def status(name):
  return next(int(line.split()[1]) * 1024 for line in open('/proc/self/status') if line.startswith(name))
hf.load({small!r}, dtype='bfloat16', mesh=mesh, rules={rules})  # what is traced and imported once
open('/proc/self/clear_refs', 'w').write('5')  # the peak starts anew
before = status('VmRSS')
model, params = hf.load({big!r}, dtype='bfloat16', mesh=mesh, rules={rules})
peak = status('VmHWM') - before
pieces = {{
    (path, str(shard.index)): shard.data.nbytes
    for path, leaf in sharding.leaf_paths(params) for shard in leaf.addressable_shards
}}
if {out!r}:
  hf.save({out!r}, model, params, shard_bytes=10**7)
print(json.dumps({{'peak': peak, 'held': sum(pieces.values()), 'read': opened[-1].bytes_read,
                  'all': sum(tensor.nbytes for tensor in opened[-1].tensors.values())}}))
'''


def run(tmp_path, *, mesh, devices, processes, out=''):
  port = 0
  if processes > 1:
    with socket.socket() as free:
      free.bind(('127.0.0.1', 0))
      port = free.getsockname()[1]
  largest = make(tmp_path / 'big', BIG)
  make(tmp_path / 'small', {**BIG, 'hidden_size': 64, 'intermediate_size': 64, 'vocab_size': 256})
  script = LOAD.format(
      root=str(ROOT), port=port, mesh=mesh, rules=RULES, small=str(tmp_path / 'small'), big=str(tmp_path / 'big'),
      out=out,
  )
  env = {**os.environ, 'JAX_NUM_CPU_DEVICES': str(devices), 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)}
  pipe = subprocess.PIPE
  started = [
      subprocess.Popen([sys.executable, '-c', script, str(i)], env=env, stdout=pipe, stderr=pipe, text=True)
      for i in range(processes)
  ]
  outputs = [process.communicate(timeout=300) for process in started]
  assert all(process.returncode == 0 for process in started), outputs
  return largest, [json.loads(out.splitlines()[-1]) for out, _ in outputs]


# Mutation seen to fail: the filled memory copied for the devices.
@pytest.mark.skipif(not os.path.exists('/proc/self/clear_refs'), reason='peak memory is read from Linux')
def test_the_host_holds_the_parameters_and_one_tensor(tmp_path):
  largest, (got,) = run(tmp_path, mesh={'data': 2, 'fsdp': 2, 'tensor': 2}, devices=8, processes=1)
  assert got['read'] == got['all'] == got['held'] > 7e7
  assert got['peak'] <= got['held'] + largest, got


# Mutation seen to fail: every process reads whole rows.
def test_each_process_reads_what_it_holds_and_one_writes_it_all(tmp_path):
  out = tmp_path / 'out'
  _, found = run(tmp_path, mesh={'data': 1, 'fsdp': 2, 'tensor': 2}, devices=2, processes=2, out=str(out))
  for got in found:
    assert got['read'] == got['held']
    assert got['read'] < 0.51 * got['all']
  with hf_files.Weights(tmp_path / 'big') as a, hf_files.Weights(out) as b:
    assert a.tensors.keys() == b.tensors.keys() and len({t.path for t in b.tensors.values()}) > 5
    assert all(a.whole(a.tensors[name]).tobytes() == b.whole(b.tensors[name]).tobytes() for name in a.tensors)
