"""The program as users run it: one process, two processes, and one that is killed, all end in the same files.
"""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
SMALL = [
    '--config=configs/spct_small.py:smoke',
    '--config.data.limit=12',
    '--config.data.eval_limit=3',
    "--config.judge.buckets=(256,)",
    '--config.judge.max_new_tokens=8',
    "--config.pipeline.stages=('sample','rft','grpo','meta_rm','evaluate')",
    '--config.sample.model=base',
    '--config.rft.init=base',
    '--config.rft.steps=2',
    '--config.meta_rm.steps=2',
    # Adam divides by the gradient's own size, so float noise in a gradient near 0 moves a parameter by up to lr.
    '--config.rft.lr=1e-5',
    '--config.grpo.lr=1e-5',
    '--config.meta_rm.lr=1e-5',
    "--config.rft.buckets=(512,)",
    "--config.grpo.buckets=(264,)",
    "--config.meta_rm.buckets=(264,)",
    "--config.evaluate.models=('base','grpo')",
    "--config.logging.tensorboard=False",
]
FILES = (
    'sample/trajectories.jsonl', 'sample/hinted.jsonl', 'meta_rm/trajectories.jsonl', 'evaluate/base.jsonl',
    'evaluate/grpo.jsonl',
)  # fmt: skip


def start(workdir, *more, devices):
  env = {**os.environ, 'JAX_NUM_CPU_DEVICES': str(devices), 'JAX_PLATFORMS': 'cpu', 'PYTHONUNBUFFERED': '1'}
  return subprocess.Popen(
      [sys.executable, '-m', 'spct_jax.main', *SMALL, f'--workdir={workdir}', *more],
      cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
  )


def finish(*processes):
  outputs = [process.communicate(timeout=420)[0] for process in processes]
  for process, output in zip(processes, outputs):
    assert process.returncode == 0, output[-4000:]
  return outputs


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """One process with one device, uninterrupted."""
  workdir = tmp_path_factory.mktemp('whole') / 'w'
  (output,) = finish(start(workdir, devices=1))
  assert output.index('mesh:') < output.index('memory per device') < output.index('--- 1/5 sample')
  return workdir


def rows(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def assert_same_run(found, whole):
  """The same prompts and tokens; log-probabilities and metrics equal up to float order.

  Before any training every token is equal. A model that was trained on another mesh differs by float noise, so a
  draw may fall on the other side of a tie now and then.
  """
  for name in FILES:
    ours, theirs = rows(found / name), rows(whole / name)
    assert len(ours) == len(theirs) > 0
    same = 0
    for a, b in zip(ours, theirs):
      for field in ('uid', 'sample', 'order', 'prompt_ids'):
        assert a[field] == b[field], (name, a['uid'], field)
      if a['token_ids'] == b['token_ids']:
        same += 1
        assert (a['text'], a['parse']) == (b['text'], b['parse'])
        np.testing.assert_allclose(a['logp'], b['logp'], atol=1e-3)
    untrained = name.startswith('sample') or 'base' in name
    assert same >= len(ours) * (1 if untrained else 0.9), (name, same, len(ours))
  for a, b in zip(rows(found / 'metrics.jsonl'), rows(whole / 'metrics.jsonl'), strict=True):
    assert a.keys() == b.keys() and (a['stage'], a['step']) == (b['stage'], b['step'])
    for name in ('loss', 'grad_norm', 'param_norm', 'learning_rate', 'reward', 'entropy', 'parse_failure'):
      if name in a:
        assert a[name] == pytest.approx(b[name], rel=5e-3, abs=1e-4), (a['stage'], a['step'], name)
  ours, theirs = (json.loads((path / 'results.json').read_text()) for path in (found, whole))
  assert ours == theirs and len(ours) > 10


@pytest.mark.slow
def test_two_processes_end_where_one_does(whole, tmp_path):
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  mesh = ['--config.mesh.data=2', '--config.mesh.fsdp=2', '--config.mesh.tensor=1']
  finish(*(
      start(
          tmp_path / 'w', *mesh, f'--coordinator=127.0.0.1:{port}', '--num_processes=2', f'--process_id={i}',
          devices=2,
      )
      for i in range(2)
  ))
  assert_same_run(tmp_path / 'w', whole)


@pytest.mark.slow
def test_eight_devices_end_where_one_does(whole, tmp_path):
  mesh = ['--config.mesh.data=2', '--config.mesh.fsdp=2', '--config.mesh.tensor=2']
  finish(start(tmp_path / 'w', *mesh, devices=8))
  assert_same_run(tmp_path / 'w', whole)


@pytest.mark.slow
def test_killed_twice_and_started_again(whole, tmp_path):
  """SIGKILL when the first chunks are there, and when GRPO has a checkpoint; then the same command finishes."""
  workdir = tmp_path / 'w'
  for sign in ('sample/*.chunks/*.jsonl', 'grpo/checkpoint/1'):
    process = start(workdir, devices=1)
    deadline = time.monotonic() + 300
    while process.poll() is None and not list(workdir.glob(sign)) and time.monotonic() < deadline:
      time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
  finish(start(workdir, devices=1))
  for name in (*FILES, 'metrics.jsonl', 'results.json', 'evaluate/examples.jsonl'):
    assert (workdir / name).read_bytes() == (whole / name).read_bytes(), name
