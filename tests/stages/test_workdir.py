"""A workdir: whose it is, what counts as done, what a resumed log holds, and who may write."""

import json
import math
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest
from ml_collections import ConfigDict

from spct_jax.stages import logbook, processes, workdir


def _config(**changes):
  config = ConfigDict(
    {
      'stage': 'sft',
      'seed': 0,
      'strict': False,
      'grpo': {'kl_coef': 0.08, 'ks': (1, 2)},
      'mesh': {'data': -1},
      'logging': {'every': 1},
      'sharding': {'rules': (('a', (None, 'fsdp')),)},
    }
  )
  for name, value in changes.items():
    with config.unlocked():
      config.update_from_flattened_dict({name.replace('__', '.'): value})
  return config


def _done(folder, stage='sft', reads=('in.jsonl',), writes=(), config=None):
  with workdir.open_workdir(folder, config or _config()) as opened:
    opened.start(stage, config or _config(), reads)
    opened.mark_done(stage, config or _config(), reads, writes)


def test_first_use_writes_the_whole_config_and_reopening_accepts_it(tmp_path):
  workdir.open_workdir(tmp_path / 'w', _config()).close()
  stored = json.loads((tmp_path / 'w' / 'config.json').read_text())
  assert stored['grpo'] == {'kl_coef': 0.08, 'ks': [1, 2]}
  assert stored['mesh'] == {'data': -1}
  workdir.open_workdir(tmp_path / 'w', _config()).close()


def test_another_semantic_config_is_refused_with_every_field_and_both_values(tmp_path):
  # Seen to catch: comparing only the fields that both have; keeping the lock after refusing.
  workdir.open_workdir(tmp_path, _config()).close()
  other = _config(grpo__kl_coef=0.02, seed=1)
  with other.unlocked():
    other.extra = 'new'
  with pytest.raises(ValueError) as error:
    workdir.open_workdir(tmp_path, other)
  message = str(error.value)
  assert 'differs in 3 fields' in message
  assert 'grpo.kl_coef: the workdir has 0.08, this run has 0.02' in message
  assert 'seed: the workdir has 0, this run has 1' in message
  assert 'extra: the workdir has (absent), this run has "new"' in message
  assert 'new --workdir' in message and 'restore' in message
  workdir.open_workdir(tmp_path, _config()).close()  # the refusal let go of the lock


def test_mesh_sharding_logging_stage_and_strict_may_differ(tmp_path):
  # Seen to catch: removing 'mesh' from NOT_SEMANTIC.
  workdir.open_workdir(tmp_path, _config()).close()
  other = _config(mesh__data=4, logging__every=9, stage='grpo', strict=True, sharding__rules=())
  workdir.open_workdir(tmp_path, other).close()
  assert workdir.semantic(other) == workdir.semantic(_config())


def test_two_runs_at_once_are_refused_and_the_lock_ends_with_its_holder(tmp_path):
  # Seen to catch: a shared lock instead of an exclusive one.
  with workdir.open_workdir(tmp_path, _config()):
    with pytest.raises(ValueError, match=r'in use by another run \(process \d+'):
      workdir.open_workdir(tmp_path, _config())
  workdir.open_workdir(tmp_path, _config()).close()


def test_a_file_is_no_workdir_and_a_broken_config_is_named(tmp_path):
  (tmp_path / 'file').write_text('x')
  with pytest.raises(ValueError, match='is a file'):
    workdir.open_workdir(tmp_path / 'file', _config())
  (tmp_path / 'config.json').write_text('{"seed": ')
  with pytest.raises(ValueError, match='config.json is not JSON'):
    workdir.open_workdir(tmp_path, _config())


def test_a_config_that_json_cannot_hold_is_refused():
  with pytest.raises(ValueError, match='of type function'):
    workdir.plain({'a': {'b': lambda: 0}})


def test_done_means_same_config_same_content_and_files_still_there(tmp_path):
  # Seen to catch: hashing names instead of content; ignoring `writes`; dropping the config's
  # digest.
  (tmp_path / 'in.jsonl').write_text('one')
  (tmp_path / 'out.jsonl').write_text('result')
  _done(tmp_path, writes=('out.jsonl',))
  with workdir.open_workdir(tmp_path, _config()) as opened:
    assert opened.is_done('sft', _config(), ('in.jsonl',))
    assert not opened.is_done('rft', _config(), ('in.jsonl',))
    assert not opened.is_done('sft', _config(seed=1), ('in.jsonl',))
    assert not opened.is_done('sft', _config(), ('in.jsonl', 'more.jsonl'))
    assert opened.is_done('sft', _config(mesh__data=8), ('in.jsonl',))
    (tmp_path / 'in.jsonl').write_text('two')
    assert not opened.is_done('sft', _config(), ('in.jsonl',))
    (tmp_path / 'in.jsonl').write_text('one')
    assert opened.is_done('sft', _config(), ('in.jsonl',))
    (tmp_path / 'out.jsonl').unlink()
    assert not opened.is_done('sft', _config(), ('in.jsonl',))
  record = json.loads((tmp_path / 'sft' / 'DONE.json').read_text())
  assert {'fingerprint', 'commit', 'version', 'writes'} <= record.keys()


def test_names_stand_for_carried_files_or_for_themselves(tmp_path):
  with workdir.open_workdir(tmp_path, _config()) as opened:
    inputs = opened.fingerprint(_config(), ('builtin:preferences', 'tfds:x:train'))['inputs']
    assert len(inputs['builtin:preferences']) == 64 and inputs['tfds:x:train'] == 'by name'
    assert opened.fingerprint(_config(), ('absent.jsonl',)) is None


# Seen to catch: 'made:' and 'package:' by their names alone; the file's own path in the fingerprint.
def test_made_and_package_names_stand_for_contents_wherever_they_are_installed(tmp_path, monkeypatch):
  made, carried = 'made:fingerprinted:rows?count=3', 'package:fingerprinted_files/rows.jsonl'

  def install(name, source, rows):
    folder = tmp_path / name / 'fingerprinted_files'
    folder.mkdir(parents=True)
    (folder / '__init__.py').write_text('')
    (folder / 'rows.jsonl').write_text(rows)
    (tmp_path / name / 'fingerprinted.py').write_text(source)
    for module in ('fingerprinted', 'fingerprinted_files'):
      sys.modules.pop(module, None)
    with monkeypatch.context() as patch:
      patch.syspath_prepend(tmp_path / name)
      with workdir.open_workdir(tmp_path / 'w', _config()) as opened:
        assert not opened.missing((made, carried))
        return opened.fingerprint(_config(), (made, carried))['inputs']

  first = install('here', 'def rows(count): yield {}', '{}')
  assert list(first) == [made, carried] and all(len(digest) == 64 for digest in first.values())
  assert install('there', 'def rows(count): yield {}', '{}') == first
  changed = install('changed', 'def rows(count): yield {0: 0}', '{"a": 1}')
  assert changed[made] != first[made] and changed[carried] != first[carried]
  for module in ('fingerprinted', 'fingerprinted_files'):
    sys.modules.pop(module, None)
  with workdir.open_workdir(tmp_path / 'w', _config()) as opened:
    with pytest.raises(ValueError, match="no module 'fingerprinted'"):
      opened.start('sft', _config(), (made,))


def test_bytecode_beside_carried_files_is_not_hashed(tmp_path):
  # Seen to catch: caches of bytecode in the hash of a folder.
  (tmp_path / 'model').mkdir()
  (tmp_path / 'model' / 'a').write_text('x')
  _done(tmp_path, reads=('model',))
  (tmp_path / 'model' / '__pycache__').mkdir()
  (tmp_path / 'model' / '__pycache__' / 'a.pyc').write_text('y')
  with workdir.open_workdir(tmp_path, _config()) as opened:
    assert opened.is_done('sft', _config(), ('model',))


def test_a_folder_is_hashed_with_the_names_and_contents_of_its_files(tmp_path):
  folder = tmp_path / 'model'
  (folder / 'sub').mkdir(parents=True)
  (folder / 'sub' / 'a').write_text('x')
  _done(tmp_path, reads=('model',))
  with workdir.open_workdir(tmp_path, _config()) as opened:
    assert opened.is_done('sft', _config(), ('model',))
    (folder / 'sub' / 'a').rename(folder / 'sub' / 'b')
    assert not opened.is_done('sft', _config(), ('model',))


def test_start_keeps_work_of_the_same_inputs_and_puts_other_work_aside(tmp_path):
  # Seen to catch: resuming regardless of the inputs (no rename); deleting instead of putting aside.
  (tmp_path / 'in.jsonl').write_text('one')
  with workdir.open_workdir(tmp_path, _config()) as opened:
    folder = opened.start('sft', _config(), ('in.jsonl',))
    (folder / 'checkpoint').write_text('of one')
    assert (opened.start('sft', _config(), ('in.jsonl',)) / 'checkpoint').exists()
    (tmp_path / 'in.jsonl').write_text('two')
    assert not (opened.start('sft', _config(), ('in.jsonl',)) / 'checkpoint').exists()
    assert (tmp_path / 'sft.old1' / 'checkpoint').read_text() == 'of one'
    with pytest.raises(ValueError, match='reads absent.jsonl, which does not exist'):
      opened.start('rft', _config(), ('in.jsonl', 'absent.jsonl', 'builtin:preferences'))
    assert not (tmp_path / 'rft').exists()


def test_inputs_that_change_while_a_stage_runs_make_it_not_done(tmp_path):
  # Seen to catch: hashing the inputs anew in mark_done.
  (tmp_path / 'in.jsonl').write_text('one')
  with workdir.open_workdir(tmp_path, _config()) as opened:
    opened.start('sft', _config(), ('in.jsonl',))
    (tmp_path / 'in.jsonl').write_text('two')
    opened.mark_done('sft', _config(), ('in.jsonl',))
    assert not opened.is_done('sft', _config(), ('in.jsonl',))


def test_starting_again_is_not_done_until_it_ends(tmp_path):
  (tmp_path / 'in.jsonl').write_text('one')
  _done(tmp_path)
  with workdir.open_workdir(tmp_path, _config()) as opened:
    opened.start('sft', _config(), ('in.jsonl',))
    assert not opened.is_done('sft', _config(), ('in.jsonl',))


def test_withdraw_frees_a_workdir_on_which_nothing_was_done(tmp_path):
  with workdir.open_workdir(tmp_path, _config()) as opened:
    opened.start('sft', _config(), ())
    opened.withdraw()
  with workdir.open_workdir(tmp_path, _config(seed=7)) as opened:  # the corrected config is welcome
    (opened.start('sft', _config(), ()) / 'work').write_text('x')
    opened.withdraw()
  with pytest.raises(ValueError, match='belongs to another config'):
    workdir.open_workdir(tmp_path, _config(seed=8))


def _rows(folder, stage, steps, *, after=None):
  with (
    workdir.open_workdir(folder, _config()) as opened,
    workdir.MetricsWriter(opened, stage, tensorboard=False) as writer,
  ):
    if after is not None:
      writer.truncate(after)
    for step in steps:
      writer.write(
        step, {'loss': np.float32(1 / (step + 1)), 'counts': np.arange(2)}, {'seconds': 0.5 * step}
      )


def test_a_resumed_log_equals_the_uninterrupted_one_byte_for_byte(tmp_path):
  # Seen to catch: `step < after_step`; dropping other stages' rows; not repairing the half-written
  # line.
  whole, killed = tmp_path / 'whole', tmp_path / 'killed'
  for folder in (whole, killed):
    _rows(folder, 'sft', range(3))
  _rows(whole, 'grpo', range(6))
  _rows(killed, 'grpo', range(5))
  with open(killed / 'metrics.jsonl', 'a') as file:
    file.write('{"stage": "grpo", "st')
  _rows(killed, 'grpo', range(2, 6), after=1)
  assert (killed / 'metrics.jsonl').read_bytes() == (whole / 'metrics.jsonl').read_bytes()
  rows = workdir.read_rows(killed / 'metrics.jsonl')
  assert [(row['stage'], row['step']) for row in rows] == [('sft', i) for i in range(3)] + [
    ('grpo', i) for i in range(6)
  ]
  assert rows[-1]['counts'] == [0, 1] and isinstance(rows[-1]['step'], int)
  assert len(workdir.read_rows(killed / 'timing.jsonl')) == 9


def test_a_last_row_without_its_newline_is_kept(tmp_path):
  _rows(tmp_path, 'sft', range(2))
  path = tmp_path / 'metrics.jsonl'
  path.write_bytes(path.read_bytes().removesuffix(b'\n'))
  _rows(tmp_path, 'sft', range(2, 3))
  assert [row['step'] for row in workdir.read_rows(path)] == [0, 1, 2]


def test_a_broken_row_is_named_by_file_and_line(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text('{"stage": "a", "step": 0}\nnonsense\n')
  with pytest.raises(ValueError, match=r'metrics\.jsonl:2: '):
    workdir.read_rows(path)
  assert workdir.read_rows(tmp_path / 'absent.jsonl') == []


def test_numbers_as_json_holds_them():
  assert logbook.number(np.float32(0.5)) == 0.5
  assert logbook.number(math.nan) is None and logbook.number(np.float64('inf')) is None
  assert logbook.number([1.0, math.nan]) == [1.0, None]
  assert logbook.number(np.int32(3)) == 3 and logbook.number(None) is None


def test_tensorboard_gets_the_scalars(tmp_path):
  with (
    workdir.open_workdir(tmp_path, _config()) as opened,
    workdir.MetricsWriter(opened, 'sft') as writer,
  ):
    writer.write(0, {'loss': 1.0, 'counts': [1, 2]}, {'seconds': 2.0})
  assert any(path.stat().st_size for path in (tmp_path / 'tensorboard' / 'sft').iterdir())


def test_a_failed_write_leaves_the_old_file(tmp_path):
  path = tmp_path / 'x.json'
  processes.write_text(path, 'old')
  with pytest.raises(UnicodeEncodeError):
    processes.write_text(path, 'n\udc80ew')
  assert path.read_text() == 'old'


_TWO = """
import sys
import jax
from spct_jax.stages import workdir
rank, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.distributed.initialize(f'localhost:{port}', 2, rank)
opened = workdir.open_workdir(folder, {'seed': 0})
try:
  opened.start('sft', {'seed': 0}, ('absent',))
except ValueError as error:
  print('refused:', error)
with workdir.MetricsWriter(opened, 'sft', tensorboard=False) as writer:
  writer.write(0, {'loss': 1.0}, {})
opened.start('sft', {'seed': 0}, ())
opened.mark_done('sft', {'seed': 0}, ())
print('done:', opened.is_done('sft', {'seed': 0}, ()), 'locked:', opened.lock is not None)
"""


def test_two_processes_one_writes_and_both_hear_of_it(tmp_path):
  # Seen to catch: rows written by every process; process 0 raising before the broadcast.
  (tmp_path / 'two.py').write_text(_TWO)
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = str(free.getsockname()[1])
  folder = tmp_path / 'w'
  root = pathlib.Path(__file__).resolve().parents[2]
  run = [sys.executable, str(tmp_path / 'two.py')]
  two = [
    subprocess.Popen(
      [*run, str(rank), port, str(folder)],
      cwd=root,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      env=_environment(root),
    )
    for rank in range(2)
  ]
  outputs = [process.communicate(timeout=120) for process in two]
  assert [process.returncode for process in two] == [0, 0], outputs
  assert (
    "refused: stage 'sft' reads absent" in outputs[0][0]
    and 'done: True locked: True' in outputs[0][0]
  )
  assert (
    "refused: process 0 stopped at 'start sft'" in outputs[1][0]
    and 'done: True locked: False' in outputs[1][0]
  )
  assert len(workdir.read_rows(folder / 'metrics.jsonl')) == 1


def _environment(root):
  return {**os.environ, 'PYTHONPATH': str(root), 'JAX_PLATFORMS': 'cpu'}


def test_what_nobody_computes_with_is_not_hashed(tmp_path):
  folder = tmp_path / '.cache' / 'model'  # hidden itself, which does not matter
  (folder / '.git').mkdir(parents=True)
  (folder / 'model.safetensors').write_bytes(b'1')
  before = workdir.content(folder)
  for name in ('README.md', 'LICENSE', 'License.txt', '.git/HEAD', '.gitattributes'):
    (folder / name).write_text('x')
  assert workdir.content(folder) == before
  (folder / 'readme_data.jsonl').write_text('x')
  assert workdir.content(folder) != before
