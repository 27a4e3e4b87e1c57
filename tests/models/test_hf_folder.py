"""A model folder appears whole or not at all, whatever kills the program, and says what it is."""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from spct_jax.models import hf, hf_files, hf_folder
from spct_jax.models.config import BlockConfig, ModelConfig
from spct_jax.models.transformer import Transformer
from spct_jax.text import tokenizer as tokenizers

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = ModelConfig(
    vocab_size=19, width=16, heads=4, kv_heads=2, head_dim=4, ffn=24, qk_norm=True, period=(BlockConfig(),),
    num_periods=2,
)  # fmt: skip


def parameters(config, seed=0):
  shapes, rng = Transformer(config).abstract_params(), np.random.default_rng(seed)
  return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), shapes)


def tensors(folder):
  found = {}
  for file in sorted(folder.glob('*.safetensors')):
    with safetensors.safe_open(file, 'np') as opened:
      found |= {name: opened.get_tensor(name) for name in opened.keys()}
  return found


def equal(a, b):
  assert a.keys() == b.keys()
  for name in a:
    assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape, name
    assert a[name].tobytes() == b[name].tobytes(), name


# --- killed at any moment

KILLED = '''
import json, os, pathlib, signal, sys
sys.path.insert(0, {root!r})
from spct_jax.models import hf_folder

def die(*_):
  os.kill(os.getpid(), signal.SIGKILL)

def after(function):
  def run(*arguments):
    result = function(*arguments)
    die()
    return result
  return run

def write(target, moment):
  if moment == 'while it is flushed': hf_folder._sync = die
  if moment == 'before the exchange': hf_folder._swap = die
  if moment == 'after the exchange': hf_folder._swap = after(hf_folder._swap)
  if moment == 'between two renames':
    hf_folder._exchange = lambda a, b: False
    os.rename = after(os.rename)
  if moment == 'two renames': hf_folder._exchange = lambda a, b: False
  with hf_folder.replacing(target) as partial:
    (partial / 'config.json').write_text(json.dumps({{'model_type': 'new'}}))
    if moment == 'while it is written': die()
    (partial / 'model.safetensors').write_text('new')

def read(target):
  return {{path.name: path.read_text() for path in sorted(target.iterdir())}} if target.exists() else None

out = []
for moment in {moments}:
  for old in (True, False):
    place = pathlib.Path({place!r}) / f'{{len(out)}}[x]'
    target = place / 'model'
    place.mkdir()
    if old:
      with hf_folder.replacing(target) as partial:
        (partial / 'config.json').write_text(json.dumps({{'model_type': 'old'}}))
        (partial / 'model.safetensors').write_text('old')
        (partial / 'README.md').write_text('old')
    child = os.fork()
    if not child:
      write(target, moment)
      os._exit(0)
    killed = os.waitpid(child, 0)[1] == signal.SIGKILL
    left = read(target)
    write(target, 'never')
    out.append([moment, old, killed, left, read(target), sorted(path.name for path in place.iterdir())])
print(json.dumps(out))
'''
MOMENTS = (
    'while it is written', 'while it is flushed', 'before the exchange', 'after the exchange', 'between two renames',
    'two renames',
)  # fmt: skip


# Mutations seen to fail: leftovers not cleaned; another name for the folder that is being written; nothing flushed.
def test_a_killed_program_leaves_the_old_model_or_the_new_one(tmp_path):
  script = KILLED.format(root=str(ROOT), moments=MOMENTS, place=str(tmp_path))
  done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, timeout=120)
  assert done.returncode == 0, done.stderr
  new = {'config.json': '{"model_type": "new"}', 'model.safetensors': 'new'}
  old = {'README.md': 'old', 'config.json': '{"model_type": "old"}', 'model.safetensors': 'old'}
  rows = json.loads(done.stdout.splitlines()[-1])
  assert len(rows) == 2 * len(MOMENTS)
  for moment, had_old, killed, left, again, beside in rows:
    # Without a model there before, one rename is all, and it is the moment of 'between two renames' too.
    arrived = moment in ('after the exchange', 'two renames') or (moment == 'between two renames' and not had_old)
    want = new if arrived else old if had_old else None
    if moment == 'between two renames' and had_old:
      want = None  # what the next call repairs
    assert killed == (moment != 'two renames'), moment
    assert left == want, (moment, had_old)
    assert again == new and beside == ['model'], (moment, had_old, beside)


def test_a_save_that_is_killed_while_it_writes_tensors_leaves_the_old_model(tmp_path):
  target = tmp_path / 'model'
  hf.save(target, Transformer(CONFIG), parameters(CONFIG))
  before = tensors(target)
  script = f'''
import os, signal, sys
sys.path[:0] = [{str(ROOT)!r}, {str(pathlib.Path(__file__).parent)!r}]
import jax, numpy as np
import test_hf_folder as t
from spct_jax.models import hf, hf_names
theirs, count = hf_names.theirs, []
def counted(*arguments):
  count.append(1)
  if len(count) > 15: os.kill(os.getpid(), signal.SIGKILL)
  return theirs(*arguments)
hf_names.theirs = counted
hf.save({str(target)!r}, t.Transformer(t.CONFIG), t.parameters(t.CONFIG, seed=1), shard_bytes=2000)
'''
  done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, timeout=120)
  assert done.returncode == -9, done.stderr
  (left,) = tmp_path.glob('.model.partial-*')
  assert list(left.glob('*.safetensors')) and not (left / 'config.json').exists()
  equal(tensors(target), before)
  hf.save(target, Transformer(CONFIG), parameters(CONFIG, seed=1), shard_bytes=2000)
  assert os.listdir(tmp_path) == ['model']
  jax.tree.map(np.testing.assert_array_equal, hf.load(target)[1], parameters(CONFIG, seed=1))


def test_an_error_leaves_the_old_model_and_nothing_beside(tmp_path):
  target = tmp_path / 'model'
  hf.save(target, Transformer(CONFIG), parameters(CONFIG))
  before = tensors(target)
  huge = parameters(CONFIG)
  huge['final_norm']['scale'][3] = 1e6
  with pytest.raises(ValueError, match='model.norm.weight has values beyond float16'):
    hf.save(target, Transformer(CONFIG), huge, dtype='float16')
  equal(tensors(target), before)
  assert os.listdir(tmp_path) == ['model']


@pytest.mark.parametrize(
    'files, message',
    [
        ({'notes.txt': 'x'}, 'holds files but no model'),
        ({'config.json': '{"pipeline": {}}'}, 'holds files but no model'),
        ({'config.json': '{"model_type": "llama"}', 'thesis.tex': 'x'}, r'would be lost \(thesis.tex\)'),
        ({'config.json': '{"model_type": "llama"}', 'checkpoints/x': 'x'}, r'would be lost \(checkpoints\)'),
    ],
)
def test_what_is_no_model_is_not_replaced(tmp_path, files, message):
  # Seen to fail: no look at what else is there.
  target = tmp_path / 'model'
  for name, text in files.items():
    (target / name).parent.mkdir(parents=True, exist_ok=True)
    (target / name).write_text(text)
  with pytest.raises(ValueError, match=message):
    hf.save(target, Transformer(CONFIG), parameters(CONFIG))
  assert {str(path.relative_to(target)) for path in target.rglob('*') if path.is_file()} == set(files)
  (tmp_path / 'file').write_text('x')
  with pytest.raises(ValueError, match='is a file'):
    hf.save(tmp_path / 'file', Transformer(CONFIG), parameters(CONFIG))


def write(target, tag='new'):
  """A save that a test can stop in the middle: what comes after its `yield` is the end of the save."""
  with hf_folder.replacing(target) as partial:
    hf_folder.write_json(partial / 'config.json', {'model_type': tag})
    yield partial


# Mutations seen to fail: no second look at the place; the old folder removed without a look.
def test_what_comes_into_the_place_meanwhile_stays(tmp_path, monkeypatch):
  target = tmp_path / 'model'
  for was in (None, 'old'):
    if was:
      (target / 'thesis.txt').unlink()
      (target / 'config.json').write_text('{"model_type": "old"}')
    writing = write(target)
    next(writing)
    target.mkdir(exist_ok=True)
    (target / 'thesis.txt').write_text('precious')
    with pytest.raises(ValueError, match='came there while the model was written, which is whole in ') as error:
      next(writing)
    assert (target / 'thesis.txt').read_text() == 'precious'
    kept = pathlib.Path(str(error.value).rpartition(' in ')[2])
    assert read(kept / 'config.json') == {'model_type': 'new'}
  # In the last moment, after that look: the model is there, and the file in what was replaced.
  (target / 'thesis.txt').unlink()
  swap = hf_folder._swap
  monkeypatch.setattr(hf_folder, '_swap', lambda *at: ((target / 'thesis.txt').write_text('precious'), swap(*at))[1])
  [*write(target)]
  assert read(target / 'config.json') == {'model_type': 'new'}
  assert [path.read_text() for path in tmp_path.glob('.model.*/thesis.txt')] == ['precious']


# Mutations seen to fail: a leftover that is gone already; a name that came or went between look and rename.
def test_several_programs_may_write_to_one_place(tmp_path):
  script = f'''
import os, pathlib, sys
sys.path.insert(0, {str(ROOT)!r})
from spct_jax.models import hf_folder
hf_folder._sync = lambda path: None
target = pathlib.Path({str(tmp_path)!r}) / 'model'
children = []
for k in range(4):
  child = os.fork()
  if not child:
    try:
      for _ in range(60):
        with hf_folder.replacing(target) as partial:
          (partial / 'config.json').write_text('{{"model_type": "x"}}')
          (partial / 'model.safetensors').write_text('x')
    except BaseException as error:
      print(type(error).__name__, error, flush=True)
      os._exit(1)
    os._exit(0)
  children.append(child)
sys.exit(sum(os.waitpid(child, 0)[1] for child in children) > 0)
'''
  done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, timeout=120)
  assert done.returncode == 0, done.stdout + done.stderr
  assert sorted(os.listdir(tmp_path / 'model')) == ['config.json', 'model.safetensors']
  [*write(tmp_path / 'model')]
  assert os.listdir(tmp_path) == ['model']


# Mutations seen to fail: the old model not put back; the system's error as it is.
def test_what_the_system_refuses_is_said_and_the_old_model_stays(tmp_path, monkeypatch):
  target = tmp_path / 'model'
  [*write(target, 'old')]
  calls, rename = [], os.rename

  def failing(*names):
    calls.append(names)
    if len(calls) == 2:
      raise OSError(5, 'Input/output error')
    rename(*names)

  with monkeypatch.context() as patch:
    patch.setattr(hf_folder, '_exchange', lambda *names: False)
    patch.setattr(os, 'rename', failing)
    with pytest.raises(ValueError, match=r'model: could not be written \(.*Input/output error.* stayed as it was'):
      [*write(target)]
  assert read(target / 'config.json') == {'model_type': 'old'} and os.listdir(tmp_path) == ['model']
  writing = write(target)
  next(writing)
  with pytest.raises(ValueError, match='could not be written .*No space left'):
    writing.throw(OSError(28, 'No space left on device'))
  assert read(target / 'config.json') == {'model_type': 'old'} and os.listdir(tmp_path) == ['model']
  with pytest.raises(ValueError, match='config.json is a file'):
    [*write(target / 'config.json' / 'x' / 'y')]
  with monkeypatch.context() as patch:  # what cannot be removed is left to the next call
    patch.setattr(os, 'unlink', lambda *_, **__: (_ for _ in ()).throw(OSError(1, 'Operation not permitted')))
    [*write(target)]
  assert read(target / 'config.json') == {'model_type': 'new'} and len(os.listdir(tmp_path)) == 2
  [*write(target)]
  assert os.listdir(tmp_path) == ['model']


def test_a_link_keeps_leading_to_the_model(tmp_path):
  (tmp_path / 'real').mkdir()
  (tmp_path / 'link').symlink_to(tmp_path / 'real')
  hf.save(tmp_path / 'link', Transformer(CONFIG), parameters(CONFIG))
  assert (tmp_path / 'link').is_symlink() and (tmp_path / 'real' / 'config.json').is_file()


# --- what is written


# Mutation seen to fail: values rounded through float16 on the way out.
@pytest.mark.parametrize('head_kind', ['lm', 'scalar'])
@pytest.mark.parametrize('dtype', ['bfloat16', 'float16', 'float32'])
def test_unchanged_weights_are_the_same_bytes(tmp_path, head_kind, dtype):
  """File -> parameters -> file: names, dtypes and bytes; and parameters -> file -> parameters."""
  config = dataclasses.replace(CONFIG, head_kind=head_kind, dtype=dtype, param_dtype=dtype)
  params = parameters(config)
  hf.save(tmp_path / 'a', Transformer(config), params, shard_bytes=3000)
  model, loaded = hf.load(tmp_path / 'a', dtype=dtype)
  assert model.config == config
  jax.tree.map(np.testing.assert_array_equal, loaded, params)
  hf.save(tmp_path / 'b', model, loaded, shard_bytes=10**9)
  equal(tensors(tmp_path / 'a'), tensors(tmp_path / 'b'))
  assert len(list((tmp_path / 'a').glob('model-*'))) > 3 and (tmp_path / 'b' / 'model.safetensors').is_file()
  # Through float32, and back on request.
  model, wide = hf.load(tmp_path / 'a', dtype='float32')
  hf.save(tmp_path / 'c', model, wide, dtype=dtype)
  equal(tensors(tmp_path / 'a'), tensors(tmp_path / 'c'))


def test_a_file_of_another_writer_comes_back(tmp_path):
  """Special values and all: the bytes of a bfloat16 file, NaNs and subnormals among them."""
  config = dataclasses.replace(CONFIG, dtype='bfloat16', param_dtype='bfloat16')
  hf.save(tmp_path / 'a', Transformer(config), parameters(config))
  rng = np.random.default_rng(0)
  made = {
      name: rng.integers(0, 2**16, value.shape, np.uint16).view(ml_dtypes.bfloat16)
      for name, value in tensors(tmp_path / 'a').items()
  }
  safetensors.numpy.save_file(made, tmp_path / 'a' / 'model.safetensors')
  hf.save(tmp_path / 'b', *hf.load(tmp_path / 'a', dtype='bfloat16'))
  equal(tensors(tmp_path / 'b'), made)


# Mutation seen to fail: the values taken as numpy rounds them.
@pytest.mark.parametrize(
    'name', ['model.layers.1.mlp.up_proj.weight', 'model.norm.weight', 'model.embed_tokens.weight']
)
def test_a_value_beyond_float16_is_named_and_not_made_infinite(tmp_path, name):
  config = dataclasses.replace(CONFIG, dtype='bfloat16', param_dtype='bfloat16')
  hf.save(tmp_path, Transformer(config), parameters(config))
  made = tensors(tmp_path)
  made[name][..., 3] = np.inf  # is in the file, and stays
  safetensors.numpy.save_file(made, tmp_path / 'model.safetensors')
  hf.load(tmp_path, dtype='float16')
  made[name][..., 2] = 1e6
  safetensors.numpy.save_file(made, tmp_path / 'model.safetensors')
  with pytest.raises(ValueError, match=rf'model.safetensors: tensor {name} has values beyond float16 \(65504\)'):
    hf.load(tmp_path, dtype='float16')


# Mutation seen to fail: the table under its one name.
@pytest.mark.parametrize('names', [['lm_head.weight'], ['lm_head.weight', 'model.embed_tokens.weight']])
def test_a_tied_table_has_the_names_of_the_source(tmp_path, names, monkeypatch):
  config = dataclasses.replace(CONFIG, tied=True)
  hf.save(tmp_path / 'a', Transformer(config), parameters(config))
  made = tensors(tmp_path / 'a')
  table = made.pop('model.embed_tokens.weight')
  safetensors.numpy.save_file(made | dict.fromkeys(names, table), tmp_path / 'a' / 'model.safetensors')
  model, params = hf.load(tmp_path / 'a')
  hf.save(tmp_path / 'b', model, params, source=tmp_path / 'a')
  equal(tensors(tmp_path / 'a'), tensors(tmp_path / 'b'))
  # Headers say all but whether they are equal.
  monkeypatch.setattr(hf_files.Weights, '_bytes', lambda *_: pytest.fail('a tensor was read'))
  with hf_files.Weights(tmp_path / 'a') as weights:
    hf.check(weights, model.config, model.abstract_params())


def test_others_may_read_the_folder_as_any_other(tmp_path):
  # Seen to fail: the rights of a private folder taken over with its files.
  tok = tokenizers.load('builtin:small')
  config = dataclasses.replace(CONFIG, vocab_size=tok.vocab_size)
  hf.save(tmp_path / 'out', Transformer(config), parameters(config), tok)
  (tmp_path / 'other').mkdir()
  (tmp_path / 'other' / 'file').write_text('')
  mode = lambda path: path.stat().st_mode & 0o777
  assert mode(tmp_path / 'out') == mode(tmp_path / 'other')
  assert {mode(path) for path in (tmp_path / 'out').iterdir()} == {mode(tmp_path / 'other' / 'file')}


def test_shards_hold_what_they_may_and_the_index_says_where(tmp_path):
  hf.save(tmp_path, Transformer(CONFIG), parameters(CONFIG), shard_bytes=5000)
  index = json.loads((tmp_path / 'model.safetensors.index.json').read_text())
  total, count = 0, len(list(tmp_path.glob('*.safetensors')))
  for file in tmp_path.glob('*.safetensors'):
    assert re.fullmatch(rf'model-\d{{5}}-of-{count:05d}.safetensors', file.name)
    held = safetensors.numpy.load_file(file)
    size = sum(value.nbytes for value in held.values())
    assert size <= 5000 or len(held) == 1
    total += size
    assert {index['weight_map'].pop(name) for name in held} == {file.name}
    with safetensors.safe_open(file, 'np') as opened:
      assert opened.metadata() == {'format': 'pt'}
  assert not index['weight_map'] and index['metadata']['total_size'] == total


def test_the_host_holds_one_tensor_at_a_time(tmp_path, monkeypatch):
  alive, most = [], []
  write = hf_folder.write_tensors

  def watched(path, entries, values):
    def one_by_one():
      for value in values:
        alive.append(1)
        most.append(len(alive))
        yield value
        alive.pop()
    return write(path, entries, one_by_one())

  monkeypatch.setattr(hf_folder, 'write_tensors', watched)
  hf.save(tmp_path, Transformer(CONFIG), parameters(CONFIG))
  assert max(most) == 1 and len(most) > 20


KEPT = {
    'architectures': ['Qwen3ForCausalLM'], 'model_type': 'qwen3', 'vocab_size': 19, 'hidden_size': 16,
    'num_attention_heads': 4, 'num_key_value_heads': 2, 'head_dim': 4, 'intermediate_size': 24, 'num_hidden_layers': 2,
    'tie_word_embeddings': False,
    'rms_norm_eps': 1e-6, 'hidden_act': 'silu', 'max_position_embeddings': 40960, 'attention_dropout': 0.0,
    'initializer_range': 0.02, 'use_cache': True, 'dtype': 'bfloat16', 'bos_token_id': 1, 'eos_token_id': 2,
    'rope_parameters': {'rope_type': 'default', 'rope_theta': 10000.0},
}  # fmt: skip


@pytest.fixture
def source(tmp_path):
  """A folder as others write it."""
  config = dataclasses.replace(CONFIG, dtype='bfloat16', param_dtype='bfloat16')
  hf.save(tmp_path / 'source', Transformer(config), parameters(config))
  (tmp_path / 'source' / 'config.json').write_text(json.dumps(KEPT))
  (tmp_path / 'source' / 'generation_config.json').write_text(json.dumps({'eos_token_id': [2, 7], 'temperature': 0.6}))
  (tmp_path / 'source' / 'tokenizer.json').write_text('{"the": "tokenizer"}')
  (tmp_path / 'source' / 'chat_template.jinja').write_text('the template')
  return tmp_path / 'source'


def read(path):
  return json.loads(path.read_text())


# Mutations seen to fail: the fields written anew; the dtype left as it was.
def test_fields_of_the_source_are_kept_and_what_changed_is_updated(source, tmp_path):
  model, params = hf.load(source)
  hf.save(tmp_path / 'out', model, params, source=source)
  assert read(tmp_path / 'out' / 'config.json') == KEPT | {'dtype': 'float32'}
  assert read(tmp_path / 'out' / 'generation_config.json') == {'eos_token_id': [2, 7], 'temperature': 0.6}
  for name in ('tokenizer.json', 'chat_template.jinja'):
    assert (tmp_path / 'out' / name).read_bytes() == (source / name).read_bytes()
  hf.save(tmp_path / 'out', model, params, source=source, dtype='bfloat16')
  assert read(tmp_path / 'out' / 'config.json') == KEPT
  equal(tensors(tmp_path / 'out'), tensors(source))
  # A reward model made of it: the head changes, and nothing else.
  config = dataclasses.replace(model.config, head_kind='scalar')
  reward = {name: value for name, value in params.items() if name != 'unembed'}
  reward['reward'] = {'kernel': np.ones((16, 1), np.float32)}
  hf.save(tmp_path / 'out', Transformer(config), reward, source=source)
  fields = read(tmp_path / 'out' / 'config.json')
  assert fields['architectures'] == ['Qwen3ForSequenceClassification'] and fields['initializer_range'] == 0.02
  assert fields['max_position_embeddings'] == 40960 and len(fields['id2label']) == 1
  assert hf.load(tmp_path / 'out')[0].config == config
  assert not (tmp_path / 'out' / 'generation_config.json').exists()


def test_a_tokenizer_s_special_tokens_are_in_both_configs(tmp_path):
  tok = tokenizers.load('builtin:small')
  config = dataclasses.replace(CONFIG, vocab_size=2048)
  hf.save(tmp_path, Transformer(config), parameters(config), tok)
  want = {'bos_token_id': tok.hf.bos_token_id, 'eos_token_id': list(tok.eos_ids), 'pad_token_id': tok.pad_id}
  assert read(tmp_path / 'generation_config.json') == want
  assert want.items() <= read(tmp_path / 'config.json').items()
  again = tokenizers.load(tmp_path)
  assert again.chat_template == tok.chat_template and again.eos_ids == tok.eos_ids


def test_the_model_card_says_how_it_was_made(tmp_path):
  card = hf_folder.Card(
      base_model='Qwen/Qwen3-8B', stage='grpo', config_hash='abc', commit='def', data=('pairs.jsonl',),
      metrics=({'benchmark': 'b', 'k': 8, 'accuracy': 0.71234},),
  )
  hf.save(tmp_path / 'judge', Transformer(CONFIG), parameters(CONFIG), card=card)
  text = (tmp_path / 'judge' / 'README.md').read_text()
  _, front, body = text.split('---\n', 2)
  assert 'library_name: transformers\npipeline_tag: text-generation\nbase_model: Qwen/Qwen3-8B\n' in front
  assert '# judge' in body and '- stage: `grpo`' in body and '- commit: `def`' in body and '| b | 8 | 0.7123 |' in body
  scalar = dataclasses.replace(CONFIG, head_kind='scalar')
  hf.save(tmp_path / 'judge', Transformer(scalar), parameters(scalar), card=hf_folder.Card(base_model='/home/me/base'))
  text = (tmp_path / 'judge' / 'README.md').read_text()
  # A path in `base_model` would be refused by the hub.
  assert 'pipeline_tag: text-classification' in text and 'base_model:' not in text and '`/home/me/base`' in text


def test_a_tokenizer_of_transformers_goes_in_too_and_a_larger_one_does_not(tmp_path):
  tok = tokenizers.load('builtin:small')
  config = dataclasses.replace(CONFIG, vocab_size=2047)
  with pytest.raises(ValueError, match='the tokenizer has 2048 tokens, but the model embeds 2047'):
    hf.save(tmp_path / 'x', Transformer(config), parameters(config), tok)
  assert not (tmp_path / 'x').exists()
  config = dataclasses.replace(CONFIG, vocab_size=2048)
  hf.save(tmp_path / 'x', Transformer(config), parameters(config), tok.hf)
  assert tokenizers.load(tmp_path / 'x').eos_ids == tok.eos_ids
