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
import hashlib
import json
import os
import pathlib
from typing import Any

from ml_collections import ConfigDict

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
    seen = [(model.path, model.stage) for model in found if model.kind == 'stage']
    if below.kind == 'stage' and (below.path, below.stage) in seen:
      raise ValueError(f'{field}: the stage {below.stage!r} starts from itself ({below.stage}.init); give another init')
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
  for model in chain(config, name, field):
    if model.kind == 'folder' and not any(pathlib.Path(model.path).glob('*.safetensors')):
      raise ValueError(
          f'{field}: {model.path} has a config.json and no safetensors; other weight formats are not read, convert them '
          'with save_pretrained(safe_serialization=True)'
      )


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
    for model in chain(config, name):
      if model.kind in ('folder', 'adapter'):
        found.append(model.path)
      elif model.kind == 'stage':
        found += _stage_reads(model)
        if not is_adapters(model):
          break  # it holds every parameter: what it was made from no longer matters
  return tuple(dict.fromkeys(found))


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
    raise ValueError(f'{field}: {name!r} is a workdir; say which of its models: {name}:STAGE with one of {", ".join(models)}')
  return Model('folder', str(path))


def _other(field, path, stage):
  """A finished stage of another workdir."""
  fields = _json(pathlib.Path(path) / 'config.json')
  if fields is None or stage not in fields or 'model' not in fields:
    raise ValueError(f'{field}: {path} is no workdir with a stage {stage!r} (its config.json says no such thing)')
  if not (pathlib.Path(path) / stage / 'DONE.json').is_file():
    done = [name for name in TRAINED if (pathlib.Path(path) / name / 'DONE.json').is_file()]
    raise ValueError(f'{field}: {stage!r} is not finished in the workdir {path}; finished there: {", ".join(done) or "none"}')
  return Model('stage', path, stage, ConfigDict(fields))


def _adapters_base(config, folder):
  """The base model of a PEFT folder: the folder that it names, or config.model where it names none that is here."""
  from spct_jax.train import peft
  name = peft.read_config(folder).base
  for place in (_normal(name), os.path.join(folder, name)) if name else ():
    if (pathlib.Path(place) / 'config.json').is_file():
      return _folder(config, place, f'{folder}: base_model_name_or_path')
  path = config.model.path
  if path and _normal(path) != folder:
    return _folder(config, path, 'model.path')
  raise ValueError(
      f'{folder}: its adapter_config.json names the base model {name!r}, and there is no such folder; download it and '
      'give it as --config.model=FOLDER, or write its folder into base_model_name_or_path'
  )


def _stage_reads(model):
  if not model.path:
    return [f'{model.stage}/DONE.json']
  done = pathlib.Path(model.path) / model.stage
  steps = [int(step.name) for step in (done / 'checkpoint').iterdir() if step.name.isdigit()]
  # Of another workdir the weights too: nobody says here when they change. The optimizer's state is not read.
  return [str(done / 'DONE.json'), *(str(done / 'checkpoint' / str(max(steps)) / 'params') for _ in steps[:1])]


def _json(path):
  try:
    fields = json.loads(path.read_text(encoding='utf-8'))
  except FileNotFoundError:
    return None
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise ValueError(f'{path}: not JSON ({error})') from None
  return fields if isinstance(fields, dict) else None
