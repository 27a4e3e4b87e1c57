"""Raw rows from files of many shapes, and clear words about the rest."""

import gzip
import importlib
import json
import sys

import pytest

from spct_jax.data import preference, sources

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


def test_a_file_that_a_package_carries():
  named = list(sources.read('package:spct_jax.data/files/preferences.jsonl'))
  assert named == list(sources.read('builtin:preferences'))
  with pytest.raises(ValueError, match="did you mean 'preferences.jsonl'"):
    list(sources.read('package:spct_jax.data/files/preference.jsonl'))
  with pytest.raises(ValueError, match='is a folder: give one file'):
    list(sources.read('package:spct_jax.data/files'))


MODULE = """
from __future__ import annotations
calls = []
made = []

def rows(count: int, scale: float = 1.0, upper: bool = False, name: 'str' = 'a', bare='b', extra=None):
  calls.append(count)
  for i in range(count):
    made.append(i)
    yield {'i': i, 'x': i * scale, 'name': (name + bare).upper() if upper else name + bare, 'none': None}

def endless(step=2):
  i = 0
  while True:
    made.append(i)
    yield {'prompt': f'Question {i}?', 'responses': ['a', 'b'], 'label': 0}
    i += step

def broken(after: int = 2):
  for i in range(after):
    yield {'i': i}
  raise ValueError('ran dry')

def unfit(data: dict): yield {}
def listed(): return [{'i': 0}, 3]
def nothing(): return None
def one(): return {'i': 0}
def empty(): return []
def _hidden(): yield {}
"""


@pytest.fixture
def maker(tmp_path, monkeypatch):
  """The module MODULE, loaded anew."""
  (tmp_path / 'source_maker.py').write_text(MODULE)
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.delitem(sys.modules, 'source_maker', raising=False)
  yield importlib.import_module('source_maker')
  sys.modules.pop('source_maker', None)


# Mutations seen to fail: lines from 0; bool('false') for a flag; the default's type in place of the annotation's.
def test_rows_that_a_function_makes(maker):
  name = 'made:source_maker:rows?count=2&scale=3&upper=true&name=x=y&bare=7'
  found = list(sources.read(name))
  assert [raw.row for raw in found] == [
    {'i': 0, 'x': 0.0, 'name': 'X=Y7'},
    {'i': 1, 'x': 3.0, 'name': 'X=Y7'},
  ]
  assert [(raw.file, raw.line) for raw in found] == [('source_maker:rows', 1), ('source_maker:rows', 2)]
  assert (found[1].where, found[1].name) == ('source_maker:rows:2',) * 2
  plain = list(sources.read('made:source_maker:rows?count=1&upper=false'))
  assert plain[0].row == {'i': 0, 'x': 0.0, 'name': 'ab'}


# Mutations seen to fail: list(rows) in place of one by one; every read calling the function again.
def test_rows_are_made_one_by_one_and_once(maker):
  loaded = preference.load('made:source_maker:endless?step=5', limit=3)
  assert [example.messages[0].content for example in loaded.examples] == [
    'Question 0?',
    'Question 5?',
    'Question 10?',
  ]
  assert maker.made == [0, 5, 10]
  assert preference.load('made:source_maker:endless?step=5', limit=2).examples == loaded.examples[:2]
  assert maker.made == [0, 5, 10]
  assert len(preference.load('made:source_maker:endless?step=5', limit=4).examples) == 4
  assert maker.made == [0, 5, 10, 15]
  for _ in range(2):
    assert len(list(sources.read('made:source_maker:rows?count=4'))) == 4
  assert maker.calls == [4]


# Mutation seen to fail: the error not kept, by which a second read ends early and looks complete.
def test_a_function_that_fails_fails_at_every_read(maker):
  for _ in range(2):
    rows = sources.read('made:source_maker:broken')
    assert [next(rows).row, next(rows).row] == [{'i': 0}, {'i': 1}]
    with pytest.raises(ValueError, match='ran dry'):
      next(rows)


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    ('source_maker', 'expected made:MODULE:FUNCTION'),
    (':rows', 'expected made:MODULE:FUNCTION'),
    ('source_maker:rows:x', 'expected made:MODULE:FUNCTION'),
    ('no_such_maker:rows', "no module 'no_such_maker'"),
    ('no_such_maker.inner:rows', "cannot find the module 'no_such_maker.inner'"),
    ('source_maker:row', "has no function 'row'; it has: broken, empty, endless, listed, nothing, one"),
    ('source_maker:calls', "has no function 'calls'"),
    ('source_maker:rows?counts=2', r"has no 'counts'; allowed: count \(int\), scale \(float, default 1.0\)"),
    ('source_maker:rows?count=2&extra=1', r"has no 'extra'; allowed: .*bare \(str, default 'b'\)"),
    ('source_maker:rows', r'rows needs count; allowed: count \(int\)'),
    ('source_maker:rows?count=2.5', "count: got '2.5'; allowed: a value of type int"),
    ('source_maker:rows?count=2&upper=1', "upper: got '1'; allowed: true or false"),
    ('source_maker:rows?count=2&count=3', "'count' is given twice"),
    ('source_maker:rows?count', "'count' is no name=value"),
    ('source_maker:rows?', "'' is no name=value"),
    ('source_maker:unfit', "needs 'data', which no name can give"),
    ('source_maker:listed', 'row 2 is no dict but int'),
    ('source_maker:nothing', r'must yield rows \(dicts\), and returned NoneType'),
    ('source_maker:one', 'row 1 is no dict but str'),
    ('source_maker:empty', 'empty yields no row'),
  ],
)
def test_a_name_that_makes_no_rows(maker, name, message):
  with pytest.raises(ValueError, match=message):
    list(sources.read(f'made:{name}'))
