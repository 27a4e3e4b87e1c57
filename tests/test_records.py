"""Rows on disk: exact round trips, nothing half-written, errors that name file and line."""

import dataclasses
import gzip
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from spct_jax import records
from spct_jax.types import Example, Kept, Message, Trajectory

TRAJECTORY = Trajectory(
  uid='a.jsonl:3',
  sample=1,
  visit=0,
  order=(1, 0),
  hinted=False,
  prompt_ids=(5, 6, 7),
  token_ids=(8, 2),
  logp=(-0.1, float(np.float32(-2.3))),
  text='Scores: \\boxed{7, 5}\u2028 ü',
  scores=(7, 5),
  parse='ok',
)
EXAMPLE = Example(
  uid='x',
  messages=(Message('system', 's'), Message('user', 'q\n')),
  responses=('a', 'b'),
  label=1,
  grades=(1.0, 2.5),
)

# A compressed file whose middle is overwritten: the stream itself cannot be read.
SPOILT = gzip.compress(b'{"a": 1}\n' * 50, mtime=0)[:10] + b'\xff' * 20

# Mutations seen to fail: reading '<u4' as '>u4'; Python's `hash` in place of BLAKE2b.
def test_uid_hash_is_a_constant_of_the_uid():
  value = records.uid_hash('a.jsonl:3')
  assert value.dtype == np.uint32 and value.shape == (2,)
  assert [hex(half) for half in value] == ['0x5960a46a', '0x7f55214c']
  assert len({tuple(records.uid_hash(f'file:{i}')) for i in range(10_000)}) == 10_000
  assert records.uid_hash('Zoë').tolist() != records.uid_hash('Zoe').tolist()


@pytest.mark.parametrize('name', ['rows.jsonl', 'rows.jsonl.gz', 'rows.jsonl.GZ'])
def test_records_come_back_as_they_were(tmp_path, name):
  path = tmp_path / 'new' / name
  failed = dataclasses.replace(TRAJECTORY, scores=None, parse='no scores', sample=2)
  assert records.write_jsonl(path, map(records.to_row, (TRAJECTORY, failed))) == 2
  assert list(records.read_trajectories(path)) == [TRAJECTORY, failed]
  assert next(records.read_jsonl(path))['schema'] == 'trajectory/1'
  records.write_jsonl(path, [records.to_row(EXAMPLE)])
  assert list(records.read_examples(path)) == [EXAMPLE]
  assert (path.read_bytes()[:2] == b'\x1f\x8b') == (path.suffix != '.jsonl')
  assert [entry.name for entry in path.parent.iterdir()] == [name]  # no temporary file is left


# Seen to fail: `kept` read as lists, and written as null where nothing was recorded.
def test_kept_tokens_are_an_optional_field(tmp_path):
  kept = Kept(ids=((8, 3), (2,)), logp=(-0.25, 0.0), count=(5, 1))
  path, recorded = tmp_path / 'f.jsonl', dataclasses.replace(TRAJECTORY, kept=kept)
  records.write_jsonl(path, map(records.to_row, (TRAJECTORY, recorded)))
  assert list(records.read_trajectories(path)) == [TRAJECTORY, recorded]
  bare, row = records.read_jsonl(path)
  assert 'kept' not in bare and row['kept'] == {'ids': [[8, 3], [2]], 'logp': [-0.25, 0.0], 'count': [5, 1]}
  for wrong in ({**row['kept'], 'ids': [8, 3]}, {'ids': [[8, 3], [2]]}, [[8, 3], [2]]):
    with pytest.raises(ValueError, match="row: field 'kept' of 'trajectory/1' has the wrong type"):
      records.trajectory_from_row({**row, 'kept': wrong})
  with pytest.raises(ValueError, match='sample 1: logp has a value that is not finite'):
    records.to_row(dataclasses.replace(recorded, kept=dataclasses.replace(kept, logp=(float('nan'), 0.0))))


def test_equal_rows_give_equal_compressed_bytes(tmp_path):
  for name in ('a.jsonl.gz', 'b.jsonl.gz'):
    records.write_jsonl(tmp_path / name, [{'x': 1}])
  assert (tmp_path / 'a.jsonl.gz').read_bytes() == (tmp_path / 'b.jsonl.gz').read_bytes()


def test_numpy_values_become_plain():
  value = {
    'a': np.float32(0.5),
    'b': np.arange(3),
    'c': np.bool_(True),
    4: float('nan'),
    'e': (np.inf, None),
  }
  assert json.loads(records.dumps(value)) == {
    'a': 0.5,
    'b': [0, 1, 2],
    'c': True,
    '4': None,
    'e': [None, None],
  }
  with pytest.raises(ValueError, match='cannot write a set as JSON'):
    records.dumps({'a': {1}})


def test_a_logp_that_is_not_finite_is_an_error():
  with pytest.raises(ValueError, match='sample 1: logp'):
    records.to_row(dataclasses.replace(TRAJECTORY, logp=(-0.1, float('-inf'))))


# Seen to fail: any number, which lets infinity in from 1e999 and out as null.
def test_a_grade_that_is_not_finite_is_an_error(tmp_path):
  with pytest.raises(ValueError, match="example 'x': grades must be finite"):
    records.to_row(dataclasses.replace(EXAMPLE, grades=(1.0, float('inf'))))
  path = tmp_path / 'f.jsonl'
  for grade in ('1e999', '-1e999', '1' + '0' * 400):
    path.write_text(records.dumps(records.to_row(EXAMPLE)).replace('2.5', grade))
    with pytest.raises(ValueError, match=r"f\.jsonl:1: field 'grades'"):
      list(records.read_examples(path))


# Mutation seen to fail: writing to the path itself in place of the temporary file.
def test_a_failed_write_leaves_the_old_file(tmp_path):
  path = tmp_path / 'rows.jsonl'
  records.write_jsonl(path, [{'x': 1}])

  def rows():
    yield {'x': 2}
    raise RuntimeError('killed')

  with pytest.raises(RuntimeError):
    records.write_jsonl(path, rows())
  assert list(records.read_jsonl(path)) == [{'x': 1}]
  assert [entry.name for entry in tmp_path.iterdir()] == ['rows.jsonl']


# Mutation seen to fail: no truncation before the append.
@pytest.mark.parametrize(
  'torn', [b'', b'{"x": 0}\n', b'{"x": 0}\n{"x": 1', b'{"x', b'{"x": 0}\n' + b'y' * 200_000]
)
def test_append_cuts_off_a_torn_line(tmp_path, torn):
  path = tmp_path / 'log.jsonl'
  path.write_bytes(torn)
  records.append_jsonl(path, [{'x': 5}, {'x': 6}])
  whole = [{'x': 0}] if b'\n' in torn else []
  assert list(records.read_jsonl(path)) == [*whole, {'x': 5}, {'x': 6}]


# Mutation seen to fail: `done` that counts the temporary file of a killed write; joining in the
# order of writing.
def test_chunks_resume_to_the_same_bytes(tmp_path):
  rows = {chunk: [{'chunk': chunk, 'i': i} for i in range(chunk + 1)] for chunk in range(12)}
  straight = records.ChunkedWriter(tmp_path / 'straight.jsonl')
  for chunk in range(12):
    straight.write(chunk, rows[chunk])
  straight.finish(12)

  broken = tmp_path / 'broken.jsonl'
  first = records.ChunkedWriter(broken)
  for chunk in (10, 0, 3):
    first.write(chunk, rows[chunk])
  (first.folder / '.000004.jsonl.0000.part').write_text('{"half')
  with pytest.raises(ValueError, match=r'missing \[1, 2, 4'):
    first.finish(12)
  assert not first.finished

  second = records.ChunkedWriter(broken)
  assert second.done == {0, 3, 10}
  for chunk in set(range(12)) - second.done:
    second.write(chunk, rows[chunk])
  with pytest.raises(ValueError, match=r'unknown \[11\]'):
    second.finish(11)
  second.finish(12)
  second.finish(12)
  assert broken.read_bytes() == (tmp_path / 'straight.jsonl').read_bytes()
  assert not second.folder.exists()
  with pytest.raises(ValueError, match='is finished'):
    second.write(0, [])


def test_chunks_left_by_a_kill_after_joining_are_removed(tmp_path):
  writer = records.ChunkedWriter(tmp_path / 'a.jsonl')
  writer.write(0, [{'x': 1}])
  records.write_jsonl(writer.path, [{'x': 1}])
  assert records.ChunkedWriter(writer.path).finished and not writer.folder.exists()


@pytest.mark.parametrize(
  ('data', 'message'),
  [
    (b'{"a": 1}\n\n{"a": }\n', r'f\.jsonl:3: not valid JSON'),
    (b'{"a": 1}\n[1]\n', r'f\.jsonl:2: a row is a JSON object .* got list'),
    (b'{"a": NaN}\n', r'f\.jsonl:1: .*NaN is not JSON'),
    (b'{"a": 1}\n{"a": "\xff"}\n', r'f\.jsonl:2: not UTF-8'),
    (b'{"a": "\\ud83d"}\n', r'f\.jsonl:1: .*surrogate'),
    (gzip.compress(b'{"a": 1}\n' * 50, mtime=0)[:-12], r'f\.jsonl: damaged gzip'),
    # Seen to fail: zlib.error not caught.
    (SPOILT, r'f\.jsonl: damaged gzip file .*fetch it again'),
  ],
)
def test_a_malformed_row_names_file_and_line(tmp_path, data, message):
  path = tmp_path / 'f.jsonl'
  path.write_bytes(data)
  with pytest.raises(ValueError, match=message):
    list(records.read_jsonl(path))


# Mutation seen to fail: lines that also end at U+2028.
def test_what_a_line_is(tmp_path):
  path = tmp_path / 'f.jsonl'
  rows = [{'a': 'x\u2028y\u0085z'}, {'a': '😀'}]
  text = json.dumps(rows[0], ensure_ascii=False) + '\r\n\r\n  \n' + json.dumps(rows[1])
  path.write_bytes(b'\xef\xbb\xbf' + text.encode())
  assert list(records.read_numbered(path)) == [(1, rows[0]), (4, rows[1])]


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'schema': 'trajectory/2'}, "expected a row of schema 'trajectory/1', got 'trajectory/2'"),
    ({'scores': [7.5, 1]}, "field 'scores'"),
    ({'hinted': 1}, "field 'hinted'"),
    ({'sample': True}, "field 'sample'"),
    ({'logp': [None]}, "field 'logp'"),
    ({'extra': 1}, r"unknown: \['extra'\]"),
  ],
)
def test_a_row_of_another_kind_is_an_error(change, message):
  with pytest.raises(ValueError, match=f'^here: .*{message}'):
    records.trajectory_from_row({**records.to_row(TRAJECTORY), **change}, 'here')


def test_text_units_import_without_jax():
  data = 'sources preference stream heldout instructions hh_rlhf_builder'
  units = ['types', 'jsonl', 'records', 'benchmarks', *(f'data.{name}' for name in data.split())]
  lines = [
    'import sys',
    *(f'import spct_jax.{unit}' for unit in units),
    'sys.exit("jax" in sys.modules)',
  ]
  root = pathlib.Path(__file__).resolve().parents[1]
  done = subprocess.run([sys.executable, '-c', '\n'.join(lines)], cwd=root, check=False)
  assert done.returncode == 0
