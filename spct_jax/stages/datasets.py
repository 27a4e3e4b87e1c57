"""The items of a run, from the files that its config names: to train on, to evaluate, to validate; what is left out."""

import dataclasses
from typing import Any

from spct_jax import benchmarks, types
from spct_jax.data import heldout
from spct_jax.stages import loading


@dataclasses.dataclass(frozen=True)
class Data:
  """Items of a run: `train` for training and sampling, `heldout` for the evaluation, what was left out and why.

  `validation` items only watch training: they are in none of the others. `contaminated` are held-out items whose
  conversation is in `train` too, `validation_contaminated` validation items whose conversation is in `train` or
  `heldout`; only files of their own can bring such items.
  """

  train: tuple[types.Example, ...]
  heldout: tuple[types.Example, ...]
  validation: tuple[types.Example, ...]
  skipped: dict[str, list[str]]
  contaminated: tuple[str, ...]
  validation_contaminated: tuple[str, ...]


def load(config: Any) -> Data:
  """Reads the preference file(s); labels are needed, so items without one are skipped and named."""
  fields = config.data
  if not fields.path:
    raise ValueError(
        'data.path is empty; give the preference file: --config.data.path=FILE, or path=FILE after the colon'
    )
  for name, zero in (('limit', 'all'), ('eval_limit', 'all'), ('validation_limit', 'none')):
    if fields[name] < 0:
      raise ValueError(f'data.{name}: got {fields[name]}; allowed: a number of items, or 0 = {zero}')
  loaded = benchmarks.load(
      fields.path, reader=fields.reader, strict=config.strict, limit=fields.limit or None
  )
  skipped = dict(loaded.skipped)
  if fields.eval_path:
    held = benchmarks.load(
        fields.eval_path,
        reader=fields.eval_reader,
        strict=config.strict,
        limit=fields.eval_limit or None,
    )
    for reason, names in held.skipped.items():
      skipped[reason] = [*skipped.get(reason, []), *names]
    train, held = loaded.examples, held.examples
  else:
    parts = heldout.split(loaded.examples, fraction=fields.heldout, seed=config.seed, by='prompt')
    train, held = parts.train, parts.held_out[: fields.eval_limit or None]
  train, held = _labelled(train, skipped), _labelled(held, skipped)
  validation = ()
  if fields.validation_limit and fields.validation_path:
    watched = benchmarks.load(
        fields.validation_path, reader='auto', strict=config.strict, limit=fields.validation_limit
    )
    for reason, names in watched.skipped.items():
      skipped[reason] = [*skipped.get(reason, []), *names]
    validation = _labelled(watched.examples, skipped)
    if not validation:
      raise ValueError(
          f'{fields.validation_path}: none of its first {len(watched.examples)} items has a label, so none can be '
          'validated on; give labelled items, or set data.validation_limit=0'
      )
  if config.strict and skipped.get('no label'):
    raise ValueError(f'{fields.path}: strict, and {len(skipped["no label"])} items have no label: '
                     + ', '.join(skipped['no label'][:10]))
  if not train or not held:
    raise ValueError(
        f'{fields.path}: {len(train)} items with a label to train on and {len(held)} to evaluate; both are needed'
    )
  if fields.validation_limit and not fields.validation_path:
    try:
      parts = heldout.take(train, fields.validation_limit, config.seed)
    except ValueError as error:
      raise ValueError(
          f'data.validation_limit: got {fields.validation_limit}; {error}. Validation items are taken from the '
          'training items; lower data.validation_limit, give a file of their own (data.validation_path), or do '
          'without (data.validation_limit=0 and grpo.validate_every=0)'
      ) from None
    train, validation = parts.train, parts.held_out
  uids = lambda shared: tuple(uid for both in shared for uid in both.held_out)
  return Data(
      train=train,
      heldout=held,
      validation=validation,
      skipped=skipped,
      contaminated=uids(heldout.contamination(train, held)),
      validation_contaminated=uids(heldout.contamination((*train, *held), validation)),
  )


def _labelled(examples, skipped):
  bare = [example.uid for example in examples if example.label is None]
  if bare:
    skipped['no label'] = [*skipped.get('no label', []), *bare]
  return tuple(example for example in examples if example.label is not None)


def reads(config: Any) -> tuple[str, ...]:
  """What the result of a stage that judges depends on: preference data, and `loading.setup_reads`."""
  fields = config.data
  watched = fields.validation_path if fields.validation_limit else ''
  data_files = (path for path in (fields.path, fields.eval_path, watched) if path)
  return (*data_files, *loading.setup_reads(config))


def sft_data(config: Any) -> str:
  """What the warm start learns from; sft.data = '' stands for data.instructions."""
  return config.sft.data if config.sft.data else config.data.instructions
