"""TFDS without TensorFlow and without a network: a builder over a local file, read back row for
row."""

import gzip
import json
import socket
import sys

import pytest

from spct_jax.data import hh_rlhf_builder, preference, sources

ROWS = [
  {
    'chosen': f'\n\nHuman: Ask {i} ü\n\nAssistant: good {i}',
    'rejected': f'\n\nHuman: Ask {i} ü\n\nAssistant: bad {i}',
  }
  for i in range(25)
] + [{'chosen': '\n\nHuman: a\n\nAssistant:', 'rejected': '\n\nHuman: a\n\nAssistant: x'}]


@pytest.fixture
def raw_dir(tmp_path):
  folder = tmp_path / 'raw' / 'harmless-base'
  folder.mkdir(parents=True)
  with gzip.open(folder / 'test.jsonl.gz', 'wt', encoding='utf-8') as file:
    file.write('\n'.join(json.dumps(row) for row in ROWS))
  return tmp_path / 'raw'


@pytest.fixture
def offline(monkeypatch):
  def refuse(*_):
    raise OSError('no network in this test')

  monkeypatch.setattr(socket.socket, 'connect', refuse)


# Mutation seen to fail: without `disable_shuffling` (the rows then come in the order of a hash).
def test_a_built_set_gives_the_examples_of_the_raw_file(raw_dir, tmp_path, offline):
  hh_rlhf_builder.build(raw_dir, tmp_path / 'tfds', config='harmless-base')
  rows = list(sources.read_tfds('hh_rlhf/harmless-base', 'test', tmp_path / 'tfds'))
  assert [{'chosen': raw.row['chosen'], 'rejected': raw.row['rejected']} for raw in rows] == ROWS

  built = preference.load(f'tfds:hh_rlhf/harmless-base:test@{tmp_path / "tfds"}')
  direct = preference.load(raw_dir / 'harmless-base' / 'test.jsonl.gz')
  assert built.reader == direct.reader == 'hh_rlhf'
  assert built.examples == direct.examples and len(built.examples) == 25
  assert {reason: len(places) for reason, places in built.skipped.items()} == {'empty reply': 1}
  assert list((tmp_path / 'tfds').rglob('*.array_record*'))
  assert 'tensorflow' not in sys.modules

  with pytest.raises(ValueError, match="split 'train', .*cannot be read .*Should be one of"):
    list(sources.read_tfds('hh_rlhf/harmless-base', 'train', tmp_path / 'tfds'))


def test_mistakes(raw_dir, tmp_path, offline):
  with pytest.raises(
    ValueError, match="unknown config 'harmless' of hh_rlhf: allowed are harmless-base"
  ):
    hh_rlhf_builder.build(raw_dir, tmp_path / 'tfds', config='harmless')
  with pytest.raises(ValueError, match=r'helpful-base: no train\.jsonl\.gz'):
    hh_rlhf_builder.build(raw_dir, tmp_path / 'tfds', config='helpful-base')
  with pytest.raises(ValueError, match="TFDS set 'no_such_set'.*cannot be read"):
    list(sources.read_tfds('no_such_set', 'test', tmp_path / 'tfds'))
  (raw_dir / 'harmless-base' / 'train.jsonl').write_text('{"chosen": "x"}')
  with pytest.raises(ValueError, match=r"train\.jsonl:1: \['rejected'\] must be strings"):
    hh_rlhf_builder.build(raw_dir, tmp_path / 'broken', config='harmless-base')
