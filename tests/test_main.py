"""The door: what the command line teaches, refuses and returns.

Most tests call `main.main` in this process with a stage of their own; a few start a real process,
for its exit code and its signals.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from spct_jax import main, stages

_ROOT = pathlib.Path(__file__).resolve().parents[1]

_PAGE = '''"""A page for tests.

More words about it.
"""

from ml_collections import ConfigDict


def get_config(arg=None):
  if arg not in (None, '', 'smoke'):
    raise ValueError(f'unknown choice {arg!r}; this config knows: smoke')
  return ConfigDict({
      'stage': 'probe', 'seed': 0, 'strict': False, 'grpo': {'kl_coef': 0.08, 'ks': (1, 2)},
      'mesh': {'data': 2, 'fsdp': 1, 'tensor': 1}, 'sharding': {'rules': ()}, 'logging': {'every': 1 if arg else 2},
      'names': ['a', 'b'],
  })
'''


@pytest.fixture
def page(tmp_path):
  path = tmp_path / 'page.py'
  path.write_text(_PAGE)
  return path


@pytest.fixture
def calls(monkeypatch):
  """The stage 'probe', which records what it is given."""
  seen = []
  monkeypatch.setitem(
    stages.RUN, 'probe', lambda config, workdir, mesh: seen.append((config, workdir, mesh))
  )
  return seen


def _run(page, tmp_path, *words, choice=''):
  return main.main([f'--config={page}{choice}', f'--workdir={tmp_path / "w"}', *words])


def test_the_stage_gets_config_workdir_and_mesh(page, tmp_path, calls, capsys):
  code = _run(
    page,
    tmp_path,
    '--config.grpo.kl_coef=0.02',
    '--config.grpo.ks=(4,8)',
    '--strict',
    choice=':smoke',
  )
  assert code == 0
  config, workdir, mesh = calls[0]
  assert (
    config.grpo.kl_coef == 0.02
    and config.grpo.ks == (4, 8)
    and config.strict
    and config.logging.every == 1
  )
  assert workdir.path == tmp_path / 'w' and dict(mesh.shape) == {'data': 2, 'fsdp': 1, 'tensor': 1}
  assert json.loads((tmp_path / 'w' / 'config.json').read_text())['grpo']['kl_coef'] == 0.02
  assert capsys.readouterr().out.startswith('devices: 2 x cpu')


# Seen to catch: the section's value set as a flag of its own, which ml_collections answers with a traceback.
def test_a_section_with_a_path_takes_the_path_itself(page, tmp_path, calls, capsys):
  page.write_text(_PAGE.replace("'names'", "'model': {'path': '', 'width': 8}, 'names'"))
  assert _run(page, tmp_path, '--config.model=/some/folder=1', '--config.model.width=4') == 0
  assert calls[0][0].model.path == '/some/folder=1' and calls[0][0].model.width == 4
  assert main.main([f'--config={page}', f'--workdir={tmp_path / "v"}', '--config.model', 'w:rft']) == 0
  assert calls[1][0].model.path == 'w:rft'
  assert _run(page, tmp_path, '--config.grpo=x') == 2 and '--config.grpo' in capsys.readouterr().err
  assert _run(page, tmp_path, '--config.model=') == 2  # seen to fail: random weights without a word
  assert 'the name of the model is empty; give a folder' in capsys.readouterr().err


def test_the_same_command_runs_again_and_another_config_does_not(page, tmp_path, calls, capsys):
  assert _run(page, tmp_path) == 0
  assert _run(page, tmp_path, '--config.mesh.data=4') == 0
  assert _run(page, tmp_path, '--config.seed=1') == 2
  assert 'seed: the workdir has 0, this run has 1' in capsys.readouterr().err
  assert len(calls) == 2


@pytest.mark.parametrize('words, message', [
    # Seen to catch: no check of the names, which leaves an AttributeError of ml_collections.
    (['--config.nope=1'], "unknown config field --config.nope: config has no 'nope'; it has grpo, logging, "),
    (['--config.grpo.kl_coeff=1'], "config.grpo has no 'kl_coeff'; it has kl_coef, ks. Did you mean 'kl_coef'?"),
    (['--config.seed.x=1'], 'config.seed is a value, not a section'),
    (['--config.seed=abc'], '--config.seed=abc'),
    (['--config.seed'], 'Missing value for flag --config.seed'),
    (['--config.stage=nope'], "'nope' is not a stage; the stages are sft, sample"),
    (['--config.mesh.data=3', '--config.mesh.fsdp=-1', '--config.mesh.tensor=-1'], 'impossible mesh'),
    (['--config.mesh.data=99'], 'impossible mesh'),
    (['--nope=1'], "Unknown command line flag 'nope'"),
    (['extra'], "unexpected 'extra'"),
    (['--process_id=0'], 'go together'),
    # Seen to catch: no check of the values, which leaves them to a late stage or to an overflow.
    (['--config.seed=-1'], 'config.seed=-1: allowed are whole numbers from 0 to 4294967295'),
    (['--config.seed=4294967296'], 'config.seed=4294967296: allowed are'),
    (['--config.seed=99999999999999999999'], 'config.seed=99999999999999999999: allowed are'),
    (['--config.grpo.kl_coef=nan'], 'config.grpo.kl_coef=nan: allowed are finite numbers'),
    (['--config.grpo.kl_coef=-inf'], 'config.grpo.kl_coef=-inf: allowed are finite numbers'),
    (['--config.grpo.ks=(1,1e999)'], 'config.grpo.ks[1]=inf: allowed are finite numbers'),
    # Seen to catch: every failure taken for one of the page.
    (['--config.grpo.ks[0]=2'], '--config.grpo.ks[0]: an item of a tuple cannot be set alone'),
    (['--config.grpo[0]=2'], '--config.grpo[0]: an item of a ConfigDict cannot be set alone'),
    (['--config.names[7]=x'], '--config.names[7]: cannot be set'),
    (['--coordinator=a:1', '--num_processes=2', '--process_id=2'], 'allowed are 0 to 1'),
])  # fmt: skip
def test_a_mistake_in_the_command_is_code_2_with_a_message_and_no_workdir(
  page, tmp_path, calls, capsys, words, message
):
  assert _run(page, tmp_path, *words) == 2
  error = capsys.readouterr().err
  assert message in error and error.startswith('error: ') and 'Traceback' not in error
  assert not calls and not (tmp_path / 'w' / 'config.json').exists()


def test_missing_flags_and_pages_are_named(page, tmp_path, capsys):
  assert main.main([]) == 2
  assert '--config is missing' in capsys.readouterr().err
  assert main.main([f'--config={page}']) == 2
  assert '--workdir is missing' in capsys.readouterr().err
  assert main.main([f'--config={tmp_path}/absent.py:smoke', '--workdir=w']) == 2
  assert f'there is no file {tmp_path}/absent.py' in capsys.readouterr().err
  assert main.main([f'--config={page}:bad', '--workdir=w']) == 2
  error = capsys.readouterr().err
  assert "unknown choice 'bad'; this config knows: smoke" in error and 'Traceback' not in error


# Seen to catch: --help that reads a page without the checks of a run.
def test_help_with_a_page_that_is_not_there(tmp_path, capsys):
  for words in (['--config', '--help'], ['--config=', '--help'], ['--help', '--config']):
    assert main.main(words) == 2
    assert capsys.readouterr().err.startswith('error: --config is missing')
  assert main.main([f'--config={tmp_path}/absent.py:smoke', '--help']) == 2
  assert f'there is no file {tmp_path}/absent.py' in capsys.readouterr().err


def test_a_workdir_below_the_home_folder(page, tmp_path, calls, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path / 'home'))
  assert main.main([f'--config={page}', '--workdir=~/w', '--config.names[0]=c']) == 0
  (config, workdir, _), = calls
  assert workdir.path == tmp_path / 'home' / 'w' and config.names == ['c', 'b']


def test_a_page_without_the_common_fields_is_refused(tmp_path, capsys):
  (tmp_path / 'page.py').write_text(
    'from ml_collections import ConfigDict\ndef get_config(arg=None):\n  return ConfigDict({"stage": "sft"})\n'
  )
  assert _run(tmp_path / 'page.py', tmp_path) == 2
  assert "has no field 'strict'" in capsys.readouterr().err


def test_a_broken_page_shows_where(tmp_path, capsys):
  (tmp_path / 'page.py').write_text('def get_config(arg=None):\n  return nonsense\n')
  assert _run(tmp_path / 'page.py', tmp_path) == 2
  error = capsys.readouterr().err
  assert 'line 2' in error and "name 'nonsense' is not defined" in error


def test_a_users_mistake_in_a_stage_is_code_2_and_leaves_the_workdir_free(
  page, tmp_path, monkeypatch, capsys
):
  # Seen to catch: not withdrawing the config, which then refuses the corrected command.
  from spct_jax import sharding

  monkeypatch.setitem(
    stages.RUN, 'probe', lambda config, workdir, mesh: sharding.make_mesh({'nope': 1})
  )
  assert _run(page, tmp_path) == 2
  assert "unknown axis 'nope'" in capsys.readouterr().err
  monkeypatch.setitem(stages.RUN, 'probe', lambda config, workdir, mesh: None)
  assert _run(page, tmp_path, '--config.seed=5') == 0


def test_a_bug_is_no_users_mistake(page, tmp_path, monkeypatch):
  # Seen to catch: every ValueError taken for a user's, which hides the place of a bug.
  import jax.numpy as jnp

  monkeypatch.setitem(stages.RUN, 'probe', lambda config, workdir, mesh: jnp.zeros(3).reshape(2, 2))
  with pytest.raises(TypeError):
    _run(page, tmp_path)
  import numpy as np

  monkeypatch.setitem(stages.RUN, 'probe', lambda config, workdir, mesh: np.zeros(3).reshape(2, 2))
  with pytest.raises(ValueError):
    _run(page, tmp_path)


def test_help_teaches_and_shows_a_pages_own_words(page, capsys, monkeypatch):
  monkeypatch.chdir(_ROOT)
  assert main.main(['--help']) == 0
  text = capsys.readouterr().out
  for words in (
    '--config=',
    '--workdir=',
    '--strict',
    'Resume:',
    'Exit codes:',
    '--coordinator',
    *stages.RUN,
  ):
    assert words in text
  for config in sorted((_ROOT / 'configs').glob('*.py')):
    assert f'configs/{config.name}' in text
  assert main.main([f'--config={page}:smoke', '--help']) == 0
  text = capsys.readouterr().out
  assert 'More words about it.' in text and 'kl_coef: 0.08' in text


def _process(*words, cwd=_ROOT, **more):
  environment = {
    **os.environ,
    'PYTHONPATH': str(_ROOT),
    'JAX_PLATFORMS': 'cpu',
    'JAX_NUM_CPU_DEVICES': '2',
  }
  return subprocess.Popen(
    [sys.executable, *words],
    cwd=cwd,
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    **more,
  )


def test_help_and_mistakes_end_a_real_process_before_jax_is_loaded(page, tmp_path):
  # Seen to catch: a module-level import of jax in main (the assertion on sys.modules).
  probe = (
    'import sys; from spct_jax import main; codes = [main.main(["--help"]), '
    f'main.main(["--config={page}", "--workdir={tmp_path}/w", "--config.nope=1"]), '
    f'main.main(["--config={page}", "--workdir={tmp_path}/w", "--config.seed=-1"])]; '
    'assert "jax" not in sys.modules and codes == [0, 2, 2], codes; sys.exit(codes[1])'
  )
  process = _process('-c', probe)
  _, error = process.communicate(timeout=60)
  assert process.returncode == 2, error
  process = _process(
    '-m', 'spct_jax.main', f'--config={page}', f'--workdir={tmp_path}/w', '--config.nope=1'
  )
  _, error = process.communicate(timeout=60)
  assert process.returncode == 2 and 'unknown config field' in error and 'Traceback' not in error


# Mutations seen to fail: the user's own number overruled; flags of XLA replaced; threads left on.
@pytest.mark.parametrize(
  ('count', 'environment', 'devices', 'flags'),
  [
    (2, {}, 2, '--xla_cpu_multi_thread_eigen=false'),
    (0, {}, 1, ''),
    (2, {'JAX_NUM_CPU_DEVICES': '3'}, 3, ''),
    (2, {'XLA_FLAGS': '--xla_force_host_platform_device_count=4'}, 4, '--xla_force_host_platform_device_count=4'),
    (
      3,
      {'XLA_FLAGS': '--xla_cpu_enable_fast_math=false'},
      3,
      '--xla_cpu_enable_fast_math=false --xla_cpu_multi_thread_eigen=false',
    ),
  ],
)
def test_a_page_divides_the_cpu_unless_the_user_did(count, environment, devices, flags):
  code = (
    'import os, jax; from spct_jax import main; '
    f'main._divide_cpu(jax, {count}); print(jax.device_count(), os.environ.get("XLA_FLAGS", ""), sep="|")'
  )
  kept = {
    name: value for name, value in os.environ.items() if name not in ('JAX_NUM_CPU_DEVICES', 'XLA_FLAGS')
  }
  told = subprocess.run(
    [sys.executable, '-c', code],
    cwd=_ROOT,
    env=kept | {'JAX_PLATFORMS': 'cpu'} | environment,
    capture_output=True,
    text=True,
    check=True,
  )
  assert told.stdout.strip() == f'{devices}|{flags}'.strip()


@pytest.mark.parametrize('devices', [-1, 'two'])
def test_a_number_of_cpu_devices_that_is_none_is_refused(page, tmp_path, capsys, devices):
  page.write_text(page.read_text().replace("'stage': 'probe',", f"'stage': 'probe', 'cpu_devices': {devices!r},"))
  assert main.main([f'--config={page}', f'--workdir={tmp_path}/w']) == 2
  assert f'config.cpu_devices={devices}: allowed are whole numbers' in capsys.readouterr().err


_SLEEPER = """
import sys, time
from spct_jax import main, stages
def probe(config, workdir, mesh):
  (workdir.path / 'started').write_text('x')
  try:
    time.sleep(60)
  except Exception:
    print('swallowed')
stages.RUN['probe'] = probe
main._leave(main.main(sys.argv[1:]))
"""


@pytest.mark.parametrize('number, code', [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_says_how_to_go_on(page, tmp_path, number, code):
  # Seen to catch: a stop that is an Exception, which a stage's own handler swallows.
  process = _process('-c', _SLEEPER, f'--config={page}', f'--workdir={tmp_path / "w"}')
  for _ in range(600):
    if (tmp_path / 'w' / 'started').exists():
      break
    time.sleep(0.1)
  process.send_signal(number)
  out, error = process.communicate(timeout=60)
  assert process.returncode == code, error
  assert (
    'the same command continues' in error
    and signal.Signals(number).name in error
    and 'Traceback' not in error
    and 'swallowed' not in out
  )
