"""The words after the colon of a config."""

import pytest

from spct_jax import choices


def test_types_follow_the_defaults():
  found = choices.parse('smoke,seed=3,rate=0.5,name=a/b', smoke=False, seed=0, rate=1.0, name='')
  assert found == {'smoke': True, 'seed': 3, 'rate': 0.5, 'name': 'a/b'}
  assert choices.parse(None, smoke=False) == {'smoke': False}
  assert choices.parse('smoke=false', smoke=True) == {'smoke': False}


@pytest.mark.parametrize(
    ('arg', 'message'),
    [
        ('smok', "unknown choice 'smok'.*smoke"),
        ('seed=x', 'seed: got .x.; allowed: a value of type int'),
        ('seed', 'needs a value'),
        ('smoke=maybe', 'allowed: smoke'),
    ],
)
def test_what_is_wrong_is_said(arg, message):
  with pytest.raises(ValueError, match=message):
    choices.parse(arg, smoke=False, seed=0)


def test_a_file_may_have_commas_in_its_name(tmp_path):
  # Seen to catch: cutting at every comma. JudgeBench's own files are named so.
  path = tmp_path / 'dataset=a,response_model=b.jsonl'
  path.write_text('')
  found = choices.parse(f'smoke,data=judgebench,path={path}', smoke=False, data='', path='')
  assert found == {'smoke': True, 'data': 'judgebench', 'path': str(path)}
  found = choices.parse(f'path={path},smoke', smoke=False, data='', path='')
  assert found == {'smoke': True, 'data': '', 'path': str(path)}
  with pytest.raises(ValueError, match='unknown choice'):
    choices.parse('path=x=a,response_model=b.jsonl', path='')
