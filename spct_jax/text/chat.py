"""Puts a user message into a tokenizer's own chat template, up to where the assistant's answer begins.

The template is rendered once with a placeholder for the message and split there, so the message
itself never passes through it: its data spans stay data, and no template can trim, search or escape
them. A template that opens the assistant's turn by itself (some fine-tunes do, whatever
add_generation_prompt says) is taken as it is; one that leaves it closed is opened with the header
it gives to an assistant's message.

A tokenizer without a template gets plain lines, `User:`, `Assistant:` and `System:`. Since such a
line is ordinary text, data spans are neutralised there against these labels, too; where a template
frames the turns, data spans stay exactly as they came. `fallback` is that frame as a template: what
a run records and an exported model carries. A tokenizer that comes with it is one without a template.

A tokenizer that puts its BOS before every text has it before every prompt, once: where the template writes it, or
else in front of what the template gives (`framed` is then what a run records). `apply_chat_template` of transformers
leaves it out in that case; we read the template's silence as a gap, because the model saw BOS at the start of all it
was trained on.

A template that asks for the time (`strftime_now`) is told the start of 2024-07-26, always, so that
a prompt does not depend on the day on which it is built.
"""

from __future__ import annotations

from collections.abc import Sequence
import functools
from typing import Any

from spct_jax.text import markers
from spct_jax.types import Message, Span

# No template contains these, and none finds anything in them to trim or to split.
_USER, _ASSISTANT = 'QxUserTurnxQ', 'QxAssistantTurnxQ'
_PLAIN = (f'{markers.TURNS["user"]}:\n', f'\n\n{markers.TURNS["assistant"]}:\n')
_FALLBACK = (
    "{% for message in messages %}{% if not loop.first %}{{ '\\n\\n' }}{% endif %}"
    + ''.join(
        f"{{% {'el' if i else ''}if message['role'] == '{role}' %}}{{{{ '{label}:\\n' + message['content'] }}}}"
        for i, (role, label) in enumerate(markers.TURNS.items())
    )
    + "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '"
    + _PLAIN[1].replace('\n', '\\n')
    + "' }}{% endif %}"
)
_BOS = '{{ bos_token }}'

# 2024-07-26 00:00:00, a Friday, in the words of the C locale: what each directive gives.
_DATE = {
    'Y': '2024', 'y': '24', 'C': '20', 'G': '2024', 'g': '24', 'm': '07', 'd': '26', 'e': '26',
    'B': 'July', 'b': 'Jul', 'h': 'Jul', 'A': 'Friday', 'a': 'Fri', 'j': '208', 'u': '5', 'w': '5',
    'U': '29', 'W': '30', 'V': '30', 'H': '00', 'I': '12', 'M': '00', 'S': '00', 'p': 'AM',
    'f': '000000', 'Z': '', 'z': '', 'F': '2024-07-26', 'D': '07/26/24', 'T': '00:00:00',
    'R': '00:00', 'x': '07/26/24', 'X': '00:00:00', 'c': 'Fri Jul 26 00:00:00 2024',
    '-d': '26', '-m': '7', '-y': '24', '-j': '208', '-H': '0', '-I': '12', '-M': '0', '-S': '0',
}
_REPLACED = ''.join(f"|replace('%{directive}','{text}')" for directive, text in _DATE.items())
# Put in front of a template, it hides the clock: a template sees nothing else that we could set,
# since the rendering turns every function that it is handed into a string. The line end behind it
# goes with its block, and the template still begins on a line of its own.
_CLOCK = (
    '{%- macro strftime_now(format) -%}{%- for piece in format.split("%%") -%}'
    "{{ '' if loop.first else '%' }}{{ piece" + _REPLACED + ' }}'
    '{%- endfor -%}{%- endmacro %}\n'
)


def wrap(spans: Sequence[Span], tokenizer: Any) -> list[Span]:
  """The spans of a user message, with the frame that opens it and the one that opens the answer."""
  head, tail = frame(tokenizer.hf)
  if template_text(tokenizer.hf) is None:
    spans = [_plain(span.text) if span.data else span for span in spans]
  return [Span(head, data=False), *spans, Span(tail, data=False)]


def wrap_messages(messages: Sequence[Message], tokenizer: Any) -> list[Span]:
  """The spans of a conversation that ends with the user, up to where the assistant's answer begins.

  Every content is data. One user turn alone gives what `wrap` gives. A conversation that the
  template refuses, leaves out a turn of, or reorders is a ValueError that names its roles.
  """
  for message in messages:
    if message.role not in markers.TURNS:
      raise ValueError(
          f'chat: a message has the role {message.role!r}; allowed: {", ".join(markers.TURNS)}'
      )
  if not messages or messages[-1].role != 'user':
    raise ValueError(
        f'chat: a conversation to be answered ends with a user turn; got roles {[m.role for m in messages]}'
    )
  if len(messages) == 1:
    return wrap([Span(messages[0].content, data=True)], tokenizer)
  template = template_text(tokenizer.hf)
  if template is None:
    head, tail = frame(tokenizer.hf)
    spans = [Span(head.removesuffix(_PLAIN[0]), data=False)]
    for i, message in enumerate(messages):
      label = f'{markers.TURNS[message.role]}:\n'
      spans += [Span('\n\n' + label if i else label, data=False), _plain(message.content)]
    return [*spans, Span(tail, data=False)]
  places = [f'QxTurn{i}xQ' for i in range(len(messages))]
  turns = [(message.role, place) for message, place in zip(messages, places)]
  rest = _render(tokenizer.hf, [*turns, ('assistant', _ASSISTANT)], add_generation_prompt=False)
  _check_turns(rest, [message.role for message in messages], places)
  spans = [Span(hf_bos, data=False)] if (hf_bos := _lacking_bos(tokenizer.hf, rest.split(places[0])[0])) else []
  for message, place in zip(messages, places):
    before, rest = rest.split(place)
    spans += [Span(before, data=False), Span(message.content, data=True)]
  # What follows the last turn is what follows a lone one, thinking blocks of the template included.
  return [*spans, Span(frame(tokenizer.hf)[1], data=False)]


def frame(hf: Any) -> tuple[str, str]:
  """The text before and after a user message, for a Hugging Face tokenizer."""
  return _frame(hf, template_text(hf))


@functools.lru_cache(maxsize=16)
def _frame(hf: Any, template: str | None) -> tuple[str, str]:
  if template is None:
    return (hf.bos_token if _adds_bos(hf) else '') + _PLAIN[0], _PLAIN[1]
  asked = _render(hf, [('user', _USER)], add_generation_prompt=True)
  head, tail = _split(asked, _USER)
  if asked == _render(hf, [('user', _USER)], add_generation_prompt=False):
    turns = _render(hf, [('user', _USER), ('assistant', _ASSISTANT)], add_generation_prompt=False)
    between = _split(_split(turns, _USER)[1], _ASSISTANT)[0]
    tail = between if between.startswith(tail) else tail
  return _lacking_bos(hf, head) + head, tail


def turn_end(hf: Any) -> int | None:
  """The id of the special token with which the template ends an assistant's turn, if it does."""
  if template_text(hf) is None:
    return None
  turns = _render(hf, [('user', _USER), ('assistant', _ASSISTANT)], add_generation_prompt=False)
  after = _split(turns, _ASSISTANT)[1].lstrip()
  special = set(hf.all_special_ids) | set(hf.added_tokens_decoder)
  ids = hf.encode(after, add_special_tokens=False)
  return ids[0] if ids and ids[0] in special else None


def template_text(hf: Any) -> str | None:
  """The template that answers a plain conversation, of the one or several that a tokenizer has."""
  templates = hf.chat_template
  if isinstance(templates, dict):
    found = templates.get('default')
    if found is None and templates:
      raise ValueError(
          f'chat template: the tokenizer has templates called {", ".join(map(repr, sorted(templates)))} and none called '
          "'default', which plain conversations take; name one of them so in its chat_template"
      )
  else:
    found = templates
  return None if found is not None and found.removeprefix(_BOS) in ('', _FALLBACK) else found


def fallback(hf: Any) -> str:
  """The frame of a tokenizer without a template, as a template."""
  return (_BOS if _adds_bos(hf) else '') + _FALLBACK


def framed(hf: Any) -> str:
  """What prompts are framed with, as a template."""
  own = template_text(hf)
  if own is None:
    return fallback(hf)
  head = _split(_render(hf, [('user', _USER)], add_generation_prompt=True), _USER)[0]
  return _BOS + own if _lacking_bos(hf, head) else own


def _render(hf: Any, turns: list[tuple[str, str]], add_generation_prompt: bool) -> str:
  messages = [{'role': role, 'content': content} for role, content in turns]
  try:
    return hf.apply_chat_template(
        messages,
        chat_template=_without_clock(template_text(hf)),
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
    )
  except Exception as error:  # Templates are programs: they raise whatever they like.
    raise ValueError(
        f'chat template: it cannot render turns of the roles {", ".join(role for role, _ in turns)}: '
        f"{error}; leave such conversations out, correct the tokenizer's chat_template, or remove it "
        'to get plain User: and Assistant: lines'
    ) from error


def _without_clock(template: str) -> str:
  return _CLOCK + template if 'strftime_now' in template else template


def _plain(text: str) -> Span:
  """Data inside the plain frame, unable to open a turn of it."""
  return Span(markers.neutralise(text, turns=True), data=True)


def _check_turns(text: str, roles: list[str], places: list[str]) -> None:
  remedy = "leave such conversations out, or correct the tokenizer's chat_template"
  for i, (role, place) in enumerate(zip(roles, places), start=1):
    if text.count(place) != 1:
      raise ValueError(
          f'chat template: of turns of the roles {", ".join(roles)}, turn {i} ({role}) came out '
          f'{text.count(place)} times, expected once; {remedy}'
      )
  if sorted(places, key=text.index) != places:
    raise ValueError(
        f'chat template: turns of the roles {", ".join(roles)} came out in another order; {remedy}'
    )


def _split(text: str, placeholder: str) -> tuple[str, str]:
  if text.count(placeholder) != 1:
    raise ValueError(
        f'chat template: a message came out {text.count(placeholder)} times, expected once; '
        "correct the tokenizer's chat_template"
    )
  before, after = text.split(placeholder)
  return before, after


@functools.lru_cache(maxsize=256)
def _lacking_bos(hf: Any, head: str) -> str:
  """The BOS that a tokenizer adds to every text and `head`, the beginning of a prompt, has not; or ''."""
  there = not _adds_bos(hf) or hf.bos_token_id in hf.encode(head, add_special_tokens=False)
  return '' if there else hf.bos_token


def _adds_bos(hf: Any) -> bool:
  first = hf.encode('a', add_special_tokens=True)[:1]
  return hf.bos_token_id is not None and first == [hf.bos_token_id]
