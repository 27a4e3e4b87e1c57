"""Self-Principled Critique Tuning: one command for every stage and for all of them.

Run it:

  python -m spct_jax.main --config=configs/spct_small.py:smoke --workdir=/tmp/smoke
  python -m spct_jax.main --config=configs/spct_small.py --workdir=/tmp/spct --config.seed=1
  python -m spct_jax.main --config=configs/spct_small.py --workdir=/tmp/spct --config.stage=sft
  python -m spct_jax.main --config=configs/convert.py:do=inspect --config.model=FOLDER

  --config=PAGE.py[:CHOICES]  the page of numbers; a choice moves several fields at once
  --config.FIELD=VALUE        sets one field: --config.seed=3, --config.evaluate.ks='(1,8)'
  --config.model=FOLDER       the same as --config.model.path=FOLDER, and so for tokenizer, data and
                              every other section with a field path
  --workdir=FOLDER            where everything is written
  --strict                    an unusable item is an error, not a counted and named skip
  --help                      this text; with --config=PAGE.py, that page's own text and fields

Wherever a stage takes a model (config.model.path, and sft.init, sample.model, rft.init, grpo.init,
grpo.reference, meta_rm.init, meta_rm.policy, evaluate.models, evaluate.meta), it may be a Hugging Face
folder, a PEFT folder, or WORKDIR:STAGE, what a stage of another workdir trained; all but the first
also take base (config.model) and the name of a stage of this workdir.

Resume: start the same command again. A workdir belongs to one config: finished stages are skipped,
an unfinished one continues from its last checkpoint, and a finished stage whose inputs changed runs
again. Fields under mesh, sharding and logging may differ, and cpu_devices, so a run may continue on
other devices.

Several processes: start the same command in each, with

  --coordinator=HOST:PORT --num_processes=N --process_id=I   on any cluster, or
  --distributed                                              where JAX knows it: TPU pods, Slurm

The workdir must be a folder that all of them see. JAX_NUM_CPU_DEVICES=8 in the environment gives a
process 8 CPU devices to try a mesh on; a page's own number of them is its field cpu_devices.

Exit codes: 0 done, 1 an internal error (with its traceback), 2 a mistake in the command, the config
or the data (with its message), 130 or 143 stopped by Ctrl-C or SIGTERM.
"""

# Only the light imports stand here: a mistake in the command is answered before JAX is loaded.
import ast
import difflib
import math
import os
import pathlib
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from absl import flags
from ml_collections import ConfigDict, config_flags

_HELP = ('--help', '-help', '-h', '--helpfull', '--helpshort')
_PACKAGE = pathlib.Path(__file__).resolve().parent


def main(argv: Sequence[str]) -> int:
  """Runs the command line `argv` (without the program's name) and returns the exit code."""
  if any(word in _HELP for word in argv):
    try:
      return _help(argv)
    except BrokenPipeError:  # as in `--help | head`
      os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
      return 0
  previous = {number: signal.signal(number, _stop) for number in (signal.SIGTERM, signal.SIGINT)}
  try:
    _run(parse(argv))
  except ValueError as error:
    if not _is_ours(error):
      raise
    return _refuse(error)
  except _Stopped as stopped:
    name = signal.Signals(stopped.number).name
    print(f'\nstopped by {name}; the same command continues this run', file=sys.stderr, flush=True)
    return 128 + stopped.number
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)
  return 0


def parse(argv: Sequence[str]) -> flags.FlagValues:
  """The command line as flags, `.config` among them. ValueError says what is wrong with it."""
  page = _page(argv)
  # First the page as it stands: the names and types that the overrides are held against.
  config = _read_flags([f'--config={page}']).config
  if not isinstance(config, ConfigDict):
    raise ValueError(
      f'--config={page}: get_config returns a {type(config).__name__}, not a ConfigDict'
    )
  argv = _with_paths(argv, config)
  overrides = list(_overrides(argv))
  for name in overrides:
    _check_field(config, name)
  settings = _read_flags(argv, overrides)
  for field in ('stage', 'strict', 'mesh'):
    if field not in settings.config:
      raise ValueError(
        f'--config={page}: the page has no field {field!r}; every page needs stage, strict and mesh'
      )
  from spct_jax import stages

  if not settings.workdir and settings.config.stage not in stages.WITHOUT_WORKDIR:
    raise ValueError(
      '--workdir is missing; give the folder to write into, for example --workdir=/tmp/spct'
    )
  if settings.workdir:
    settings.workdir = os.path.expanduser(settings.workdir)  # a shell leaves --workdir=~/x as it is
  several = [settings.coordinator, settings.num_processes, settings.process_id]
  if any(value is not None for value in several) and (None in several or settings.distributed):
    raise ValueError(
      '--coordinator, --num_processes and --process_id go together, and without --distributed; got '
      f'coordinator={settings.coordinator}, num_processes={settings.num_processes}, '
      f'process_id={settings.process_id}, distributed={settings.distributed}'
    )
  if settings.num_processes is not None and not 0 <= settings.process_id < settings.num_processes:
    raise ValueError(
      f'--process_id={settings.process_id}: allowed are 0 to {settings.num_processes - 1}'
    )
  if settings.strict:
    settings.config.strict = True
  _check_values(settings.config)
  return settings


def _run(settings: flags.FlagValues) -> None:
  from spct_jax import stages

  config = settings.config
  if config.stage not in stages.RUN:
    raise ValueError(
      f'config.stage={config.stage!r} is not a stage; the stages are {", ".join(stages.RUN)}'
    )

  import jax

  if -1 in dict(config.mesh).values():  # a mesh of a fixed size has the devices that its user counted
    _divide_cpu(jax, config.get('cpu_devices', 0))
  from spct_jax import sharding
  from spct_jax.stages import plan, workdir

  # With JAX's own frames in the traceback, an error raised by JAX can be told from a user's
  # mistake.
  jax.config.update('jax_traceback_filtering', 'off')
  if settings.distributed:
    jax.distributed.initialize()
  elif settings.coordinator is not None:
    jax.distributed.initialize(settings.coordinator, settings.num_processes, settings.process_id)
  if settings.workdir and not os.environ.get('JAX_COMPILATION_CACHE_DIR'):
    # A run that is started again need not compile again.
    jax.config.update('jax_compilation_cache_dir', os.path.join(settings.workdir, 'xla_cache'))
  for number in (signal.SIGTERM, signal.SIGINT):  # jax.distributed takes SIGTERM for itself
    signal.signal(number, _stop)

  mesh = sharding.make_mesh(dict(config.mesh))
  if workdir.is_writer():
    print('\n'.join(plan.describe(mesh)), flush=True)
  if not settings.workdir:
    stages.RUN[config.stage](config, None, mesh)
    return
  with workdir.open_workdir(settings.workdir, config) as opened:
    try:
      stages.RUN[config.stage](config, opened, mesh)
    except ValueError:
      opened.withdraw()
      raise


def _divide_cpu(jax: Any, count: int) -> None:
  """Makes the CPU `count` devices of one thread each; 0, or the user's own number, leaves it as it is.

  A small model's operations are too short to be shared by threads: two devices that each take half of the rows sample
  1.4 times as fast as one device of two threads, and train 1.1 to 1.3 times as fast.
  """
  if not count or os.environ.get('JAX_NUM_CPU_DEVICES') or jax.config.jax_num_cpu_devices > 0:
    return
  flags_of_xla = os.environ.get('XLA_FLAGS', '')
  if '--xla_force_host_platform_device_count' in flags_of_xla:
    return
  try:
    jax.config.update('jax_num_cpu_devices', count)
  except RuntimeError:  # called from a program whose devices exist already
    return
  if '--xla_cpu_multi_thread_eigen' not in flags_of_xla:
    os.environ['XLA_FLAGS'] = f'{flags_of_xla} --xla_cpu_multi_thread_eigen=false'.strip()


def _read_flags(argv: Sequence[str], overrides: Sequence[str] = ()) -> flags.FlagValues:
  """The flags of `argv`; `overrides` names the fields it sets on a page that is known to work."""
  values = flags.FlagValues()
  words = ['spct_jax.main', *argv]
  # Overrides are found in `sys_argv`, which would otherwise be the process's own.
  config_flags.DEFINE_config_file(
    'config', None, 'page of numbers', flag_values=values, lock_config=True, sys_argv=words
  )
  flags.DEFINE_string('workdir', None, 'folder to write into', flag_values=values)
  flags.DEFINE_bool('strict', False, 'an unusable item is an error', flag_values=values)
  flags.DEFINE_bool('distributed', False, 'several processes, found by JAX', flag_values=values)
  flags.DEFINE_string('coordinator', None, 'HOST:PORT of process 0', flag_values=values)
  flags.DEFINE_integer('num_processes', None, 'number of processes', flag_values=values)
  flags.DEFINE_integer('process_id', None, 'number of this process, from 0', flag_values=values)
  try:
    rest = values(words)
  except flags.IllegalFlagValueError as error:
    # ml_collections puts the traceback of an error in the page into its message. A ValueError there
    # is the page's refusal of a choice, and its words are enough; anything else is a broken page.
    head, found, words = str(error).rpartition('\nValueError: ')
    message = f'{head.partition(": ")[0]}: {words.strip()}' if found else str(error)
    raise ValueError(message) from None
  except flags.Error as error:
    raise ValueError(f'{error}; --help shows the flags') from None
  except Exception as error:
    if overrides:
      raise ValueError(
        f'--config.{", --config.".join(overrides)}: cannot be set ({error}); --help with the page'
        ' shows its fields and their values'
      ) from None
    place = ''.join(traceback.format_exception(error, limit=-1)).rstrip()
    raise ValueError(f'the config page fails:\n{place}') from None
  if rest[1:]:
    raise ValueError(
      f'unexpected {" ".join(rest[1:])!r}; flags are written --name=value; --help shows them'
    )
  return values


def _names_page(argv: Sequence[str]) -> bool:
  return any(word.partition('=')[0] in ('--config', '-config') for word in argv)


def _page(argv: Sequence[str]) -> str:
  """The value of --config, written with '=' or as the next word; ValueError if it is no file."""
  page = ''
  for word, following in zip(argv, [*argv, ''][1:], strict=True):
    name, equals, value = word.partition('=')
    if name in ('--config', '-config'):
      page = value if equals else following
      break
  if not page or page.startswith('-'):
    raise ValueError(
      '--config is missing; give a page and a workdir, for example\n'
      '  python -m spct_jax.main --config=configs/spct_small.py:smoke --workdir=/tmp/smoke\n'
      '--help lists the pages'
    )
  file = page.partition(':')[0]
  if not pathlib.Path(file).is_file():
    raise ValueError(f'--config={page}: there is no file {file}; --help lists the pages')
  return page


def _overrides(argv: Sequence[str]) -> Iterator[str]:
  for word in argv:
    name = word.partition('=')[0]
    for prefix in ('--config.', '-config.', '--noconfig.'):
      if name.startswith(prefix):
        yield name.removeprefix(prefix)


def _with_paths(argv: Sequence[str], config: ConfigDict) -> list[str]:
  """`argv` with --config.SECTION=PATH, which no flag of a section takes, written out as --config.SECTION.path=PATH."""
  written = []
  for word in argv:
    name, equals, value = word.partition('=')
    flag, _, section = name.partition('.')
    node = config[section] if flag in ('--config', '-config') and section in config else None
    if isinstance(node, ConfigDict) and section == 'model' and equals and not value:
      raise ValueError(f'{word}: the name of the model is empty; give a folder, or no flag for random weights')
    written.append(f'{name}.path{equals}{value}' if isinstance(node, ConfigDict) and 'path' in node else word)
  return written


def _check_field(config: ConfigDict, name: str) -> None:
  node: Any = config
  above = 'config'
  for part in name.partition('[')[0].split('.'):
    if not isinstance(node, ConfigDict) or part not in node:
      known = sorted(node) if isinstance(node, ConfigDict) else []
      near = difflib.get_close_matches(part, known, n=1)
      what = f'{above} has no {part!r}; it has {", ".join(known)}'
      if not known:
        what = f'{above} is a value, not a section'
      hint = f'. Did you mean {near[0]!r}?' if near else ''
      raise ValueError(f'unknown config field --config.{name}: {what}{hint}')
    node, above = node[part], f'{above}.{part}'
  if '[' in name and not isinstance(node, list):
    raise ValueError(
      f'--config.{name}: an item of a {type(node).__name__} cannot be set alone; give the whole:'
      f' --config.{name.partition("[")[0]}=VALUE'
    )


def _check_values(config: ConfigDict) -> None:
  """What no stage can use: a seed that is no uint32, a number of devices that is none, a number that is not finite."""
  seed = config.seed if 'seed' in config else 0
  if not isinstance(seed, int) or not 0 <= seed < 2**32:
    raise ValueError(f'config.seed={seed}: allowed are whole numbers from 0 to {2**32 - 1}')
  devices = config.get('cpu_devices', 0)
  if not isinstance(devices, int) or devices < 0:
    raise ValueError(f'config.cpu_devices={devices}: allowed are whole numbers from 0, which leaves the CPU one device')
  for name, value in _values('config', config):
    if isinstance(value, float) and not math.isfinite(value):
      raise ValueError(f'{name}={value}: allowed are finite numbers')


def _values(name: str, node: Any) -> Iterator[tuple[str, Any]]:
  """The values below a node of the config, each with its full name."""
  if isinstance(node, (ConfigDict, dict)):
    for key, value in node.items():
      yield from _values(f'{name}.{key}', value)
  elif isinstance(node, (list, tuple)):
    for index, value in enumerate(node):
      yield from _values(f'{name}[{index}]', value)
  else:
    yield name, node


def _is_ours(error: ValueError) -> bool:
  """True if our own code raised it (a user's mistake), False if a library did (a bug of ours)."""
  frame = traceback.extract_tb(error.__traceback__)[-1]
  return pathlib.Path(frame.filename).resolve().is_relative_to(_PACKAGE)


def _refuse(error: ValueError) -> int:
  print(f'error: {error}', file=sys.stderr, flush=True)
  return 2


class _Stopped(BaseException):
  """A signal asked us to stop. No Exception, so that no handler on the way swallows it."""

  def __init__(self, number: int):
    super().__init__(number)
    self.number = number


def _stop(number: int, frame: Any) -> NoReturn:
  del frame
  signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once
  raise _Stopped(number)


def _help(argv: Sequence[str]) -> int:
  if _names_page(argv):
    try:
      page = _page(argv)
      config = _read_flags([f'--config={page}']).config
    except ValueError as error:
      return _refuse(error)
    print(_docstring(pathlib.Path(page.partition(':')[0])) + '\n\nIts fields and their values:\n')
    print(config)
    return 0
  from spct_jax import stages

  print(__doc__)
  print('Stages (--config.stage=NAME): ' + ', '.join(stages.RUN) + '\n')
  pages = sorted(set(pathlib.Path('configs').glob('*.py')) - {pathlib.Path('configs/__init__.py')})
  if pages:
    print('Pages under configs/:')
  else:
    print('Pages: none under configs/ here; run this in the root of the clone.')
  for path in pages:
    print(f'\n  {path}\n    {_docstring(path).partition(chr(10))[0]}')
  if pages:
    print(f'\nThe choices and fields of a page: python -m spct_jax.main --config={pages[0]} --help')
  return 0


def _docstring(path: pathlib.Path) -> str:
  return ast.get_docstring(ast.parse(path.read_text(encoding='utf-8'))) or ''


def _leave(code: int) -> NoReturn:
  """Ends the process; after a failure, without waiting for threads or other processes."""
  sys.stdout.flush()
  sys.stderr.flush()
  if code:
    os._exit(code)
  sys.exit(0)


if __name__ == '__main__':
  try:
    _code = main(sys.argv[1:])
  except BaseException:
    traceback.print_exc()
    _code = 1
  _leave(_code)
