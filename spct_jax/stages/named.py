"""Names of models: wherever a stage takes a model, one of these.

    base               config.model: its folder, or random weights of its shape
    sft, rft, grpo     what that stage of this workdir trained; meta_rm where a meta-RM is wanted
    FOLDER             a Hugging Face folder, or a PEFT folder (adapters, which name the folder of their base)
    WORKDIR:STAGE      what a stage of another workdir trained; WORKDIR:convert is a model that was imported there

`config.model.path` may be any of the last two. A name says which decoder it is (`root`), which files it depends on
(`reads`) and what files and tables call it (`slug`, `label`); `loading` makes the parameters. Here only small files
are read, so a mistake is found before any work.
"""

import dataclasses
import functools
import hashlib
import os
import pathlib
import re
from typing import Any

from ml_collections import ConfigDict

from spct_jax import jsonl

LANGUAGE = ('sft', 'rft', 'grpo')  # stages whose checkpoint is a language model
TRAINED = (*LANGUAGE, 'meta_rm')
IMPORTED = 'convert'  # the stage whose checkpoint is a model that was taken from a folder (config.model)


@dataclasses.dataclass(frozen=True)
class Model:
  """What a name stands for.

  `kind`: 'random', 'folder' (Hugging Face), 'adapter' (PEFT) or 'stage'. `path` is the folder, of a stage the workdir
  ('' = the one of this run). `config` is the page that a stage was trained with, or that a random base is described by.
  """

  kind: str
  path: str = ''
  stage: str = ''
  config: Any = None


def find(config: Any, name: str, field: str = 'model') -> Model:
  """What `name` stands for under this config; `field` names the place of the name in errors.

  Raises:
    ValueError: it is no stage and no folder of a known kind.
  """
  if name == 'base':
    path = config.model.path
    return _folder(config, path, 'model.path') if path else Model('random', config=config)
  if name in TRAINED:
    return Model('stage', '', name, config)
  return _folder(config, name, field)


def base_of(config: Any, model: Model) -> Model | None:
  """What a model was made from: a stage's init, an adapter's base; None where it stands by itself."""
  if model.kind == 'stage' and model.stage == IMPORTED:
    return find(model.config, 'base', 'model.path')
  if model.kind == 'stage':
    start = model.config[model.stage].init
    found = find(model.config, start, f'{model.stage}.init')
    if found.kind == 'stage' and not found.path:
      found = dataclasses.replace(found, path=model.path)
    return found
  if model.kind == 'adapter':
    return _adapters_base(config, model.path)
  return None


def chain(config: Any, name: str, field: str = 'model') -> tuple[Model, ...]:
  """The model and what it was made from, down to random weights or a Hugging Face folder.

  Raises:
    ValueError: a link that is not there, or a stage that starts from itself.
  """
  found = [find(config, name, field)]
  while (below := base_of(config, found[-1])) is not None:
    if _place(below) in map(_place, found):
      if below.kind == 'stage':
        raise ValueError(
            f'{field}: the stage {below.stage!r} starts from itself ({below.stage}.init); give another init'
        )
      raise ValueError(
          f'{field}: the adapters in {below.path} are, in the end, on themselves; write the folder of their base model '
          'into base_model_name_or_path of its adapter_config.json'
      )
    found.append(below)
  return tuple(found)


def root(config: Any, name: str, field: str = 'model') -> Model:
  """Where the shape of the decoder is written: a Hugging Face folder, or a config page ('random')."""
  return chain(config, name, field)[-1]


def head_kind(config: Any, name: str, field: str = 'model') -> str:
  """'lm' or 'scalar': which head the model has."""
  first = chain(config, name, field)[0]
  if first.kind == 'stage' and first.stage == IMPORTED:
    return head_kind(first.config, 'base', field)
  if first.kind == 'stage':
    return 'scalar' if first.stage == 'meta_rm' else 'lm'
  if first.kind == 'adapter':
    from spct_jax.train import peft  # needs safetensors, as `hf` does, which a random decoder does not
    return peft.read_config(first.path).head_kind
  if first.kind == 'folder':
    from spct_jax.models import hf
    return hf.read_config(first.path).head_kind
  return 'lm'


def check(config: Any, name: str, field: str, kinds: tuple[str, ...]) -> None:
  """Raises unless `name` stands for a model with one of these kinds of head, as far as small files can tell."""
  if name in TRAINED and ('scalar' if name == 'meta_rm' else 'lm') not in kinds:
    allowed = ('base', *LANGUAGE) if 'lm' in kinds else ('meta_rm',)
    raise ValueError(
        f'{field}: got the model {name!r}; allowed: {", ".join(map(repr, allowed))}, a folder, or WORKDIR:STAGE'
    )
  got = head_kind(config, name, field)
  if got not in kinds:
    what = {'lm': 'a language model', 'scalar': 'a scalar reward model (*ForSequenceClassification with one label)'}
    raise ValueError(f'{field}: {name!r} is {what[got]}; needed is {" or ".join(what[kind] for kind in kinds)}')
  for model in _read(chain(config, name, field)):
    try:
      if model.kind == 'folder':
        files = [file for file in sorted(pathlib.Path(model.path).iterdir()) if '.safetensors' in file.name]
        state = [file.stat() for file in (pathlib.Path(model.path) / 'config.json', *files)]
        _check_weights(model.path, *files, *((found.st_size, found.st_mtime_ns) for found in state))
      elif model.kind == 'adapter':
        from spct_jax.train import peft
        peft.check_file(model.path)
    except ValueError as error:
      raise ValueError(f'{field}: {error}') from None


@functools.lru_cache(maxsize=64)
def _check_weights(folder: str, *state: Any) -> None:
  """Holds a folder's tensors against its config.json, by headers alone; `state` tells its files from earlier ones."""
  from spct_jax.models import hf
  del state
  hf.check_folder(folder)


def stand_in(model: Model, below: Model) -> str:
  """What to say where the adapters of a PEFT folder are put on another folder than the one that they name, or ''.

  The name of a hub is taken for a folder of its last part, or whose config.json repeats it.
  """
  if model.kind != 'adapter' or not below.path:
    return ''
  from spct_jax.train import peft
  name = peft.read_config(model.path).base
  if any(os.path.realpath(place) == os.path.realpath(below.path) for place in _places(model.path, name)):
    return ''
  if name and pathlib.PurePath(name).name == pathlib.PurePath(below.path).name:
    return ''
  if name and (_json(pathlib.Path(below.path) / 'config.json') or {}).get('_name_or_path') == name:
    return ''
  on = f'{below.path}:{below.stage}' if below.kind == 'stage' else below.path
  return f'the adapters in {model.path} name the base model {name!r}; they are put on {on} (config.model)'


def lora_rank(config: Any, stage: str) -> int:
  """Rank of the adapters that a stage trains; 0 where it trains every parameter."""
  # A workdir of before adapters has no such section.
  return config[stage].lora.rank if 'lora' in config[stage] else 0


def is_adapters(model: Model) -> bool:
  """Whether the link of a chain is adapters on the next one."""
  return model.kind == 'adapter' or (model.kind == 'stage' and lora_rank(model.config, model.stage) > 0)


def reads(config: Any, *names: str) -> tuple[str, ...]:
  """The files that the parameters called `names` depend on: records of training, and folders."""
  found: list[str] = []
  for name in filter(None, names):
    links = chain(config, name)
    for model in _read(links):
      found += _stage_reads(model) if model.kind == 'stage' else [model.path] if model.path else []
    if links[-1].kind == 'folder' and links[-1].path not in found:
      found.append(f'{links[-1].path}/config.json')  # the shape, whoever holds the parameters
  return tuple(dict.fromkeys(found))


def _read(links):
  """The links whose parameters are read: a stage without adapters holds every one, whatever it was made from."""
  for model in links:
    yield model
    if model.kind == 'stage' and not is_adapters(model):
      return


def slug(name: str) -> str:
  """What a model's files are called: its own name, or a folder's with a mark that tells it from others of that name."""
  if name == 'base' or name in TRAINED:
    return name
  return f'{label(name)}-{hashlib.sha256(_normal(name).encode()).hexdigest()[:8]}'


def label(name: str) -> str:
  """What tables call a model: its own name, the last part of a folder's, or of both parts of WORKDIR:STAGE."""
  if name == 'base' or name in TRAINED:
    return name
  head, _, stage = name.rpartition(':')
  if stage in (*TRAINED, IMPORTED) and head:
    return f'{pathlib.PurePath(_normal(head)).name}-{stage}'
  return pathlib.PurePath(_normal(name)).name


def checkpoint(model: Model, workdir: pathlib.Path | None) -> pathlib.Path:
  """The folder of checkpoints of a stage; `workdir` is the one of this run."""
  return pathlib.Path(model.path or workdir) / model.stage / 'checkpoint'


def _place(model):
  return model.kind, os.path.realpath(model.path) if model.path else '', model.stage


def _normal(path: str) -> str:
  return os.path.normpath(os.path.expanduser(path))


def _folder(config, name, field):
  if not isinstance(name, str):
    raise ValueError(f'{field}: got {name!r}; allowed: the name of a model, or a folder')
  head, _, stage = name.rpartition(':')
  if head and stage in (*TRAINED, IMPORTED) and not pathlib.Path(_normal(name)).is_dir():
    return _other(field, _normal(head), stage)
  path = pathlib.Path(_normal(name))
  if not path.is_dir():
    names = '' if field == 'model.path' else ', '.join(map(repr, ('base', *TRAINED))) + ', '
    raise ValueError(
        f'{field}: got the model {name!r}; allowed: {names}a folder (there is none of this name), or WORKDIR:STAGE'
    )
  if (path / 'adapter_config.json').is_file():
    return Model('adapter', str(path))
  fields = _json(path / 'config.json')
  if fields is None:
    raise ValueError(
        f'{field}: the folder {name!r} holds no config.json and no adapter_config.json; give a Hugging Face folder, a '
        'PEFT folder, or WORKDIR:STAGE'
    )
  if 'stage' in fields and ('pipeline' in fields or IMPORTED in fields):
    models = TRAINED if 'pipeline' in fields else (IMPORTED,)
    raise ValueError(
        f'{field}: {name!r} is a workdir; say which of its models: {name}:STAGE with one of {", ".join(models)}'
    )
  return Model('folder', str(path))


def _other(field, path, stage):
  """A finished stage of another workdir."""
  fields = _json(pathlib.Path(path) / 'config.json')
  if fields is None or stage not in fields or 'model' not in fields:
    raise ValueError(f'{field}: {path} is no workdir with a stage {stage!r} (its config.json says no such thing)')
  if not (pathlib.Path(path) / stage / 'DONE.json').is_file():
    done = [name for name in TRAINED if (pathlib.Path(path) / name / 'DONE.json').is_file()]
    raise ValueError(
        f'{field}: {stage!r} is not finished in the workdir {path}; finished there: {", ".join(done) or "none"}'
    )
  cwd = (_json(pathlib.Path(path) / stage / 'DONE.json') or {}).get('cwd')
  return Model('stage', path, stage, ConfigDict(_from(cwd, fields) if cwd else fields))


def _from(cwd, fields):
  """The page of a workdir with the paths that a chain follows, which started from the folder of that run."""
  out = {name: dict(part) if isinstance(part, dict) else part for name, part in fields.items()}
  for section, field in (('model', 'path'), ('tokenizer', 'path'), *((stage, 'init') for stage in TRAINED)):
    value = out.get(section, {}).get(field)
    # No path is the name of a model, or of what a package carries (builtin:small).
    names = ('base', *TRAINED) if field == 'init' else ()
    if value and value not in names and not re.match(r'(builtin|package):', value):
      out[section][field] = os.path.join(cwd, os.path.expanduser(value))
  return out


def _adapters_base(config, folder):
  """The base model of a PEFT folder: the folder that it names, or config.model where it names none that is here."""
  from spct_jax.train import peft
  name = peft.read_config(folder).base
  for place in _places(folder, name):
    if any((pathlib.Path(place) / file).is_file() for file in ('config.json', 'adapter_config.json')):
      return _folder(config, place, f'{folder}: base_model_name_or_path')
  path = config.model.path
  if path and _normal(path) != folder:
    return _folder(config, path, 'model.path')
  raise ValueError(
      f'{folder}: its adapter_config.json names the base model {name!r}, and there is no such folder; download it and '
      'give it as --config.model=FOLDER, or write its folder into base_model_name_or_path'
  )


def _places(folder, name):
  """Where the base of a PEFT folder may lie."""
  return (_normal(name), os.path.join(folder, name)) if name else ()


def _stage_reads(model):
  if not model.path:
    return [f'{model.stage}/DONE.json']
  done = pathlib.Path(model.path) / model.stage
  steps = [int(step.name) for step in (done / 'checkpoint').iterdir() if step.name.isdigit()]
  # Of another workdir the weights too: nobody says here when they change. The optimizer's state is not read.
  return [str(done / 'DONE.json'), *(str(done / 'checkpoint' / str(max(steps)) / 'params') for _ in steps[:1])]


def _json(path):
  try:
    fields = jsonl.read_json(path)
  except FileNotFoundError:
    return None
  if not isinstance(fields, dict):
    raise ValueError(f'{path}: it holds no table {{"field": value, ...}}; restore the file')
  return fields
