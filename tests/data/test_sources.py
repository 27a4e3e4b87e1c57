"""Raw rows from files of many shapes, and clear words about the rest."""

import gzip
import json

import pytest

from spct_jax.data import sources

ROWS = [{'a': 1, 'b': 'ü'}, {'a': 2, 'b': None}]
LINES = ''.join(json.dumps(row) + '\n' for row in ROWS)


# Mutation seen to fail: compression decided by the name (`.gz`) in place of the first bytes.
@pytest.mark.parametrize(
  ('name', 'data'),
  [
    ('a.jsonl', LINES.encode()),
    ('a.json', LINES.encode()),
    ('a.json', json.dumps(ROWS, indent=1).encode()),
    ('a.jsonl', json.dumps(ROWS).encode()),
    ('a.jsonl.gz', gzip.compress(LINES.encode(), mtime=0)),
    ('a.json.gz', gzip.compress(json.dumps(ROWS).encode(), mtime=0)),
    ('a.jsonl', gzip.compress(LINES.encode(), mtime=0)),
    ('a.jsonl.gz', LINES.encode()),
    ('a.JSONL.GZ', gzip.compress(LINES.encode(), mtime=0)),
    ('a.ndjson', b'\xef\xbb\xbf\r\n' + LINES.replace('\n', '\r\n').encode().rstrip()),
  ],
)
def test_every_way_to_write_the_same_rows(tmp_path, name, data):
  path = tmp_path / name
  path.write_bytes(data)
  assert [raw.row for raw in sources.read(path)] == [ROWS[0], {'a': 2}]  # null is absent


def test_a_row_knows_its_place(write):
  path = write('deep/a.jsonl', '\n{"a": 1}\n\n{"a": 2}')
  first, second = sources.read(path)
  assert (first.where, second.where) == (f'{path}:2', f'{path}:4')
  assert (first.name, second.name) == ('a.jsonl:2', 'a.jsonl:4')


@pytest.mark.parametrize('name', sources.BUILTIN)
def test_the_package_carries_its_files(name):
  assert len(list(sources.read(name))) >= 60


@pytest.mark.parametrize(
  ('name', 'text', 'message'),
  [
    ('a.jsonl', '', 'is empty'),
    ('a.jsonl', ' \n\r\n', 'is empty'),
    ('a.json', '[]', 'is empty'),
    ('a.json', '[{"a": 1}, 2]', r'a\.json:2: item 2 of the list is no JSON object but int'),
    ('a.json', '[{"a": 1},', r'a\.json: not valid JSON'),
    ('a.jsonl', '{"a": 1}\n{"a"', r'a\.jsonl:2: not valid JSON'),
    ('a.csv', 'a,b\n', 'cannot read this format; allowed are .jsonl, .ndjson, .json'),
    ('a.parquet', 'PAR1', 'convert the file to JSON lines'),
  ],
)
def test_a_file_that_cannot_be_read(write, name, text, message):
  with pytest.raises(ValueError, match=message):
    list(sources.read(write(name, text)))


def test_a_file_that_is_not_there(write, tmp_path):
  write('pairs.jsonl', LINES)
  with pytest.raises(ValueError, match=r"pair\.jsonl does not exist: did you mean 'pairs\.jsonl'"):
    list(sources.read(tmp_path / 'pair.jsonl'))
  with pytest.raises(ValueError, match='nor does its folder'):
    list(sources.read(tmp_path / 'no' / 'pairs.jsonl'))
  with pytest.raises(ValueError, match=r"is a folder: give one file, such as \['pairs\.jsonl'\]"):
    list(sources.read(tmp_path))
  with pytest.raises(
    ValueError, match="'builtin:pairs' is no file of the package: allowed are builtin:pref"
  ):
    list(sources.read('builtin:pairs'))
  with pytest.raises(ValueError, match='expected tfds:NAME:SPLIT'):
    list(sources.read('tfds:gsm8k'))
