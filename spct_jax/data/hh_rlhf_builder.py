"""A TFDS builder for hh-rlhf that reads local files, without download and without TensorFlow.

The folder `raw_dir` is laid out as the data is published, one folder per config with the files
train.jsonl.gz and test.jsonl.gz (either may be missing; they may also be uncompressed):

    raw_dir/harmless-base/test.jsonl.gz

    from spct_jax.data import hh_rlhf_builder
    hh_rlhf_builder.build(raw_dir, data_dir, config='harmless-base')

and then the source 'tfds:hh_rlhf/harmless-base:test@data_dir', read as 'hh_rlhf', gives the very
examples that the raw file gives. Rows are stored raw and in the order of the file; `id` is <file
name>:<line>, the uid that the reader gives a row of the raw file. Nothing is filtered here: what
cannot be used is the reader's to say.

The set is stored as ArrayRecord. Importing this module imports TFDS.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator

import tensorflow_datasets as tfds

from spct_jax.data import sources

CONFIGS = ('harmless-base', 'helpful-base', 'helpful-online', 'helpful-rejection-sampled')
SPLITS = ('train', 'test')


class HhRlhf(tfds.core.GeneratorBasedBuilder):
  """Pairs of transcripts of a human and an assistant, of which people preferred one."""

  name = 'hh_rlhf'
  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': 'The raw rows, with an id each.'}
  BUILDER_CONFIGS = [
    tfds.core.BuilderConfig(name=name, description=f'the folder {name} of hh-rlhf')
    for name in CONFIGS
  ]
  MANUAL_DOWNLOAD_INSTRUCTIONS = (
    'raw_dir holds one folder per config with train.jsonl.gz and/or test.jsonl.gz'
  )

  def _info(self) -> tfds.core.DatasetInfo:
    text = tfds.features.Text()
    return tfds.core.DatasetInfo(
      builder=self,
      description='Human preference data about helpful and harmless answers (arXiv 2204.05862).',
      features=tfds.features.FeaturesDict({'id': text, 'chosen': text, 'rejected': text}),
      homepage='https://github.com/anthropics/hh-rlhf',
      disable_shuffling=True,  # the order of the file, so that row i of the split is line i
    )

  def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
    return {
      split: self._generate_examples(path)
      for split, path in raw_files(dl_manager.manual_dir, self.builder_config.name).items()
    }

  def _generate_examples(self, path: pathlib.Path) -> Iterator[tuple[int, dict]]:
    for raw in sources.read(path):
      missing = [name for name in ('chosen', 'rejected') if not isinstance(raw.row.get(name), str)]
      if missing:
        raise ValueError(
          f'{raw.where}: {missing} must be strings; columns found: {sorted(raw.row)}'
        )
      yield raw.line, {'id': raw.name, 'chosen': raw.row['chosen'], 'rejected': raw.row['rejected']}


def raw_files(raw_dir: os.PathLike | str, config: str) -> dict[str, pathlib.Path]:
  """split -> raw file of a config; ValueError if there is none."""
  if config not in CONFIGS:
    raise ValueError(f'unknown config {config!r} of hh_rlhf: allowed are {", ".join(CONFIGS)}')
  folder = pathlib.Path(raw_dir) / config
  found = {
    split: folder / f'{split}.jsonl{end}'
    for split in SPLITS
    for end in ('', '.gz')
    if (folder / f'{split}.jsonl{end}').is_file()
  }
  if not found:
    raise ValueError(
      f'{folder}: no train.jsonl.gz and no test.jsonl.gz there; put at least one of them there'
    )
  return found


def build(raw_dir: os.PathLike | str, data_dir: os.PathLike | str, config: str) -> HhRlhf:
  """Prepares one config under `data_dir`; what was prepared there before is kept as it is."""
  raw_files(raw_dir, config)  # the mistakes a user can make, before TFDS makes folders
  builder = HhRlhf(config=config, data_dir=os.fspath(data_dir), file_format='array_record')
  builder.download_and_prepare(
    download_config=tfds.download.DownloadConfig(
      manual_dir=os.fspath(raw_dir), try_download_gcs=False
    )
  )
  return builder
