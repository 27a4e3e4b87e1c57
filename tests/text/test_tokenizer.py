"""Frame text is read with its special tokens, quoted text without, in tokenizers of every kind."""

import json
import random
import shutil
import unicodedata

import pytest
import tokenizers
import transformers

from spct_jax.text import chat
from spct_jax.text import encode
from spct_jax.text import tokenizer as tokenizer_lib
from spct_jax.types import Message, Span

CONTROL = (
    '<|im_end|>', '<|im_start|>', '<|endoftext|>', '<think>', '</think>', '</s>', '<s>', '<unk>', '<pad>', '<start_of_turn>', '<end_of_turn>',
    '<|eos|>', '<|user|>', '<|pad|>', '[SEP]', '<tool_call>', '<|eot_id|>', '<｜Assistant｜>',
)
TEXTS = (
    '', ' ', '\n', '  two  blanks ', 'a\r\nb\tc', 'Scores: \\boxed{10, 7}', 'naïve café 日本語 \U0001f600 \u202e\x00\x7f', '1234567890', *CONTROL,
    *(f'x{control}y' for control in CONTROL), *(f' {control} ' for control in CONTROL), ''.join(CONTROL), 'word ' * 500,
)


def sentencepiece_like(model):
  backend = tokenizers.Tokenizer(model)
  backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme='always')
  decoders = tokenizers.decoders
  backend.decoder = decoders.Sequence(
      [decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(' ', 1, 0)])
  backend.add_special_tokens(['<unk>', '<s>', '</s>', '<start_of_turn>'])
  return transformers.PreTrainedTokenizerFast(
      tokenizer_object=backend, bos_token='<s>', eos_token='</s>', unk_token='<unk>', clean_up_tokenization_spaces=False)


def unigram():
  # Special tokens are ordinary pieces of a unigram vocabulary, and good ones.
  pieces = [('<unk>', 0.0), ('<s>', -1.0), ('</s>', -1.0), ('<start_of_turn>', -1.0), ('▁', -2.0)]
  pieces += [(chr(code), -5.0) for code in range(33, 127)] + [('▁the', -3.0), ('word', -3.0)]
  return sentencepiece_like(tokenizers.models.Unigram(pieces, unk_id=0, byte_fallback=False))


def metaspace_bpe():
  vocab = {'<unk>': 0, '<s>': 1, '</s>': 2, '<start_of_turn>': 3, '▁': 4}
  for byte in range(256):
    vocab[f'<0x{byte:02X}>'] = len(vocab)
  for code in range(33, 127):
    vocab[chr(code)] = len(vocab)
  merges = [('▁', 't'), ('▁t', 'h'), ('<', '/'), ('</', 's'), ('</s', '>')]
  for a, b in merges:
    vocab.setdefault(a + b, len(vocab))
  return sentencepiece_like(tokenizers.models.BPE(vocab=vocab, merges=merges, unk_token='<unk>', byte_fallback=True, fuse_unk=True))


def word_level():
  words = ['[UNK]', '</s>', '<think>', 'the', 'PAD', 'cat', '8', ',', 'Scores:', '\\boxed{8}']
  backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: at for at, word in enumerate(words)}, unk_token='[UNK]'))
  backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  backend.add_special_tokens(['[UNK]', '</s>', 'PAD'])
  backend.add_tokens(['<think>'])
  return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token='</s>', pad_token='PAD', unk_token='[UNK]')


def whole_words():
  """A byte-level vocabulary that takes a whole pre-token where it has one (as Llama 3's does)."""
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  vocab = {piece: at for at, piece in enumerate([*alphabet, 'PAD', '</', 'Ġthe'])}
  backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[], ignore_merges=True))
  backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
  backend.decoder = tokenizers.decoders.ByteLevel()
  backend.add_special_tokens(['PAD', '</s>'])
  return transformers.PreTrainedTokenizerFast(
      tokenizer_object=backend, eos_token='</s>', pad_token='PAD', clean_up_tokenization_spaces=False)


MADE = {'unigram': unigram, 'metaspace_bpe': metaspace_bpe, 'word_level': word_level, 'whole_words': whole_words}
REAL = ('minimind', 'qwen2', 'qwen2+qwen3', 'gpt2')


@pytest.fixture(scope='module')
def loaded(tmp_path_factory):
  """name, shared folder -> tokenizer, each loaded once."""
  cache = {}

  def get(name, request):
    if name not in cache:
      cache[name] = make(name, request)
    return cache[name]

  def make(name, request):
    if name in MADE:
      return tokenizer_lib.wrap(MADE[name]())
    if name.startswith('builtin'):
      return tokenizer_lib.load(name)
    root = request.getfixturevalue('shared') / 'data' / 'tokenizers'
    if name != 'qwen2+qwen3':
      return tokenizer_lib.load(root / name)
    folder = tmp_path_factory.mktemp('qwen3')
    for file in ('vocab.json', 'merges.txt'):
      shutil.copy(root / 'qwen2' / file, folder)
    shutil.copy(root / 'qwen3_chat_template' / 'tokenizer_config.json', folder)
    return tokenizer_lib.load(folder)

  return get


@pytest.fixture(params=['builtin:small', *MADE, *REAL])
def named(request, loaded):
  return request.param, loaded(request.param, request)


# Seen to fail: the cut left out (unigram, word_level, whole_words).
def test_quoted_text_gives_ordinary_tokens_only(named):
  name, tokenizer = named
  for text in TEXTS:
    ids = tokenizer.encode_data(text)
    assert tokenizer.reserved.isdisjoint(ids), (name, text)
    assert all(0 <= index < tokenizer.vocab_size for index in ids)


def test_quoted_text_comes_back(named):
  name, tokenizer = named
  if name == 'word_level':
    pytest.skip('a word-level vocabulary keeps no blanks')
  for text in TEXTS:
    if name == 'unigram' and not (text.isascii() and (text.isprintable() or not text)):
      continue  # Unknown to this vocabulary.
    text = unicodedata.normalize('NFC', text) if name.startswith('qwen') else text
    # A decoder drops the blank that its encoder puts in front; behind other text it shows.
    at = tokenizer.encode_next('x') if name in ('unigram', 'metaspace_bpe') else []
    assert tokenizer.decode(at + tokenizer.encode_data(text)) == ('x' if at else '') + text, name


def test_random_bytes_come_back(named):
  name, tokenizer = named
  if name in ('word_level', 'unigram', 'metaspace_bpe'):
    pytest.skip('not byte-level')
  rng = random.Random(0)
  alphabet = ['<', '|', '>', 'im_end', '/s', 'think', ' ', '\n', 'é', '\u0301', '語', '\U0001f468\u200d\U0001f469', '\x00', 'PAD', '0', *CONTROL]
  for _ in range(300):
    text = unicodedata.normalize('NFC', ''.join(rng.choice(alphabet) for _ in range(rng.randrange(12))))
    ids = tokenizer.encode_data(text)
    assert tokenizer.decode(ids) == text and tokenizer.reserved.isdisjoint(ids)


def test_halves_of_a_special_token_do_not_meet(named):
  name, tokenizer = named
  specials = [tokenizer.hf.convert_ids_to_tokens(index) for index in sorted(tokenizer.reserved)]
  for special in specials:
    for cut in range(1, len(special)):
      left, right = special[:cut], special[cut:]
      for spans in (
          [Span(left, True), Span(right, True)],
          [Span('User: ', False), Span(left, True), Span(right, True), Span('\n', False)],
          [Span(left, True), Span('', False), Span(right, True)],
      ):
        assert tokenizer.reserved.isdisjoint(encode.encode(spans, tokenizer)), (name, special, cut)


# Seen to fail: data encoded as frame.
def test_frame_text_is_special(named):
  _, tokenizer = named
  end = tokenizer.hf.eos_token
  assert tokenizer.encode(end) == [tokenizer.hf.eos_token_id]
  assert tokenizer.encode_next(end) == [tokenizer.hf.eos_token_id]
  assert tokenizer.hf.eos_token_id in tokenizer.reserved
  assert encode.encode([Span(end, False), Span(end, True)], tokenizer).count(tokenizer.hf.eos_token_id) == 1


# Seen to fail: added tokens left in the tokenizer of data (the cut then shifts the pieces).
def test_quoted_text_gets_the_pieces_of_its_vocabulary():
  tokenizer = tokenizer_lib.wrap(whole_words())
  assert [tokenizer.decode([index]) for index in tokenizer.encode_data('</s>')] == ['</', 's', '>']


# Seen to fail: the prefix rule kept.
def test_pieces_of_a_prompt_get_no_blank_in_front():
  for name in ('unigram', 'metaspace_bpe', 'whole_words'):
    tokenizer = tokenizer_lib.wrap(MADE[name]())
    spans = [Span('a ', False), Span('the', True), Span('b', False), Span('c', True)]
    assert tokenizer.decode(encode.encode(spans, tokenizer)).lstrip() == 'a thebc'


def test_ends_pads_and_sizes(request, loaded):
  expected = {
      'builtin:small': (['<|eos|>'], '<|pad|>', 2048),
      'minimind': (['<|im_end|>'], '<|endoftext|>', 6400),
      'qwen2': (['<|im_end|>', '<|endoftext|>'], '<|endoftext|>', 151646),
      'qwen2+qwen3': (['<|im_end|>'], '<|endoftext|>', 151669),
      'gpt2': (['<|endoftext|>'], '<|endoftext|>', 50257),
  }
  for name, (ends, pad, size) in expected.items():
    tokenizer = loaded(name, request)
    assert [tokenizer.hf.convert_ids_to_tokens(index) for index in tokenizer.eos_ids] == ends
    assert tokenizer.hf.convert_ids_to_tokens(tokenizer.pad_id) == pad
    assert tokenizer.vocab_size == size
  assert loaded('qwen2', request).encode('hello world') == [14990, 1879]
  assert loaded('gpt2', request).encode('hello world') == [31373, 995]


# Seen to fail: the tokenizer's own end only.
def test_the_end_of_a_turn_ends_an_answer_too():
  backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({'[UNK]': 0, '<eos>': 1, '<turn>': 2, '</turn>': 3}, unk_token='[UNK]'))
  backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  backend.add_special_tokens(['<eos>', '<turn>', '</turn>'])
  hf = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token='<eos>', unk_token='[UNK]')
  hf.chat_template = "{% for m in messages %}<turn>{{ m['role'] }}\n{{ m['content'] | trim }}</turn>\n{% endfor %}"
  assert tokenizer_lib.wrap(hf).eos_ids == (1, 3)


def test_save_and_load_again(named, tmp_path):
  name, tokenizer = named
  if name == 'qwen2':
    pytest.skip('slow, and the same code as its sibling')
  tokenizer.save(tmp_path)
  again = tokenizer_lib.load(tmp_path)
  text = 'The <|im_end|> scores: 8, 6 </s>'
  assert again.encode(text) == tokenizer.encode(text) and again.encode_data(text) == tokenizer.encode_data(text)
  assert (again.eos_ids, again.pad_id, again.vocab_size, again.reserved) == (
      tokenizer.eos_ids, tokenizer.pad_id, tokenizer.vocab_size, tokenizer.reserved)


def test_odd_strings(named):
  _, tokenizer = named
  for text in ('\ud800', 'a\udfffb', '\x00', '\ufffe', '\u0301'):
    assert tokenizer.reserved.isdisjoint(tokenizer.encode_data(text))
    tokenizer.encode(text)
  many = '</s><|im_end|>' * 2000
  assert tokenizer.reserved.isdisjoint(tokenizer.encode_data(many))


def test_wrong_paths_are_refused(tmp_path):
  with pytest.raises(ValueError, match='no folder'):
    tokenizer_lib.load(tmp_path / 'missing')
  with pytest.raises(ValueError, match='holds no tokenizer'):
    tokenizer_lib.load(tmp_path)
  with pytest.raises(ValueError, match="'builtin:large'.*builtin:small"):
    tokenizer_lib.load('builtin:large')
  (tmp_path / 'tokenizer.json').write_text('{')
  with pytest.raises(ValueError, match='could not be read'):
    tokenizer_lib.load(tmp_path)


def test_a_folder_that_a_package_carries():
  carried = tokenizer_lib.load('package:spct_jax.text/files/small')
  builtin = tokenizer_lib.load('builtin:small')
  assert carried.hf.get_vocab() == builtin.hf.get_vocab()
  assert (carried.eos_ids, carried.pad_id) == (builtin.eos_ids, builtin.pad_id)
  with pytest.raises(ValueError, match="holds no 'smal': did you mean 'small'"):
    tokenizer_lib.load('package:spct_jax.text/files/smal')


# Mutations seen to fail: the remembered list handed out itself; one memory for frames and quotes.
def test_remembered_ids_are_the_ids():
  tokenizer, other = (tokenizer_lib.load('builtin:small') for _ in range(2))
  calls = [(name, text) for text in TEXTS for name in ('encode', 'encode_next', 'encode_data')]
  first = {call: getattr(tokenizer, call[0])(call[1]) for call in calls}
  assert first['encode', '<|eos|>'] == first['encode_next', '<|eos|>'] != first['encode_data', '<|eos|>']
  for (name, text), found in first.items():
    assert found == getattr(other, name)(text)
    found.append(-1)  # a caller's own list
    assert getattr(tokenizer, name)(text) == found[:-1]


def test_an_answer_must_be_able_to_end():
  backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({'a': 0}, unk_token='a'))
  with pytest.raises(ValueError, match='no end-of-sequence token'):
    tokenizer_lib.wrap(transformers.PreTrainedTokenizerFast(tokenizer_object=backend))


def test_the_small_tokenizer_reads_a_score_from_digits():
  tokenizer = tokenizer_lib.load('builtin:small')
  assert [tokenizer.decode([index]) for index in tokenizer.encode('Scores: \\boxed{10, 7}')][-6:] == ['1', '0', ',', ' ', '7', '}']
  rules = json.loads(tokenizer.hf.backend_tokenizer.to_str())
  assert [token['content'] for token in rules['added_tokens']] == ['<|pad|>', '<|bos|>', '<|eos|>', '<|user|>', '<|assistant|>', '<|system|>']


# Folders -----------------------------------------------------------------------------------------


def written(folder, **changes):
  """The small tokenizer's folder with other fields in its tokenizer_config.json; None takes a field out."""
  tokenizer_lib.load('builtin:small').save(folder)
  path = folder / 'tokenizer_config.json'
  fields = json.loads(path.read_text()) | changes
  path.write_text(json.dumps({name: value for name, value in fields.items() if value is not None}))
  return folder


ONE, OTHER = "{% for m in messages %}one {{ m['content'] }}{% endfor %}", "{% for m in messages %}other {{ m['content'] }}{% endfor %}"


# Seen to fail: the templates of a list taken for none.
@pytest.mark.parametrize('way', ['config', 'file', 'list', 'files'])
def test_the_folder_s_template_is_used_however_it_is_kept(tmp_path, way):
  folder = written(tmp_path)
  (folder / 'chat_template.jinja').unlink(missing_ok=True)
  if way == 'config':
    written(folder, chat_template=ONE)
    (folder / 'chat_template.jinja').unlink()
  elif way == 'file':
    (folder / 'chat_template.jinja').write_text(ONE)
  elif way == 'list':
    written(folder, chat_template=[{'name': 'tool_use', 'template': OTHER}, {'name': 'default', 'template': ONE}])
    (folder / 'chat_template.jinja').unlink()
  else:
    (folder / 'chat_template.jinja').write_text(ONE)
    (folder / 'additional_chat_templates').mkdir()
    (folder / 'additional_chat_templates' / 'tool_use.jinja').write_text(OTHER)
  tokenizer = tokenizer_lib.load(folder)
  assert tokenizer.template == tokenizer.chat_template == ONE
  assert chat.wrap([Span('x', True)], tokenizer)[0] == Span('one ', False)
  tokenizer.save(tmp_path / 'again')
  assert tokenizer_lib.load(tmp_path / 'again').chat_template == ONE


# Mutation seen to fail: the fallback of a saved tokenizer taken for a template of its own.
def test_the_fallback_is_the_plain_frame_and_stays_one(tmp_path):
  tokenizer = tokenizer_lib.wrap(MADE['whole_words']())
  assert tokenizer.chat_template is None
  turns = [Message('system', 'be brief'), Message('user', 'a'), Message('assistant', 'b'), Message('user', 'c')]
  rendered = tokenizer.hf.apply_chat_template(
      [{'role': turn.role, 'content': turn.content} for turn in turns], chat_template=tokenizer.template, tokenize=False,
      add_generation_prompt=True)  # fmt: skip
  assert rendered == ''.join(span.text for span in chat.wrap_messages(turns, tokenizer))
  tokenizer.hf.chat_template = tokenizer.template  # as an exported model carries it
  tokenizer.save(tmp_path)
  again = tokenizer_lib.load(tmp_path)
  assert again.hf.chat_template == tokenizer.template == again.template and again.chat_template is None
  assert chat.wrap_messages(turns, again) == chat.wrap_messages(turns, tokenizer)


# Mutation seen to fail: prompts encoded with add_special_tokens.
@pytest.mark.parametrize('template', [None, "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"])
def test_bos_is_there_exactly_once(template, tmp_path):
  """A tokenizer that opens every text with BOS, with and without a template that does so, too; quotes cannot add one."""
  hf = MADE['metaspace_bpe']()
  hf.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
      single='<s> $A', special_tokens=[('<s>', hf.bos_token_id)])  # fmt: skip
  hf.chat_template = template
  assert hf.encode('a')[0] == hf.bos_token_id
  tokenizer = tokenizer_lib.wrap(hf)
  tokenizer.save(tmp_path)
  for tokenizer in (tokenizer, tokenizer_lib.load(tmp_path)):
    ids = encode.encode(chat.wrap([Span('Judge <s>: ', True), Span('now', False)], tokenizer), tokenizer)
    assert ids[0] == tokenizer.bos_id and ids.count(tokenizer.bos_id) == 1
    rendered = ''.join(span.text for span in chat.wrap([Span('x', False)], tokenizer))
    assert rendered == tokenizer.hf.apply_chat_template(
        [{'role': 'user', 'content': 'x'}], chat_template=tokenizer.template, tokenize=False, add_generation_prompt=True)  # fmt: skip


def test_real_folders_open_with_the_bos_that_their_template_gives(request, loaded):
  for name in ('minimind', 'qwen2', 'qwen2+qwen3', 'gpt2'):
    tokenizer = loaded(name, request)
    ids = encode.encode(chat.wrap([Span('Hello', True)], tokenizer), tokenizer)
    want = tokenizer.hf.apply_chat_template(
        [{'role': 'user', 'content': 'Hello'}], chat_template=tokenizer.template, add_generation_prompt=True,
        tokenize=True, return_dict=False)  # fmt: skip
    if name != 'minimind':  # its template closes the thinking block where ours does
      assert ids == want, name
    assert ids.count(tokenizer.hf.convert_tokens_to_ids('<|endoftext|>')) == 0


def test_a_tokenizer_without_pad_token_pads_with_its_end(tmp_path):
  tokenizer = tokenizer_lib.load(written(tmp_path, pad_token=None))
  assert tokenizer.hf.pad_token_id is None and tokenizer.pad_id == tokenizer.eos_ids[0]
  batch = encode.batch([tokenizer.encode('a'), tokenizer.encode('a longer text')], 8, pad_id=tokenizer.pad_id)
  assert batch.tokens[0, -1] == tokenizer.pad_id and batch.length[0] < batch.length[1]


# Seen to fail: no look at the vocabulary (transformers makes a tokenizer of special tokens only, without a word).
@pytest.mark.parametrize(
    'files, message',
    [
        ({'tokenizer_config.json': '{"tokenizer_class": "LlamaTokenizer"}'}, 'no vocabulary for it; add tokenizer.json'),
        ({'tokenizer_config.json': '{"tokenizer_class": "Qwen2Tokenizer"}'}, 'no vocabulary for it; add tokenizer.json'),
        ({'tokenizer.model': '\n\x0b'}, 'no tokenizer.json, the one format that is read by itself'),
        ({'tokenizer.model': '\n\x0b', 'tokenizer_config.json': '{"tokenizer_class": "LlamaTokenizer"}'},
         'could not be read.*save_pretrained'),
        ({'tokenizer_config.json': '{"tokenizer_class": "BertJapaneseTokenizer"}', 'vocab.txt': 'a'}, 'is no fast tokenizer'),
    ],
)  # fmt: skip
def test_folders_without_a_fast_tokenizer_say_what_to_do(tmp_path, files, message):
  for name, text in files.items():
    (tmp_path / name).write_text(text)
  with pytest.raises(ValueError, match=message):
    tokenizer_lib.load(tmp_path)


def test_templates_of_which_none_is_the_default_are_named(tmp_path):
  folder = written(tmp_path, chat_template=[{'name': 'tool_use', 'template': OTHER}, {'name': 'rag', 'template': ONE}])
  (folder / 'chat_template.jinja').unlink()
  with pytest.raises(ValueError, match="called 'rag', 'tool_use' and none called 'default'"):
    tokenizer_lib.load(folder)
