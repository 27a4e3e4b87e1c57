"""The tokenizer's part of a model folder: its files, and its special tokens in config.json and generation_config.json.

1. `transformers` scores a sequence at its last token that is not the pad token, and rows of ours end with a token that
   ends an answer. So a scalar model gets a pad token that ends none. Where there is none to take, its config names
   none: `transformers` then takes one sequence at a time, and refuses more instead of scoring another token.
2. `AutoTokenizer` goes by the model's family before it goes by the files, and makes its own rules for some (qwen2).
   So what was written is read again, and must give the same ids.
"""

import copy
import pathlib
from collections.abc import Mapping
from typing import Any

from spct_jax.models import hf_folder
from spct_jax.models.config import ModelConfig
from spct_jax.text import tokenizer as tokenizers

PAD = '<|pad|>'
# Numbers, contractions, runs of blanks, an accent on its own, other scripts: where tokenizers differ.
_PROBE = "In 2024, 12345 don't  two\n\n\tblanks e\u0301 \u00e9 \u6f22\u5b57 \U0001f600 x_y() </s>"


def write(
    folder: pathlib.Path, config: ModelConfig, fields: Mapping[str, Any], tokenizer: tokenizers.Tokenizer | None,
    source: pathlib.Path | None, chat_template: str | None,
) -> None:
  """Writes config.json, generation_config.json and the tokenizer's files; arguments as of `hf.save`.

  fields: of config.json. ValueError if `transformers` would read the tokenizer otherwise than we do.
  """
  generation = hf_folder.read_json(source / 'generation_config.json') if source else {}
  before = (hf_folder.read_json(source / 'config.json') if source else {}) | generation
  scalar = config.head_kind == 'scalar'
  fields = dict(fields)
  if tokenizer is not None:
    special = {'eos_token_id': list(dict.fromkeys([*_ids(before.get('eos_token_id')), *tokenizer.eos_ids]))}
    for name, own in (('bos_token_id', tokenizer.bos_id), ('pad_token_id', tokenizer.pad_id)):
      theirs = before.get(name)
      special |= {} if theirs is own is None else {name: own if theirs is None else theirs}
    if scalar:
      tokenizer, special['pad_token_id'] = _padded(tokenizer, special['eos_token_id'], config.vocab_size)
    tokenizer.save(folder)
    fields, generation = fields | special, generation | special
  elif source:
    hf_folder.copy_tokenizer(source, folder)
    if chat_template is not None:
      (folder / 'chat_template.jinja').write_text(chat_template, encoding='utf-8')
    new_head = not any(name.endswith('ForSequenceClassification') for name in before.get('architectures') or ())
    if scalar and new_head and fields.get('pad_token_id') in _ids(before.get('eos_token_id')):
      fields['pad_token_id'] = None
  if generation and not scalar:
    hf_folder.write_json(folder / 'generation_config.json', generation)
  hf_folder.write_json(folder / 'config.json', fields)
  if tokenizer is not None:
    _check_read_back(folder, tokenizer, fields['model_type'])


def _ids(value) -> list[int]:
  return [index for index in (value if isinstance(value, list) else [value]) if isinstance(index, int)]


def _padded(tokenizer, eos_ids, room) -> tuple[tokenizers.Tokenizer, int | None]:
  """(a tokenizer whose pad token ends no answer, that token's id); as it is, and None, where there is none to take."""
  hf = tokenizer.hf
  if hf.pad_token_id is not None and hf.pad_token_id not in eos_ids:
    return tokenizer, hf.pad_token_id
  others = {hf.convert_ids_to_tokens(index): index for index in sorted(tokenizer.reserved - set(eos_ids))}
  named = [token for token in others if 'pad' in token.lower()]
  if tokenizer.vocab_size < room:
    named += [PAD]
  token = next(iter([*named, *others]), None)
  if token is None:
    return tokenizer, None
  hf = copy.deepcopy(hf)
  hf.add_special_tokens({'pad_token': token})
  return tokenizers.wrap(hf, tokenizer.eos_ids), hf.pad_token_id


def _check_read_back(folder, tokenizer, model_type):
  again = tokenizers.load(folder)
  want, got = tokenizer.encode(_PROBE), again.encode(_PROBE)
  if (want, tokenizer.vocab_size, tokenizer.template) == (got, again.vocab_size, again.template):
    return
  first = next((i for i, pair in enumerate(zip(want, got)) if pair[0] != pair[1]), min(len(want), len(got)))
  raise ValueError(
      f'save: beside a config.json of model_type {model_type!r}, transformers reads this tokenizer as '
      f'{type(again.hf).__name__} with {again.vocab_size} tokens of {tokenizer.vocab_size}, and other ids come out '
      f'(of {_PROBE!r} from token {first} on); give the model a tokenizer of its family, or train a decoder of another '
      'family with this tokenizer (llama and qwen3 read any; qwen2 is what qkv_bias makes)'
  )
