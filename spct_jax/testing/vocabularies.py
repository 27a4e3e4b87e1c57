"""Tokenizers of every kind, small and full of traps for whoever looks for a text in tokens. Imported by tests only."""

from typing import Any

from spct_jax.text import tokenizer as tokenizers_

# Pieces in which a stop or a score line begins, ends, or both.
TRAPS = (
  'Scores', 'Score', 'scores:', '\n\nScores:', 'Scores: ', '\nScores: \\boxed{', ': \\boxed{1', 'Output', 'Final ',
  'al Sco', 'res', '\\b', '\\box', 'oxed', 'boxed{', '\\boxed{', 'ed{10', '{8', '8}', '10', ', ', ',1', '1, 10',
  ', 8}', '}\n', '}}', '}{', '}\\boxed{', '} or \\boxed{2}', '\\boxed{8, 6}', 'Scores: \\boxed{8, 6}', '<th', 'ink>',
  '</th', '<think>', '</think>', '\n<think>', 'x<think>', '</thinking>\n', '</THINK> Scores: ', '**', '## ', '\n\n',
  ' \n', 'word', 'a {b', '1.', '-1', ' ', 'END', 'EN', 'D.', 'é', '語',
)  # fmt: skip


def _wrapped(backend: Any, **special: str) -> tokenizers_.Tokenizer:
  import transformers

  backend.add_special_tokens(list(special.values()))
  return tokenizers_.wrap(transformers.PreTrainedTokenizerFast(
      tokenizer_object=backend, clean_up_tokenization_spaces=False, **special
  ))


def byte_level() -> tokenizers_.Tokenizer:
  """All bytes and the traps; two ids are missing."""
  import tokenizers

  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  shown = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  traps = [''.join(part for part, _ in shown.pre_tokenize_str(trap)) for trap in TRAPS]
  pieces = dict.fromkeys(['<|end|>', '<|pad|>', *alphabet, *traps])
  vocab = {piece: at + 2 * (at > 250) for at, piece in enumerate(pieces)}
  backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[], ignore_merges=True))
  backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = tokenizers.decoders.ByteLevel()
  return _wrapped(backend, eos_token='<|end|>', pad_token='<|pad|>')


def metaspace() -> tokenizers_.Tokenizer:
  """Blanks as '▁', bytes as fallback (there is no other line end), the first blank of a text dropped."""
  import tokenizers

  pieces = ['<unk>', *(f'<0x{byte:02X}>' for byte in range(256)), *map(chr, range(33, 127)), '▁', '▁▁']
  pieces += [trap.replace(' ', '▁') for trap in TRAPS if '\n' not in trap]
  vocab = {piece: at for at, piece in enumerate(dict.fromkeys(pieces))}
  model = tokenizers.models.BPE(vocab=vocab, merges=[], unk_token='<unk>', byte_fallback=True, fuse_unk=True)
  backend = tokenizers.Tokenizer(model)
  backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme='always')
  decoders = tokenizers.decoders
  backend.decoder = decoders.Sequence(
      [decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(' ', 1, 0)]
  )
  return _wrapped(backend, bos_token='<s>', eos_token='</s>', unk_token='<unk>')


def words() -> tokenizers_.Tokenizer:
  """Whole words, joined by blanks whatever they are."""
  import tokenizers

  pieces = ['<unk>', '\n', 'Scores:', 'Score', ':', 'Scores', 'Final', '\\boxed{', '{', '}', ',', 'word']
  pieces += ['</think>', '<think>', 'END', 'EN', 'D.', *map(str, range(12)), '8}', '\\boxed{1}']
  model = tokenizers.models.WordLevel({piece: at for at, piece in enumerate(pieces)}, unk_token='<unk>')
  backend = tokenizers.Tokenizer(model)
  backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  return _wrapped(backend, eos_token='<|end|>', unk_token='<unk>')
