"""What `pip install .` takes along: every package, and every file that is no Python code."""

import configparser
import fnmatch
import pathlib

_ROOT = pathlib.Path(__file__).resolve().parents[1]


def _package_data():
  parser = configparser.ConfigParser()
  parser.optionxform = str
  parser.read(_ROOT / 'setup.cfg', encoding='utf-8')
  return {name: patterns.split() for name, patterns in parser['options.package_data'].items()}


def test_every_carried_file_is_package_data():
  # Seen to catch: 'files/*' for text, which leaves out text/files/small/tokenizer.json.
  patterns = [
    f'{package.replace(".", "/")}/{pattern}'
    for package, found in _package_data().items()
    for pattern in found
  ]
  carried = [
    path.relative_to(_ROOT).as_posix()
    for path in sorted((_ROOT / 'spct_jax').rglob('*'))
    if path.is_file() and path.suffix not in ('.py', '.pyc')
  ]
  assert carried
  # Unlike a shell's, a star of fnmatch crosses '/'; the depth is compared as well.
  lost = [
    name
    for name in carried
    if not any(fnmatch.fnmatch(name, p) and name.count('/') == p.count('/') for p in patterns)
  ]
  assert not lost, f'not in [options.package_data] of setup.cfg: {lost}'


def test_every_folder_of_code_is_a_package():
  folders = {path.parent for path in (_ROOT / 'spct_jax').rglob('*.py')}
  bare = [
    str(folder.relative_to(_ROOT))
    for folder in sorted(folders)
    if not (folder / '__init__.py').exists()
  ]
  assert not bare, f'without __init__.py, `find:` leaves out {bare}'
