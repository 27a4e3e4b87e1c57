"""Models in and out of Hugging Face folders: `config.json` and safetensors, one file or several.

Names and the values of tensors are in `hf_names`, the settings in `hf_config`.

A sequence-classification model with one label is the scalar head.
"""

import dataclasses
import os
import pathlib
import shutil
import tempfile
import types
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from spct_jax import jsonl, sharding
from spct_jax.models import hf_config, hf_experts, hf_files, hf_folder, hf_names, hf_slices, hf_tokenizer
from spct_jax.models.config import DTYPES, ModelConfig
from spct_jax.models.hf_files import Weights, listing
from spct_jax.models.transformer import Transformer
from spct_jax.text import tokenizer as tokenizers

SHARD_BYTES = 5 * 10**9  # one file up to this size, as other writers do

# Tensors that may lie in a file and belong to no leaf: old files carry the rotary frequencies.
_SPARE = 'rotary_emb.inv_freq'


def read_config(folder: str | os.PathLike, dtype: str = 'float32') -> ModelConfig:
  """The model of a folder, computing and stored in `dtype`; ValueError if it is none of the known families."""
  path = pathlib.Path(folder) / 'config.json'
  if not path.is_file():
    raise ValueError(f'{folder}: no config.json there; give a folder as save_pretrained writes it')
  return hf_config.read(str(path), jsonl.read_json(path), dtype=dtype)


def load(
    folder: str | os.PathLike,
    dtype: Any = 'float32',
    mesh: Any = None,
    rules: Any = None,
    vocab_multiple: int | None = None,
    leave: tuple[str, ...] = (),
) -> tuple[Transformer, dict]:
  """`(model, params)` of a folder, computing and stored in `dtype`; with a mesh, placed by the sharding rules.

  The vocabulary is padded to a multiple of `vocab_multiple`, by default of the number of devices in the mesh.
  Top-level parts of the parameters named in `leave` are not read: an output matrix whose place another head takes.

  Every process reads from the files only what its devices hold, straight into the memory of their dtype and layout:
  the host never holds more than that and one tensor of the file. ValueError, before the first tensor is read, for
  whatever is wrong with the folder.
  """
  if (mesh is None) != (rules is None):
    raise ValueError('load: got one of mesh and rules; give both to shard the parameters, or neither')
  folder, dtype = pathlib.Path(folder), jnp.dtype(dtype)
  if dtype.name not in DTYPES:
    raise ValueError(f'load: got dtype {dtype.name}; allowed are {", ".join(DTYPES)}')
  if vocab_multiple is None:
    vocab_multiple = 1 if mesh is None else int(mesh.size)
  settings = dataclasses.replace(read_config(folder, dtype.name), vocab_multiple=vocab_multiple)
  with Weights(folder) as weights, hf_slices.threads() as pool:
    settings = hf_experts.with_routers(settings, weights.tensors)
    model = Transformer(settings)
    abstract = model.abstract_params()
    if mesh is None:
      one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
      places = jax.tree.map(lambda leaf: one, abstract)
    else:
      places = sharding.tree_shardings(abstract, rules, mesh)
    check(weights, settings, abstract)
    _check_tied(weights, settings, mesh)
    abstract, places = ({k: v for k, v in tree.items() if k not in leave} for tree in (abstract, places))

    def fill(path, leaf, place):
      names, axes = hf_names.tensors_of(settings, path)
      pairs = hf_names.pairs(settings, path)
      return hf_slices.fill(weights, names, axes, leaf.shape, leaf.dtype, place, pool, pairs)

    names = [path for path, _ in sharding.leaf_paths(abstract)]
    paths = jax.tree.unflatten(jax.tree.structure(abstract), names)
    return model, jax.block_until_ready(jax.tree.map(fill, paths, abstract, places))


def check_folder(folder: str | os.PathLike) -> None:
  """`check` of a folder's tensors against its own config.json."""
  settings = read_config(folder)
  with Weights(folder) as weights:
    check(weights, settings, Transformer(settings).abstract_params())


def check(weights: Weights, config: ModelConfig, abstract: Any) -> None:
  """ValueError unless every parameter has its tensor and every tensor its place, of the shape of `config.json`.

  Headers alone are read, and all that is wrong is named at once. Where a tied model's file holds the output matrix too,
  it stands in for a missing table, as `transformers` does it.
  """
  tensors = weights.tensors
  hf_experts.unfuse(tensors, config)
  wanted = {}
  for path, leaf in sharding.leaf_paths(abstract):
    names, _ = hf_names.tensors_of(config, path)
    flat = list(_flat(names))
    shape = hf_names.file_shape(config, path, leaf.shape[hf_names.depth(names) :])
    wanted |= {name: tuple(shape) for name in flat}
  table, output = hf_names.ENDS['embed/table'][0], hf_names.ENDS['unembed/kernel'][0]
  twice = config.tied and output in tensors
  if twice and table not in tensors:
    tensors[table] = tensors.pop(output)
    twice = False
  spare = {output} if twice else set()
  missing = sorted(set(wanted) - set(tensors))
  extra = sorted(name for name in set(tensors) - set(wanted) - spare if not name.endswith(_SPARE))
  there = [name for name in wanted if name in tensors]
  shapes = [name for name in there if tensors[name].shape != wanted[name]]
  if twice and tensors[output].shape != wanted[table]:
    shapes.append(output)
  dtypes = [name for name in there if tensors[name].dtype not in hf_files.DTYPES]
  said = [
      (f'{len(missing)} missing', missing, None),
      (f'{len(extra)} without a place', extra, lambda name: tensors[name].path.name),
      (
          f'{len(shapes)} of another shape', shapes,
          lambda name: f'{_text(tensors[name].shape)} in {tensors[name].path.name}, by config.json '
          f'{_text(wanted.get(name, wanted[table]))}',
      ),
      (
          f'{len(dtypes)} of a dtype that is not read ({", ".join(hf_files.DTYPES)} are)', dtypes,
          lambda name: f'{tensors[name].dtype} in {tensors[name].path.name}',
      ),
  ]  # fmt: skip
  problems = [f'{what}: {listing(names, about)}' for what, names, about in said if names]
  if problems:
    raise ValueError(f'{weights.folder}: the tensors do not belong to its config.json: ' + '; '.join(problems))


def _check_tied(weights, config, mesh):
  """ValueError where a tied model's file holds the table twice, and not the same; each process compares a part."""
  table, output = (weights.tensors.get(hf_names.ENDS[path][0]) for path in ('embed/table', 'unembed/kernel'))
  if not config.tied or output is None:
    return
  count = 1 if mesh is None else jax.process_count()
  same = weights.same(table, output, jax.process_index() if count > 1 else 0, count)
  if count > 1:
    same = bool(np.all(multihost_utils.process_allgather(np.int32(same))))
  if not same:
    raise ValueError(
        f'{output.path}: {output.name} differs from {table.name}, but config.json ties them (tie_word_embeddings); set '
        'tie_word_embeddings to false there, or remove the tensor'
    )


def save(
    folder: str | os.PathLike,
    model: Transformer,
    params: dict,
    tokenizer: Any = None,
    *,
    dtype: Any = None,
    dtypes: Mapping[str, Any] = types.MappingProxyType({}),
    shard_bytes: int = SHARD_BYTES,
    source: str | os.PathLike | None = None,
    card: hf_folder.Card = hf_folder.Card(),
    chat_template: str | None = None,
) -> None:
  """Writes a folder that `load` and `transformers` read; it appears whole, or what was there stays (`hf_folder`).

  tokenizer: our `text.tokenizer.Tokenizer`, or a fast one of `transformers`.
  dtype: of the tensors, by default that of the parameters. dtypes: of single tensors, by name, where it is another.
  shard_bytes: a file holds so much, or one tensor.
  source: the folder that the model was imported from; fields of its `config.json` and `generation_config.json` that
    still hold are kept, the names under which it holds a tied table, and its tokenizer's files if no `tokenizer` is
    given.
  card: how the model was made, for the README.
  chat_template: written beside the tokenizer's files of a source without one.

  With several processes every one calls this, with a folder that the first one sees, and the first one writes. The
  host holds one tensor at a time. ValueError if the folder is there and is no model folder, if no family of
  `transformers` computes this decoder, or if `transformers` would read the tokenizer otherwise beside this family.
  """
  config = model.config
  dtype = jnp.dtype(config.param_dtype if dtype is None else dtype)
  if dtype.name not in DTYPES:
    raise ValueError(f'save: got dtype {dtype.name}; allowed are {", ".join(DTYPES)}')
  if shard_bytes < 1:
    raise ValueError(f'shard_bytes: got {shard_bytes}; allowed: a positive number of bytes')
  if tokenizer is not None and not isinstance(tokenizer, tokenizers.Tokenizer):
    tokenizer = tokenizers.wrap(tokenizer)
  if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
    raise ValueError(
        f'save: the tokenizer has {tokenizer.vocab_size} tokens, but the model embeds {config.vocab_size}; give the '
        'tokenizer that belongs to the model'
    )
  source = None if source is None else pathlib.Path(source)
  fields = _config_json(dataclasses.replace(config, dtype=dtype.name, param_dtype=dtype.name), source)
  with tempfile.TemporaryDirectory() as private:
    small = os.path.join(private, 'small')  # with the rights of any folder: they go over with its files
    os.mkdir(small)

    def prepare():
      hf_folder.check_target(folder)
      hf_tokenizer.write(pathlib.Path(small), config, fields, tokenizer, source, chat_template)

    _first_must(prepare)
    shards = _plan(config, params, dtype, dtypes, shard_bytes, _table_names(config, source))
    values = lambda shard: (_value(config, params, tensor) for tensor in shard)
    if jax.process_index() > 0:
      for shard in shards:
        for value in values(shard):
          del value  # every process takes part in gathering it
    else:
      with hf_folder.replacing(folder) as partial:
        _write_tensors(partial, shards, values)
        shutil.copytree(small, partial, dirs_exist_ok=True)
        text = hf_folder.readme(
            pathlib.Path(folder).resolve().name, card, head_kind=config.head_kind, dtype=dtype.name,
            parameters=sum(int(np.prod(tensor.shape)) for shard in shards for tensor in shard),
        )
        (partial / 'README.md').write_text(text, encoding='utf-8')
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices('hf.save')  # nobody reads the folder before it is there


# --- what is written


def _first_must(prepare):
  """Runs `prepare` in the first process, and ends every process where it cannot: the others would wait forever."""
  problem = None
  if jax.process_index() == 0:
    try:
      prepare()
    except (ValueError, OSError) as error:
      problem = error
  if jax.process_count() > 1 and int(multihost_utils.broadcast_one_to_all(np.int32(problem is not None))):
    problem = problem or ValueError('save: process 0 could not write the model; its message says why')
  if problem is not None:
    raise problem


def _write_tensors(folder, shards, values):
  where, total = {}, 0
  for number, shard in enumerate(shards, 1):
    count = '' if len(shards) == 1 else f'-{number:05d}-of-{len(shards):05d}'
    file = f'model{count}.safetensors'
    entries = [(tensor.name, tensor.dtype.name, tensor.shape) for tensor in shard]
    total += hf_folder.write_tensors(folder / file, entries, values(shard))
    where |= {tensor.name: file for tensor in shard}
  if len(shards) > 1:
    hf_folder.write_index(folder, where, total)


@dataclasses.dataclass(frozen=True)
class _Planned:
  """A tensor to be written: the leaf it comes from, and the place in its stacked dimensions."""

  name: str
  path: str
  lead: tuple[int, ...]
  shape: tuple[int, ...]
  dtype: np.dtype


def _table_names(config, source) -> list[str]:
  """The tensors of the table: of a tied model the source may hold it under either name, or both."""
  names = [hf_names.ENDS[path][0] for path in ('embed/table', 'unembed/kernel')]
  if source is not None and config.tied and config.head_kind == 'lm' and hf_files.present(source):
    with Weights(source) as weights:
      return [name for name in names if name in weights.tensors] or names[:1]
  return names[:1]


def _plan(config, params, dtype, dtypes, shard_bytes, table_names) -> list[list[_Planned]]:
  """Which tensors go into which file."""
  shards, room = [[]], shard_bytes
  for path, leaf in sharding.leaf_paths(params):
    names, _ = hf_names.tensors_of(config, path)
    places = [((), name) for name in table_names] if path == 'embed/table' else _leads(names)
    shape = tuple(hf_names.file_shape(config, path, leaf.shape[hf_names.depth(names) :]))
    stored = hf_experts.stored(config, path, dtype)
    for lead, name in places:
      own = np.dtype(jnp.dtype(dtypes[name])) if name in dtypes else stored
      size = int(np.prod(shape)) * own.itemsize
      if size > room and shards[-1]:
        shards, room = shards + [[]], shard_bytes
      shards[-1].append(_Planned(name, path, lead, shape, own))
      room -= size
  return shards


def _value(config, params, tensor) -> np.ndarray:
  leaf = params
  for key in tensor.path.split('/'):
    leaf = leaf[key]
  for i in tensor.lead:
    leaf = leaf[i]
  value = hf_names.theirs(config, tensor.path, sharding.to_host(leaf))
  try:
    return hf_files.rounded(value, tensor.dtype)
  except OverflowError as error:
    raise ValueError(f'tensor {tensor.name} {error}') from None


def _config_json(config: ModelConfig, source: pathlib.Path | None) -> dict[str, Any]:
  """The fields of `config.json`: those of the source that still hold, and what is different now."""
  ours = hf_config.write(config)
  if source is None:
    return ours
  kept = hf_folder.read_json(source / 'config.json')
  if not kept:
    raise ValueError(f'{source}: no config.json there; give the folder that the model was imported from')
  kept.pop('auto_map', None)  # names program files, which stay behind; and transformers has the family itself
  before = read_config(source, config.dtype)
  same = dict(vocab_multiple=config.vocab_multiple, remat=config.remat)
  written = hf_config.write(before)
  changed = {
      name: value for name, value in ours.items()
      if name != 'torch_dtype' and (name not in written or written[name] != value)
  }  # fmt: skip
  fields = {name: value for name, value in kept.items() if name in ours or name not in written} | changed
  names = [name for name in ('dtype', 'torch_dtype') if name in kept] or ['torch_dtype']
  fields |= {name: config.param_dtype for name in names}
  # A field of the source that now contradicts the model (an older spelling, for example) is not worth keeping it.
  try:
    again = hf_config.read('config.json', fields, dtype=config.dtype)
  except ValueError:
    return ours
  return fields if dataclasses.replace(again, **same) == config else ours


def _flat(names) -> Iterator[str]:
  return (name for _, name in _leads(names))


def _leads(names, lead=()) -> Iterator[tuple[tuple[int, ...], str]]:
  """Each name with its place in the stacked dimensions."""
  if isinstance(names, str):
    yield lead, names
  else:
    for i, part in enumerate(names):
      yield from _leads(part, (*lead, i))


def _text(shape) -> str:
  return f'[{", ".join(map(str, shape))}]'
