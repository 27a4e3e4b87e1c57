"""Models in and out of Hugging Face folders: `config.json` and safetensors, one file or several.

Names and the values of tensors are in `hf_names`, the settings in `hf_config`.

1. A sequence-classification model with one label is the scalar head. The file's head has no bias; ours is 0
   there, and one that training moved is written as `score.bias`, which other software does not read.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from spct_jax import sharding
from spct_jax.models import hf_config, hf_names
from spct_jax.models.config import ModelConfig
from spct_jax.models.transformer import Transformer

SHARD_BYTES = 5 * 10**9  # one file up to this size, as other writers do


def read_config(folder: str | os.PathLike, dtype: str = 'float32') -> ModelConfig:
  """The model of a folder, computing and stored in `dtype`; ValueError if it is none of the known families."""
  path = pathlib.Path(folder) / 'config.json'
  if not path.is_file():
    raise ValueError(f'{folder}: no config.json there; give a folder as save_pretrained writes it')
  try:
    fields = json.loads(path.read_text())
  except json.JSONDecodeError as error:
    raise ValueError(f'{path}: not JSON ({error})') from None
  return hf_config.read(str(path), fields, dtype=dtype)


def load(
    folder: str | os.PathLike,
    dtype: Any = 'float32',
    mesh: Any = None,
    rules: Any = None,
    vocab_multiple: int | None = None,
) -> tuple[Transformer, dict]:
  """`(model, params)` of a folder, computing and stored in `dtype`; with a mesh, placed by the sharding rules.

  The vocabulary is padded to a multiple of `vocab_multiple`, by default of the number of devices in the mesh.

  Tensors are read as their place on a device is filled, so the host never holds the model.
  """
  if (mesh is None) != (rules is None):
    raise ValueError('load: got one of mesh and rules; give both to shard the parameters, or neither')
  folder, dtype = pathlib.Path(folder), jnp.dtype(dtype)
  if vocab_multiple is None:
    vocab_multiple = 1 if mesh is None else int(mesh.size)
  settings = dataclasses.replace(read_config(folder, dtype.name), vocab_multiple=vocab_multiple)
  model = Transformer(settings)
  abstract = model.abstract_params()
  if mesh is None:
    one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    places = jax.tree.map(lambda leaf: one, abstract)
  else:
    places = sharding.tree_shardings(abstract, rules, mesh)
  with contextlib.ExitStack() as stack:
    tensors = _open(folder, stack)
    _check(folder, settings, abstract, tensors)

    def fill(path, leaf, place):
      names, axes = hf_names.tensors_of(settings, path)

      def piece(index):
        if path == 'reward/bias' and names not in tensors:
          return np.zeros(leaf.shape, dtype)[index]
        if isinstance(names, str):
          return hf_names.ours(tensors[names].get_tensor(names), leaf.shape, axes, dtype)[index]
        layers = (tensors[name].get_tensor(name) for name in names[index[0]])
        return np.stack([hf_names.ours(t, leaf.shape[1:], axes, dtype)[index[1:]] for t in layers])

      # The gates of `sharding` take whole host arrays; here the file is the host array.
      return jax.make_array_from_callback(leaf.shape, place, piece)

    names = [path for path, _ in sharding.leaf_paths(abstract)]
    paths = jax.tree.unflatten(jax.tree.structure(abstract), names)
    return model, jax.block_until_ready(jax.tree.map(fill, paths, abstract, places))


def save(folder: str | os.PathLike, model: Transformer, params: dict, tokenizer: Any = None) -> None:
  """Writes a folder that `load` and `transformers` read; `config.json` comes last, so a cut-off folder has none.

  With several processes every one calls this and the first one writes. `tokenizer` is our
  `text.tokenizer.Tokenizer`.
  """
  folder, settings = pathlib.Path(folder), model.config
  fields = hf_config.write(settings)
  if tokenizer is not None:
    fields |= {'eos_token_id': list(tokenizer.eos_ids) or None, 'pad_token_id': tokenizer.pad_id}
  writer = jax.process_index() == 0
  if writer:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'config.json').unlink(missing_ok=True)
    for old in folder.glob('model*.safetensors*'):
      old.unlink()
  shards = _plan(settings, params)
  where, total = {}, 0
  for number, shard in enumerate(shards, 1):
    count = '' if len(shards) == 1 else f'-{number:05d}-of-{len(shards):05d}'
    file = f'model{count}.safetensors'
    values = {}
    for name, path, i in shard:
      values[name] = hf_names.theirs(settings, path, sharding.to_host(_leaf(params, path, i)))
      where[name], total = file, total + values[name].nbytes
    if writer:
      safetensors.numpy.save_file(values, folder / file, metadata={'format': 'pt'})
  if not writer:
    return
  if len(shards) > 1:
    index = {'metadata': {'total_size': total}, 'weight_map': where}
    (folder / 'model.safetensors.index.json').write_text(json.dumps(index, indent=2))
  if tokenizer is not None:
    tokenizer.save(folder)
  partial = folder / 'config.json.partial'
  partial.write_text(json.dumps(fields, indent=2) + '\n')
  os.replace(partial, folder / 'config.json')


# --- tensors


def _plan(config, params):
  """Which tensors go into which file: lists of (name, path, period index or None)."""
  shards, room = [[]], SHARD_BYTES
  for path, leaf in sharding.leaf_paths(params):
    names, _ = hf_names.tensors_of(config, path)
    # A head that was never given a bias has none in the file either.
    if path == 'reward/bias' and not np.any(sharding.to_host(leaf)):
      continue
    each = [(names, path, None)]
    if not isinstance(names, str):
      each = [(name, path, i) for i, name in enumerate(names)]
    size = leaf.nbytes // len(each)
    for tensor in each:
      if size > room and shards[-1]:
        shards, room = shards + [[]], SHARD_BYTES
      shards[-1].append(tensor)
      room -= size
  return shards


def _leaf(params, path, i):
  for key in path.split('/'):
    params = params[key]
  return params if i is None else params[i]


# --- files


def _open(folder, stack):
  """Tensor name -> the open file it is in."""
  index = folder / 'model.safetensors.index.json'
  if index.is_file():
    listed = json.loads(index.read_text())
    if not isinstance(listed, dict) or 'weight_map' not in listed:
      raise ValueError(f'{index}: no weight_map in it, so it names no files; the download is damaged')
    files = sorted(set(listed['weight_map'].values()))
  elif (folder / 'model.safetensors').is_file():
    files = ['model.safetensors']
  else:
    raise ValueError(
        f'{folder}: no model.safetensors and no model.safetensors.index.json; other weight formats are not read, '
        'convert them with save_pretrained(safe_serialization=True)'
    )
  tensors = {}
  for file in files:
    if not (folder / file).is_file():
      raise ValueError(f'{index}: names {file}, which is not in the folder; the download is incomplete')
    try:
      opened = stack.enter_context(safetensors.safe_open(folder / file, framework='np'))
    except safetensors.SafetensorError as error:
      raise ValueError(f'{folder / file}: not a whole safetensors file ({error})') from None
    tensors |= {name: opened for name in opened.keys()}
  return tensors


def _check(folder, config, abstract, tensors):
  """Every tensor has a place and every place a tensor of the right shape."""
  wanted = {}
  for path, leaf in sharding.leaf_paths(abstract):
    names, _ = hf_names.tensors_of(config, path)
    if isinstance(names, str):
      wanted[names] = hf_names.file_shape(config, path, leaf.shape)
    else:
      wanted |= {name: hf_names.file_shape(config, path, leaf.shape[1:]) for name in names}
  missing = sorted(set(wanted) - set(tensors) - {'score.bias'})
  # Files of tied models may repeat the table, and old ones carry the rotary frequencies.
  spare = {'lm_head.weight'} if config.tied else set()
  extra = sorted(n for n in set(tensors) - set(wanted) - spare if not n.endswith('rotary_emb.inv_freq'))
  if missing or extra:
    raise ValueError(
        f'{folder}: the tensors do not belong to its config.json: {_some("missing", missing)}, '
        f'{_some("without a place", extra)}'
    )
  for name, shape in wanted.items():
    if name in tensors:
      got = tuple(tensors[name].get_slice(name).get_shape())
      if got != shape:
        raise ValueError(f'{folder}: tensor {name} has shape {got}; config.json asks for {shape}')


def _some(what, names):
  shown = ', '.join(names[:3]) + (', ...' if len(names) > 3 else '')
  return f'{len(names)} {what}' + (f' ({shown})' if names else '')
