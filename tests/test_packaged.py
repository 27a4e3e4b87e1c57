"""Files of an importable package, by a name that does not say where it is installed."""

import pathlib

import pytest

from spct_jax import packaged


@pytest.fixture
def package(tmp_path, monkeypatch):
  """An installed package `carrier` with a file, a plain module beside it, and a folder without code."""
  (tmp_path / 'carrier' / 'files').mkdir(parents=True)
  (tmp_path / 'carrier' / '__init__.py').write_text('')
  (tmp_path / 'carrier' / 'files' / 'rows.jsonl').write_text('{}\n')
  (tmp_path / 'carrier_module.py').write_text('')
  (tmp_path / 'carrier_bare').mkdir()
  (tmp_path / 'carrier_needs.py').write_text('import no_such_thing_at_all\n')
  monkeypatch.syspath_prepend(tmp_path)
  return tmp_path / 'carrier'


def test_a_name_finds_a_file_and_a_folder(package):
  assert packaged.resolve('package:carrier/files/rows.jsonl') == package / 'files' / 'rows.jsonl'
  assert packaged.resolve('package:carrier/files') == package / 'files'
  nested = packaged.resolve('package:spct_jax.text/files/small')
  assert nested == packaged.resolve('package:spct_jax/text/files/small')
  assert (nested / 'tokenizer.json').is_file()


# Mutation seen to fail: `locate` that takes every name for a path.
def test_any_other_name_is_a_path():
  carried = 'package:spct_jax.text/files/small'
  assert packaged.locate(carried) == packaged.resolve(carried)
  for name in ('spct_jax.text/files/small', pathlib.Path('spct_jax.text/files/small')):
    assert packaged.locate(name) == pathlib.Path(name)


# Mutation seen to fail: no check of '..', which leaves the package.
@pytest.mark.parametrize(
  ('name', 'message'),
  [
    ('package:', 'expected package:MODULE/folder'),
    ('package:carrier', 'expected package:MODULE/folder'),
    ('package:carrier/', 'expected package:MODULE/folder'),
    ('package:/carrier', 'expected package:MODULE/folder'),
    ('package:carrier//etc/hostname', 'expected package:MODULE/folder'),
    ('package:carrier/../carrier_module.py', 'expected package:MODULE/folder'),
    ('package:no_such_thing_at_all/a', "cannot import 'no_such_thing_at_all'.*install the package"),
    ('package:carrier_needs/a', "cannot import 'carrier_needs' .No module named 'no_such_thing"),
    ('package:.carrier/a', "cannot import '.carrier'"),
    ('package:carrier_module/a', 'is a module and no package'),
    ('package:carrier_bare/a', 'in several folders'),
    ('package:carrier/file', "holds no 'file': did you mean 'files'"),
    ('package:carrier/files/xyz', "files holds no 'xyz'; it holds: rows.jsonl"),
    ('package:carrier/files/rows.jsonl/x', "holds no 'x'; it holds: none"),
  ],
)
def test_what_is_wrong_is_said(package, name, message):
  with pytest.raises(ValueError, match=message):
    packaged.resolve(name)
