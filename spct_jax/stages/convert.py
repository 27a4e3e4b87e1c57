"""A model from one form into another: look at it (inspect), write it as a Hugging Face folder (export), or take it
into a workdir as a checkpoint (import).

The model is `config.model.path`: a Hugging Face folder, a PEFT folder, or WORKDIR:STAGE; without one, random weights of
the page's shape. None of this reads data or an optimizer's state.

    inspect   parameters, bytes and memory per device by group, on any mesh, from headers alone; no tensor is read
    export    tensors in shards with an index, config.json, generation_config.json, tokenizer, chat template, README;
              adapters are merged, or written by themselves in the PEFT layout
    import    every tensor read, checked to be finite and placed on the mesh; WORKDIR:convert is then a model like any
"""

import collections
import dataclasses
import json
import math
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from spct_jax import jsonl, sharding
from spct_jax.models import hf, hf_files, hf_folder
from spct_jax.models.config import DTYPES
from spct_jax.models.transformer import Transformer
from spct_jax.stages import loading, named, plan, processes
from spct_jax.stages.workdir import Workdir, commit, version
from spct_jax.text import tokenizer as tokenizers
from spct_jax.train import checkpoint, peft

READS = ()
WRITES = ()

# First match wins; what is left is named by its own path.
_GROUPS = (
    ('embedding', r'^embed/'), ('output matrix', r'^unembed/'), ('reward head', r'^reward/'), ('norms', r'scale$'),
    ('experts', r'/moe/experts/'), ('router', r'/moe/router/'), ('shared experts', r'/moe/shared/'),
    ('attention', r'/(q|k|v|o)/(kernel|bias)$|/mla/'), ('feed-forward', r'/(gate|up|down)/(kernel|bias)$'),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Given:
  """The model to convert: its chain of names, the page with its own tokenizer, and its decoder in `dtype`.

  dtypes: of the single tensors of a folder that come out as they went in, by name.
  """

  links: tuple[named.Model, ...]
  config: Any
  tokenizer: tokenizers.Tokenizer | None
  decoder: Transformer
  dtype: str
  dtypes: Mapping[str, str]

  @property
  def source(self) -> str | None:
    """The Hugging Face folder that the decoder's shape comes from."""
    return self.links[-1].path if self.links[-1].kind == 'folder' else None


def run(config: Any, workdir: Workdir | None, mesh: Any, generate: Any = None) -> None:
  """Does `config.convert.do`; only an import needs a workdir.

  Raises:
    ValueError: a model that is none, a folder that must not be replaced, or a decoder of no known family.
  """
  del generate
  ways = {'inspect': _inspect, 'export': _export, 'import': _import}
  fields = config.convert
  if fields.do not in ways:
    raise ValueError(f'convert.do: got {fields.do!r}; allowed: {", ".join(ways)}')
  if fields.dtype not in ('', *DTYPES):
    raise ValueError(f"convert.dtype: got {fields.dtype!r}; allowed: {', '.join(DTYPES)}, or '' for the model's own")
  if fields.adapters not in ('merge', 'peft'):
    raise ValueError(f'convert.adapters: got {fields.adapters!r}; allowed: merge, peft')
  if not isinstance(fields.shard_bytes, int) or fields.shard_bytes < 1:
    raise ValueError(f'convert.shard_bytes: got {fields.shard_bytes!r}; allowed: a positive number of bytes')
  ways[fields.do](config, _given(config), workdir, mesh)


# --- the three ways


def _inspect(config, given, workdir, mesh):
  del workdir
  if given.source:
    hf.check_folder(given.source)
  planned = _mesh(config, mesh)
  table = inspect(given.decoder, loading.rules(config.sharding.rules), planned)
  first = given.links[0]
  head = given.decoder.config.head_kind
  told = {'model': config.model.path or 'random weights', 'kind': first.kind, 'head': head, **table}
  if given.tokenizer is not None:
    told['tokens'] = given.tokenizer.vocab_size
  processes.say(*_lines(told))
  if config.convert.json and processes.is_writer():
    path = pathlib.Path(config.convert.json).expanduser()
    jsonl.write_text(path, json.dumps(told, indent=2) + '\n')


def inspect(decoder: Transformer, rules: sharding.Rules, mesh: Any) -> dict[str, Any]:
  """Parameters, their bytes, and bytes on one device of `mesh` (a `Mesh` or an `AbstractMesh`), by group and in all.

  Nothing is made: shapes and shardings say it all. Rows that pad the vocabulary are in the bytes per device, not among
  the parameters; 'padding' counts their numbers.
  """
  abstract = decoder.abstract_params()
  layout = dict(sharding.leaf_paths(sharding.tree_shardings(abstract, rules, mesh)))
  groups: dict[str, dict[str, Any]] = {}
  padding, c = 0, decoder.config
  for path, leaf in sharding.leaf_paths(abstract):
    name = next((name for name, pattern in _GROUPS if re.search(pattern, path)), path)
    row = groups.setdefault(name, {'name': name, 'parameters': 0, 'bytes': 0, 'bytes_per_device': 0})
    count = math.prod(leaf.shape)
    if path in ('embed/table', 'unembed/kernel'):
      padding += count - c.vocab_size * c.width
      count = c.vocab_size * c.width
    row['parameters'] += count
    row['bytes'] += count * leaf.dtype.itemsize
    row['bytes_per_device'] += sharding.bytes_per_device(leaf, layout[path])
  rows = list(groups.values())
  return {
      'layers': c.num_layers,
      'vocabulary': c.vocab_size,
      'dtype': c.param_dtype,
      'mesh': dict(mesh.shape),
      **{key: sum(row[key] for row in rows) for key in ('parameters', 'bytes', 'bytes_per_device')},
      'padding': padding,
      'groups': rows,
  }


def _export(config, given, workdir, mesh):
  fields = config.convert
  if not fields.to and workdir is None:
    raise ValueError('convert.to is empty; give the folder to write: --config.convert.to=FOLDER')
  to = pathlib.Path(fields.to).expanduser() if fields.to else workdir.path / 'export'
  first = given.links[0]
  if os.path.realpath(to) in [os.path.realpath(link.path) for link in given.links if link.path]:
    raise ValueError(f'convert.to: {to} is the model itself, or what it was made from; give another folder')
  if fields.adapters == 'peft':
    return _export_adapters(given, to, mesh)
  # Now, not after minutes of reading.
  processes.only_writer(lambda: hf_folder.check_target(to), what=f'looking at {to}')
  params = loading.params(given.config, 'base', given.decoder, None, mesh)
  tok = given.tokenizer
  copied = first.kind == 'folder' and given.config.tokenizer.path in ('', first.path)  # the files as they are
  template = None  # the fallback, recorded for a tokenizer that has none
  if tok is not None and not tok.hf.chat_template:
    template = tok.hf.chat_template = tok.template
  hf.save(
      to, given.decoder, params, None if copied else tok, dtype=given.dtype, dtypes=given.dtypes,
      shard_bytes=fields.shard_bytes, source=given.source, card=card(config.model.path, given.links),
      chat_template=template,
  )  # fmt: skip
  if processes.is_writer():
    files = sorted(path.name for path in to.iterdir())
    size = sum(path.stat().st_size for path in to.iterdir() if path.is_file())
    processes.say(f'exported: {to}, {plan.size(size)} in {given.dtype}: {", ".join(files)}')


def _export_adapters(given, to, mesh):
  first = given.links[0]
  below = next(link for link in given.links if not named.is_adapters(link))
  if below is first:
    raise ValueError(
        'convert.adapters: peft writes the adapters that a stage trained, and this model has none of its own; give '
        'WORKDIR:STAGE of a stage with lora.rank, or adapters=merge'
    )
  if below.kind != 'folder':
    raise ValueError(
        f'convert.adapters: these adapters are on {below.kind} weights, and the PEFT layout names a folder as its '
        'base; export the base first and train on that folder, or take adapters=merge'
    )
  adapted, adapters, _ = loading.adapters(given.config, given.links, given.decoder, None, mesh)
  peft.save(to, adapted, adapters, base=given.source)
  processes.say(f'exported: {to}, adapters on {given.source}')


def _import(config, given, workdir, mesh):
  if workdir is None:
    raise ValueError('an import needs a workdir to put the checkpoint into; give --workdir=FOLDER')
  reads = named.reads(given.config, 'base')
  if workdir.is_done('convert', config, reads):
    return processes.say('convert: done already')
  folder = workdir.start('convert', config, reads)
  params = loading.params(given.config, 'base', given.decoder, None, mesh)
  bad = [path for path, leaf in sharding.leaf_paths(params) if not bool(_finite(leaf))]
  if bad:
    what = hf_files.listing(bad)
    raise ValueError(f'{config.model.path}: values that are not finite in {what}; the model is damaged')
  with checkpoint.Checkpoints(folder / 'checkpoint', keep=1) as checkpoints:
    checkpoints.save(0, {'params': params, 'step': jnp.zeros((), jnp.int32)}, {'model': str(config.model.path)})
  workdir.mark_done('convert', config, reads, ('convert/checkpoint',))
  count = inspect(given.decoder, loading.rules(config.sharding.rules), mesh)['parameters']
  processes.say(
      f'imported: {count:,} parameters in {given.dtype}; name it as a model: {workdir.path}:convert'
  )


_finite = jax.jit(lambda leaf: jnp.isfinite(leaf).all())


# --- the model


def _given(config):
  links = named.chain(config, 'base', 'model.path')
  first, root = links[0], links[-1]
  path = config.tokenizer.path or _own_tokenizer(links)
  tok = tokenizers.load(path) if path else None
  dtype, dtypes = (config.convert.dtype, {}) if config.convert.dtype else _own_dtypes(first)
  # Merging rounds once, at the end; a folder's own tensors are read as they will be written, if all are of one dtype.
  several = config.convert.do == 'export' and not set(dtypes.values()) <= {dtype}
  held = dtype if first.kind == 'folder' and not several else 'float32'
  own = config.copy_and_resolve_references()
  with own.unlocked():
    own.tokenizer.path = path
    own.model.param_dtype = own.model.dtype = own.model.sampler_dtype = held
  if root.kind == 'random' and root.config is config:
    links = tuple(dataclasses.replace(link, config=own) if link.config is config else link for link in links)
    if tok is None:
      raise ValueError(
          'random weights need a tokenizer for the size of their vocabulary; give --config.tokenizer=FOLDER'
      )
  head_kind = named.head_kind(own, 'base', 'model.path')
  if tok is not None:
    decoder = loading.model(own, tok, head_kind=head_kind)
  else:
    trained = [link.config for link in links if link.kind == 'stage']
    padded = (trained[0] if trained else own).model.vocab_multiple
    settings = loading.with_routers(hf.read_config(root.path, held), root.path)
    decoder = Transformer(dataclasses.replace(settings, head_kind=head_kind, vocab_multiple=padded))
  return _Given(links, own, tok, decoder, dtype, dtypes)


def _own_tokenizer(links):
  """The tokenizer that the model was trained with or that its folder holds; '' where there is none."""
  for link in links:
    if link.kind == 'stage' and link.config.tokenizer.path:
      return link.config.tokenizer.path
    folder = pathlib.Path(link.path)
    if link.kind != 'stage' and link.path and any((folder / name).is_file() for name in tokenizers.FILES):
      return link.path
  return ''


def _own_dtypes(first) -> tuple[str, dict[str, str]]:
  """(what a folder holds most bytes in, or a stage its parameters; the dtypes of the folder's tensors by name)."""
  if first.kind != 'folder':
    return first.config.model.param_dtype if first.config is not None else 'float32', {}
  with hf_files.Weights(first.path) as weights:
    tensors = [tensor for tensor in weights.tensors.values() if tensor.dtype in hf_files.DTYPES]
  size = collections.Counter()
  for tensor in tensors:
    size[hf_files.DTYPES[tensor.dtype].name] += tensor.nbytes
  return max(size, key=size.get, default='float32'), {t.name: hf_files.DTYPES[t.dtype].name for t in tensors}


def _mesh(config, mesh):
  """The mesh to plan for: that of `convert.mesh`, which no device need be there for, or the one there is."""
  sizes = {axis: size for axis, size in dict(config.convert.mesh).items() if size}
  if not sizes:
    return mesh
  if any(not isinstance(size, int) or size < 1 for size in sizes.values()):
    raise ValueError(f'convert.mesh: got {sizes}; allowed: positive sizes, or all 0 for the mesh of this run')
  axes = tuple(mesh.axis_names)
  return jax.sharding.AbstractMesh(tuple(sizes.get(axis, 1) for axis in axes), axes)


# --- words


def card(name: str, links: tuple[named.Model, ...]) -> hf_folder.Card:
  """How the model was made, from the records of the workdir that trained it."""
  first, root = links[0], links[-1]
  base = root.path if root.kind == 'folder' else None
  told = tuple(filter(None, map(named.stand_in, links, links[1:])))
  if first.kind != 'stage':
    notes = (f'converted from `{name}`',) if name else ('random weights: nothing was trained',)
    return hf_folder.Card(base_model=base, commit=commit(), version=version(), notes=notes + told)
  folder = pathlib.Path(first.path)
  done = hf_folder.read_json(folder / first.stage / 'DONE.json')
  prints = done['fingerprint'] or {'config': None, 'inputs': {}}
  steps = [link.stage for link in reversed(links) if link.kind == 'stage']
  notes = (f'stages: {" → ".join(steps)}',) if len(steps) > 1 else ()
  return hf_folder.Card(
      base_model=base or 'random weights',
      stage=first.stage,
      config_hash=prints['config'],
      commit=done['commit'],
      version=done['version'],
      data=tuple(read for read in prints['inputs'] if not read.endswith(('DONE.json', 'config.json'))),
      metrics=_metrics(folder, first),
      notes=notes + told,
  )


def _metrics(folder, first) -> tuple[Mapping[str, Any], ...]:
  """The rows of the workdir's evaluation that are about this stage, over all items."""
  path = folder / 'results.json'
  if not path.is_file() or 'evaluate' not in first.config:
    return ()
  models = tuple(first.config.evaluate.models)
  if first.stage not in models:
    return ()
  called = loading.stage_names(first.config)[models.index(first.stage)]
  rows = json.loads(path.read_text(encoding='utf-8'))
  keys = ('benchmark', 'n', 'k', 'temperature', 'guided', 'accuracy', 'stderr', 'items', 'parse_failure')
  return tuple(
      {key: row.get(key) for key in keys} for row in rows if row.get('stage') == called and row.get('subset') == 'all'
  )


def _lines(told):
  mesh = ', '.join(f'{axis} {size}' for axis, size in told['mesh'].items())
  lines = [
      f'model: {told["model"]} ({told["kind"]}, {told["head"]} head)',
      f'layers: {told["layers"]}; vocabulary: {told["vocabulary"]}'
      + (f', of which the tokenizer has {told["tokens"]}' if 'tokens' in told else ''),
      f'mesh: {mesh}',
      *([f'padding of the vocabulary, in memory only: {told["padding"]:,} numbers'] if told['padding'] else ()),
      '',
      f'{"":<16}{"parameters":>18}{told["dtype"]:>14}{"per device":>14}',
  ]
  for row in (*told['groups'], {**told, 'name': 'sum'}):
    whole, part = plan.size(row['bytes']), plan.size(row['bytes_per_device'])
    lines.append(f'{row["name"]:<16}{row["parameters"]:>18,}{whole:>14}{part:>14}')
  return lines
