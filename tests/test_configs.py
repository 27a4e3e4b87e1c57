"""Every config page runs in its smoke form, through the door, as it stands."""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = sorted(path.name for path in (ROOT / 'configs').glob('*.py') if path.name != '__init__.py')


@pytest.mark.parametrize('page', PAGES)
def test_smoke(page, tmp_path):
  command = [sys.executable, '-m', 'spct_jax.main', f'--config=configs/{page}:smoke', f'--workdir={tmp_path}/w']
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
  assert done.returncode == 0, done.stderr[-4000:]
  rows = json.loads((tmp_path / 'w' / 'results.json').read_text())
  keys = {
      'stage', 'benchmark', 'subset', 'n', 'temperature', 'k', 'guided', 'accuracy', 'stderr', 'items', 'parse_failure',
      'ties',
  }  # fmt: skip
  assert rows and all(keys <= row.keys() for row in rows)
  assert {row['guided'] for row in rows} == {False, 'hard', 'soft'}
  assert any(row['temperature'] == 0 and row['k'] == 1 for row in rows)
  assert '## Results' in (tmp_path / 'w' / 'report.md').read_text()
