"""GSM8K model solutions: each alone with a 0/1 label, and as lists with one right solution."""

import pytest

from spct_jax.data import gsm8k, preference
from spct_jax.data.items import Skipped
from spct_jax.data.sources import RawRow

MODELS = ('6b_finetuning', '6b_verification', '175b_finetuning', '175b_verification')


def raw(*right, texts=None):
  solutions = {
    model: {'is_correct': flag, 'solution': (texts or 'abcd')[i]}
    for i, (model, flag) in enumerate(zip(MODELS, right, strict=False))
  }
  return RawRow({'question': 'q', 'ground_truth': 'A: 3', **solutions}, 'f.jsonl', 2)


def test_each_solution_alone():
  found = gsm8k.read_single(raw(False, True, False, True))
  assert [(e.label, e.responses, e.subset) for e in found] == [
    (0, ('a',), MODELS[0]),
    (1, ('b',), MODELS[1]),
    (0, ('c',), MODELS[2]),
    (1, ('d',), MODELS[3]),
  ]
  assert found[1].uid == 'f.jsonl:2:6b_verification' and found[1].reference == 'A: 3'
  assert gsm8k.read_single(raw(True, True, texts=['', 'b']))[0] == Skipped(
    'f.jsonl:2:6b_finetuning', 'empty reply'
  )


# Mutation seen to fail: `sum(right) < 1` in place of `!= 1`.
def test_lists_need_exactly_one_right_solution():
  (example,) = gsm8k.read_list(raw(False, False, True, False))
  assert (
    example.responses == ('a', 'b', 'c', 'd')
    and example.label == 2
    and example.grades == (0, 0, 1, 0)
  )
  for right in ((False,) * 4, (True, False, True, False), (True,) * 4):
    assert gsm8k.read_list(raw(*right)) == (Skipped('f.jsonl:2', 'no unique best'),)


def test_mistakes():
  with pytest.raises(ValueError, match='f.jsonl:2: no model solutions'):
    gsm8k.read_single(raw())
  with pytest.raises(
    ValueError, match="'6b_finetuning' must have a string solution and a boolean is_correct"
  ):
    gsm8k.read_single(raw('yes'))


def test_the_published_file(shared):
  path = (
    shared / 'data' / 'gsm8k' / 'grade_school_math' / 'data' / 'example_model_solutions.jsonl.gz'
  )
  single = preference.load(path, 'gsm8k_single', strict=True).examples
  assert len(single) == 4 * 1319
  accuracy = {model: sum(e.label for e in single if e.subset == model) / 1319 for model in MODELS}
  assert [round(100 * accuracy[model], 2) for model in MODELS] == [21.68, 39.04, 34.72, 56.25]
  right = [sum(e.label for e in single[i : i + 4]) for i in range(0, len(single), 4)]
  assert sum(0 < r < 4 for r in right) == 731 and sum(r * (4 - r) for r in right) == 2429

  listed = preference.load(path, 'gsm8k_list')
  assert len(listed.examples) == right.count(1) == 290
  assert {reason: len(places) for reason, places in listed.skipped.items()} == {
    'no unique best': 1319 - 290
  }


def test_a_number_as_the_answer():
  row = {'question': 'q', 'ground_truth': 42, 'm': {'is_correct': True, 'solution': 's'}}
  for read in (gsm8k.read_single, gsm8k.read_list):
    (example,) = read(RawRow(row, 'f.jsonl', 1))
    assert example.reference == '42'
