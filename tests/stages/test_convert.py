"""Models in and out of folders by one command, and what they need told without reading them."""

import dataclasses
import importlib.util
import json
import pathlib

import jax
import numpy as np
import pytest
import safetensors.numpy

from spct_jax import main, sharding, stages
from spct_jax.models import hf, hf_files
from spct_jax.models.transformer import Transformer
from spct_jax.stages import convert, loading, named, workdir
from spct_jax.testing import tiny
from spct_jax.testing.finished import write_stage
from spct_jax.text import tokenizer as tokenizers
from spct_jax.train import lora, peft

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture
def mesh():
  return sharding.make_mesh({'data': 1, 'fsdp': 2, 'tensor': 1})


@pytest.fixture
def config(small_config):
  return small_config


def page(**fields):
  spec = importlib.util.spec_from_file_location('convert', ROOT / 'configs' / 'convert.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  found = module.get_config('do=' + fields.pop('do', 'export'))
  with found.unlocked():
    for name, value in fields.items():
      section, name = name.split('__') if '__' in name else ('convert', name)
      found[section][name] = value if not hasattr(value, 'joinpath') else str(value)
  return found


def random(decoder, seed):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), decoder.abstract_params())


# Mutations seen to fail: the judge's head written for the meta-RM; the padding rows of the vocabulary written.
def test_a_trained_stage_becomes_a_folder_without_its_data(config, files, tmp_path, mesh):
  tok = tokenizers.load(config.tokenizer.path)
  config.evaluate.models = ('rft',)
  for stage, head_kind in (('rft', 'lm'), ('meta_rm', 'scalar')):
    decoder = loading.model(config, tok, head_kind=head_kind)
    params = random(decoder, 1)
    write_stage(tmp_path / 'w', config, stage, decoder, params)
    (tmp_path / 'w' / 'results.json').write_text(json.dumps([
        {'stage': 'rft', 'benchmark': 'pairs', 'subset': 'all', 'n': 2, 'k': 1, 'accuracy': 0.625},
        {'stage': 'rft', 'benchmark': 'pairs', 'subset': 'some', 'n': 2, 'k': 1, 'accuracy': 0.25},
    ]))  # fmt: skip
    (files / 'train.jsonl').rename(files / 'gone.jsonl')
    stages.RUN['convert'](page(model__path=f'{tmp_path}/w:{stage}', to=tmp_path / stage), None, mesh)
    (files / 'gone.jsonl').rename(files / 'train.jsonl')

    model, loaded = hf.load(tmp_path / stage)
    assert model.config.head_kind == head_kind and model.config.vocab_size == tok.vocab_size
    rows = dict(params, embed={'table': params['embed']['table'][: tok.vocab_size]})
    jax.tree.map(np.testing.assert_array_equal, loaded, rows)
    assert tokenizers.load(tmp_path / stage).chat_template == tok.chat_template
    text = (tmp_path / stage / 'README.md').read_text()
    assert f'- stage: `{stage}`' in text and '- config: `' in text and 'base model: `random weights`' in text
    assert ('| pairs | 2 | 1 |' in text) == (stage == 'rft') and '0.25' not in text
  fields = json.loads((tmp_path / 'meta_rm' / 'config.json').read_text())
  assert fields['architectures'][0].endswith('ForSequenceClassification') and fields['pad_token_id'] == tok.pad_id


@pytest.fixture
def folder(config, tmp_path):
  """A bfloat16 folder with its tokenizer, as it would be downloaded."""
  tok = tokenizers.load(config.tokenizer.path)
  decoder = loading.model(config, tok)
  decoder = Transformer(dataclasses.replace(decoder.config, dtype='bfloat16', param_dtype='bfloat16', vocab_multiple=1))
  hf.save(tmp_path / 'base', decoder, random(decoder, 3), tok)
  path = tmp_path / 'base' / 'config.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | {'initializer_range': 0.02}))
  return tmp_path / 'base'


def test_a_folder_comes_out_as_it_went_in(folder, tmp_path, mesh):
  stages.RUN['convert'](page(model__path=folder, to=tmp_path / 'out', shard_bytes=5000), None, mesh)
  assert len(list((tmp_path / 'out').glob('*.safetensors'))) > 1
  equal(tmp_path / 'out', folder)
  for name in ('config.json', 'tokenizer.json', 'chat_template.jinja', 'generation_config.json'):
    assert json_or_text(tmp_path / 'out' / name) == json_or_text(folder / name), name
  stages.RUN['convert'](page(model__path=folder, to=tmp_path / 'out', dtype='float32'), None, mesh)
  assert json_or_text(tmp_path / 'out' / 'config.json')['torch_dtype'] == 'float32'
  with pytest.raises(ValueError, match='is the model itself'):
    stages.RUN['convert'](page(model__path=folder, to=folder), None, mesh)


# Mutation seen to fail: all of them in the dtype that most are in.
def test_tensors_of_several_dtypes_keep_theirs(folder, tmp_path, mesh):
  file = folder / 'model.safetensors'
  held = safetensors.numpy.load_file(file)
  wide = {name: value.astype(np.float32) * np.float32(1.001) for name, value in held.items() if 'norm' in name}
  safetensors.numpy.save_file(held | wide, file)
  stages.RUN['convert'](page(model__path=folder, to=tmp_path / 'out'), None, mesh)
  equal(tmp_path / 'out', folder)
  assert json_or_text(tmp_path / 'out' / 'config.json')['torch_dtype'] == 'bfloat16'
  stages.RUN['convert'](page(model__path=folder, to=tmp_path / 'out', dtype='bfloat16'), None, mesh)
  written = safetensors.numpy.load_file(tmp_path / 'out' / 'model.safetensors')
  assert {str(value.dtype) for value in written.values()} == {'bfloat16'}


# Mutation seen to fail: nothing written beside files that are copied.
def test_a_base_model_without_a_template_goes_out_with_the_fallback(config, folder, tmp_path, mesh):
  (folder / 'chat_template.jinja').unlink()
  want = tokenizers.load(folder)
  stages.RUN['convert'](page(model__path=folder, to=tmp_path / 'out'), None, mesh)
  assert (tmp_path / 'out' / 'chat_template.jinja').read_text() == want.template
  assert tokenizers.load(tmp_path / 'out').chat_template is want.chat_template is None
  # A tokenizer that is given goes out with a folder that has none.
  for file in folder.glob('*token*.json'):
    file.unlink()
  asked = page(model__path=folder, to=tmp_path / 'given', tokenizer__path=config.tokenizer.path)
  stages.RUN['convert'](asked, None, mesh)
  assert tokenizers.load(tmp_path / 'given').encode('a text') == want.encode('a text')


def equal(folder, other):
  """The same tensors: names, dtypes and bytes."""
  read = lambda at: [safetensors.numpy.load_file(file) for file in at.glob('*.safetensors')]
  a, b = ({name: value for held in read(at) for name, value in held.items()} for at in (folder, other))
  assert a.keys() == b.keys()
  assert all(a[name].dtype == b[name].dtype and a[name].tobytes() == b[name].tobytes() for name in a)


def json_or_text(path):
  return json.loads(path.read_text()) if path.suffix == '.json' else path.read_text()


# Mutation seen to fail: the imported model looked for where a trained one is.
def test_an_imported_model_is_a_model_like_any(config, folder, tmp_path, mesh):
  asked = page(do='import', model__path=folder)
  with workdir.open_workdir(tmp_path / 'w', asked) as opened:
    stages.RUN['convert'](asked, opened, mesh)
    stages.RUN['convert'](asked, opened, mesh)  # done already
  name = f'{tmp_path}/w:convert'
  tok = tokenizers.load(config.tokenizer.path)
  decoder = loading.model(config, tok, name=name)
  named.check(config, name, 'rft.init', ('lm',))
  got = loading.params(config, name, decoder, None, mesh)
  want = hf.load(folder, vocab_multiple=128)[1]
  jax.tree.map(np.testing.assert_array_equal, sharding.to_host(got), sharding.to_host(want))
  stages.RUN['convert'](page(model__path=name, to=tmp_path / 'again', dtype='bfloat16'), None, mesh)
  equal(tmp_path / 'again', folder)
  with pytest.raises(ValueError, match='needs a workdir'):
    stages.RUN['convert'](asked, None, mesh)


def test_an_import_of_damaged_numbers_is_refused(folder, tmp_path, mesh):
  file = folder / 'model.safetensors'
  tensors = safetensors.numpy.load_file(file)
  tensors['model.norm.weight'][2] = np.nan
  safetensors.numpy.save_file(tensors, file)
  asked = page(do='import', model__path=folder)
  with workdir.open_workdir(tmp_path / 'w', asked) as opened:
    with pytest.raises(ValueError, match='not finite in final_norm/scale'):
      stages.RUN['convert'](asked, opened, mesh)


def test_adapters_go_out_merged_or_by_themselves(config, folder, tmp_path, mesh):
  config.model.path, config.rft.lora.rank, config.rft.lora.targets = str(folder), 2, ('q', 'down')
  config.rft.init = 'base'
  tok = tokenizers.load(config.tokenizer.path)
  decoder = loading.model(config, tok)
  adapted = lora.Adapted(decoder, loading.lora_settings(config, 'rft'))
  adapters = random(adapted, 5)
  write_stage(tmp_path / 'w', config, 'rft', adapted, adapters)
  name = f'{tmp_path}/w:rft'
  stages.RUN['convert'](page(model__path=name, to=tmp_path / 'merged'), None, mesh)
  _, base = hf.load(folder, vocab_multiple=128)
  want = lora.merge(base, jax.tree.map(np.asarray, adapters), adapted.settings)
  _, got = hf.load(tmp_path / 'merged', vocab_multiple=128)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, want)
  text = (tmp_path / 'merged' / 'README.md').read_text()
  assert str(folder) in text and json_or_text(tmp_path / 'merged' / 'config.json')['initializer_range'] == 0.02

  stages.RUN['convert'](page(model__path=name, to=tmp_path / 'peft', adapters='peft'), None, mesh)
  _, loaded = peft.load(tmp_path / 'peft', decoder)
  jax.tree.map(np.testing.assert_array_equal, loaded, adapters)

  # The PEFT folder is a model too, merged on its way out, and in; and no source of an export is its target.
  stages.RUN['convert'](page(model__path=tmp_path / 'peft', to=tmp_path / 'again'), None, mesh)
  equal(tmp_path / 'again', tmp_path / 'merged')
  asked = page(do='import', model__path=tmp_path / 'peft')
  with workdir.open_workdir(tmp_path / 'in', asked) as opened:
    stages.RUN['convert'](asked, opened, mesh)
  stages.RUN['convert'](page(model__path=f'{tmp_path}/in:convert', to=tmp_path / 'imported'), None, mesh)
  equal(tmp_path / 'imported', tmp_path / 'merged')
  held = {path.name: path.read_bytes() for path in (tmp_path / 'peft').iterdir()}
  for source, to, way in (('peft', 'peft', 'merge'), ('peft', 'peft', 'peft'), ('peft', 'base', 'merge')):
    with pytest.raises(ValueError, match='is the model itself, or what it was made from'):
      asked = page(model__path=tmp_path / source, to=tmp_path / 'w' / '..' / to, adapters=way)
      stages.RUN['convert'](asked, None, mesh)
  assert {path.name: path.read_bytes() for path in (tmp_path / 'peft').iterdir()} == held
  with pytest.raises(ValueError, match='has none of its own'):
    stages.RUN['convert'](page(model__path=folder, to=tmp_path / 'x', adapters='peft'), None, mesh)


# --- inspect


# Mutation seen to fail: bytes of the whole leaf for those of a device.
def test_what_a_model_needs_is_told_by_group_and_device():
  decoder = Transformer(tiny.model_config())
  mesh = sharding.make_mesh({'data': 2, 'fsdp': 2, 'tensor': 2})
  told = convert.inspect(decoder, tiny.RULES, mesh)
  assert told['parameters'] == decoder.num_params - told['padding'] and told['bytes'] == 4 * told['parameters']
  abstract = decoder.abstract_params()
  zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract)
  placed = jax.device_put(zeros, sharding.tree_shardings(abstract, tiny.RULES, mesh))
  shards = [leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(placed)]
  assert told['bytes_per_device'] == sum(shards)
  groups = {row['name']: row for row in told['groups']}
  assert set(groups) == {'embedding', 'norms', 'attention', 'feed-forward', 'output matrix'}
  c = decoder.config
  assert groups['feed-forward']['parameters'] == c.num_layers * 3 * c.width * c.ffn
  assert sum(row['parameters'] for row in told['groups']) == told['parameters']


# Mutation seen to fail: the rows that pad the vocabulary counted.
@pytest.mark.parametrize('tied', [True, False])
def test_padding_of_the_vocabulary_is_told_by_itself(tied):
  config = dataclasses.replace(tiny.model_config(), vocab_size=100, tied=tied)
  mesh = sharding.make_mesh({'data': 1, 'fsdp': 2, 'tensor': 1})
  plain = convert.inspect(Transformer(dataclasses.replace(config, vocab_multiple=1)), tiny.RULES, mesh)
  padded = convert.inspect(Transformer(dataclasses.replace(config, vocab_multiple=64)), tiny.RULES, mesh)
  tables = 1 if tied else 2
  assert plain['padding'] == 0 and padded['padding'] == tables * 28 * config.width
  assert [padded[key] for key in ('parameters', 'bytes')] == [plain[key] for key in ('parameters', 'bytes')]
  assert padded['bytes_per_device'] == plain['bytes_per_device'] + 4 * padded['padding'] // 2


def test_no_tensor_is_read_and_no_device_needed(folder, tmp_path, mesh, capsys, monkeypatch):
  monkeypatch.setattr(hf_files.Weights, '_bytes', lambda *_: pytest.fail('a tensor was read'))
  asked = page(do='inspect', model__path=folder, json=tmp_path / 'told.json')
  asked.convert.mesh.fsdp, asked.convert.mesh.data = 16, 64
  stages.RUN['convert'](asked, None, mesh)
  out = capsys.readouterr().out
  told = json.loads((tmp_path / 'told.json').read_text())
  assert told['mesh'] == {'data': 64, 'fsdp': 16, 'tensor': 1} and told['dtype'] == 'bfloat16'
  assert told['tokens'] == tokenizers.load(folder).vocab_size
  held = safetensors.numpy.load_file(folder / 'model.safetensors')
  assert told['parameters'] == sum(value.size for value in held.values())
  assert 'per device' in out and f'{told["parameters"]:,}' in out and 'mesh: data 64, fsdp 16' in out
  asked.convert.mesh.fsdp = 15
  with pytest.raises(ValueError, match='cannot be split 15 ways'):
    stages.RUN['convert'](asked, None, mesh)
  (folder / 'model.safetensors').write_bytes(b'12345678')
  with pytest.raises(ValueError, match='not a whole safetensors file'):
    stages.RUN['convert'](asked, None, mesh)


# --- the door


@pytest.mark.parametrize(
    'words, message',
    [
        (['--config.convert.do=move'], "convert.do: got 'move'; allowed: inspect, export, import"),
        (['--config.convert.dtype=int8'], "convert.dtype: got 'int8'; allowed: float32, bfloat16, float16"),
        (['--config.convert.shard_bytes=0'], 'convert.shard_bytes: got 0'),
        (['--config.convert.adapters=drop'], "convert.adapters: got 'drop'; allowed: merge, peft"),
        (['--config.model=/nowhere'], "model.path: got the model '/nowhere'; allowed"),
        ([], 'random weights need a tokenizer'),
        (['--config.convert.do=export', '--config.tokenizer=builtin:small'], 'convert.to is empty'),
        (['--config.convert.mesh.fsdp=-1', '--config.tokenizer=builtin:small'], 'convert.mesh: got'),
    ],
)
def test_a_mistake_is_said_in_one_line(words, message, capsys):
  assert main.main([f'--config={ROOT}/configs/convert.py', *words]) == 2
  error = capsys.readouterr().err
  assert error.startswith('error: ') and message in error


def test_other_stages_still_need_a_workdir(capsys):
  assert main.main([f'--config={ROOT}/configs/spct_small.py']) == 2
  assert '--workdir is missing' in capsys.readouterr().err


def test_smoke(tmp_path, capsys):
  assert main.main([f'--config={ROOT}/configs/convert.py:smoke', f'--workdir={tmp_path}/w']) == 0
  assert 'exported: ' in capsys.readouterr().out
  model, _ = hf.load(tmp_path / 'w' / 'export')
  assert model.config.vocab_size == tokenizers.load(tmp_path / 'w' / 'export').vocab_size
