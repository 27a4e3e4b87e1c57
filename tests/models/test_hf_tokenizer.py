"""The tokenizer in an exported folder: read there as it was here, with ends and pad tokens that leave results alone."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tokenizers as backends
import transformers

from spct_jax.models import hf
from spct_jax.models.config import BlockConfig, ModelConfig
from spct_jax.models.transformer import Transformer
from spct_jax.text import tokenizer as tokenizers

CONFIG = ModelConfig(
    vocab_size=300, width=8, heads=2, kv_heads=1, head_dim=4, ffn=8, period=(BlockConfig(),), num_periods=1
)


def parameters(config):
  return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), Transformer(config).abstract_params())


def made(special=('<end>',), **named):
  """A byte-level tokenizer of 256 + n tokens; `named` says what the special tokens are for."""
  alphabet = sorted(backends.pre_tokenizers.ByteLevel.alphabet())
  backend = backends.Tokenizer(backends.models.BPE({token: i for i, token in enumerate(alphabet)}, []))
  backend.pre_tokenizer = backends.pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = backends.decoders.ByteLevel()
  backend.add_special_tokens(list(special))
  hf_tokenizer = transformers.PreTrainedTokenizerFast(
      tokenizer_object=backend, clean_up_tokenization_spaces=False, **{'eos_token': '<end>', **named}
  )
  return tokenizers.wrap(hf_tokenizer)


def read(path):
  return json.loads(path.read_text())


# Mutations seen to fail: the first end as pad token; the pad token not in the tokenizer's files.
@pytest.mark.parametrize(
    'special, named, room, want',
    [
        (('<end>', '<fill>'), {'pad_token': '<fill>'}, 300, '<fill>'),
        (('<end>', '<fill>'), {'pad_token': '<end>'}, 258, '<fill>'),
        (('<a>', '<end>', '<img_pad>'), {}, 300, '<img_pad>'),
        (('<a>', '<end>'), {}, 300, '<|pad|>'),
        (('<end>',), {'bos_token': '<end>', 'pad_token': '<end>'}, 258, '<|pad|>'),
        (('<end>',), {'pad_token': '<end>'}, 257, None),
    ],
)
def test_the_pad_token_of_a_scalar_model_ends_no_answer(tmp_path, special, named, room, want):
  tok = made(special, **named)
  config = dataclasses.replace(CONFIG, head_kind='scalar', vocab_size=room)
  hf.save(tmp_path, Transformer(config), parameters(config), tok)
  fields = read(tmp_path / 'config.json')
  again = tokenizers.load(tmp_path)
  if want is None:
    assert fields['pad_token_id'] is None
  else:
    assert again.hf.pad_token == want and fields['pad_token_id'] == again.hf.pad_token_id < room
  assert fields['eos_token_id'] == list(again.eos_ids) == list(tok.eos_ids)
  assert fields['pad_token_id'] not in again.eos_ids
  assert again.encode('it ends<end>') == tok.encode('it ends<end>')
  assert tok.hf.pad_token == named.get('pad_token')  # the caller's own is as it was


def test_a_scalar_head_on_a_language_model_s_folder_takes_no_pad_token_that_ends_an_answer(tmp_path):
  tok = made(pad_token='<end>')
  hf.save(tmp_path / 'lm', Transformer(CONFIG), parameters(CONFIG), tok)
  assert read(tmp_path / 'lm' / 'config.json')['pad_token_id'] == 256
  config = dataclasses.replace(CONFIG, head_kind='scalar')
  hf.save(tmp_path / 'rm', Transformer(config), parameters(config), source=tmp_path / 'lm')
  assert read(tmp_path / 'rm' / 'config.json')['pad_token_id'] is None
  # A reward model of somebody else's says itself how it is read.
  fields = read(tmp_path / 'rm' / 'config.json') | {'pad_token_id': 256}
  (tmp_path / 'rm' / 'config.json').write_text(json.dumps(fields))
  hf.save(tmp_path / 'again', Transformer(config), parameters(config), source=tmp_path / 'rm')
  assert read(tmp_path / 'again' / 'config.json')['pad_token_id'] == 256


# Mutations seen to fail: the tokenizer's ends alone written; the folder's ends not read.
def test_ends_that_the_source_names_are_kept_and_end_our_answers_too(tmp_path):
  tok = made(('<a>', '<end>'))
  hf.save(tmp_path / 'a', Transformer(CONFIG), parameters(CONFIG), tok)
  settings = {'eos_token_id': [257, 5, 6, 99_999], 'bos_token_id': 1, 'temperature': 0.6}
  (tmp_path / 'a' / 'generation_config.json').write_text(json.dumps(settings))
  assert tokenizers.load(tmp_path / 'a').eos_ids == (257, 5, 6)
  hf.save(tmp_path / 'b', Transformer(CONFIG), parameters(CONFIG), tok, source=tmp_path / 'a')
  assert read(tmp_path / 'b' / 'generation_config.json') == settings | {'pad_token_id': 257}
  (tmp_path / 'a' / 'generation_config.json').unlink()
  (tmp_path / 'a' / 'config.json').write_text(json.dumps(read(tmp_path / 'a' / 'config.json') | {'eos_token_id': 7}))
  assert tokenizers.load(tmp_path / 'a').eos_ids == (257, 7)
  (tmp_path / 'a' / 'generation_config.json').write_text('{')
  with pytest.raises(ValueError, match='generation_config.json: not JSON'):
    tokenizers.load(tmp_path / 'a')


# Mutation seen to fail: no second reading.
def test_a_tokenizer_that_would_be_read_otherwise_beside_the_family_is_refused(tmp_path):
  qwen2 = dataclasses.replace(CONFIG, qkv_bias=True)
  with pytest.raises(ValueError, match="model_type 'qwen2', transformers reads this tokenizer as Qwen2Tokenizer"):
    hf.save(tmp_path / 'x', Transformer(qwen2), parameters(qwen2), made())
  assert not (tmp_path / 'x').exists()


def test_program_files_that_stay_behind_are_not_named(tmp_path):
  hf.save(tmp_path / 'a', Transformer(CONFIG), parameters(CONFIG), made())
  for name in ('config.json', 'tokenizer_config.json'):
    path = tmp_path / 'a' / name
    classes = {'AutoConfig': 'own.Config', 'AutoTokenizer': ['own.T', None]}
    path.write_text(json.dumps(read(path) | {'auto_map': classes}))
  hf.save(tmp_path / 'b', Transformer(CONFIG), parameters(CONFIG), source=tmp_path / 'a')
  assert not any('auto_map' in read(tmp_path / 'b' / name) for name in ('config.json', 'tokenizer_config.json'))
  assert tokenizers.load(tmp_path / 'b').vocab_size == 257
