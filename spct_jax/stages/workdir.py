"""What a run leaves on disk, and how the same command continues it (`DESIGN.md`, 'A workdir').

    W/config.json            the whole config, written at first use
    W/chat_template.jinja    what frames every prompt: the tokenizer's own template, or the fallback
    W/metrics.jsonl          rows {stage, step, ...} of what is deterministic
    W/timing.jsonl           rows {stage, step, ...} of seconds and bytes
    W/tensorboard/<stage>/   both, for TensorBoard
    W/<stage>/STARTED.json   fingerprints of the config and inputs of the work in this folder
    W/<stage>/DONE.json      the same, once the stage is finished
    W/<stage>.old<i>/        work that was made from other inputs, put aside and never deleted

Rules:

1. A workdir belongs to one config. Fields that cannot change a result (`NOT_SEMANTIC`) may differ,
   so a run may resume on another mesh; any other difference is an error that names the fields.
2. A stage is done if its config and the content of the files it read are what they were, and what
   it wrote is still there. The git commit and the version are recorded and not compared.
3. One run at a time: the folder is locked while a run holds it, and the lock dies with the process.
4. Only process 0 writes, and what process 0 finds is what every process acts on.
"""

import dataclasses
import fcntl
import functools
import hashlib
import json
import math
import os
import pathlib
import re
import socket
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import numpy as np

from spct_jax import packaged
from spct_jax.data import sources
from spct_jax.stages.logbook import MetricsWriter, read_rows
from spct_jax.stages.processes import as_writer_says, barrier, is_writer, write_text

__all__ = (
  'NOT_SEMANTIC',
  'MetricsWriter',
  'Workdir',
  'barrier',
  'commit',
  'content',
  'is_writer',
  'open_workdir',
  'plain',
  'read_rows',
  'semantic',
  'version',
  'write_text',
)

# Top-level fields of a config that say where and how loudly a run goes, not what it computes.
NOT_SEMANTIC = ('cpu_devices', 'logging', 'mesh', 'pipeline', 'sharding', 'stage', 'strict')

_ABSENT = '(absent)'


def plain(value: Any) -> Any:
  """A config or a part of it as JSON holds it: dicts, lists, strings, numbers, booleans, None."""
  if hasattr(value, 'to_dict'):
    value = value.to_dict()
  if isinstance(value, Mapping):
    return {str(key): plain(value[key]) for key in value}
  if isinstance(value, (list, tuple)):
    return [plain(item) for item in value]
  if isinstance(value, np.generic):
    value = value.item()
  if isinstance(value, float) and not math.isfinite(value):
    return str(value)
  if value is None or isinstance(value, (bool, int, float, str)):
    return value
  raise ValueError(
    f'a config field holds {value!r} of type {type(value).__name__}; a workdir stores numbers, strings, '
    'booleans, None, lists, tuples and dicts of these: name the object by a string'
  )


def semantic(config: Any) -> dict[str, Any]:
  """The fields that decide a result, as one flat dict {'grpo.kl_coef': 0.08, ...}."""
  return _flatten({key: value for key, value in plain(config).items() if key not in NOT_SEMANTIC})


def _flatten(tree: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  flat: dict[str, Any] = {}
  for key, value in tree.items():
    if isinstance(value, dict) and value:
      flat.update(_flatten(value, f'{prefix}{key}.'))
    else:
      flat[prefix + key] = value
  return flat


def _digest(value: Any) -> str:
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def commit() -> str | None:
  """The git commit of the code that runs, '-dirty' if files differ; None outside a clone."""
  folder = pathlib.Path(__file__).parent
  try:
    git = ['git', '-C', str(folder)]
    # An installed copy may lie inside somebody else's repository, whose commit says nothing about
    # us.
    subprocess.run(
      [*git, 'ls-files', '--error-unmatch', 'workdir.py'], check=True, capture_output=True
    )
    described = subprocess.run(
      [*git, 'describe', '--always', '--dirty', '--abbrev=40', '--exclude=*'],
      check=True,
      capture_output=True,
      text=True,
    )
  except (OSError, subprocess.CalledProcessError):
    return None
  return described.stdout.strip()


def version() -> str | None:
  """The version of the installed package; None where it runs uninstalled."""
  try:
    return metadata.version('spct_jax')
  except metadata.PackageNotFoundError:
    return None


def content(path: str | os.PathLike[str]) -> str:
  """Hash of a file, read as a stream, or of every file under a folder with its name.

  Left out are files that nobody computes with: hidden ones (.git, .cache), README and LICENSE.
  """
  path = pathlib.Path(path)
  if path.is_dir():
    files = sorted(file for file in path.rglob('*') if file.is_file() and not _idle(file.relative_to(path)))
    return _digest([[file.relative_to(path).as_posix(), content(file)] for file in files])
  found = path.stat()
  if found.st_size < _LARGE:
    return _file_content(path)
  return _large_content(path.resolve(), found.st_ino, found.st_size, found.st_mtime_ns)


def _idle(path: pathlib.PurePath) -> bool:
  # Python writes caches of bytecode beside the files of a package, at times of its own.
  hidden = any(part.startswith('.') or part == '__pycache__' for part in path.parts)
  return hidden or re.fullmatch(r'(readme|licen[cs]e)(\.(md|txt|rst))?', path.name.lower()) is not None


# Of files that nobody writes twice within a tick of the clock; a model's are gigabytes, and asked for by every stage.
_LARGE = 2**24


@functools.lru_cache(maxsize=4096)
def _large_content(path: pathlib.Path, *state: int) -> str:
  """`state` tells the file from what it was when it was read."""
  del state
  return _file_content(path)


def _file_content(path: pathlib.Path) -> str:
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


@dataclasses.dataclass(frozen=True)
class Workdir:
  """A folder that holds a run. Made by `open_workdir`, which also locks it; `close` lets go of it.

  `lock` is the open file that carries the lock (None in the processes that do not write), and
  `fresh` says that this run, not an earlier one, wrote `config.json`.
  """

  path: pathlib.Path
  lock: Any = None
  fresh: bool = False

  def __enter__(self) -> 'Workdir':
    return self

  def __exit__(self, *error: Any) -> None:
    self.close()

  def close(self) -> None:
    """Releases the lock; the object is of no use for writing afterwards."""
    if self.lock is not None:
      self.lock.close()

  def withdraw(self) -> None:
    """Takes back a config that no stage has acted on, so that a corrected one is welcome."""
    if self.lock is None or not self.fresh:
      return
    files = [path for path in self.path.rglob('*') if not path.is_dir()]
    if {path.name for path in files} <= {'config.json', '.lock', 'STARTED.json'}:
      for path in files:
        if path.name == 'STARTED.json':
          path.unlink()
          path.parent.rmdir()
      (self.path / 'config.json').unlink()

  def stage_dir(self, stage: str) -> pathlib.Path:
    """The folder of a stage, W/<stage>."""
    return self.path / stage

  def resolve(self, read: str | os.PathLike[str]) -> pathlib.Path:
    """A path that a stage reads: inside the workdir if it is there, else as the caller wrote it.

    A name such as 'builtin:preferences' or 'package:...' is the file that the package carries, and
    'made:...' the source file of the function that it names.
    """
    name = str(read)
    if name in sources.BUILTIN:
      return sources.BUILTIN[name]
    if name.startswith(sources.MADE):
      return sources.made_file(name)
    path = packaged.locate(name)
    inside = self.path / path  # a carried file has an absolute path, which this leaves as it is
    return inside if inside.exists() else path.expanduser()

  def missing(self, reads: Sequence[str | os.PathLike[str]]) -> list[str]:
    """The entries of `reads` that are not there; a name such as 'tfds:x' is no file."""
    return [
      str(read)
      for read in reads
      if not self.resolve(read).exists() and not re.match(r'[a-z_]{2,}:', str(read))
    ]

  def fingerprint(
    self, config: Any, reads: Sequence[str | os.PathLike[str]]
  ) -> dict[str, Any] | None:
    """What a stage's result depends on; None if one of its inputs is not there.

    An entry of `reads` is a file, a folder, or a name: 'builtin:preferences' and 'package:...'
    stand for the carried file or folder, 'made:...' for itself and the source of the function, any
    other with a scheme ('tfds:...') for itself. No entry says where a package is installed.
    """
    if self.missing(reads):
      return None
    inputs = {}
    for read in reads:
      path = self.resolve(read)
      inputs[str(read)] = content(path) if path.exists() else 'by name'
    return {'config': _digest(semantic(config)), 'inputs': inputs}

  def is_done(self, stage: str, config: Any, reads: Sequence[str | os.PathLike[str]]) -> bool:
    """Whether the stage finished with this config and inputs, and its files are still there."""

    def found() -> bool:
      done = _read_json(self.stage_dir(stage) / 'DONE.json')
      if done is None or not all((self.path / name).exists() for name in done['writes']):
        return False
      return done['fingerprint'] == self.fingerprint(config, reads)

    return as_writer_says(found, what=f'is_done {stage}')

  def start(self, stage: str, config: Any, reads: Sequence[str | os.PathLike[str]]) -> pathlib.Path:
    """Opens the stage's folder for work and returns it.

    Unfinished work from the same config and inputs stays, to be resumed. Work from others is put
    aside as W/<stage>.old<i>, so that no checkpoint of other inputs is ever resumed and nothing is
    lost.
    """
    folder = self.stage_dir(stage)

    def begin() -> bool:
      fingerprint = self.fingerprint(config, reads)
      if fingerprint is None:
        raise ValueError(
          f'stage {stage!r} reads {", ".join(self.missing(reads))}, which does not '
          'exist; run the stage that writes it, or '
          'correct the path in the config'
        )
      started = _read_json(folder / 'STARTED.json')
      if started is not None and started['fingerprint'] != fingerprint:
        aside = next(
          path for i in range(1, 10**6) if not (path := self.path / f'{stage}.old{i}').exists()
        )
        os.rename(folder, aside)
      folder.mkdir(parents=True, exist_ok=True)
      (folder / 'DONE.json').unlink(missing_ok=True)
      write_text(folder / 'STARTED.json', json.dumps(_record(stage, fingerprint), indent=2) + '\n')
      return True

    as_writer_says(begin, what=f'start {stage}')
    return folder

  def mark_done(
    self,
    stage: str,
    config: Any,
    reads: Sequence[str | os.PathLike[str]],
    writes: Sequence[str | os.PathLike[str]] = (),
  ) -> None:
    """Records that the stage is finished; `writes` are its files, relative to the workdir.

    The inputs are those recorded by `start`: a file that changed while the stage ran makes it not
    done.
    """
    folder = self.stage_dir(stage)

    def finish() -> bool:
      started = _read_json(folder / 'STARTED.json')
      fingerprint = (
        started['fingerprint'] if started is not None else self.fingerprint(config, reads)
      )
      folder.mkdir(parents=True, exist_ok=True)
      record = _record(stage, fingerprint) | {'writes': [str(name) for name in writes]}
      write_text(folder / 'DONE.json', json.dumps(record, indent=2) + '\n')
      return True

    barrier(f'done {stage}')  # Process 0 must not vouch for files that others are still writing.
    as_writer_says(finish, what=f'mark_done {stage}')


def _record(stage: str, fingerprint: dict[str, Any] | None) -> dict[str, Any]:
  # Relative paths in the config start from `cwd`: whoever reads them later may be elsewhere.
  return {
    'stage': stage, 'fingerprint': fingerprint, 'commit': commit(), 'version': version(), 'cwd': os.getcwd(),
  }  # fmt: skip


def _read_json(path: pathlib.Path) -> Any:
  try:
    return json.loads(path.read_text(encoding='utf-8'))
  except FileNotFoundError:
    return None
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise ValueError(f'{path} is not JSON ({error}); restore it, or use a new workdir') from error


def open_workdir(path: str | os.PathLike[str], config: Any) -> Workdir:
  """Makes or reopens a workdir and locks it.

  ValueError if another run holds it, or if it belongs to a config that differs in a semantic field.
  """
  path = pathlib.Path(path)
  opened: list[Workdir] = []

  def claim() -> bool:
    if path.exists() and not path.is_dir():
      raise ValueError(f'--workdir={path} is a file; a workdir is a folder: give another path')
    path.mkdir(parents=True, exist_ok=True)
    lock = _lock(path)
    try:
      stored = _read_json(path / 'config.json')
      if stored is None:
        write_text(path / 'config.json', json.dumps(plain(config), indent=2) + '\n')
      else:
        _check_same(path, stored, config)
    except BaseException:
      lock.close()
      raise
    opened.append(Workdir(path, lock, fresh=stored is None))
    return True

  as_writer_says(claim, what='open_workdir')
  return opened[0] if opened else Workdir(path)


def _lock(path: pathlib.Path) -> Any:
  lock = open(path / '.lock', 'a+', encoding='utf-8')
  try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    lock.seek(0)
    holder = lock.read().strip() or 'unknown'
    lock.close()
    raise ValueError(
      f'workdir {path} is in use by another run ({holder}); wait for it, or give another --workdir'
    ) from None
  lock.truncate(0)
  lock.write(f'process {os.getpid()} on {socket.gethostname()}\n')
  lock.flush()
  return lock


def _check_same(path: pathlib.Path, stored: Any, config: Any) -> None:
  old, new = semantic(stored), semantic(config)
  differing = sorted(
    key for key in old.keys() | new.keys() if old.get(key, _ABSENT) != new.get(key, _ABSENT)
  )
  if not differing:
    return
  shown = {
    name: {key: json.dumps(flat[key]) if key in flat else _ABSENT for key in differing}
    for name, flat in (('old', old), ('new', new))
  }
  lines = [
    f'  {key}: the workdir has {shown["old"][key]}, this run has {shown["new"][key]}'
    for key in differing
  ]
  raise ValueError(
    '\n'.join(
      [
        f'workdir {path} belongs to another config; it differs in {len(differing)} '
        f'{"field" if len(differing) == 1 else "fields"}:',
        *lines,
        'give a new --workdir, or restore the '
        + ('value' if len(differing) == 1 else 'values')
        + f' of the workdir (fields under {", ".join(NOT_SEMANTIC)} may differ)',
      ]
    )
  )
