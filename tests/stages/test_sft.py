"""What the warm start learns from, and in which order. The training loop is replaced by one that keeps the batches."""

import json
import sys

import numpy as np
import pytest

from spct_jax.data import instructions, stream
from spct_jax.stages import datasets, fit, sft
from spct_jax.text import tokenizer as tokenizers

MAKER = """
def rows(count: int):
  for i in range(count):
    yield {'id': f'r{i}', 'prompt': f'Say {i}', 'completion': 'so ' * (1 + i) * (40 if i == 4 else 1)}
"""


@pytest.fixture
def batches_of(config, run, monkeypatch, tmp_path):
  """`batches_of(steps)` runs the stage and returns its first batches and the workdir."""
  (tmp_path / 'sft_maker.py').write_text(MAKER)
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.delitem(sys.modules, 'sft_maker', raising=False)
  config.sft.data, config.sft.batch, config.sft.buckets = 'made:sft_maker:rows?count=5', 2, (64, 256)

  def go(steps, folder='w'):
    kept = []

    def keep(config, workdir, mesh, *, batch_of, **rest):
      (workdir.stage_dir('sft') / 'checkpoint').mkdir()
      kept.extend(batch_of(step) for step in range(steps))

    monkeypatch.setattr(fit, 'fit', keep)
    path = run(lambda info: '', stage='sft', folder=folder)
    return kept, path

  return go


def names(config, batches):
  """The ids of the rows of each batch."""
  tok = tokenizers.load(config.tokenizer.path)
  data = sft.rows(instructions.load(config.sft.data), tok, tuple(config.sft.buckets), what='sft', strict=True)
  name = {row.prompt_ids + row.completion_ids: row.name for row in data}
  return [
      [name[tuple(tokens[:length].tolist())] for tokens, length in zip(batch['tokens'], batch['lengths'])]
      for batch in batches
  ]


# Mutations seen to fail: 'given' shuffling; every batch beginning at row 0; the largest bucket for every batch.
def test_given_is_the_order_of_the_source_again_and_again(config, batches_of):
  config.sft.order = 'given'
  found, _ = batches_of(5)
  assert names(config, found) == [['r0', 'r1'], ['r2', 'r3'], ['r4', 'r0'], ['r1', 'r2'], ['r3', 'r4']]
  assert [batch['tokens'].shape[1] for batch in found] == [64, 64, 256, 64, 256]


def test_shuffle_is_the_order_that_the_seed_draws(config, batches_of):
  found, _ = batches_of(5)
  seed = stream.stage_seed(config.seed, 'sft')
  drawn = [stream.indices(seed=seed, step=step, batch_size=2, size=5)[0] for step in range(5)]
  assert names(config, found) == [[f'r{i}' for i in rows] for rows in drawn]
  assert np.concatenate(drawn).tolist() != [*range(5), *range(5)]


# Mutation seen to fail: READS that name data.instructions whatever sft.data says.
def test_the_stage_reads_what_it_learns_from(config, batches_of, tmp_path):
  assert datasets.sft_data(config) == config.sft.data
  assert batches_of(1)[0] and not batches_of(1)[0]  # done before
  _, path = batches_of(1)
  inputs = json.loads((path / 'sft' / 'DONE.json').read_text())['fingerprint']['inputs']
  assert list(inputs) == ['made:sft_maker:rows?count=5']
  (tmp_path / 'sft_maker.py').write_text(MAKER + '\n')
  assert batches_of(1)[0]  # the generator changed
  config.sft.data = ''
  _, path = batches_of(1, folder='other')
  inputs = json.loads((path / 'sft' / 'DONE.json').read_text())['fingerprint']['inputs']
  assert list(inputs) == ['builtin:instructions']


# Mutations seen to fail: the end of the answer always learnt; one flag per part; every row taken for one in parts.
def test_an_answer_in_parts_is_learnt_in_parts(config, tmp_path):
  tok = tokenizers.load(config.tokenizer.path)
  user = {'role': 'user', 'content': 'Which one?'}
  answer = lambda *parts: {
      'role': 'assistant', 'content': [{'type': 'text', 'text': text, 'train': train} for text, train in parts]
  }
  known, guess = ('It is', True), (' the third, perhaps', False)
  rows = [
      {'id': 'end', 'messages': [user, answer(guess, known)]},
      {'id': 'open', 'messages': [user, answer(known, guess)]},
      {'id': 'plain', 'messages': [user, {'role': 'assistant', 'content': 'It is'}]},
  ]
  path = tmp_path / 'parts.jsonl'
  path.write_text('\n'.join(map(json.dumps, rows)))
  end, still_open, plain = sft.rows(instructions.load(path), tok, (256,), what='sft', strict=True)
  ids = {text: tuple(tok.encode_data(text)) for text, _ in (known, guess)}
  eos = tok.eos_ids[0]
  assert end.completion_ids == (*ids[guess[0]], *ids[known[0]], eos)
  assert end.learnt == (*[False] * len(ids[guess[0]]), *[True] * len(ids[known[0]]), True)
  assert still_open.learnt == (*[True] * len(ids[known[0]]), *[False] * len(ids[guess[0]]), False)
  assert (plain.completion_ids, plain.learnt) == ((*ids[known[0]], eos), None)
  assert end.prompt_ids == plain.prompt_ids


def test_the_stage_masks_what_is_not_learnt(config, batches_of, tmp_path):
  row = {'messages': [{'role': 'user', 'content': 'Say so'}, {'role': 'assistant', 'content': [
      {'type': 'text', 'text': 'so ', 'train': False}, {'type': 'text', 'text': 'so', 'train': True}]}]}
  (tmp_path / 'parts.jsonl').write_text(json.dumps(row))
  config.sft.data, config.sft.batch = str(tmp_path / 'parts.jsonl'), 1
  (batch,), _ = batches_of(1)
  tok = tokenizers.load(config.tokenizer.path)
  assert batch['token_mask'].sum() == len(tok.encode_data('so')) + 1 < batch['lengths'][0]
