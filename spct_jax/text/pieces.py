r"""What each token of a tokenizer adds to a text, as bytes: what stop strings and score lines are compiled against.

The text of token ids is, up to what is no valid UTF-8, their pieces one after the other:

    a piece     bytes, perhaps `spaced`: with a blank before it, which the start of a text swallows, and so does a
                piece before it that `glues`
    byte-level  'ĠScores' is ' Scores', a part of a character is its bytes; nothing is spaced
    metaspace   '▁Scores' is 'Scores', spaced where the decoder drops the first blank of a text; '<0x0A>' is a byte
    words       'Scores:' is 'Scores:', spaced; where the decoder takes blanks from around signs, ',' is not spaced
                and '{' glues

This follows the `decoder` of tokenizer.json, step by step, and is then held against the tokenizer itself on random
ids: a decoder that does something else is an error, not a wrong table. Special tokens have the text that decoding
shows, and an id without a token has none.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from typing import Any

import numpy as np

from spct_jax.text.tokenizer import Tokenizer

_BYTE = re.compile(r'<0x([0-9A-Fa-f]{2})>')
_PROBES, _PROBE_TOKENS = 64, 12


@dataclasses.dataclass(frozen=True, eq=False)
class Pieces:
  """By token id: `text[V]` (None: no such token), `spaced[V]` and `glues[V]` bool.

  `joined` is whether any is spaced: whether a blank can depend on the piece before.
  """

  text: tuple[bytes | None, ...]
  spaced: tuple[bool, ...]
  glues: tuple[bool, ...]

  @property
  def joined(self) -> bool:
    return any(self.spaced)

  def decode(self, ids) -> bytes:
    """The bytes of a whole text."""
    return self.spans(ids)[0]

  def spans(self, ids) -> tuple[bytes, list[int], list[bool]]:
    """(the bytes of a whole text; how many of them stand after 0, 1, ... ids; whether a blank before the next piece is
    swallowed there)."""
    out, stops, glued = [], [0], [True]
    for index in ids:
      text, held = self.text[index], glued[-1]
      if text is not None:
        text = b' ' * (self.spaced[index] and not held) + text
        out.append(text)
        held = self.glues[index] or (held and not self.spaced[index] and not text)
      stops.append(stops[-1] + len(text or b''))
      glued.append(held)
    return b''.join(out), stops, glued


@functools.lru_cache(maxsize=8)
def of(tokenizer: Tokenizer) -> Pieces:
  """The pieces of a tokenizer; ValueError if its decoder is none of those known here."""
  backend = tokenizer.hf.backend_tokenizer
  tokens: list[str | None] = [None] * tokenizer.vocab_size
  for token, index in tokenizer.hf.get_vocab().items():
    tokens[index] = token
  found = _decoded(tokens, json.loads(backend.to_str())['decoder'])
  _check(found, tokenizer)
  return found


def _decoded(tokens: list[str | None], decoder: dict[str, Any] | None) -> Pieces:
  text: list[Any] = list(tokens)
  here = [index for index, token in enumerate(tokens) if token is not None]
  spaced, glues, fused = [False] * len(tokens), [False] * len(tokens), False
  if decoder is None:  # tokens are joined by blanks
    spaced = [True] * len(tokens)
  for step in _flat(decoder):
    kind, words = step['type'], [i for i in here if isinstance(text[i], str)]  # the others are bytes already
    if kind == 'ByteLevel':
      for i in words:
        text[i] = _byte_level(text[i])
    elif kind == 'ByteFallback':
      for i in words:
        if found := _BYTE.fullmatch(text[i]):
          text[i] = bytes([int(found[1], 16)])
    elif kind == 'WordPiece' and not step['cleanup']:
      for i in words:
        spaced[i] = not text[i].startswith(step['prefix'])
        text[i] = text[i].removeprefix(step['prefix'])
    elif kind == 'Metaspace':
      for i in words:
        text[i] = text[i].replace(step['replacement'], ' ')
        if step['prepend_scheme'] != 'never' and text[i].startswith(' '):
          spaced[i], text[i] = True, text[i][1:]
    elif kind == 'Replace' and not fused and 'String' in step['pattern']:
      for i in words:
        text[i] = text[i].replace(step['pattern']['String'], step['content'])
    elif kind == 'Replace' and _drops_a_blank(step, before=True):
      for i in words:
        spaced[i] &= not text[i].startswith(step['content'])
    elif kind == 'Replace' and _drops_a_blank(step, before=False):
      for i in words:
        glues[i] |= text[i].endswith(step['content'])
    elif kind == 'Strip' and step['content'] == ' ' and step['start'] <= 1 and step['stop'] == 0:
      for i in words:
        if step['start'] and text[i].startswith(' '):
          spaced[i], text[i] = True, text[i][1:]
    elif kind == 'Fuse':
      fused = True
    else:
      raise ValueError(_refused(f'it has the step {json.dumps(step)}'))
  raw = (piece.encode('utf-8', 'replace') if isinstance(piece, str) else piece for piece in text)
  return Pieces(tuple(raw), tuple(spaced), tuple(glues))


def _flat(decoder):
  if decoder is None:
    return []
  if decoder['type'] == 'Sequence':
    return [step for part in decoder['decoders'] for step in _flat(part)]
  return [decoder]


def _drops_a_blank(step, before: bool) -> bool:
  """Whether a replacement in the whole text takes the blank before (or behind) one sign, and does nothing else."""
  sign = step['content']
  return len(sign) == 1 and step['pattern'].get('String') == (' ' + sign if before else sign + ' ')


def _byte_level(token: str) -> bytes:
  found = [_BYTE_OF.get(char) for char in token]
  return token.encode('utf-8', 'replace') if None in found else bytes(found)


def _byte_of() -> dict[str, int]:
  """The characters in which byte-level vocabularies write bytes (GPT-2's table)."""
  shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  hidden = [byte for byte in range(256) if byte not in shown]
  return {chr(byte): byte for byte in shown} | {chr(256 + place): byte for place, byte in enumerate(hidden)}


_BYTE_OF = _byte_of()


def _check(pieces: Pieces, tokenizer: Tokenizer) -> None:
  """Random texts of whole characters, decoded by the tokenizer itself; blanks in front are beside the point."""
  known = [index for index, text in enumerate(pieces.text) if text is not None and _is_whole(text)]
  for ids in np.random.default_rng(0).choice(known, (_PROBES, _PROBE_TOKENS)).tolist():
    ours, theirs = pieces.decode(ids).decode('utf-8'), tokenizer.decode(ids)
    if ours.lstrip(' ') != theirs.lstrip(' '):
      raise ValueError(_refused(f'the ids {ids} give {theirs!r}, by its steps {ours!r}'))


def _is_whole(text: bytes) -> bool:
  try:
    text.decode('utf-8')
  except UnicodeDecodeError:
    return False
  return True


def _refused(why: str) -> str:
  return (
      f'tokenizer: what its tokens add to a text cannot be told from its decoder: {why}; stop strings, stopping at '
      'the scores and constrained score lines need a byte-level, a metaspace or a word-level decoder; leave them off'
  )
