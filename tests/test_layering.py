"""Imports point down the stack: a unit imports only from strictly lower ranks, or from its own folder.

Mutation seen to fail: `from spct_jax.judges import grm` in train/update.py.
"""

import ast
import pathlib
import subprocess
import sys

import pytest

import spct_jax

ROOT = pathlib.Path(spct_jax.__file__).parent
RANKS = {
    'types': 0, 'masked': 0, 'jsonl': 0, 'choices': 0, 'pages': 0, 'packaged': 0,
    'text': 1, 'algos': 1, 'sharding': 1, 'records': 1,
    'models': 2, 'data': 2,
    'sampling': 3, 'benchmarks': 3,
    'judges': 4, 'train': 4,
    'stages': 5,
    'main': 6, 'api': 6,
}  # fmt: skip
# Modules that must stay usable where JAX is slow to import or absent.
LIGHT = (
    'spct_jax', 'spct_jax.types', 'spct_jax.records', 'spct_jax.choices', 'spct_jax.pages', 'spct_jax.packaged',
    'spct_jax.data.preference', 'spct_jax.data.sources', 'spct_jax.data.stream', 'spct_jax.data.instructions',
    'spct_jax.benchmarks',
    'spct_jax.text.markers', 'spct_jax.text.chat', 'spct_jax.judges.prompts', 'spct_jax.judges.parse',
)  # fmt: skip


def unit(path: pathlib.Path) -> str:
  return path.relative_to(ROOT).parts[0].removesuffix('.py')


def imported(path: pathlib.Path) -> set[str]:
  """Units of the package that a file imports, wherever in the file it does."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and node.module and node.module.split('.')[0] == 'spct_jax':
      rest = node.module.split('.')[1:]
      found.update([rest[0]] if rest else [alias.name for alias in node.names])
    elif isinstance(node, ast.Import):
      found.update(a.name.split('.')[1] for a in node.names if a.name.startswith('spct_jax.'))
  return found


FILES = sorted(p for p in ROOT.rglob('*.py') if unit(p) not in ('testing', '__init__'))


@pytest.mark.parametrize('path', FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
  mine = unit(path)
  for other in imported(path) - {mine}:
    assert other in RANKS, f'{path.relative_to(ROOT)} imports {other!r}, which has no rank'
    assert RANKS[other] < RANKS[mine], f'{path.relative_to(ROOT)} (rank {RANKS[mine]}) imports {other!r}'


def test_nothing_in_the_product_imports_the_test_stand_ins():
  for path in FILES:
    assert 'testing' not in imported(path), path


def test_light_modules_do_not_import_jax():
  code = 'import sys\n' + '\n'.join(f'import {name}\nassert "jax" not in sys.modules, "{name}"' for name in LIGHT)
  subprocess.run([sys.executable, '-c', code], check=True)


# Mutation seen to fail: the word in a comment of a stage.
def test_only_the_world_and_its_page_know_the_world():
  """What works in the practice world works because of its data, never because a module knows where it is."""
  known = {ROOT / 'data' / 'practice.py', ROOT.parent / 'configs' / 'quickstart.py'}
  searched = [p for p in (*ROOT.rglob('*'), *(ROOT.parent / 'configs').rglob('*')) if p.is_file() and p.suffix != '.pyc']
  carried = ROOT / 'data' / 'files' / 'practice'
  assert known < set(searched) and len(searched) > 80
  for path in set(searched) - known:
    assert 'practice' not in path.read_text(encoding='utf-8').lower(), path
    assert carried in path.parents or 'practice' not in str(path.relative_to(ROOT.parent)).lower(), path
