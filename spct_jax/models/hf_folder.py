"""A model folder that appears whole or not at all, and what is in it besides tensors.

It is written under a hidden name beside its place, flushed to disk, and renamed. Where a model stood there before,
the two are exchanged in one step (Linux; elsewhere by two renames, and the next call puts the old one back if the
program died between them) and the old one is removed afterwards. A killed program leaves at most hidden folders
`.NAME.partial-*`, which the next call for the same place removes. Nothing that is not of a model is ever removed: what
someone puts into the place while the model is written stays, and so does the model, beside it.
"""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import ctypes
import dataclasses
import errno
import fcntl
import fnmatch
import json
import os
import pathlib
import re
import shutil
from typing import Any

import numpy as np

from spct_jax import jsonl
from spct_jax.models import hf_files

# What model folders consist of; a folder that holds anything else is not replaced, since that would be lost.
TOKENIZER = (
    'tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json', 'added_tokens.json', 'vocab.json',
    'merges.txt', 'vocab.txt', 'encoder.json', 'vocab.bpe', 'tokenizer.model', 'spiece.model', '*.tiktoken',
    'sentencepiece*.model', 'chat_template.jinja', 'chat_template.json', 'additional_chat_templates',
)  # fmt: skip
_PARTS = (
    'config.json', 'generation_config.json', 'model*.safetensors', 'model*.safetensors.index.json', 'README.md',
    'adapter_config.json', 'adapter_model*.safetensors', 'LICENSE*', 'NOTICE*', 'USE_POLICY*', '.gitattributes',
    '.gitignore', 'preprocessor_config.json', 'processor_config.json', *TOKENIZER,
)  # fmt: skip
_SIGNS = ('model_type', 'architectures', 'peft_type')


@dataclasses.dataclass(frozen=True)
class Card:
  """How a model was made, for its README: what is None or empty is not said.

  base_model: hub name or folder it started from. stage: the stage that trained it. config_hash: of the run's
  semantic fields. metrics: rows {name: value}, one table.
  """

  base_model: str | None = None
  stage: str | None = None
  config_hash: str | None = None
  commit: str | None = None
  version: str | None = None
  data: Sequence[str] = ()
  metrics: Sequence[Mapping[str, Any]] = ()
  notes: Sequence[str] = ()


@contextlib.contextmanager
def replacing(folder: str | os.PathLike) -> Iterator[pathlib.Path]:
  """A hidden folder to write into, which takes the place of `folder` once the block ends without an error.

  ValueError if `folder` is there and is neither empty nor a model folder, before the block and after it (then what was
  written is kept, and named), and for what the system refuses (a full disk, for example).
  """
  target = pathlib.Path(os.path.realpath(folder))
  old, partial, lock = None, None, None
  try:
    check_target(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    _clean(target)
    partial, lock = _begin(target)
    yield partial
    _flush(partial)
    _check_again(target, partial)
    old = _swap(partial, target)
    partial = None
    _sync(target.parent)
  except OSError as error:
    stayed = 'the model is in its place' if partial is None and lock else 'what was there stayed as it was'
    raise ValueError(f'{folder}: could not be written ({error}); {stayed}') from error
  finally:
    if partial is not None:
      shutil.rmtree(partial, ignore_errors=True)
    if old is not None:
      _discard(old)
    if lock is not None:
      os.close(lock)


def _begin(target):
  """(a new hidden folder beside `target`, its lock), which tells it from one that a dead program left."""
  while True:
    partial = target.parent / f'.{target.name}.partial-{os.getpid()}-{os.urandom(4).hex()}'
    partial.mkdir()
    try:
      lock = os.open(partial, os.O_RDONLY)
    except FileNotFoundError:
      continue  # another program took it, not locked yet, for a leftover
    fcntl.flock(lock, fcntl.LOCK_EX)
    if partial.exists():
      return partial, lock
    os.close(lock)


def _check_again(target, partial):
  """Hours may have passed: `target` must still be what may be replaced. If not, what was written gets another name."""
  try:
    check_target(target)
  except ValueError as error:
    kept = target.with_name(partial.name.removeprefix('.').replace('.partial-', '.written-'))
    os.rename(partial, kept)
    raise ValueError(f'{error}. It came there while the model was written, which is whole in {kept}') from None


def check_target(folder: str | os.PathLike) -> None:
  """ValueError unless a model may be written to `folder`: it is absent, empty, or a model folder and nothing else."""
  folder = pathlib.Path(folder)
  remedy = 'give another folder; nothing was changed'
  if not folder.exists():
    above = next(path for path in folder.absolute().parents if path.exists())
    if not above.is_dir():
      raise ValueError(f'{folder}: cannot be there, {above} is a file; {remedy}')
    return
  if not folder.is_dir():
    raise ValueError(f'{folder}: is a file, and a model is a folder of files; {remedy}')
  if not os.listdir(folder):
    return
  signs = [name for name in ('config.json', 'adapter_config.json') if _is_model(folder / name)]
  if not signs:
    raise ValueError(f'{folder}: holds files but no model (no config.json that names one); {remedy}')
  foreign = _foreign(folder)
  if foreign:
    raise ValueError(
        f'{folder}: holds what does not belong to a model and would be lost ({hf_files.listing(foreign)}); {remedy}, '
        'or move these away'
    )


def _is_model(path):
  try:
    fields = json.loads(path.read_text(encoding='utf-8'))
  except (OSError, ValueError):
    return False
  return isinstance(fields, dict) and any(sign in fields for sign in _SIGNS)


def _foreign(folder):
  """Names of what is in the folder and belongs to no model."""
  return [name for name in sorted(os.listdir(folder)) if not any(fnmatch.fnmatch(name, part) for part in _PARTS)]


def _clean(target):
  """Removes what killed programs left beside `target`, and puts back a model that was moved out of its place."""
  for path in sorted(target.parent.glob(f'.{_escaped(target.name)}.*-*-*')):
    kind = path.name[len(target.name) + 2 :].partition('-')[0]
    if kind not in ('partial', 'old') or not path.is_dir():
      continue
    with contextlib.suppress(FileNotFoundError, BlockingIOError):  # another program removed it, or is writing it now
      lock = os.open(path, os.O_RDONLY)
      try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if kind == 'old' and not target.exists():
          os.rename(path, target)
        else:
          _discard(path)
      finally:
        os.close(lock)


def _discard(folder):
  """Removes a folder as far as that goes; the next call tries again. One that holds more than a model stays."""
  with contextlib.suppress(FileNotFoundError):
    if not _foreign(folder):
      shutil.rmtree(folder, ignore_errors=True)


def _escaped(name):
  return re.sub(r'([*?\[])', r'[\1]', name)


def _swap(partial, target):
  """Puts `partial` in the place of `target`; returns where the old folder is now, None if there was none.

  Where other programs write to the same place, the last one wins.
  """
  while True:
    try:
      if not target.exists():
        os.rename(partial, target)
        return None
      return partial if _exchange(partial, target) else _two_renames(partial, target)
    except OSError as error:  # `target` came or went since we looked
      if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST) or not partial.exists():
        raise


def _two_renames(partial, target):
  old = target.with_name(partial.name.replace('.partial-', '.old-'))
  lock = os.open(target, os.O_RDONLY)
  try:
    fcntl.flock(lock, fcntl.LOCK_EX)  # or another program might take it for a dead one's and put it back
    os.rename(target, old)
    try:
      os.rename(partial, target)
    except OSError:
      os.rename(old, target)
      raise
  finally:
    os.close(lock)
  return old


def _exchange(a, b):
  """Linux's atomic exchange of two names; False where the system or the file system has none."""
  rename = getattr(ctypes.CDLL(None, use_errno=True), 'renameat2', None)
  if rename is None:
    return False
  here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
  if rename(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0:
    return True
  code = ctypes.get_errno()
  if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM):
    return False
  raise OSError(code, os.strerror(code), str(b))


def _flush(folder):
  for path, _, files in os.walk(folder, topdown=False):
    for name in files:
      _sync(pathlib.Path(path) / name)
    _sync(pathlib.Path(path))


def _sync(path):
  fd = os.open(path, os.O_RDONLY)
  try:
    os.fsync(fd)
  finally:
    os.close(fd)


# --- tensors


def write_tensors(path: pathlib.Path, entries: Sequence[tuple[str, str, tuple[int, ...]]], values: Iterator) -> int:
  """Writes a safetensors file of `(name, dtype, shape)` entries and returns the bytes of its tensors.

  The header is known from the entries, so `values` yields one array after the other, in the same order, and the host
  holds one of them. dtype: of numpy, 'bfloat16' for example.
  """
  header: dict[str, Any] = {'__metadata__': {'format': 'pt'}}  # transformers refuses a file without it
  at = 0
  for name, dtype, shape in entries:
    size = int(np.prod(shape, dtype=np.int64)) * hf_files.DTYPES[hf_files.NAMES[dtype]].itemsize
    header[name] = {'dtype': hf_files.NAMES[dtype], 'shape': list(shape), 'data_offsets': [at, at + size]}
    at += size
  text = json.dumps(header, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)
  with open(path, 'wb') as file:
    file.write(len(text).to_bytes(8, 'little') + text)
    for (name, dtype, shape), value in zip(entries, values, strict=True):
      assert (value.dtype.name, value.shape) == (dtype, tuple(shape)), name
      file.write(memoryview(np.ascontiguousarray(value).reshape(-1).view(np.uint8)))
  return at


def write_index(folder: pathlib.Path, where: Mapping[str, str], total: int) -> None:
  """The index of a model in several files: tensor name -> file, and the bytes of all tensors."""
  index = {'metadata': {'total_size': total}, 'weight_map': dict(sorted(where.items()))}
  (folder / hf_files.INDEX).write_text(json.dumps(index, indent=2) + '\n')


# --- JSON and text


def write_json(path: pathlib.Path, fields: Mapping[str, Any]) -> None:
  path.write_text(json.dumps(dict(fields), indent=2, ensure_ascii=False) + '\n', encoding='utf-8')


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """The fields of a JSON file, none if it is not there."""
  try:
    fields = jsonl.read_json(path)
  except FileNotFoundError:
    return {}
  if not isinstance(fields, dict):
    raise ValueError(f'{path}: not a table of fields')
  return fields


def copy_tokenizer(source: pathlib.Path, folder: pathlib.Path) -> None:
  """The tokenizer's files as they are, but for program files that its config names: these stay behind."""
  for path in sorted(source.iterdir()):
    if any(fnmatch.fnmatch(path.name, part) for part in TOKENIZER):
      if path.is_dir():
        shutil.copytree(path, folder / path.name)
      else:
        shutil.copyfile(path, folder / path.name)
  fields = read_json(folder / 'tokenizer_config.json')
  if fields.pop('auto_map', None):
    write_json(folder / 'tokenizer_config.json', fields)


def readme(name: str, card: Card, *, head_kind: str, parameters: int, dtype: str) -> str:
  """The model card: front matter that the hub and `transformers` read, and how the model was made."""
  lines = ['---', 'library_name: transformers']
  lines.append(f'pipeline_tag: {"text-generation" if head_kind == "lm" else "text-classification"}')
  if card.base_model and re.fullmatch(r'[\w-][\w.-]*/[\w-][\w.-]*', card.base_model):
    lines.append(f'base_model: {card.base_model}')
  lines += ['tags:', '- reward-model', '- spct', '---', '', f'# {name}', '']
  what = 'causal language model' if head_kind == 'lm' else 'scalar reward model (sequence classification, one label)'
  lines += [f'A {what} of {parameters:,} parameters in {dtype}, written by spct_jax.', '', '## How it was made', '']
  said = [
      ('base model', card.base_model), ('stage', card.stage), ('config', card.config_hash), ('commit', card.commit),
      ('spct_jax', card.version), ('data', ', '.join(card.data)),
  ]  # fmt: skip
  lines += [f'- {what}: `{value}`' for what, value in said if value]
  lines += [f'- {note}' for note in card.notes]
  if not any(value for _, value in said) and not card.notes:
    lines.append('Not recorded.')
  if card.metrics:
    names = list(dict.fromkeys(key for row in card.metrics for key in row))
    cell = lambda value: '' if value is None else f'{value:.4g}' if isinstance(value, float) else str(value)
    lines += ['', '## Results', '', f'| {" | ".join(names)} |', '|' + '---|' * len(names)]
    lines += [f'| {" | ".join(cell(row.get(key)) for key in names)} |' for row in card.metrics]
  return '\n'.join(lines) + '\n'
