"""Adapters in and out of folders in the layout of the library PEFT.

    adapter_config.json          rank, alpha, which modules, and the folder of the base model
    adapter_model.safetensors    base_model.model.<module>.lora_A.weight [r, in], .lora_B.weight [out, r]
                                 base_model.model.score.weight [1, D]         a scalar head, learnt whole

`peft.PeftModel.from_pretrained(base, folder)` computes what `lora.Adapted` does. What is adapted is read from the
tensors; every layer must have the same projections. An option of adapter_config.json that changes what is computed
and that `lora` does not compute is an error, whether this file knows its name or not.
"""

import dataclasses
import math
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from spct_jax import jsonl, sharding
from spct_jax.models import hf_experts, hf_folder, hf_names
from spct_jax.models.transformer import Transformer
from spct_jax.train import lora

CONFIG, WEIGHTS = 'adapter_config.json', 'adapter_model.safetensors'
TASKS = {'lm': 'CAUSAL_LM', 'scalar': 'SEQ_CLS'}
_PREFIX = 'base_model.model.'
_HEADS = {'classifier', 'score'}  # what PEFT saves whole of a sequence-classification model, by the names it may have
_FILES = dict(zip(lora.PAIR, ('lora_A.weight', 'lora_B.weight')))

# Fields of adapter_config.json that say nothing about what a trained adapter computes.
_READ = {'base_model_name_or_path', 'lora_alpha', 'modules_to_save', 'peft_type', 'r', 'task_type', 'use_rslora'}
_IDLE = {
    'auto_mapping', 'exclude_modules', 'inference_mode', 'init_lora_weights', 'lora_dropout', 'megatron_core',
    'peft_version', 'qalora_group_size', 'revision', 'runtime_config', 'target_modules',
}  # fmt: skip
_PLAIN = {'bias': 'none'}  # the value with which a field changes nothing; any other field: empty, False or null
# What the values of the fields that are read may be.
_KINDS = {
    'r': (int, 'a whole number'),
    'lora_alpha': ((int, float), 'a number'),
    'task_type': ((str, type(None)), 'a name or null'),
    'base_model_name_or_path': ((str, type(None)), 'a name or null'),
    'modules_to_save': ((list, type(None)), 'a list of names or null'),
}
# Initialisations that change the base model too: its folder is then not what the adapter is for.
_MOVING = ('corda', 'loftq', 'olora', 'pissa')


@dataclasses.dataclass(frozen=True)
class Config:
  """What an adapter_config.json says; `base` is as it is written there, '' if it is not."""

  rank: int
  alpha: float
  rslora: bool
  base: str
  head_kind: str


def is_folder(folder: str | os.PathLike) -> bool:
  return (pathlib.Path(folder) / CONFIG).is_file()


def read_config(folder: str | os.PathLike) -> Config:
  """The adapter's settings; no tensor is read.

  Raises:
    ValueError: no such file, another method than LoRA, or an option that is not computed here.
  """
  path = pathlib.Path(folder) / CONFIG
  if not path.is_file():
    raise ValueError(f'{folder}: no {CONFIG} there; give a folder as PEFT writes it')
  fields = jsonl.read_json(path)
  if not isinstance(fields, dict) or fields.get('peft_type') != 'LORA':
    got = fields.get('peft_type') if isinstance(fields, dict) else fields
    raise ValueError(f"{path}: peft_type is {got!r}; supported is 'LORA'")
  for name, (kinds, allowed) in _KINDS.items():
    value = fields.get(name)
    if name in fields and not isinstance(value, kinds) or name in ('r', 'lora_alpha') and isinstance(value, bool):
      raise ValueError(f'{path}: {name} is {value!r}; allowed is {allowed}')
  for name, value in sorted(fields.items()):
    idle = value == _PLAIN[name] if name in _PLAIN else not value
    if name not in _READ | _IDLE and not idle:
      raise ValueError(
          f'{path}: {name} is {value!r}, which is not computed here; supported are r, lora_alpha, use_rslora and '
          'target_modules. Merge the adapter with PEFT (merge_and_unload) and give the merged folder'
      )
  start = fields.get('init_lora_weights')
  if isinstance(start, str) and start.lower().startswith(_MOVING):
    raise ValueError(
        f'{path}: init_lora_weights is {start!r}, which changes the base model too; convert the adapter to plain LoRA '
        'with PEFT (path_initial_model_for_weight_conversion), or merge it'
    )
  missing = [name for name in ('r', 'lora_alpha') if name not in fields]
  if missing:
    raise ValueError(f'{path}: lacks {", ".join(missing)}; the file is damaged')
  tasks = {task: kind for kind, task in TASKS.items()} | {None: 'lm'}
  if fields.get('task_type') not in tasks:
    raise ValueError(f'{path}: task_type is {fields["task_type"]!r}; supported are {", ".join(TASKS.values())}')
  head_kind = tasks[fields.get('task_type')]
  whole = set(map(str, fields.get('modules_to_save') or ()))
  if whole - (_HEADS if head_kind == 'scalar' else set()):
    raise ValueError(
        f'{path}: modules_to_save is {sorted(whole)}; supported is the head of a sequence-classification model (score)'
    )
  base = fields.get('base_model_name_or_path') or ''
  return Config(fields['r'], fields['lora_alpha'], bool(fields.get('use_rslora')), base, head_kind)


def check_file(folder: str | os.PathLike) -> None:
  """Raises unless the adapter's tensors are there as one whole safetensors file; only its header is read."""
  path = pathlib.Path(folder) / WEIGHTS
  if not path.is_file():
    raise ValueError(f'{folder}: no {WEIGHTS} there; other weight formats are not read: save it with safetensors')
  try:
    with safetensors.safe_open(path, framework='numpy'):
      pass
  except safetensors.SafetensorError as error:
    raise ValueError(f'{path}: not a whole safetensors file ({error})') from None


def load(
    folder: str | os.PathLike, model: Transformer, mesh: Any = None, rules: Any = None
) -> tuple[lora.Adapted, dict]:
  """(the adapted model, its adapters in float32) of a folder, for a `model` with the adapter's kind of head.

  A scalar head that the folder leaves out is not in the adapters.

  Raises:
    ValueError: tensors that are missing, have no place or have the wrong shape, each named.
  """
  folder, config = pathlib.Path(folder), read_config(folder)
  if (mesh is None) != (rules is None):
    raise ValueError('load: got one of mesh and rules; give both to shard the adapters, or neither')
  if config.head_kind != model.config.head_kind:
    raise ValueError(f'{folder}: its task_type is {TASKS[config.head_kind]}; the model has another head')
  check_file(folder)
  path = folder / WEIGHTS
  tensors = safetensors.numpy.load_file(path)
  every = [where for where in lora.kernels(model) if 'experts' not in where.split('/')]
  places = {name: (kernel, leaf, i) for kernel in every for leaf, name, i in _names(model, kernel)}
  found = dict.fromkeys(lora.projection(places[name][0]) for name in tensors if name in places)
  if not found:
    raise ValueError(
        f'{path}: no tensor of it belongs to a projection of the model; its first is {min(tensors, default="none")}'
    )
  settings = lora.Settings(config.rank, config.alpha, tuple(found), config.rslora)
  adapted = lora.Adapted(model, settings)
  kernels = lora.adapted(model, settings)
  wanted = {name: (kernel, leaf) for name, (kernel, leaf, _) in places.items() if kernel in kernels}
  head = _head(model)
  _check(path, wanted, tensors, head, kernels, config.rank)
  tree: dict = {}
  for where, kernel in kernels.items():
    pair, pairs = {}, hf_names.pairs(model.config, where)
    for leaf in lora.PAIR:
      names = [name for which, name, _ in _names(model, where) if which == leaf]
      each = [_ours(tensors[name], leaf, kernel, config.rank, pairs) for name in names]
      pair[leaf] = np.stack(each) if kernel.stack else each[0]
    lora.put(tree, where, pair)
  if head in tensors:
    tree['reward'] = {'kernel': tensors[head].astype(np.float32).T}
  if mesh is None:
    return adapted, jax.tree.map(jnp.asarray, tree)
  return adapted, sharding.to_device(tree, sharding.tree_shardings(tree, rules, mesh))


def save(folder: str | os.PathLike, adapted: lora.Adapted, adapters: dict, base: str | os.PathLike) -> None:
  """Writes a folder that `load` and PEFT read; `base` is the folder of the frozen model that they are for.

  The folder appears whole or not at all. With several processes every one calls this and the first one writes.

  Raises:
    ValueError: there is a folder of that name already, with other things in it than a model; or experts are adapted.
  """
  folder, model, settings = pathlib.Path(folder), adapted.model, adapted.settings
  tensors = {}
  for where in lora.adapted(model, settings):
    if where.split('/')[-2] in ('gate', 'up', 'down') and any(layer.experts for layer in model.config.layers):
      # It takes every target that ends in gate_proj, up_proj or down_proj for the experts, which it holds fused.
      raise ValueError(
          f'{lora.projection(where)!r} is adapted in a mixture of experts, where PEFT knows attention alone by '
          'modules; export the merged model (models.hf.save), or leave gate, up and down out of lora.targets'
      )
    for leaf, name, i in _names(model, where):
      value = sharding.to_host(lora.at(adapters, where)[leaf])
      tensors[name] = _theirs(value if i is None else value[i], leaf, hf_names.pairs(model.config, where))
  fields = {
      'peft_type': 'LORA',
      'task_type': TASKS[model.config.head_kind],
      'base_model_name_or_path': os.fspath(base),
      'r': settings.rank,
      'lora_alpha': settings.alpha,
      'use_rslora': settings.rslora,
      'target_modules': _modules(model, settings),
      'lora_dropout': 0.0,
      'bias': 'none',
      'fan_in_fan_out': False,
      'modules_to_save': None,
      'inference_mode': True,
  }
  if 'reward' in adapters:
    fields['modules_to_save'] = ['score']
    tensors[_head(model)] = np.ascontiguousarray(sharding.to_host(adapters['reward']['kernel']).T)
  if jax.process_index():
    return
  with hf_folder.replacing(folder) as partial:
    entries = [(name, 'float32', tensors[name].shape) for name in sorted(tensors)]
    hf_folder.write_tensors(partial / WEIGHTS, entries, (tensors[name] for name in sorted(tensors)))
    hf_folder.write_json(partial / CONFIG, fields)


def _names(model, kernel):
  """(leaf, name in the file, index of the period or None) of the tensors of one kernel's adapters."""
  tensor, _ = hf_names.tensors_of(model.config, kernel)
  for i, name in [(None, tensor)] if isinstance(tensor, str) else enumerate(tensor):
    for leaf, suffix in _FILES.items():
      yield leaf, f'{_PREFIX}{name.removesuffix("weight")}{suffix}', i


def _head(model):
  if model.config.head_kind == 'lm':
    return ''
  return _PREFIX + hf_names.tensors_of(model.config, 'reward/kernel')[0]


def _modules(model, settings):
  """Names of the adapted modules, short where they are alone: 'q_proj'; 'mlp.gate_proj' beside another gate_proj."""
  def of(path):
    tensor, _ = hf_names.tensors_of(model.config, path)
    while not isinstance(tensor, str):
      tensor = tensor[0]
    return tensor.removesuffix('.weight').split('.')

  chosen = lora.adapted(model, settings)
  others = {of(path)[-1] for path in lora.kernels(model) if path not in chosen}
  return sorted({name[-1] if name[-1] not in others else '.'.join(name[-2:]) for name in map(of, chosen)})


def _ours(value, leaf, kernel, rank, pairs):
  value = np.ascontiguousarray(value.T.astype(np.float32))
  if leaf == 'lora_a':
    return value.reshape(*kernel.inputs, rank)
  return hf_experts.to_halves(value.reshape(rank, *kernel.outputs), pairs)


def _theirs(value, leaf, pairs):
  if leaf == 'lora_a':
    return np.ascontiguousarray(value.reshape(-1, value.shape[-1]).T)
  return np.ascontiguousarray(hf_experts.to_pairs(value, pairs).reshape(value.shape[0], -1).T)


def _check(path, wanted, tensors, head, kernels, rank):
  missing = sorted(set(wanted) - set(tensors))
  extra = sorted(set(tensors) - set(wanted) - {head})
  if missing or extra:
    some = lambda names: ', '.join(names[:3]) + (', ...' if len(names) > 3 else '')
    raise ValueError(
        f'{path}: the tensors do not belong to the model: {len(missing)} missing ({some(missing) or "none"}), '
        f'{len(extra)} without a place ({some(extra) or "none"})'
    )
  for name, (kernel, leaf) in wanted.items():
    inputs, outputs = (math.prod(axes) for axes in (kernels[kernel].inputs, kernels[kernel].outputs))
    allowed = (rank, inputs) if leaf == 'lora_a' else (outputs, rank)
    if tensors[name].shape != allowed:
      got = tensors[name].shape
      raise ValueError(f'{path}: tensor {name} has shape {got}; the model and r={rank} ask for {allowed}')
