"""experiments/bench_sampling.py runs from end to end on the smallest work; its numbers mean nothing there."""

import json
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).resolve().parents[1] / 'experiments' / 'bench_sampling.py'


@pytest.mark.slow
def test_three_bars_run_and_are_written(tmp_path):
  out = tmp_path / 'rows.json'
  flags = ['--tiny', '--repeats=1', '--bars=memory,share,meta', f'--json={out}']
  ran = subprocess.run([sys.executable, str(SCRIPT), *flags], capture_output=True, text=True, timeout=600)
  assert ran.returncode == 0, ran.stderr[-2000:]
  rows = json.loads(out.read_text())
  assert {row['name'].split(':')[0] for row in rows} == {'memory', 'share', 'meta'}
  assert all(set(row) == {'name', 'value', 'unit', 'higher_is_better', 'goal', 'floor'} for row in rows)
  assert all(row['value'] > 0 for row in rows)
  assert 0 < next(row['value'] for row in rows if row['name'].startswith('share: useful of the rows paid')) <= 1


def test_an_unknown_bar_is_named():
  ran = subprocess.run([sys.executable, str(SCRIPT), '--bars=mid,nought'], capture_output=True, text=True, timeout=60)
  assert ran.returncode and 'nought' in ran.stderr
