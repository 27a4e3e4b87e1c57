"""Answers in parts: what is read and what is learnt. The other forms of a row stand in test_preference.py."""

import pytest

from spct_jax.data import instructions, plain
from spct_jax.data.items import Skipped
from spct_jax.data.sources import RawRow
from spct_jax.types import Example, Message

USER = {'role': 'user', 'content': 'q'}


def part(text, **flags):
  return {'type': 'text', 'text': text, **flags}


def read(*parts, name='messages', **row):
  answer = {'role': 'assistant', 'content': list(parts)}
  (found,) = instructions.read(RawRow({name: [USER, answer], **row}, 'dir/f.jsonl', 3))
  return found


# Mutations seen to fail: a part without the flag not learnt; pieces of the learnt parts only; the subset lost.
@pytest.mark.parametrize('name', instructions.CONVERSATIONS)
def test_parts_keep_their_flags(name):
  found = read(part('one '), part('two ', train=False), part('three', train=True), name=name, id='i', subset='s')
  assert found == instructions.Instruction(
      'i', (Message('user', 'q'),), ('one two three',), subset='s',
      pieces=(('one ', True), ('two ', False), ('three', True)),
  )
  assert ''.join(text for text, _ in found.pieces) == found.responses[0]


# Mutation seen to fail: an Instruction for every list of parts.
def test_parts_without_flags_are_one_text():
  found = read(part('one '), part('two'))
  assert type(found) is Example and found.responses == ('one two',)


def test_flags_of_the_context_mean_nothing():
  turns = [{'role': 'user', 'content': [part('q', train=False)]}, {'role': 'assistant', 'content': 'a'}]
  (found,) = instructions.read(RawRow({'messages': turns}, 'dir/f.jsonl', 3))
  assert type(found) is Example and found.messages == (Message('user', 'q'),)


# Mutations seen to fail: the flags of a `completion` passed over; the first message of it taken for the answer.
@pytest.mark.parametrize('name', plain.SINGLE)
def test_a_completion_of_messages_keeps_its_flags(name):
  answer = {'role': 'assistant', 'content': [part('one '), part('two', train=False)]}
  wanted = instructions.Instruction(
      'i', (Message('user', 'q'),), ('one two',), subset='s', reference='r', pieces=(('one ', True), ('two', False)),
  )
  for value in (answer, [answer], [USER, answer]):
    row = {'id': 'i', 'prompt': 'q', name: value, 'subset': 's', 'reference': 'r'}
    assert instructions.read(RawRow(row, 'dir/f.jsonl', 3)) == (wanted,)
  for value in ('one two', {'role': 'assistant', 'content': 'one two'}):
    (found,) = instructions.read(RawRow({'prompt': 'q', name: value}, 'dir/f.jsonl', 3))
    assert type(found) is Example and found.responses == ('one two',)
  with pytest.raises(ValueError, match='dir/f.jsonl:3: every part of the answer has train=false'):
    value = {'role': 'assistant', 'content': [part('one', train=False)]}
    instructions.read(RawRow({'prompt': 'q', name: value}, 'dir/f.jsonl', 3))


# Mutations seen to fail: any flag taken for its truth value; an answer of which nothing is learnt let through.
@pytest.mark.parametrize('flag', ['false', 0, None, []])
def test_a_flag_is_true_or_false(flag):
  with pytest.raises(ValueError, match=r"dir/f.jsonl:3: 'train' of a part must be true or false, got "):
    read(part('one '), part('two', train=flag))


def test_something_must_be_learnt():
  with pytest.raises(ValueError, match='dir/f.jsonl:3: every part of the answer has train=false.*drop the row'):
    read(part('one ', train=False), part('two', train=False))


def test_what_no_reader_takes_is_not_taken_in_parts_either():
  assert read(part(' ', train=True), part('\n', train=False)) == Skipped('dir/f.jsonl:3', 'empty reply')
  assert read(part('a', train=True), {'type': 'image', 'train': False}) == Skipped('dir/f.jsonl:3', 'not text')
  with pytest.raises(ValueError, match="must end with the assistant's answer"):
    turns = [USER, {'role': 'user', 'content': [part('a', train=True)]}]
    instructions.read(RawRow({'messages': turns}, 'dir/f.jsonl', 3))
