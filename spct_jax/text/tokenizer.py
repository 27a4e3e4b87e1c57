"""Text to token ids and back, with two ways in: trusted frame text, and quoted data.

`encode` reads frame text, in which `<|im_end|>` is one special token. `encode_data` reads quoted
text, in which it is ten ordinary characters: a second tokenizer is made from the same vocabulary
and rules with all added tokens taken out. Where a vocabulary holds a special token as an ordinary
entry, too (word-level and unigram vocabularies do), its text is cut in two before it is encoded, so
that it stays readable and its id cannot come out.

The blank that SentencePiece-like tokenizers put in front of a text is put in front of a whole
prompt only: `encode_next` and `encode_data`, which encode the further pieces of a prompt, do not
add it. Byte-level tokenizers give every text back exactly; one that normalises Unicode (Qwen: NFC)
gives it back normalised.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import functools
import json
import pathlib
from typing import Any

from spct_jax import packaged
from spct_jax.text import chat

BUILTIN = {'builtin:small': pathlib.Path(__file__).parent / 'files' / 'small'}
# Any of these makes a folder one with a tokenizer.
FILES = ('tokenizer.json', 'tokenizer_config.json', 'encoder.json', 'tokenizer.model', 'spiece.model', 'vocab.json')
# How many texts a tokenizer remembers the ids of.
_FRAMES, _QUOTES = 1024, 64
_NO_JSON = (
    'The folder has no tokenizer.json, the one format that is read by itself; make one where the tokenizer loads: '
    'AutoTokenizer.from_pretrained(folder).save_pretrained(folder)'
)
_BLANKS = ' \t\r\n\u2581\u0120\u010a'


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
  """A Hugging Face fast tokenizer behind the few calls that this library makes.

  Attributes:
    hf: the `PreTrainedTokenizerFast`, with all it knows.
    eos_ids: the ids that end an answer: the tokenizer's own, what ends an assistant's turn, and those that the
      model's generation_config.json (config.json without one) names beside it.
    pad_id: what fills up a batch; it is never read, masks come from lengths.
    vocab_size: one more than the largest id, added tokens included.
    chat_template: the tokenizer's own jinja template, or None.
    template: what prompts are framed with: that, with BOS if it lacks one, or the fallback of `chat` as a template.
  """

  hf: Any
  eos_ids: tuple[int, ...]
  pad_id: int
  vocab_size: int
  chat_template: str | None

  @property
  def bos_id(self) -> int | None:
    """The id that begins a text, None where the tokenizer names none."""
    return self.hf.bos_token_id

  def encode(self, text: str) -> list[int]:
    """Ids of frame text that opens a prompt; special tokens in it are special."""
    return list(self._opening(text))

  def encode_next(self, text: str) -> list[int]:
    """Ids of frame text inside a prompt: as `encode`, without a blank put in front."""
    return list(self._inside(text))

  def encode_data(self, text: str) -> list[int]:
    """Ids of quoted text: ordinary tokens only, whatever it says."""
    return list(self._quoted(text))

  def decode(self, ids: Sequence[int]) -> str:
    """The text of some ids, special tokens included."""
    return self.hf.decode(
        [int(index) for index in ids], skip_special_tokens=False, clean_up_tokenization_spaces=False
    )

  @property
  def template(self) -> str:
    return chat.framed(self.hf)

  def save(self, folder: str | pathlib.Path) -> None:
    """Writes the tokenizer's files, which `load` reads."""
    self.hf.save_pretrained(str(folder))

  @functools.cached_property
  def reserved(self) -> frozenset[int]:
    """The ids that quoted text can never produce: special and added tokens.

    Left out are runs of blanks, which some vocabularies list as added tokens and which mean nothing
    else, and the id of unknown words, which is what a word-level vocabulary has to answer with.
    """
    added = self.hf.added_tokens_decoder
    ids = {index for index, token in added.items() if token.content.strip(_BLANKS)}
    return frozenset(ids | set(self.hf.all_special_ids)) - {_unknown_id(self._rules['model'])}

  # The same frames come back in every prompt, and the same quotes in every order of an item.
  @functools.cached_property
  def _opening(self) -> Callable[[str], tuple[int, ...]]:
    return functools.lru_cache(maxsize=_FRAMES)(
        lambda text: tuple(self.hf.encode(_well_formed(text), add_special_tokens=False))
    )

  @functools.cached_property
  def _inside(self) -> Callable[[str], tuple[int, ...]]:
    return functools.lru_cache(maxsize=_FRAMES)(
        lambda text: tuple(self._inner.encode(_well_formed(text), add_special_tokens=False).ids)
    )

  @functools.cached_property
  def _quoted(self) -> Callable[[str], tuple[int, ...]]:
    return functools.lru_cache(maxsize=_QUOTES)(self._encode_data)

  def _encode_data(self, text: str) -> tuple[int, ...]:
    found = []
    pieces = [_well_formed(text)]
    while pieces:
      piece = pieces.pop()
      encoding = self._plain.encode(piece, add_special_tokens=False)
      ids = encoding.ids  # a new list at each access
      if self.reserved.isdisjoint(ids):
        found += ids
      else:
        pieces += reversed(self._cut(piece, encoding))
    return tuple(found)

  @functools.cached_property
  def _rules(self) -> dict[str, Any]:
    return _without_prefix(json.loads(self.hf.backend_tokenizer.to_str()))

  @functools.cached_property
  def _inner(self) -> Any:
    return _from_rules(self._rules)

  @functools.cached_property
  def _plain(self) -> Any:
    return _from_rules(self._rules | {'added_tokens': []})

  def _cut(self, text: str, encoding: Any) -> list[str]:
    """Cuts `text` inside each reserved token found in it; one of a single character becomes a blank."""
    pieces, start = [], 0
    for index, (first, stop) in zip(encoding.ids, encoding.offsets):
      if index not in self.reserved:
        continue
      middle = first + 1
      if stop - first > 1:
        pieces.append(text[start:middle])
        start = middle
      else:
        pieces += [text[start:first], '' if text[first:stop] == ' ' else ' ']
        start = stop
    return [piece for piece in (*pieces, text[start:]) if piece]


def load(path: str | pathlib.Path) -> Tokenizer:
  """Loads a Hugging Face folder, a GPT-2 folder (encoder.json, vocab.bpe), or 'builtin:small'.

  'package:MODULE/folder' is a folder that an importable package carries.
  """
  if str(path).startswith('builtin:') and str(path) not in BUILTIN:
    raise ValueError(f'tokenizer: got {str(path)!r}; the package carries: {", ".join(BUILTIN)}')
  folder = BUILTIN.get(str(path)) or packaged.locate(path)
  if not folder.is_dir():
    raise ValueError(
        f'tokenizer: no folder {str(folder)!r}; give a Hugging Face folder or {", ".join(BUILTIN)}'
    )
  if (folder / 'encoder.json').is_file() and (folder / 'vocab.bpe').is_file():
    hf = _read_gpt2(folder)
  elif (folder / 'tokenizer.json').is_file() or (folder / 'tokenizer_config.json').is_file():
    hf = _read_hf(folder)
  else:
    raise ValueError(
        f'tokenizer: {folder} holds no tokenizer; expected tokenizer.json, tokenizer_config.json '
        'with the vocabulary files it needs, or encoder.json with vocab.bpe'
        + (f'. {_NO_JSON}' if any(folder.glob('*.model')) else '')
    )
  return wrap(hf, _ends(folder))


def wrap(hf: Any, ends: Sequence[int] = ()) -> Tokenizer:
  """Puts a loaded `PreTrainedTokenizerFast` behind our calls; `ends` are further ids that end an answer."""
  if not getattr(hf, 'is_fast', False):
    raise ValueError(
        f'tokenizer: {type(hf).__name__} is no fast tokenizer; a slow one is not used. {_NO_JSON}'
    )
  size = max(hf.get_vocab().values()) + 1
  found = [hf.eos_token_id, chat.turn_end(hf), *(index for index in ends if 0 <= index < size)]
  eos_ids = tuple(dict.fromkeys(index for index in found if index is not None))
  if not eos_ids:
    raise ValueError('tokenizer: it names no end-of-sequence token, so no answer could end; '
                     'set eos_token in its tokenizer_config.json')
  return Tokenizer(
      hf=hf,
      eos_ids=eos_ids,
      pad_id=eos_ids[0] if hf.pad_token_id is None else hf.pad_token_id,
      vocab_size=size,
      chat_template=chat.template_text(hf),
  )


def _ends(folder: pathlib.Path) -> list[int]:
  """What the model beside the tokenizer, if there is one, stops at."""
  for name in ('generation_config.json', 'config.json'):
    try:
      fields = json.loads((folder / name).read_text(encoding='utf-8'))
    except FileNotFoundError:
      continue
    except ValueError as error:
      raise ValueError(f'{folder / name}: not JSON ({error})') from None
    found = fields.get('eos_token_id') if isinstance(fields, dict) else None
    found = found if isinstance(found, list) else [found]
    if any(isinstance(index, int) for index in found):
      return [index for index in found if isinstance(index, int)]
  return []


def _read_hf(folder: pathlib.Path) -> Any:
  import transformers  # Imported here: it takes seconds, and light modules import this one.

  try:
    hf = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
  except Exception as error:  # It runs code of many authors: one class per tokenizer, and converters.
    remedy = ''
    if not (folder / 'tokenizer.json').is_file():
      remedy = f'. {_NO_JSON}'
    raise ValueError(
        f'tokenizer: {folder} could not be read as a Hugging Face tokenizer: {str(error).rstrip(".")}{remedy}'
    ) from error
  # Without its vocabulary files a tokenizer is made all the same, of special tokens only.
  if hf.is_fast:
    ordinary = set(hf.backend_tokenizer.get_vocab(with_added_tokens=False)) - set(hf.all_special_tokens)
    if not ordinary:
      raise ValueError(
          f'tokenizer: {folder} holds a tokenizer_config.json and no vocabulary for it; add tokenizer.json (or '
          'vocab.json and merges.txt) of the same model'
      )
  return hf


def _read_gpt2(folder: pathlib.Path) -> Any:
  """GPT-2 as it was first published: a byte-level BPE whose one special token ends a text."""
  import tokenizers
  import transformers

  model = tokenizers.models.BPE.from_file(str(folder / 'encoder.json'), str(folder / 'vocab.bpe'))
  backend = tokenizers.Tokenizer(model)
  backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = tokenizers.decoders.ByteLevel()
  end = '<|endoftext|>'
  return transformers.PreTrainedTokenizerFast(
      tokenizer_object=backend, bos_token=end, eos_token=end, clean_up_tokenization_spaces=False
  )


def _from_rules(rules: dict[str, Any]) -> Any:
  import tokenizers

  return tokenizers.Tokenizer.from_str(json.dumps(rules))


def _without_prefix(rules: dict[str, Any]) -> dict[str, Any]:
  """The rules without a blank in front, padding, truncation, or tokens put around the text."""
  rules = rules | {'truncation': None, 'padding': None, 'post_processor': None}
  rules['normalizer'] = _steps(rules['normalizer'], 'normalizers')
  rules['pre_tokenizer'] = _steps(rules['pre_tokenizer'], 'pretokenizers')
  return rules


def _steps(step: dict[str, Any] | None, parts: str) -> dict[str, Any] | None:
  if step is None or step['type'] == 'Prepend':
    return None
  if step['type'] == 'Sequence':
    kept = [part for part in (_steps(part, parts) for part in step[parts]) if part is not None]
    return step | {parts: kept}
  if step['type'] == 'Metaspace':
    return step | {'prepend_scheme': 'never'}
  return step | {'add_prefix_space': False} if 'add_prefix_space' in step else step


def _unknown_id(model: dict[str, Any]) -> int | None:
  """The id that the model itself gives to what it does not know, if it has one."""
  if model.get('unk_id') is not None:
    return model['unk_id']
  unknown = model.get('unk_token')
  return model['vocab'].get(unknown) if unknown is not None else None


def _well_formed(text: str) -> str:
  """Replaces lone surrogates, which JSON can carry and no tokenizer accepts."""
  if text.isascii():
    return text
  return text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')
