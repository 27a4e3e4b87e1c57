"""The practice world's tokenizer and template: the committed files say what the code says, and nothing is unknown."""

import functools
import importlib.util
import itertools
import json
import pathlib

import pytest

from spct_jax.data import instructions, plain, practice
from spct_jax.data.sources import RawRow
from spct_jax.judges import parse, prompts
from spct_jax.stages import sft, trackers
from spct_jax.text import chat, encode
from spct_jax.text import tokenizer as tokenizers
from spct_jax.types import Message

PAGE = pathlib.Path(__file__).resolve().parents[2] / 'configs' / 'quickstart.py'
SIZES = {1: 'singles', 2: 'pairs', 4: 'fours'}


@pytest.fixture(scope='module')
def tok():
  return tokenizers.load('package:spct_jax.data/files/practice/tokenizer')


@pytest.fixture(scope='module')
def template():
  return prompts.load_template('package:spct_jax.data/files/practice/template')


@pytest.fixture(scope='module')
def page():
  spec = importlib.util.spec_from_file_location('quickstart', PAGE)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config()


@functools.cache
def rows(n, count):
  return tuple(practice.preferences('heldout', seed=11, **{SIZES[n]: count}))


def example(row):
  (found,) = plain.read(RawRow(row, 'made', 1))
  return found


def parts(row, order=None):
  """(query, responses) as the world's functions take them, the responses in the order shown."""
  _, a, b, _, c, d = row['prompt'].split()
  return (a, b, c, d), [row['responses'][i].split() for i in order or range(len(row['responses']))]


def judgements(n, items, times):
  draws = practice._Draws('tokenizer', n)
  return [practice.judgement(*parts(row), draws) for row in rows(n, items) for _ in range(times)]


# Mutations seen to fail: a word added to the code's vocabulary; another word in the file; a chat template without its end.
def test_the_committed_folder_is_what_the_code_makes(tok):
  made = tokenizers.wrap(practice.tokenizer())
  assert json.loads(tok.hf.backend_tokenizer.to_str()) == json.loads(made.hf.backend_tokenizer.to_str())
  assert tok.hf.get_vocab() == made.hf.get_vocab() == {token: i for i, token in enumerate(practice.vocabulary())}
  assert (tok.chat_template, tok.eos_ids, tok.pad_id) == (made.chat_template, made.eos_ids, made.pad_id)
  assert tok.hf.special_tokens_map == made.hf.special_tokens_map
  assert tok.eos_ids == (practice.vocabulary().index(practice.EOS),) and tok.pad_id != tok.eos_ids[0]
  assert practice.FOLDER / 'tokenizer' == pathlib.Path(tok.hf.name_or_path)


def test_the_vocabulary_has_every_token_once():
  assert len(set(practice.vocabulary())) == len(practice.vocabulary())


# What was decoded is what trackers read. Mutation seen to fail: `}` not cut off, so that `6}` is one unknown word.
@pytest.mark.parametrize('n', SIZES)
def test_a_judgement_survives_encoding_and_decoding(tok, page, n):
  low_high = (0, 1) if n == 1 else (1, 10)
  look = trackers.compiled(page.trackers)
  for text, scores in judgements(n, 100, 3):
    again = tok.decode(tok.encode_data(text))
    assert parse.scores(again, n, *low_high) == parse.scores(text, n, *low_high) == tuple(scores)
    assert tok.encode_data(again) == tok.encode_data(text)
    blanks = lambda lines: [line.replace('{ ', '{').strip() for line in lines.split('\n')]
    assert blanks(again) == blanks(text)
    written = text.split('\n')[0].split()[3::2]  # each after its weight
    assert trackers.principles_of(look, again) == trackers.principles_of(look, text)
    assert sorted(trackers.principles_of(look, again)) == sorted(written)
    (careless,) = (pattern for name, pattern in look.patterns if name == 'careless')
    assert bool(careless.search(again)) == ('\nImpression: ' in text)


# Mutations seen to fail: a filler and `facts` missing in the file.
def test_every_word_is_known(tok):
  unknown = tok.hf.unk_token_id
  made = [
      *practice.preferences('train', 30, 30, 30, 30),
      *practice.general('train', 100),
      *practice.demonstrations(words=3, facts=4, clean=4, habits=8, batch=16),
  ]
  texts = set(practice.criteria())
  for row in made:
    texts.update([row['prompt'], *row['responses']] if 'prompt' in row else [])
    for message in row.get('messages', ()):
      content = message['content']
      texts.update([content] if isinstance(content, str) else [part['text'] for part in content])
  assert len(texts) > 500
  for text in texts:
    ids = tok.encode_data(text)
    assert ids and unknown not in ids, text
  assert unknown in tok.encode_data('elephant')


# What the base model is trained to answer and what the judge asks must be the same tokens.
# Mutations seen to fail: the hint's number from 0; `score` for one response; the hint without its colon.
@pytest.mark.parametrize('n', SIZES)
@pytest.mark.parametrize('hinted', [False, True])
def test_the_demonstrations_prompt_is_the_judges(tok, template, n, hinted):
  for row in rows(n, 20):
    found = example(row)
    for order in itertools.permutations(range(n)):
      prompt = prompts.build(
          found, order, template, mode='single' if n == 1 else 'pointwise', hint=found.label if hinted else None
      )
      judged = encode.encode(chat.wrap(prompt.spans, tok), tok)
      hint = None if not hinted else found.label if n == 1 else order.index(found.label)
      text = practice.prompt_text(*parts(row, order), hint)
      learnt = encode.encode(chat.wrap_messages((Message('user', text),), tok), tok)
      assert learnt == judged
      assert text == ''.join(span.text for span in prompt.spans)


# Mutation seen to fail: the responses before the conversation in meta.txt.
@pytest.mark.parametrize('n', SIZES)
def test_the_meta_prompt_is_the_judges_up_to_its_question(tok, template, n):
  for row in rows(n, 20):
    found, order = example(row), tuple(reversed(range(n)))
    asked = prompts.build(found, order, template, mode='single' if n == 1 else 'pointwise')
    meta = prompts.build_meta(found, order, template)
    asked, meta = (encode.encode(chat.wrap(prompt.spans, tok), tok) for prompt in (asked, meta))
    assert meta[-1] == asked[-1] == practice.vocabulary().index(practice.ASSISTANT)
    rest = tok.decode(asked[len(meta) - 1 : -1])
    assert asked[: len(meta) - 1] == meta[:-1]
    assert rest.split() == ('correct x' if n == 1 else 'score ' + ', '.join('x' * n)).split()


# Mutation seen to fail: a prompt bucket shorter than the longest.
def test_the_quickstart_has_room_for_the_longest(tok, page):
  longest_prompt = longest_answer = 0
  for n in SIZES:
    prompts_of = {hinted: set() for hinted in (False, True)}  # lengths
    for row in rows(n, 250):
      for hint in (None, row['label']):
        text = practice.prompt_text(*parts(row), hint)
        ids = encode.encode(chat.wrap_messages((Message('user', text),), tok), tok)
        prompts_of[hint is not None].add(len(ids))
    draws = practice._Draws('broken', n)
    answers = [
        len(tok.encode_data(text)) + 1  # and its end
        for whole, _ in judgements(n, 30, 4) for text in (whole, practice._broken(whole, draws))
    ]
    if n <= 2:  # what grouping by length lives on
      assert max(prompts_of[False]) <= page.judge.buckets[0]
      assert max(prompts_of[False]) + max(answers) <= page.grpo.buckets[0]
    longest_prompt = max(longest_prompt, *prompts_of[False], *prompts_of[True])
    longest_answer = max(longest_answer, *answers)
  assert longest_prompt <= page.judge.buckets[-1]
  assert longest_answer <= page.judge.max_new_tokens
  for stage in (page.rft, page.grpo, page.meta_rm):
    assert longest_prompt + page.judge.max_new_tokens <= stage.buckets[-1]
  # Every row of the warm start, in small: strict refuses what does not fit.
  name = 'made:spct_jax.data.practice:demonstrations?words=4&facts=8&clean=8&habits=40&batch=32'
  found = sft.rows(instructions.load(name), tok, tuple(page.sft.buckets), what='sft', strict=True)
  assert len(found) == 60 * 32 and max(row.length for row in found) > page.sft.buckets[-2]
