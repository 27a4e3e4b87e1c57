"""The plain reader on every way to write a preference, and its errors."""

import pytest

from spct_jax.data import plain
from spct_jax.data.items import Skipped
from spct_jax.data.sources import RawRow
from spct_jax.types import Message

INF = float('inf')


def turn(role, content):
  return {'role': role, 'content': content}


def read(**row):
  (item,) = plain.read(RawRow(row, 'dir/f.jsonl', 3))
  return item


def parts(role, *texts):
  return turn(role, [{'type': 'text', 'text': text, 'image': None} for text in texts])


USER = [turn('user', 'q')]
CONTEXT = [turn('user', 'a'), turn('assistant', 'b'), turn('user', 'q')]
IMAGE = [turn('user', [{'type': 'text', 'text': 'q'}, {'type': 'image_url', 'image_url': 'u'}])]
GOOD, BAD = turn('assistant', 'good'), turn('assistant', 'bad')


@pytest.mark.parametrize(
  'row',
  [
    {'prompt': 'q', 'chosen': 'good', 'rejected': 'bad'},
    {'question': 'q', 'chosen': ['good'], 'rejected': ['bad']},
    {'instruction': 'q', 'chosen': GOOD, 'rejected': BAD},
    {'prompt': USER, 'chosen': [GOOD], 'rejected': [BAD]},
    {'messages': USER, 'chosen': 'good', 'rejected': 'bad'},
    {'prompt': 'q', 'messages': [*USER, GOOD], 'chosen': [*USER, GOOD], 'rejected': [*USER, BAD]},
    {'chosen': [*USER, GOOD], 'rejected': [*USER, BAD]},
    {
      'chosen': [{'from': 'human', 'value': 'q'}, {'from': 'gpt', 'value': 'good'}],
      'rejected': [*USER, BAD],
    },
    {'prompt': 'q', 'responses': ['bad', 'good'], 'label': 1},
    {'prompt': 'q', 'responses': ['good', 'bad'], 'grades': [2, 1.5]},
    {'query': 'q', 'responses': [GOOD, BAD], 'scores': [0.2, 0.1], 'label': 0},
    # ShareGPT's way, and columns and roles of other makers.
    {
      'conversations': [{'from': 'human', 'value': 'q'}],
      'chosen': {'from': 'gpt', 'value': 'good'},
      'rejected': {'from': 'gpt', 'value': 'bad'},
    },
    {'prompt': [parts('user', 'q')], 'chosen': parts('assistant', 'go', 'od'), 'rejected': 'bad'},
    {'instruction': 'q', 'input': '', 'chosen': 'good', 'rejected': 'bad'},
    {'prompt': 'q', 'system': ' ', 'chosen': 'good', 'rejected': 'bad'},
    {'prompt': 'q', 'prompt_id': 'shared', 'chosen': 'good', 'rejected': 'bad'},
    # Null columns of a schema that several data sets share.
    {'prompt': 'q', 'chosen': 'good', 'rejected': 'bad', 'completion': None, 'responses': None},
    {'prompt': None, 'question': 'q', 'responses': ['good', 'bad'], 'label': 0, 'chosen': None},
    {'prompt': [{**USER[0], 'from': None, 'tool_calls': None}], 'chosen': GOOD, 'rejected': BAD},
  ],
)
def test_ways_to_write_a_pair(row):
  example = read(**row)
  assert example.messages == (Message('user', 'q'),)
  assert sorted(example.responses) == ['bad', 'good'] and example.responses[example.label] == 'good'
  assert example.uid == 'f.jsonl:3'


# Mutation seen to fail: the prompt of whole conversations taken as their first turn.
def test_a_conversation_keeps_its_turns():
  for row in (
    {'prompt': CONTEXT, 'chosen': 'good', 'rejected': 'bad'},
    {'chosen': [*CONTEXT, GOOD], 'rejected': [*CONTEXT, BAD]},
    {'prompt': CONTEXT, 'chosen': [*CONTEXT, GOOD], 'rejected': [*CONTEXT, BAD]},
  ):
    example = read(**row)
    assert [message.content for message in example.messages] == ['a', 'b', 'q']
    assert example.responses[example.label] == 'good'


def test_a_system_turn():
  example = read(system='be short', prompt='q', chosen=[*USER, GOOD], rejected='bad')
  assert [message.role for message in example.messages] == ['system', 'user']
  developer = read(prompt=[turn('developer', 'be short'), *USER], chosen='good', rejected='bad')
  assert developer.messages == example.messages


# Seen to fail: `input` passed over like any other column.
def test_the_input_of_an_instruction_belongs_to_the_prompt():
  answers = ({'chosen': 'good', 'rejected': 'bad'}, {'output': 'good'}, {'responses': ['a', 'b']})
  for answer in answers:
    assert read(instruction='Sum up.', input='Text', **answer).messages == (
      Message('user', 'Sum up.\n\nText'),
    )
    assert read(instruction=' ', input='Text', **answer).messages == (Message('user', 'Text'),)
    assert read(prompt='q', input='Text', **answer).messages == (Message('user', 'q'),)


def test_numbers_as_text():
  row = {'prompt': 'q', 'chosen': 'x', 'rejected': 'y'}
  example = read(**row, subset=4, ground_truth=42)
  assert (example.subset, example.reference) == ('4', '42')
  assert read(**row, source=0, reference=2.5).reference == '2.5'


def test_one_best_of_several():
  example = read(
    prompt='q',
    chosen='good',
    rejected=['x', 'y', 'z'],
    id='a',
    subset='s',
    reference='r',
    principles='p',
  )
  assert (
    sorted(example.responses) == ['good', 'x', 'y', 'z']
    and example.responses[example.label] == 'good'
  )
  assert (example.uid, example.subset, example.reference, example.principles) == (
    'a',
    's',
    'r',
    'p',
  )
  # A list keeps its order, and equal responses are no harm as long as the best one is not among
  # them.
  example = read(prompt='q', responses=['x', 'x', 'good'], grades=[1, 1, 4])
  assert (
    example.responses == ('x', 'x', 'good')
    and example.label == 2
    and example.grades == (1.0, 1.0, 4.0)
  )


@pytest.mark.parametrize(
  ('label', 'gold'),
  [(True, 1), (False, 0), (1, 1), (0, 0), (1.0, 1), (0.0, 0), (None, None)],
)
def test_a_single_response(label, gold):
  for row in (
    {'completion': 'x'},
    {'response': [*USER, turn('assistant', 'x')]},
    {'responses': ['x']},
  ):
    example = read(prompt='q', label=label, ground_truth='42', **row)
    assert (
      example.responses == ('x',) and example.label == gold and type(example.label) is type(gold)
    )
    assert example.reference == '42'


def test_no_label_is_allowed():
  assert read(prompt='q', responses=['x', 'y']).label is None


@pytest.mark.parametrize(
  ('row', 'reason'),
  [
    ({'prompt': 'q', 'chosen': 'x', 'rejected': ' x\n'}, 'identical responses'),
    ({'prompt': 'q', 'responses': ['x', 'y', 'x'], 'label': 0}, 'identical responses'),
    ({'prompt': 'q', 'responses': ['x', 'x']}, 'identical responses'),
    ({'prompt': 'q', 'responses': ['x', 'y'], 'grades': [2, 2]}, 'no unique best'),
    (
      {'prompt': 'q', 'responses': ['x', 'y', 'z'], 'grades': [2, 1, 2], 'label': 0},
      'no unique best',
    ),
    ({'prompt': 'q', 'chosen': ['x', 'y'], 'rejected': ['z']}, 'no unique best'),
    ({'prompt': ' \n', 'chosen': 'x', 'rejected': 'y'}, 'empty prompt'),
    ({'chosen': [GOOD], 'rejected': [BAD]}, 'empty prompt'),
    ({'prompt': 'q', 'chosen': 'x', 'rejected': ''}, 'empty reply'),
    ({'chosen': [*CONTEXT, GOOD], 'rejected': [*USER, BAD]}, 'prefixes differ'),
    ({'prompt': 'other', 'chosen': [*USER, GOOD], 'rejected': [*USER, BAD]}, 'prefixes differ'),
    ({'prompt': 'q', 'chosen': [*USER, GOOD, *USER], 'rejected': 'y'}, 'not one assistant turn'),
    ({'prompt': IMAGE, 'chosen': 'x', 'rejected': 'y'}, 'not text'),
    ({'prompt': 'q', 'chosen': IMAGE, 'rejected': 'y'}, 'not text'),
    ({'prompt': [*USER, turn('tool', 'r')], 'chosen': 'x', 'rejected': 'y'}, 'tool turns'),
    (
      {'prompt': [{**turn('assistant', None), 'tool_calls': [{}]}, *USER], 'completion': 'x'},
      'tool turns',
    ),
  ],
)
def test_what_is_skipped(row, reason):
  assert read(**row) == Skipped('dir/f.jsonl:3', reason)


@pytest.mark.parametrize(
  ('row', 'message'),
  [
    ({'prompt': 'q', 'chosen': 'x'}, "'rejected' is missing; columns found: .*expected a prompt"),
    ({'prompt': 'q'}, 'no column of answers'),
    (
      {'prompt': 'q', 'chosen': 'x', 'rejected': 'y', 'responses': ['x']},
      r'found chosen \+ rejected and responses',
    ),
    ({'chosen': 'x', 'rejected': 'y'}, "no prompt; .*reader='hh_rlhf'"),
    ({'responses': ['x', 'y'], 'label': 0}, 'no prompt'),
    (
      {'prompt': 3, 'chosen': 'x', 'rejected': 'y'},
      "'prompt' must be a string or a list of messages, got int",
    ),
    (
      {'prompt': 'q', 'chosen': 3, 'rejected': 'y'},
      "'chosen' must be a list of messages .*got int",
    ),
    (
      {'prompt': 'q', 'chosen': [], 'rejected': 'y'},
      "'chosen' must be a list of messages .* not empty",
    ),
    ({'prompt': 'q', 'responses': 'x'}, "'responses' must be a list"),
    ({'prompt': 'q', 'responses': ['x', 3]}, "'responses' must be a list of messages"),
    (
      {'prompt': 'q', 'responses': ['x', 'y'], 'label': 2},
      r"'label' must be the index .*0 to 1\), got 2",
    ),
    ({'prompt': 'q', 'responses': ['x', 'y'], 'label': True}, "'label' must be the index"),
    ({'prompt': 'q', 'responses': ['x', 'y'], 'label': '1'}, "'label' must be the index"),
    ({'prompt': 'q', 'responses': ['x', 'y'], 'grades': [1]}, "'grades' must be 2 numbers"),
    ({'prompt': 'q', 'responses': ['x', 'y'], 'grades': ['1', '2']}, "'grades' must be 2 numbers"),
    (
      {'prompt': 'q', 'responses': ['x', 'y'], 'grades': [2, 1], 'label': 1},
      "'label' 1 is not the response with the",
    ),
    (
      {'prompt': 'q', 'completion': 'x', 'label': 2},
      "'label' of a single response must be true or false",
    ),
    ({'prompt': 'q', 'completion': 'x', 'label': 0.5}, "'label' of a single response"),
    # Seen to fail: float() of each grade, which passes infinity on and overflows at 400 digits.
    ({'prompt': 'q', 'responses': ['x', 'y'], 'grades': [1, INF]}, '2 numbers, .* each finite'),
    ({'prompt': 'q', 'responses': ['x', 'y'], 'scores': [10**400, 1]}, '2 numbers, .* each finite'),
    ({'prompt': 'q', 'completion': 'x', 'reference': INF}, "'reference' must be a string or a fin"),
    ({'prompt': 'q', 'completion': 'x', 'reference': True}, "'reference' must be a string"),
    ({'instruction': USER, 'input': 'x', 'completion': 'x'}, "'instruction' must be a string"),
    ({'instruction': 'q', 'input': 3, 'completion': 'x'}, "'input' must be a string"),
    ({'prompt': [turn('user', ['q'])], 'completion': 'x'}, 'list of parts'),
    (
      {'prompt': [turn('robot', 'q')], 'chosen': 'x', 'rejected': 'y'},
      "role 'robot' in 'prompt' is unknown",
    ),
    (
      {'prompt': [{'role': 'user'}], 'chosen': 'x', 'rejected': 'y'},
      'must have the strings role and content',
    ),
    ({'prompt': [*USER, GOOD], 'chosen': 'x', 'rejected': 'y'}, 'must end with a turn of the user'),
    (
      {'prompt': 'q', 'chosen': 'x', 'rejected': 'y', 'id': ''},
      "'id' must be a string or an integer",
    ),
    ({'prompt': 'q', 'chosen': 'x', 'rejected': 'y', 'subset': []}, "'subset' must be a string"),
  ],
)
def test_mistakes_name_file_and_line(row, message):
  with pytest.raises(ValueError, match=rf'^dir/f\.jsonl:3: .*{message}'):
    read(**row)
