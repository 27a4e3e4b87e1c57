"""JudgeBench: the published counts, the file's order, and what `benchmarks.load` knows."""

import collections
import json

import pytest

from spct_jax import benchmarks
from spct_jax.benchmarks import judgebench
from spct_jax.data.items import Skipped
from spct_jax.data.sources import RawRow

ROW = {
  'pair_id': 'p',
  'original_id': None,
  'source': 'mmlu-pro-law',
  'question': 'q',
  'response_model': 'm',
  'response_A': 'a',
  'response_B': 'b',
  'label': 'B>A',
}


def read(**change):
  (item,) = judgebench.reader(RawRow({**ROW, **change}, 'f.jsonl', 4))
  return item


# Mutation seen to fail: the two labels swapped.
def test_a_pair():
  example = read()
  assert (example.uid, example.responses, example.label, example.subset) == (
    'p',
    ('a', 'b'),
    1,
    'mmlu-pro-law',
  )
  assert read(label='A>B').label == 0
  assert read(response_B='a').responses == ('a', 'a')  # the authors count it


def test_what_is_skipped_and_what_is_a_mistake():
  assert read(label='A=B') == Skipped('f.jsonl:4', 'no unique best')
  assert read(response_A=' ') == Skipped('f.jsonl:4', 'empty reply')
  assert read(question='') == Skipped('f.jsonl:4', 'empty prompt')
  with pytest.raises(ValueError, match="f.jsonl:4: 'label' must be 'A>B' or 'B>A', got 'A'"):
    read(label='A')
  with pytest.raises(ValueError, match="'response_B' must be a string, got int"):
    read(response_B=3)
  with pytest.raises(
    ValueError, match=r"f.jsonl:1: missing \['question', .*expected question, response_A"
  ):
    judgebench.reader(RawRow({'a': 1}, 'f.jsonl', 1))


def test_load_knows_every_reader(tmp_path):
  path = tmp_path / 'a.jsonl'
  path.write_text(json.dumps(ROW))
  assert benchmarks.load(path).reader == 'judgebench'
  path.write_text(json.dumps({'prompt': 'q', 'chosen': 'x', 'rejected': 'y'}))
  assert benchmarks.load(path).reader == 'plain'
  with pytest.raises(
    ValueError, match='allowed are auto, plain, hh_rlhf, gsm8k_single, gsm8k_list, judgebench'
  ):
    benchmarks.load(path, 'rewardbench')


@pytest.mark.parametrize(
  ('model', 'labels', 'groups'),
  [
    (
      'gpt-4o-2024-05-13',
      {0: 193, 1: 157},
      {'knowledge': 154, 'reasoning': 98, 'math': 56, 'coding': 42},
    ),
    (
      'claude-3-5-sonnet-20240620',
      {0: 143, 1: 127},
      {'knowledge': 154, 'reasoning': 51, 'math': 34, 'coding': 31},
    ),
  ],
)
def test_the_published_files(shared, model, labels, groups):
  path = (
    shared / 'data' / 'judgebench' / 'data' / f'dataset=judgebench,response_model={model}.jsonl'
  )
  loaded = benchmarks.load(path, strict=True)
  assert loaded.reader == 'judgebench' and not loaded.skipped
  assert collections.Counter(example.label for example in loaded.examples) == labels
  assert (
    collections.Counter(judgebench.group(example.subset) for example in loaded.examples) == groups
  )
