"""Chat templates frame a message and never touch it."""

import pytest
import tokenizers
import transformers

from spct_jax.text import chat
from spct_jax.text import encode
from spct_jax.text import tokenizer as tokenizer_lib
from spct_jax.types import Span

CHATML = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
ASKED = CHATML + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


def made(template):
  backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({'[UNK]': 0}, unk_token='[UNK]'))
  backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  backend.add_special_tokens(['<|im_start|>', '<|im_end|>', '<|bos|>'])
  hf = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token='<|im_end|>', bos_token='<|bos|>', unk_token='[UNK]')
  hf.chat_template = template
  return hf


def test_the_message_stays_as_it_is_between_two_frames():
  tokenizer = tokenizer_lib.load('builtin:small')
  spans = [Span('Judge: ', False), Span('  <|eos|>{{ messages }} \n', True), Span('now', False)]
  wrapped = chat.wrap(spans, tokenizer)
  assert wrapped[1:-1] == spans
  assert wrapped[0] == Span('<|bos|><|user|>\n', False)
  assert wrapped[-1] == Span('<|eos|>\n<|assistant|>\n', False)
  ids = encode.encode(wrapped, tokenizer)
  assert tokenizer.decode(ids) == ''.join(span.text for span in wrapped)
  assert [index for index in ids if index in tokenizer.reserved] == [1, 3, 2, 4]


@pytest.mark.parametrize(
    'name, expected',
    [
        ('minimind', ('<|im_start|>user\n', '<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n')),
        ('qwen2', ('<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n', '<|im_end|>\n<|im_start|>assistant\n')),
        ('gpt2', ('User:\n', '\n\nAssistant:\n')),
    ],
)
def test_real_templates(shared, name, expected):
  tokenizer = tokenizer_lib.load(shared / 'data' / 'tokenizers' / name)
  assert chat.frame(tokenizer.hf) == expected


# Seen to fail: the header of the assistant's turn put on always (opened twice), or never.
@pytest.mark.parametrize(
    'template',
    [
        ASKED,
        CHATML,  # never opens it
        # Opens it after each user's turn, whatever it is asked.
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|im_start|>user\n' + m['content'] + '<|im_end|>\n<|im_start|>assistant\n' }}"
        "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}",
        ASKED.replace("m['content']", "m['content'] | trim"),
    ],
)
def test_the_assistant_s_turn_is_opened_exactly_once(template):
  assert chat.frame(made(template)) == ('<|im_start|>user\n', '<|im_end|>\n<|im_start|>assistant\n')


def test_a_tokenizer_with_several_templates():
  assert chat.frame(made({'default': ASKED, 'tool_use': 'x'})) == chat.frame(made(ASKED))


def test_no_template():
  assert chat.frame(made(None)) == ('User:\n', '\n\nAssistant:\n')


def test_no_template_but_a_token_that_opens_every_text():
  hf = made(None)
  hf.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
      single='<|bos|> $A', special_tokens=[('<|bos|>', hf.bos_token_id)])
  assert chat.frame(hf) == ('<|bos|>User:\n', '\n\nAssistant:\n')


@pytest.mark.parametrize(
    'template, match',
    [
        ('fixed', 'came out 0 times'),
        (ASKED + "{{ messages[0]['content'] }}", 'came out 2 times'),
        ("{{ raise_exception('no system turn') }}", 'no system turn'),
        ('{% for %}', 'cannot render'),
    ],
)
def test_broken_templates_are_refused(template, match):
  with pytest.raises(ValueError, match=match):
    chat.frame(made(template))
