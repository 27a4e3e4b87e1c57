"""Trajectories on disk: what a call returns is what it wrote, and what others wrote is held against the plan.

Mutations seen to fail here: the held trajectories counted and not named; fresh ones returned where some were held;
held chunks believed.
"""

import pytest

from spct_jax import records
from spct_jax.judges import grm, prompts
from spct_jax.stages import drawing
from spct_jax.testing import scripted
from spct_jax.text import tokenizer as tokenizers
from spct_jax.types import Example, Message


@pytest.fixture(scope='module')
def judge():
  tok = tokenizers.load('builtin:small')
  engine = scripted.ScriptedEngine(tok, lambda info: scripted.verdict(info, (8, 3)), max_new_tokens=96)
  settings = grm.Settings(
      template=prompts.load_template('short'), orders='shuffle', single='scale', given_principles=False,
      reference_answer=False, buckets=(300,), chunk_prompts=4, chunk_tasks=4, temperature=1.0, top_p=1.0, top_k=0,
      min_p=0.0, seed=3,
  )
  return grm.Judge(engine, tok, settings)


@pytest.fixture(scope='module')
def planned(judge):
  examples = [
      Example(uid=uid, messages=(Message('user', 'why'),), responses=('yes', 'no'), label=0) for uid in 'abcdef'
  ]
  return grm.plan(judge, examples, samples=2, stage='x')


def draw(judge, planned, path):
  return drawing.draw(judge, planned, path, desc='x')


def test_what_is_returned_is_what_is_written(judge, planned, tmp_path):
  path = tmp_path / 'drawn.jsonl'
  drawn = draw(judge, planned, path)
  assert len(drawn) == 12 and drawn == tuple(records.read_trajectories(path)) == draw(judge, planned, path)


@pytest.mark.parametrize('kept', [0, 1, 2])
def test_a_run_that_was_killed_ends_in_the_same_file(judge, planned, tmp_path, kept):
  whole = draw(judge, planned, tmp_path / 'whole.jsonl')
  writer = records.ChunkedWriter(tmp_path / 'cut.jsonl')
  for chunk in planned.chunks[:kept]:
    writer.write(chunk.index, [records.to_row(t) for t in whole[4 * chunk.index : 4 * chunk.index + 4]])
  assert draw(judge, planned, tmp_path / 'cut.jsonl') == whole
  assert (tmp_path / 'cut.jsonl').read_bytes() == (tmp_path / 'whole.jsonl').read_bytes()


def test_chunks_of_another_plan_are_refused_before_anything_is_drawn(judge, planned, tmp_path):
  whole = draw(judge, planned, tmp_path / 'whole.jsonl')
  writer = records.ChunkedWriter(tmp_path / 'cut.jsonl')
  writer.write(1, [records.to_row(t) for t in whole[:4]])
  calls = len(judge.generate.calls)
  with pytest.raises(ValueError, match='cut.jsonl.chunks: .* is not what this plan draws there.*remove that folder'):
    draw(judge, planned, tmp_path / 'cut.jsonl')
  assert len(judge.generate.calls) == calls and writer.done == {1}


@pytest.mark.parametrize('lines', [slice(1, None), [0, *range(11)]])
def test_a_file_of_other_samples_is_refused(judge, planned, tmp_path, lines):
  """One too few, and one twice in place of another."""
  draw(judge, planned, tmp_path / 'whole.jsonl')
  whole = (tmp_path / 'whole.jsonl').read_text().splitlines(keepends=True)
  kept = whole[lines] if isinstance(lines, slice) else [whole[i] for i in lines]
  (tmp_path / 'cut.jsonl').write_text(''.join(kept))
  with pytest.raises(ValueError, match=f'{len(kept)} trajectories that are not the 12 of the plan.*remove it'):
    draw(judge, planned, tmp_path / 'cut.jsonl')
