"""hh-rlhf transcripts: turns, the shared prefix, and the rows that are left out."""

import pytest

from spct_jax.data import preference, transcripts
from spct_jax.data.items import Skipped
from spct_jax.data.sources import RawRow
from spct_jax.types import Message


def read(chosen, rejected):
  (item,) = transcripts.read(RawRow({'chosen': chosen, 'rejected': rejected}, 'f.jsonl', 9))
  return item


PROMPT = '\n\nHuman: One?\n\nAssistant: Two.\n\nThree: four\n\nHuman:  Five\n'


# Mutation seen to fail: splitting at the first '\n\nAssistant:' in place of the last one.
def test_turns_and_replies():
  example = read(PROMPT + '\n\nAssistant: good\n\nline', PROMPT + '\n\nAssistant:bad ')
  assert example.messages == (
    Message('user', 'One?'),
    Message('assistant', 'Two.\n\nThree: four'),
    Message('user', 'Five'),
  )
  assert (
    set(example.responses) == {'good\n\nline', 'bad'}
    and example.responses[example.label] == 'good\n\nline'
  )
  assert example.uid == 'f.jsonl:9'


def test_two_turns_of_one_role_stay_two():
  start = '\n\nHuman: a\n\nHuman: b'
  assert [
    m.content for m in read(start + '\n\nAssistant: x', start + '\n\nAssistant: y').messages
  ] == ['a', 'b']


# Mutation seen to fail: prefixes compared by their number of turns.
@pytest.mark.parametrize(
  ('chosen', 'rejected', 'reason'),
  [
    ('\n\nHuman: a\n\nAssistant: x', '\n\nHuman: b\n\nAssistant: y', 'prefixes differ'),
    ('\n\nHuman: a\n\nAssistant: x', PROMPT + '\n\nAssistant: x', 'prefixes differ'),
    ('\n\nHuman: a\n\nAssistant: ', '\n\nHuman: a\n\nAssistant: y', 'empty reply'),
    ('\n\nHuman: a\n\nAssistant: y', '\n\nHuman: a\n\nAssistant:', 'empty reply'),
    ('\n\nHuman: a\n\nAssistant: y', '\n\nHuman: a\n\nAssistant:  y', 'identical responses'),
    ('\n\nHuman:\n\nAssistant: y', '\n\nHuman:\n\nAssistant: z', 'empty prompt'),
    (
      '\n\nHuman: a\n\nAssistant: b\n\nAssistant: x',
      '\n\nHuman: a\n\nAssistant: b\n\nAssistant: y',
      'not one assistant turn',
    ),
    (
      '\n\nHuman: a\n\nAssistant: x\n\nHuman: more',
      '\n\nHuman: a\n\nAssistant: y',
      'not one assistant turn',
    ),
    (
      '\n\nHuman: a\n\nAssistant: x',
      '\n\nHuman: a\n\nAssistant:\n\nHuman: more',
      'not one assistant turn',
    ),
  ],
)
def test_what_is_skipped(chosen, rejected, reason):
  assert read(chosen, rejected) == Skipped('f.jsonl:9', reason)


def test_no_transcript_is_an_error():
  with pytest.raises(ValueError, match="f.jsonl:9: 'rejected' is no transcript"):
    read('\n\nHuman: a\n\nAssistant: x', 'y')
  with pytest.raises(ValueError, match="f.jsonl:9: 'chosen' must be a string, got nothing"):
    read(None, 'y')


@pytest.mark.parametrize(
  ('part', 'items', 'skipped'),
  [
    (
      'harmless-base',
      2312,
      {'prefixes differ': [1255, 1689, 1951, 1953, 2037], 'empty reply': [87, 517, 926, 1104]},
    ),
    (
      'helpful-base',
      2354,
      {
        'prefixes differ': [169, 355, 568, 744, 961, 1012, 1167, 1308, 1451],
        'empty reply': [121, 741, 1215, 2064],
        'identical responses': [722, 2169],
      },
    ),
  ],
)
def test_the_published_files(shared, part, items, skipped):
  path = shared / 'data' / 'hh_rlhf' / part / 'test.jsonl.gz'
  loaded = preference.load(path)
  assert loaded.reader == 'hh_rlhf'
  assert {
    reason: [int(place.split(':')[-1]) for place in places]
    for reason, places in loaded.skipped.items()
  } == skipped
  assert len(loaded.examples) == items - sum(map(len, skipped.values()))
  assert 0.47 < sum(example.label == 0 for example in loaded.examples) / len(loaded.examples) < 0.53
  assert (
    0.65
    < sum(len(example.messages) > 1 for example in loaded.examples) / len(loaded.examples)
    < 0.78
  )
  with pytest.raises(ValueError, match='strict(.|\n)*prefixes differ'):
    preference.load(path, strict=True)
