"""Held-out items stay held out, and prompts on both sides are found."""

import pytest

from spct_jax import data
from spct_jax.data import heldout
from spct_jax.types import Example, Message


def item(uid, prompt):
  return Example(uid, (Message('user', prompt),), ('a', 'b'), 0)


ITEMS = [item(f'file:{i}', f'question {i}') for i in range(1000)]


# Mutation seen to fail: membership by the index in the list.
def test_adding_and_reordering_moves_nothing():
  first = data.split(ITEMS[:600], 0.2, seed=0)
  more = data.split(ITEMS[::-1], 0.2, seed=0)
  assert set(first.held_out) == set(more.held_out) & set(ITEMS[:600])
  assert len(first.train) + len(first.held_out) == 600
  assert 0.15 < len(more.held_out) / 1000 < 0.25
  assert first.train[0] == ITEMS[0] or first.held_out[0] == ITEMS[0]  # the order given is kept
  assert set(data.split(ITEMS, 0.2, seed=1).held_out) != set(more.held_out)
  # A larger part contains the smaller one.
  assert set(more.held_out) < set(data.split(ITEMS, 0.4, seed=0).held_out)


def test_a_prompt_on_both_sides_is_named():
  twice = ITEMS[:40] + [item(f'copy:{i}', f'  QUESTION\n{i} ') for i in range(40)]
  found = data.split(twice, 0.5, seed=0)
  assert found.contamination
  held = {example.uid for example in found.held_out}
  for shared in found.contamination:
    assert {uid.split(':')[1] for uid in shared.train + shared.held_out} == {
      shared.held_out[0].split(':')[1]
    }
    assert held.issuperset(shared.held_out) and not held & set(shared.train)
  crossing = sum((f'file:{i}' in held) != (f'copy:{i}' in held) for i in range(40))
  assert len(found.contamination) == crossing
  assert f'{crossing} prompts stand in both' in found.describe()
  clean = data.split(twice, 0.5, seed=0, by='prompt')
  assert not clean.contamination and 'no prompt in both' in clean.describe()


def test_the_whole_conversation_counts():
  first = Example(
    'a', (Message('user', 'x'), Message('assistant', 'y'), Message('user', 'z')), ('r',)
  )
  second = Example('b', (Message('user', 'z'),), ('r',))
  assert heldout.contamination([first], [second]) == ()
  assert heldout.contamination([first], [first])[0].train == ('a',)


def test_mistakes():
  for fraction in (0, 1, -0.5, 2):
    with pytest.raises(ValueError, match='fraction is the share to hold out'):
      data.split(ITEMS, fraction, seed=0)
  with pytest.raises(ValueError, match='leaves .* to train on'):
    data.split(ITEMS[:1], 0.5, seed=0)
  with pytest.raises(ValueError, match="cannot split by 'subset': allowed are uid, prompt"):
    data.split(ITEMS, 0.5, seed=0, by='subset')


# Mutations seen to fail: prompts in the order of the file; items taken one by one.
def test_a_number_of_items_is_taken_by_whole_prompts():
  twice = ITEMS[:40] + [item(f'copy:{i}', f'  QUESTION\n{i} ') for i in range(40)]
  found = heldout.take(twice, 9, seed=0)
  assert len(found.held_out) == 8 and not heldout.contamination(found.train, found.held_out)
  assert [e for e in twice if e in found.train] == list(found.train) and len(found.train) == 72
  assert set(heldout.take(twice[::-1], 9, seed=0).held_out) == set(found.held_out)
  assert set(found.held_out) < set(heldout.take(twice, 20, seed=0).held_out)
  # After a split of the same seed, it is what a larger split would have held out next.
  parts = data.split(twice, 0.2, seed=0, by='prompt')
  held = parts.held_out + heldout.take(parts.train, 8, seed=0).held_out
  fraction = next(f / 1000 for f in range(200, 1000)
                  if len(data.split(twice, f / 1000, seed=0, by='prompt').held_out) == len(held))
  assert set(data.split(twice, fraction, seed=0, by='prompt').held_out) == set(held)
  for number in (1, 80):  # less than a prompt, and all of them
    with pytest.raises(ValueError, match=f'taking {number} of 80 items \\(40 prompts, which stay whole\\) leaves'):
      heldout.take(twice, number, seed=0)
